"""What one search moves in, and what it has found and spent: shared by the portfolio, the chains and the loop over them.

In: a stage problem, limits on memory, a bound, a budget. :class:`SearchSpace` never changes; :class:`Progress` is written between rounds
only, so that chains on several threads may read it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.interleave import NEVER, UNLIMITED, Costs, KernelGraph, make_costs, make_kernel_graph, refresh_costs
from megatron_dip.schedule.memory import MemoryTables, apply_choice, make_tables
from megatron_dip.schedule.result import time_order


class Priorities(NamedTuple):
    """Orders of priority, most urgent first. Letters: Gf, Gb forward and backward groups."""

    forward: NDArray[np.int32]
    """[Gf]"""
    backward: NDArray[np.int32]
    """[Gb], counted from 0"""


_KEPT = 5
"""Schedules that a search keeps: the best, and others for who scores by more than the makespan."""


class Found(NamedTuple):
    """A schedule worth keeping."""

    orders: list[NDArray[np.int32]]
    """[P] tasks of each rank in order"""
    choice: NDArray[np.int32]
    """[Q] candidate of each stage pair"""
    makespan_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """One problem under its limits, as the kernels read it."""

    problem: StageProblem
    kernel: KernelGraph
    tables: MemoryTables
    leanest: NDArray[np.int32]
    """[Q] each pair's candidate that holds least"""
    limit: NDArray[np.int64]
    """[P] bytes that live stages may hold, UNLIMITED for no limit"""
    bounded: bool
    """Whether any rank has a limit"""
    bound_ns: int
    """A makespan that no schedule can beat"""

    def level(self, number: int) -> NDArray[np.int32]:
        """[Q] the choice in which every pair takes its candidate ``number``, or its leanest where it has no such."""
        return np.minimum(number, self.leanest).astype(np.int32)

    def most_level(self) -> int:
        """The level at which every pair is at its leanest."""
        return int(self.leanest.max())

    def limit_at(self, share: float) -> NDArray[np.int64]:
        """[P] the limit with a share of each rank's bytes."""
        return np.array([value if value >= UNLIMITED else math.floor(value * share) for value in self.limit.tolist()], dtype=np.int64)

    def fresh_costs(self) -> Costs:
        return make_costs(self.problem.fastest, self.kernel)

    def set_choice(self, costs: Costs, choice: NDArray[np.int32]) -> None:
        """Writes the durations and memory of a choice into ``costs``."""
        apply_choice(self.tables, choice, costs.duration, costs.mem_start, costs.mem_end)
        refresh_costs(self.kernel, costs)

    def given_order(self) -> Priorities:
        """Microbatches as they come."""
        forward = self.kernel.num_forward_groups
        return Priorities(np.arange(forward, dtype=np.int32), np.arange(len(self.kernel.group_unit) - forward, dtype=np.int32))

    def timed(self, orders: list[NDArray[np.int32]], choice: NDArray[np.int32]) -> Found:
        """The orders with the makespan of their earliest times."""
        schedule = time_order(self.problem.graph(choice), orders)
        assert schedule is not None, "orders of a search deadlock"
        return Found(orders, choice.copy(), schedule.makespan_ns)


def make_space(problem: StageProblem, limit: NDArray[np.int64], bound_ns: int) -> SearchSpace:
    """A limit that everything together keeps is none, which spares the interleaver the admission check."""
    kernel = make_kernel_graph(problem.fastest)
    costs = make_costs(problem.fastest, kernel)
    everything = costs.need.reshape(-1, kernel.num_ranks).sum(axis=0) + costs.extra.max(initial=0)
    own = np.where(limit >= everything, UNLIMITED, limit).astype(np.int64)
    return SearchSpace(
        problem=problem, kernel=kernel, tables=make_tables(problem), leanest=problem.leanest(), limit=own,
        bounded=bool((own < UNLIMITED).any()), bound_ns=bound_ns,
    )


@dataclass(slots=True, kw_only=True)
class Progress:
    """What a search may spend, has spent, and has found."""

    bound_ns: int
    evaluations_limit: int | None
    time_budget_s: float | None
    is_needed: Callable[[], bool] | None = None
    """Tells that the result is waited for, so that the search ends"""
    began: float = field(default_factory=time.monotonic)
    evaluations: int = 0
    kept: list[Found] = field(default_factory=list)
    """The best few of unlike makespans, the best first."""

    @property
    def best(self) -> Found | None:
        return self.kept[0] if self.kept else None

    @property
    def best_makespan_ns(self) -> int:
        return int(NEVER) if self.best is None else self.best.makespan_ns

    def spent(self, wanted: int = 1) -> bool:
        """Whether the budget has no room for ``wanted`` evaluations more, or nothing is left to win."""
        if self.best_makespan_ns <= self.bound_ns:
            return True
        if self.evaluations_limit is not None and self.evaluations + wanted > self.evaluations_limit:
            return True
        return self.out_of_time()

    def out_of_time(self) -> bool:
        if self.is_needed is not None and self.is_needed():
            return True
        return self.time_budget_s is not None and time.monotonic() - self.began >= self.time_budget_s

    def offer(self, found: Found) -> None:
        if len(self.kept) == _KEPT and found.makespan_ns >= self.kept[-1].makespan_ns:
            return
        if any(found.makespan_ns == other.makespan_ns for other in self.kept):
            return
        self.kept = sorted([*self.kept, found], key=lambda one: one.makespan_ns)[:_KEPT]
