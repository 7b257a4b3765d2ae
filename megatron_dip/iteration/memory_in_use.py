"""What a rank really holds, beside what its plans say: measured, said, and given back to planning.

On CUDA the allocator's peak since the process began is held against the highest plan so far; what the run holds in between (optimizer
steps, evaluation) counts as well. On the CPU saved tensors, messages and inputs are counted iteration by iteration
(:class:`~megatron_dip.runtime.memory_meter.MemoryMeter`), weights, gradients and optimizer state taken as plans have them.

Costs rest on operator graphs, and layers keep more or less than these have: on the CPU the first iterations measure what stages keep, by
which the activations of each module are scaled from then on (:meth:`MemoryInUse.costs`).

A rank that holds more than its plan has as much kept free in every later plan (``PlanOptions.reserved_bytes``), and never less again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from megatron_dip.cost.interface import CostModel, Part, PartCost
from megatron_dip.cost.wrapped import WrappedCost
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.memory_meter import MemoryMeter, tensors_in
from megatron_dip.runtime.offload import host_memory_limit
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan, PlanStage
from megatron_dip.spec.profile import Strategy

logger = logging.getLogger(__name__)

COMPARED_FIRST, COMPARED_EVERY = 6, 50
"""Training iterations behind which ranks tell each other what they hold: the first ones, then every so many."""
LEARNED_BEHIND, FOLLOWED_FROM = 2, 4
"""The iteration behind which activations are scaled; the first one whose plan surely knows."""
UNUSED_BLOCKS = 0.04
"""Share of the device that the allocator cannot use, until it is measured."""


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """Of one rank in its last training iteration, bytes."""

    planned: int
    """Without what was kept free for what earlier plans did not know"""
    measured: int


class MemoryInUse:
    """One rank's. Methods marked so are collective over the replica's ranks.

    Args:
        forget: called where later plans must keep more free than those that were made.
        follows_device: the limit is what the device has: asked for again as iterations run.
    """

    def __init__(self, groups: PipelineGroups, device: torch.device, forget: Callable[[], None], *, follows_device: bool = False) -> None:
        self.expected: Callable[[PlanStage], float | None] | None = None
        """What costs say that a forward stage keeps until its backward, None where they cannot be held against it. Without it nothing is
        scaled. Set before training, alike on all ranks."""
        self.scales: Mapping[str, float] = {}
        """Module -> what its stages keep over what costs say; 1 where absent."""
        self.meter = MemoryMeter() if device.type == "cpu" else None
        self.figures: MemoryFigures | None = None
        self.reserved: tuple[int, ...] = (0,) * groups.num_ranks
        """Bytes on each pipeline rank that later plans keep free."""
        self.of_ranks: list[MemoryFigures] | None = None
        """Of every pipeline rank, as ranks last told each other."""
        self._groups = groups
        self._device = device
        self._forget = forget
        self._static: int | None = None
        self._highest_plan = 0
        self._iterations = 0
        self._at_start = device_memory(device) if follows_device else None
        self._said: set[int] = set()
        self._kept: dict[str, tuple[float, float]] = {}
        """Module -> (bytes that its stages kept, bytes that costs say)."""

    def count_inputs(self, captured: Any) -> None:
        """What microbatches bring counts as long as it is held."""
        if self.meter is not None:
            for tensor in tensors_in(captured):
                self.meter.add(tensor)

    def begin(self, chunks: Iterable[torch.nn.Module]) -> None:
        """Before an iteration's first action."""
        if self.meter is None:
            return
        weights = [weight for chunk in chunks for weight in chunk.parameters()]
        gradients = [getattr(weight, "main_grad", weight.grad) for weight in weights]
        self.meter.leave_out([*weights, *(gradient for gradient in gradients if gradient is not None)])
        self.meter.begin()

    def end(self, plan: Plan, kept_bytes: Mapping[int, int] | None = None) -> None:
        """Behind a training iteration's last action.

        Args:
            kept_bytes: forward stage -> what it kept.
        """
        self._add_kept(plan, kept_bytes or {})
        rank = self._groups.rank
        # The first plans keep nothing free.
        self._static = plan.memory_initial[rank] if self._static is None else min(self._static, plan.memory_initial[rank])
        planned = plan.peak_memory[rank] - plan.memory_initial[rank] + self._static
        if self.meter is None:
            self._highest_plan = planned = max(self._highest_plan, planned)
            measured = torch.cuda.max_memory_allocated(self._device)
        else:
            measured = self._static + self.meter.peak_bytes
        self.figures = MemoryFigures(planned, measured)

    def after_iteration(self) -> None:
        """Collective where it is due: ranks tell each other, and what is missing in plans is kept free from now on."""
        self._iterations += 1
        if self._iterations > COMPARED_FIRST and self._iterations % COMPARED_EVERY:
            return
        assert self.figures is not None, "no training iteration has run"
        learns = self.expected is not None and self.meter is not None
        if learns and self._iterations == LEARNED_BEHIND:
            self._learn_scales()
        if learns and self._iterations < FOLLOWED_FROM:
            return
        own = (self._groups.rank, self.figures.planned, self.figures.measured, self._lost())
        every: list[tuple[int, int, int, int]] = [own] * len(self._groups.control_ranks)
        dist.all_gather_object(every, own, group=self._groups.control)
        worst = {rank: max((one for one in every if one[0] == rank), key=lambda one: one[2] - one[1]) for rank in {one[0] for one in every}}
        self.of_ranks = [MemoryFigures(*worst[rank][1:3]) for rank in range(self._groups.num_ranks)]
        lost = max(one[3] for one in every)
        reserved = tuple(
            max(before, figures.measured - figures.planned, lost) for before, figures in zip(self.reserved, self.of_ranks, strict=True)
        )
        if reserved != self.reserved:
            self._say(reserved)
            self.reserved = reserved
            self._forget()

    def costs(self, costs: CostModel) -> CostModel:
        """``costs`` with activations as they were measured."""
        return KeptBytesCost(costs, self.scales) if self.scales else costs

    def _add_kept(self, plan: Plan, kept_bytes: Mapping[int, int]) -> None:
        if self.expected is None or self._iterations >= LEARNED_BEHIND:
            return
        for number, kept in kept_bytes.items():
            stage = plan.stages[number]
            expected = self.expected(stage)
            if expected is not None:
                before = self._kept.get(stage.module, (0.0, 0.0))
                self._kept[stage.module] = (before[0] + kept, before[1] + expected)

    def _learn_scales(self) -> None:
        """Collective over the replica's ranks."""
        every: list[dict[str, tuple[float, float]]] = [self._kept] * len(self._groups.control_ranks)
        dist.all_gather_object(every, self._kept, group=self._groups.control)
        scales = {}
        for module in sorted({module for of_rank in every for module in of_rank}):
            kept, expected = (sum(of_rank.get(module, (0.0, 0.0))[index] for of_rank in every) for index in range(2))
            if expected > 0:
                scales[module] = kept / expected
        self.scales = scales
        self._kept = {}
        self._forget()

    def _lost(self) -> int:
        """By how much the device has less for plans than it seemed to have at the start."""
        return 0 if self._at_start is None else max(0, self._at_start - device_memory(self._device))

    def _say(self, reserved: Sequence[int]) -> None:
        assert self.of_ranks is not None
        for rank, (figures, free) in enumerate(zip(self.of_ranks, reserved, strict=True)):
            if free > self.reserved[rank] and rank not in self._said and self._groups.rank == 0:
                self._said.add(rank)
                logger.warning(
                    "pipeline rank %d holds %.3f GiB where its plan has %.3f GiB: later plans keep %.3f GiB more free there", rank,
                    figures.measured / 2**30, figures.planned / 2**30, free / 2**30,
                )


