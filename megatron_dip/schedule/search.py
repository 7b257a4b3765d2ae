"""Searches the orders of priority and the memory choice of one iteration.

In: a :class:`~megatron_dip.schedule.graph.StageProblem`, the bytes that each rank may hold, a budget. Out: a :class:`SearchResult`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.interleave import (
    ALTERNATE,
    BACKWARD_FIRST,
    UNLIMITED,
    Policy,
    interleave,
    make_costs,
    make_kernel_graph,
    make_workspace,
)
from megatron_dip.schedule.result import Schedule, time_order

SearchMethod = Literal["anneal", "mcts", "dfs", "random", "fifo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What a search may spend."""

    method: SearchMethod = "anneal"
    time_budget_s: float | None = None
    """Seconds; None = ``evaluations`` alone limit the search."""
    evaluations: int | None = None
    """Whole schedules that may be tried; the same number gives the same plan on every machine."""
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    schedule: Schedule
    choice: NDArray[np.int32]
    """[Q] candidate of each stage pair"""
    evaluations: int


class DoesNotFit(Exception):
    """Even with every pair's leanest candidate one microbatch exceeds a rank's memory.

    Attributes:
        missing: [P] bytes that are missing on each rank (negative = to spare).
    """

    def __init__(self, missing: NDArray[np.int64]) -> None:
        self.missing = missing
        super().__init__(f"bytes missing on each rank: {missing.tolist()}")


def search(problem: StageProblem, limit: NDArray[np.int64], options: SearchOptions) -> SearchResult:
    """Best schedule found.

    Args:
        limit: [P] bytes that live stages may hold on each rank, UNLIMITED for no limit.

    Raises:
        DoesNotFit: no schedule keeps the limit.
    """
    kernel = make_kernel_graph(problem.fastest)
    work = make_workspace(kernel)
    forward = np.arange(kernel.num_forward_groups, dtype=np.int32)
    backward = np.arange(len(kernel.group_unit) - kernel.num_forward_groups, dtype=np.int32)
    best: SearchResult | None = None
    evaluations = 0
    levels = int(problem.num_candidates.max())
    for level in range(levels):
        choice = np.minimum(level, problem.leanest()).astype(np.int32)
        graph = problem.graph(choice)
        costs = make_costs(graph, kernel)
        if (costs.worst > limit).any():
            if level == levels - 1 and best is None:
                raise DoesNotFit(costs.worst - limit)
            continue
        for both in (ALTERNATE, BACKWARD_FIRST):
            interleave(kernel, costs, limit, forward, backward, Policy(both), work)
            evaluations += 1
            schedule = time_order(graph, work.orders())
            assert schedule is not None
            if best is None or schedule.makespan_ns < best.schedule.makespan_ns:
                best = SearchResult(schedule=schedule, choice=choice, evaluations=evaluations)
        if (limit >= UNLIMITED).all():
            break
    assert best is not None
    return SearchResult(schedule=best.schedule, choice=best.choice, evaluations=evaluations)
