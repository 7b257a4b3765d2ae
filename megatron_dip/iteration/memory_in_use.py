"""What a rank really holds, beside what its plans say: measured, said, and given back to planning.

On CUDA the allocator's peak since the process began is held against the highest plan so far; what the run holds in between (optimizer
steps, evaluation) counts as well. On the CPU saved tensors, messages and inputs are counted iteration by iteration
(:class:`~megatron_dip.runtime.memory_meter.MemoryMeter`), weights, gradients and optimizer state taken as plans have them.

A rank that holds more than its plan has as much kept free in every later plan (``PlanOptions.reserved_bytes``), and never less again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.memory_meter import MemoryMeter, tensors_in
from megatron_dip.runtime.offload import host_memory_limit
from megatron_dip.spec.plan import Plan

logger = logging.getLogger(__name__)

COMPARED_FIRST, COMPARED_EVERY = 4, 50
"""Training iterations behind which ranks tell each other what they hold: the first ones, then every so many."""
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

    def end(self, plan: Plan) -> None:
        """Behind a training iteration's last action."""
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
