"""What compute actions do: run a staged model under autograd, or sleep for the planned time.

:class:`AutogradCompute` owns autograd's books: what arrives becomes a leaf (that requires a gradient where the plan sends one back),
what a stage makes is kept attached until its backward and handed on detached, and the leaves' gradients are the messages back. A stage
without a backward in the plan runs without a graph. Where nothing that requires a gradient is behind a payload (a batch without images,
frozen modules) the backward is skipped and zeros go back, as Megatron does.

Where the plan splits the backward, a :class:`~megatron_dip.runtime.interface.WeightDeferral` puts weight gradients off to W; without one
B does all of it and W nothing, which gives the same numbers.

Where the plan offloads layers, an :class:`~megatron_dip.runtime.offload.ActivationOffload` moves what they save; its meter, if it has one,
counts what all stages keep.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from megatron_dip.runtime.interface import LossFunction, PayloadSpec, StagedModel, StageLinks, WeightDeferral
from megatron_dip.runtime.offload import ActivationOffload
from megatron_dip.spec.plan import PlanStage


@dataclass(slots=True)
class _Kept:
    """What a stage's forward leaves for its backward."""

    inputs: Mapping[int, torch.Tensor]
    payloads: Mapping[int, torch.Tensor]
    loss: torch.Tensor | None


