"""The joint choice of a partition, judged by the planner's own search.

In: model, ranks, a sample of batches, costs. Out: a :class:`~megatron_dip.partition.joint.PartitionChoice`. The search behind every
judgement is short and limited by evaluations, not by time: the same sample gives the same partition on every machine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.joint import ChoiceLimits, NothingFits, PartitionChoice, choose_partition, judged_batches
from megatron_dip.partition.offline import Batch
from megatron_dip.partition.online import split
from megatron_dip.planner.all_memory import captured_inputs, recomputing_room
from megatron_dip.schedule.backward import SplitBackward, search_forms
from megatron_dip.schedule.graph import build_problem, static_bytes
from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.search import DoesNotFit, SearchOptions
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition

_SHORT, _THOROUGH = 140, 840
"""Schedules tried for a candidate on all judged batches together: enough to rank partitions, not to find the best plan."""
_SHORT_STAGES, _THOROUGH_STAGES = 1_000_000, 5_000_000
"""Stages placed for a candidate on all judged batches together at most, so that the choice takes no longer for large setups."""
_MESSAGES_PART = 40
"""One part in so many of what live stages may hold is left for messages and for fuller microbatches than the sample's."""
_LEAST = 8
"""Schedules tried for a candidate on one batch, however many batches there are."""


def joint_partition(
    model: ModelSpec,
    num_ranks: int,
    batches: Sequence[Batch],
    costs: CostModel,
    *,
    split_backward: SplitBackward = False,
    strategy: str | None = None,
    chunks: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
    progress: Callable[[int, float], None] | None = None,
    drift: bool = True,
    limits: ChoiceLimits | None = None,
) -> PartitionChoice:
    """Chooses B, K and the layers of every chunk together; see :func:`megatron_dip.partition.joint.choose_partition`.

    Args:
        batches: one replica's microbatches of several iterations: 256 or more for a real run.
        split_backward, strategy: as the plans will be made.
        drift: judge batches too that differ from the sample as later ones may.
        limits: partitions to evaluate.

    Raises:
        InputError: no partition fits (with what the nearest one lacks, where, and what would help).
    """
    given, drifted = judged_batches(model, batches, drift=drift)
    judge = _Judge(model, num_ranks, costs, split_backward, strategy, len(given) + len(drifted))

    def choose() -> PartitionChoice:
        return choose_partition(
            model, num_ranks, batches, costs, judge, chunks=chunks, sizes=sizes, progress=progress, drift=drift, limits=limits,
        )

    try:
        if judge.keeps_room:
            with contextlib.suppress(NothingFits):
                return choose()
            judge.keeps_room = False
        return choose()
    except NothingFits:
        missing, rank, held = min(judge.lacking)
        raise InputError(
            "memory_capacity_bytes", judge.capacity,
            f"none of {len(judge.lacking)} partitions fits: of the nearest one {missing} bytes are missing on pipeline rank {rank}, where {held} bytes "
            "are held all the time and the leanest memory strategy is taken everywhere",
            "use more pipeline or tensor ranks, smaller microbatches, or a memory strategy that keeps less (full recompute, offload)",
        ) from None


def expected_ns(
    model: ModelSpec, num_ranks: int, batches: Sequence[Batch], costs: CostModel, partition: Partition, *, split_backward: SplitBackward = False,
    strategy: str | None = None,
) -> float:
    """Mean planned time of the batches on a partition, searched as thoroughly as the choice's last candidates; math.inf where one does not fit."""
    judge = _Judge(model, num_ranks, costs, split_backward, strategy, len(batches))
    return sum(judge(partition, batch, True) for batch in batches) / len(batches)


class _Judge:
    """Planned time of a batch on a partition, by a search limited in evaluations."""

    def __init__(
        self, model: ModelSpec, num_ranks: int, costs: CostModel, split_backward: SplitBackward, strategy: str | None, num_judged: int
    ) -> None:
        """Args:
        num_judged: batches among which the evaluations of a candidate are shared.
        """
        self._model, self._num_ranks, self._costs = model, num_ranks, costs
        self._split_backward: SplitBackward = split_backward
        self._strategy, self._num_judged = strategy, num_judged
        self.capacity = costs.memory_capacity_bytes()
        self.keeps_room = self.capacity is not None and costs.counts_all_memory()
        """What plans count besides is known only once they are lowered: room is kept for it, unless nothing fits so."""
        self.lacking: list[tuple[int, int, int]] = []
        """(most bytes missing on a rank, that rank, bytes it holds all the time) of each candidate that did not fit."""

    def __call__(self, partition: Partition, batch: Batch, fine: bool) -> float:
        model, costs, num_ranks = self._model, self._costs, self._num_ranks
        limit = np.full(num_ranks, UNLIMITED, dtype=np.int64)
        sub_microbatches = split(batch, model, partition, costs)
        if self.capacity is not None:
            limit = self.capacity - np.array(static_bytes(model, partition, costs), dtype=np.int64)
        problem = build_problem(model, partition, sub_microbatches, costs, only_strategy=self._strategy)
        if self.keeps_room:
            limit -= recomputing_room(problem) + captured_inputs(model, batch, costs, num_ranks).room()
            limit -= np.maximum(limit, 0) // _MESSAGES_PART
        stages = sum(2 * num_ranks * partition.num_chunks(sub.module) for sub in sub_microbatches)
        tries, most_stages = (_THOROUGH, _THOROUGH_STAGES) if fine else (_SHORT, _SHORT_STAGES)
        tried = max(_LEAST, min(tries, most_stages // stages) // self._num_judged)
        options = SearchOptions(evaluations=tried if self._split_backward is False else max(1, tried // 2))
        try:
            solved = search_forms(
                lambda form: build_problem(
                    model, partition, sub_microbatches, costs, split_backward=True, only_strategy=self._strategy
                ) if form else problem,
                limit, options, self._split_backward, with_bound=False,
            )
            return float(solved.result.schedule.makespan_ns)
        except DoesNotFit as error:
            assert self.capacity is not None
            rank = int(np.argmax(error.missing))
            self.lacking.append((int(error.missing[rank]), rank, self.capacity - int(limit[rank])))
            return math.inf
