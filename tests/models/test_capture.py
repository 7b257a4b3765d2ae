"""A user's forward_step runs unchanged: arguments recorded, outputs and loss functions put right, misuse explained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from megatron_dip.models.capture import CapturedCall, capture
from megatron_dip.spec.errors import InputError


class Inner(torch.nn.Module):
    image_token_index = 7


class Wrapper(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module


MODEL = Wrapper(Wrapper(Inner()))
OUTPUT = torch.tensor([1.0, 2.0, 3.0])
MASK = torch.tensor([1.0, 0.0, 1.0])


def masked_loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = (output * mask).sum()
    return loss, {"loss": loss}


def run_loss(call: CapturedCall, returned: Any) -> float:
    loss_function = call.resolved_loss_function(returned)
    assert loss_function is not None
    return float(loss_function(call.resolved_output(returned))[0])


def test_arguments_are_recorded_and_the_iterator_holds_one_microbatch() -> None:
    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Callable[..., Any]]:
        item = next(data_iterator)
        assert list(data_iterator) == []
        return model(item["tokens"], labels=item["labels"]), partial(masked_loss, MASK)

    call = capture(forward_step, iter([{"tokens": 1, "labels": 2}]), MODEL)
    assert (call.args, call.kwargs) == ((1,), {"labels": 2})
    assert run_loss(call, OUTPUT) == 4.0


def test_attributes_reach_the_real_chunk() -> None:
    seen = []

    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
        seen.append(model.module.module.image_token_index)
        return model(), None

    call = capture(forward_step, None, MODEL)
    assert seen == [7]
    assert call.resolved_loss_function(OUTPUT) is None
    assert call.resolved_output(OUTPUT) is OUTPUT


def test_unpacked_outputs_may_be_bound_into_the_loss_function() -> None:
    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
        output, mask = model()  # as LLaVAModel returns them
        return output, partial(masked_loss, mask)

    assert run_loss(capture(forward_step, None, MODEL, num_outputs=2), (OUTPUT, MASK)) == 4.0


def test_outputs_may_be_held_by_a_closure_or_in_containers() -> None:
    def closure_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
        outputs = model()
        scale = 2.0

        def loss(output: torch.Tensor) -> tuple[torch.Tensor]:
            return ((output * outputs[1]).sum() * scale,)

        return outputs[0], loss

    def container_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
        output, mask = model()
        return [output, {"mask": mask}], lambda pair: (float((pair[0] * pair[1]["mask"]).sum()),)

    assert run_loss(capture(closure_step, None, MODEL, num_outputs=2), (OUTPUT, MASK)) == 8.0
    assert run_loss(capture(container_step, None, MODEL, num_outputs=2), (OUTPUT, MASK)) == 4.0


def test_one_call_serves_different_outputs() -> None:
    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
        output, mask = model()
        return output, partial(masked_loss, mask)

    call = capture(forward_step, None, MODEL, num_outputs=2)
    assert run_loss(call, (OUTPUT, MASK)) == 4.0
    assert run_loss(call, (OUTPUT, 1 - MASK)) == 2.0


@pytest.mark.parametrize(
    "use",
    [
        lambda output: output * 2, lambda output: 2 + output, lambda output: torch.mean(output), lambda output: output.float(),
        lambda output: list(output), lambda output: output[0], lambda output: bool(output), lambda output: OUTPUT.add(output),
    ],
)
def test_computing_with_the_output_inside_forward_step_is_explained(use: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match=r"before the pipeline has made it.*compute with it in the loss function"):
        capture(lambda data_iterator, model: (use(model()), None), None, MODEL)


@pytest.mark.parametrize(
    ("forward_step", "problem"),
    [
        (lambda data_iterator, model: (None, None), "called the model 0 times"),
        (lambda data_iterator, model: (model(), model()), "called the model 2 times"),
        (lambda data_iterator, model: model(), "returned Placeholder instead of two values"),
    ],
)
def test_other_forward_steps_are_refused(forward_step: Callable[..., Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        capture(forward_step, None, MODEL)