class AutogradCompute:
    """
    Args:
        deferral: how weight gradients are put off where the plan splits backwards.
        free_outputs: a stage's outputs are only needed by who takes them: their memory goes as soon as they are sent
            (Megatron's ``deallocate_pipeline_outputs``).
        offload: moves what the model's layers save, where the model asks for it.
    """

    def __init__(
        self, model: StagedModel, loss_function: LossFunction, deferral: WeightDeferral | None = None, *, free_outputs: bool = False,
        offload: ActivationOffload | None = None,
    ) -> None:
        self._free_outputs = free_outputs
        self._offload = offload
        self._model = model
        self._loss_function = loss_function
        self._deferral = deferral
        self._kept: dict[int, _Kept] = {}
        self.kept_bytes: dict[int, int] = {}
        """Forward stage with a backward -> what it was measured to keep, inputs included; where there is a meter."""

    def payload(self, producer: PlanStage, consumer: PlanStage) -> PayloadSpec:
        return self._model.payload(producer, consumer)

    def forward(self, links: StageLinks, inputs: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        for producer in links.grad_inputs:
            inputs[producer].requires_grad_()
        self._count(inputs.values())
        if self._offload is not None:
            self._offload.settle()
        before = self._live_bytes()
        with torch.set_grad_enabled(links.backward is not None), self._collecting(links), self._keeping(links, inputs.values()):
            output = self._model.forward(links.forward, inputs, links.consumers)
            loss = None if links.consumers else self._loss_function(links.forward, output.result)
        if links.backward is not None:
            self.kept_bytes[links.forward.id] = self._live_bytes() - before + sum(inputs[producer].nbytes for producer in links.grad_inputs)
            grad_inputs = {producer: inputs[producer] for producer in links.grad_inputs}
            self._kept[links.forward.id] = _Kept(grad_inputs, output.payloads, loss)
        payloads = {consumer: payload.detach().contiguous() for consumer, payload in output.payloads.items()}
        if self._free_outputs and links.backward is not None:
            for payload in output.payloads.values():
                _free(payload)
        self._count(payloads.values())
        return payloads

    def fetch_ahead(self, links: StageLinks, during: StageLinks | None) -> None:
        if self._offload is not None:
            self._offload.fetch_ahead(links.forward.id, None if during is None else during.forward.id)

    def backward(self, links: StageLinks, grads: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        if self._offload is not None:
            self._offload.settle(links.forward.id)
        kept = self._kept.pop(links.forward.id)
        roots: list[torch.Tensor] = []
        root_grads: list[torch.Tensor | None] = []
        for consumer, grad in grads.items():
            if kept.payloads[consumer].requires_grad:
                roots.append(kept.payloads[consumer])
                root_grads.append(grad)
        if kept.loss is not None and kept.loss.requires_grad:
            roots.append(kept.loss)
            root_grads.append(None)
        if roots:
            with self._collecting(links), self._watching():
                _run_backward(roots, root_grads)
        if self._offload is not None:
            self._offload.finish(links.forward.id)
        back = {
            producer: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.contiguous() for producer, leaf in kept.inputs.items()
        }
        self._count(back.values())
        return back

    def weight(self, links: StageLinks) -> None:
        if self._offload is not None:
            self._offload.settle()
        if self._deferral is not None:
            self._deferral.run(links.forward.id)

    def assert_empty(self) -> None:
        assert not self._kept, f"stages {sorted(self._kept)} ran forward but not backward"
        if self._deferral is not None:
            self._deferral.assert_empty()
        if self._offload is not None:
            self._offload.assert_empty()

    @contextmanager
    def _keeping(self, links: StageLinks, inputs: Iterable[torch.Tensor]) -> Iterator[None]:
        """Around a forward: what its layers save is moved or counted."""
        if self._offload is None or links.backward is None:
            yield
            return
        with self._watching(), self._offload.stage(links.forward.id, inputs):
            yield

    def _watching(self) -> AbstractContextManager[None]:
        meter = None if self._offload is None else self._offload.meter
        return nullcontext() if meter is None else meter.watching()

    def _live_bytes(self) -> int:
        return 0 if self._offload is None or self._offload.meter is None else self._offload.meter.live_bytes

    def _count(self, payloads: Iterable[torch.Tensor]) -> None:
        if self._offload is not None and self._offload.meter is not None:
            for payload in payloads:
                self._offload.meter.add(payload)

    def _collecting(self, links: StageLinks) -> AbstractContextManager[None]:
        if self._deferral is None or links.weight is None:
            return nullcontext()
        return self._deferral.collecting(links.forward.id)


def _free(payload: torch.Tensor) -> None:
    """Takes an output's memory from it and leaves its place in the graph; who holds a detached alias keeps the memory."""
    if payload.grad_fn is not None and payload._base is None:
        payload.data = torch.empty((1,), dtype=payload.dtype, device=payload.device)


def _run_backward(roots: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]) -> None:
    """torch.autograd.backward without its check of shapes, which roots without their memory would not pass."""
    whole = tuple(torch.ones_like(root) if grad is None else grad for root, grad in zip(roots, grads, strict=True))
    torch.autograd.Variable._execution_engine.run_backward(  # type: ignore[attr-defined]
        tuple(roots), whole, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class SleepCompute:
    """Stages that sleep for their planned time and exchange messages of a few bytes (or of ``payload_elements`` floats)."""

    def __init__(self, *, payload_elements: int = 16, time_scale: float = 1.0) -> None:
        self._spec = PayloadSpec((payload_elements,), torch.float32)
        self._tensor = torch.zeros(payload_elements)
        self._time_scale = time_scale

    def payload(self, producer: PlanStage, consumer: PlanStage) -> PayloadSpec:
        return self._spec

    def _sleep(self, stage: PlanStage) -> None:
        time.sleep(stage.duration * self._time_scale / 1e9)

    def forward(self, links: StageLinks, inputs: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        self._sleep(links.forward)
        return {consumer.id: self._tensor for consumer in links.consumers}

    def fetch_ahead(self, links: StageLinks, during: StageLinks | None) -> None:
        pass

    def backward(self, links: StageLinks, grads: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        assert links.backward is not None
        self._sleep(links.backward)
        return dict.fromkeys(links.grad_inputs, self._tensor)

    def weight(self, links: StageLinks) -> None:
        assert links.weight is not None
        self._sleep(links.weight)

    def assert_empty(self) -> None:
        pass
