"""Stages inside Megatron's timers, NVTX ranges and autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.utils import nvtx_range_pop, nvtx_range_push

from megatron_dip.iteration.loss import IterationLoss
from megatron_dip.models.deferral import LinearWeightDeferral
from megatron_dip.runtime.compute import AutogradCompute
from megatron_dip.runtime.interface import StagedModel, StageLinks
from megatron_dip.spec.plan import PlanStage


class MegatronCompute(AutogradCompute):
    """Stages inside Megatron's timers, NVTX ranges and autocast."""

    def __init__(self, model: StagedModel, loss: IterationLoss, deferral: LinearWeightDeferral | None, config: Any) -> None:
        super().__init__(model, loss, deferral, free_outputs=config.deallocate_pipeline_outputs, offload=model.offload)
        self._timers = config.timers
        self._autocast_dtype = config.autocast_dtype if config.enable_autocast else None

    def forward(self, links: StageLinks, inputs: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        with self._measured("forward-compute", links.forward):
            if self._autocast_dtype is None:
                return super().forward(links, inputs)
            with torch.autocast("cuda", dtype=self._autocast_dtype):
                return super().forward(links, inputs)

    def backward(self, links: StageLinks, grads: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        assert links.backward is not None
        with self._measured("backward-compute", links.backward):
            return super().backward(links, grads)

    def weight(self, links: StageLinks) -> None:
        assert links.weight is not None
        with self._measured("backward-compute", links.weight):
            super().weight(links)

    @contextlib.contextmanager
    def _measured(self, timer: str, stage: PlanStage) -> Iterator[None]:
        name = f"dip {stage.kind} {stage.module} chunk {stage.vp_stage} microbatch {stage.microbatch}.{stage.sub_microbatch}"
        with nvtx_range(name):
            if self._timers is None:
                yield
                return
            self._timers(timer, log_level=2).start()
            yield
            self._timers(timer).stop()


@contextlib.contextmanager
def nvtx_range(name: str) -> Iterator[None]:
    """One of Megatron's NVTX ranges; nothing unless its profiling is on (``configure_nvtx_profiling``)."""
    nvtx_range_push(name)
    yield
    nvtx_range_pop(name)