class KeptBytesCost(WrappedCost):
    """Costs whose modules keep so many times as much."""

    def __init__(self, costs: CostModel, scales: Mapping[str, float]) -> None:
        super().__init__(costs)
        self._scales = scales

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        cost = self.costs.part(module, part, lengths)
        return replace(cost, activation_bytes=cost.activation_bytes * self._scales.get(module, 1.0))

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        """What recomputed layers keep is their input, whose size is known."""
        scale = self._scales.get(module, 1.0)
        return {
            label: msgspec.structs.replace(strategy, activation=min(1.0, strategy.activation / scale)) if strategy.activation < 1 else strategy
            for label, strategy in self.costs.strategies(module, lengths).items()
        }


def stage_bytes(costs: CostModel, model: ModelSpec, partition: Partition) -> Callable[[PlanStage], float | None]:
    """What costs say that a forward stage keeps until its backward where all its layers keep all; None for others, and for modules that are
    frozen in part."""
    whole = {
        module.name for module in model.modules
        if (parts := model.trainable_parts(module.name)).first and parts.last and all(parts.layers)
    }

    def expected(stage: PlanStage) -> float | None:
        if stage.module not in whole or set(stage.strategy) - {"none"}:
            return None
        lengths = [stage.tokens // stage.instances] * stage.instances
        rows = partition.chunks[stage.module]
        kept = stage.layers[1] * costs.part(stage.module, "layer", lengths).activation_bytes
        if (stage.vp_stage, stage.rank) == (0, 0):
            kept += costs.part(stage.module, "first", lengths).activation_bytes
        if (stage.vp_stage, stage.rank) == (len(rows) - 1, len(rows[0]) - 1):
            kept += costs.part(stage.module, "last", lengths).activation_bytes
        return kept

    return expected


def device_memory(device: torch.device) -> int:
    """Bytes that plans may use on this rank: what the device has, less what others hold there (context, NCCL, other processes) and what
    the allocator has in blocks that it cannot use."""
    if device.type == "cpu":
        return host_memory_limit(1.0)
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    unused = max(0, torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device))
    return int(free + reserved - max(unused, UNUSED_BLOCKS * total))


def least_device_memory(groups: PipelineGroups, device: torch.device) -> int:
    """Of all ranks of the job that share a replica; collective over them."""
    own = device_memory(device)
    every = [own] * len(groups.control_ranks)
    dist.all_gather_object(every, own, group=groups.control)
    return min(every)


def memory_words(memory: MemoryInUse) -> str:
    """For a log line: the rank that stands highest above its plan."""
    if memory.of_ranks is None:
        return ""
    rank, figures = max(enumerate(memory.of_ranks), key=lambda pair: pair[1].measured / max(1, pair[1].planned))
    return f" | memory planned (GiB): {figures.planned / 2**30:.3f} measured: {figures.measured / 2**30:.3f} (rank {rank})"
