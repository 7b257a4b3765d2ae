"""What was captured of a microbatch goes with its last forward stage; reports keep no graph."""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.launcher import launch
from tests.hooks.test_adapters import Case, batches, forward_step_llava, prepare, provide_llava

pytestmark = pytest.mark.distributed


def test_reports_keep_no_graph() -> None:
    from megatron_dip.iteration.loss import IterationLoss
    from megatron_dip.models.capture import CapturedCall, Placeholder

    weight = torch.ones(3, requires_grad=True)
    call = CapturedCall((), {}, Placeholder(), lambda output: (output.sum(), {"loss": output.sum(), "pair": (output.mean(), 2)}))
    config = SimpleNamespace(grad_scale_func=None, calculate_per_token_loss=False)
    loss = IterationLoss([call], config, 1, False, False, 1, torch.device("cpu"), True)
    value = loss(SimpleNamespace(microbatch=0, module="lm", sub_microbatch=0), weight * 2)  # type: ignore[arg-type]
    assert value is not None
    assert value.requires_grad
    (report,) = loss.reports()
    assert not report["loss"].requires_grad
    assert not report["pair"][0].requires_grad
    loss.release(0)
    assert not loss._calls


@dataclass(frozen=True, slots=True)
class Alive:
    """Tensors of the batch that are alive on one rank."""

    at_losses: list[tuple[int, int]]
    """(images, labels) whenever a loss is computed"""
    in_the_end: tuple[int, int]


def run(rank: int, ranks: int) -> Alive:
    prepare(1, ranks, 1)
    from megatron.core import tensor_parallel

    from megatron_dip.hooks.arguments import add_dip_args
    from megatron_dip.hooks.build import build_chunks
    from megatron_dip.hooks.megatron_lm import dip_schedule
    from megatron_dip.without_cuda.core import CpuDeviceMode

    case = Case(model="clip", images=(1, 2, 1, 2))
    args = add_dip_args(argparse.ArgumentParser()).parse_args(["--dip-evaluations", "5", "--dip-device", "cpu", "--dip-partition", "even", "--dip-split-backward", "off"])
    for name, value in {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": ranks, "data_parallel_size": 1, "context_parallel_size": 1,
        "sequence_parallel": False, "bf16": False, "fp16": False, "use_distributed_optimizer": False,
    }.items():
        setattr(args, name, value)
    images: list[weakref.ref[Any]] = []
    labels: list[weakref.ref[Any]] = []
    at_losses: list[tuple[int, int]] = []

    def alive() -> tuple[int, int]:
        return sum(tensor() is not None for tensor in images), sum(tensor() is not None for tensor in labels)

    waiting = batches(case)

    def next_item() -> Any:
        item = waiting.pop(0)
        item["labels"] = item["labels"].clone()
        images.append(weakref.ref(item["images"]))
        labels.append(weakref.ref(item["labels"]))
        return item

    def items() -> Iterator[Any]:
        while waiting:
            yield next_item()  # a variable would keep the last one

    def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
        output, loss = forward_step_llava(data_iterator, model)

        def counted(mask: Any, losses: torch.Tensor) -> Any:
            at_losses.append(alive())
            return loss.func(mask, losses)

        return output, partial(counted, *loss.args)

    with CpuDeviceMode():
        torch.manual_seed(1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        chunks = build_chunks(args, partial(provide_llava, case, ranks))
        dip_schedule(lambda **_: [])(
            forward_step_func=forward_step, data_iterator=items(), model=chunks, num_microbatches=4, seq_length=12, micro_batch_size=1,
            forward_only=False,
        )
    return Alive(at_losses, alive())


def test_a_microbatchs_inputs_go_with_its_last_forward_and_images_stay_with_the_stem() -> None:
    first, last = launch(run, 2, timeout_s=120)
    assert first.in_the_end == last.in_the_end == (0, 0)
    assert [images for images, _ in last.at_losses] == [0, 0, 0, 0]
    # At the n-th loss those of the microbatches before it are gone.
    assert [labels for _, labels in last.at_losses] == [4, 3, 2, 1]
