"""Whole or split backwards: the search over both, never worse than over whole ones alone.

A whole backward is a split one whose weight part (W) stands right behind its input part (B): every schedule of the one is a schedule of
the other, with the same memory, and no later but for rounding (B and W are rounded to ns each, their sum once). So whole backwards are
searched first, and the search over split ones starts from what that has found.

In: what builds the problem in either form, limits, a budget. Out: a :class:`Solved`. The paper's methods and ``fifo`` take no start: they
search each form by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.bounds import problem_bound_ns
from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.search import SearchFunction, SearchOptions, SearchResult, Seed, search
from megatron_dip.spec.tasks import WEIGHT

SplitBackward = bool | Literal["auto"]
"""False: whole backwards; True: split ones; ``auto``: whichever is faster for these very microbatches, whole ones when equal."""

WHOLE_SHARE = 0.4
"""Of the seconds, for whole backwards: they have two thirds of the stages, and split ones go on from them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A searched problem."""

    problem: StageProblem
    bound_ns: int
    """No schedule of this problem is faster; 0 where none was asked for"""
    result: SearchResult
    evaluations: int
    """Schedules tried in both forms"""


def with_weights_behind(whole: StageProblem, result: SearchResult, split: StageProblem) -> Seed:
    """The schedule of whole backwards in the problem of split ones: each weight stage right behind its input stage."""
    weight_of = np.full(split.fastest.num_tasks, -1, dtype=np.int32)
    weights = np.flatnonzero(split.fastest.kind == WEIGHT)
    weight_of[split.fastest.dep_task[split.fastest.dep_offset[weights]]] = weights  # each waits for its backward alone
    orders = []
    for tasks in result.schedule.order:
        both = np.stack((tasks, weight_of[tasks]), axis=1).reshape(-1)
        orders.append(both[both >= 0].astype(np.int32))
    return Seed(orders=orders, choice=split.nearest_choice(whole, result.choice), priorities=result.priorities)


def search_forms(
    build: Callable[[bool], StageProblem], limit: NDArray[np.int64], options: SearchOptions, split_backward: SplitBackward, *,
    with_bound: bool = True, start: Callable[[StageProblem], Seed] | None = None, search: SearchFunction = search,
) -> Solved:
    """The best schedule in the wanted form of the backward.

    Args:
        build: the problem with whole (False) or split backwards (True).
        limit: [P] bytes that live stages may hold on each rank, UNLIMITED for no limit.
        options: where both forms are searched, ``evaluations`` may be tried in each, and seconds are shared (:data:`WHOLE_SHARE`).
        with_bound: compute a lower bound, at which a search ends.
        start: a schedule of whole backwards to start from (method ``anneal``).
        search: what searches each form.

    Raises:
        DoesNotFit: no schedule keeps the limit.
    """

    def solve(split: bool, share: float, start: Callable[[StageProblem], Seed] | None = None) -> Solved:
        problem = build(split)
        bound_ns = problem_bound_ns(problem, limit) if with_bound else 0
        seconds = None if options.time_budget_s is None else share * options.time_budget_s
        seed = None if start is None else start(problem)
        result = search(problem, limit, replace(options, time_budget_s=seconds), bound_ns, seed)
        return Solved(problem=problem, bound_ns=bound_ns, result=result, evaluations=result.evaluations)

    seeded = options.method == "anneal"
    if split_backward is False or (split_backward is True and not seeded):
        return solve(split_backward, 1.0, start if seeded and not split_backward else None)
    whole = solve(False, WHOLE_SHARE, start if seeded else None)
    split = solve(True, 1.0 - WHOLE_SHARE, (lambda problem: with_weights_behind(whole.problem, whole.result, problem)) if seeded else None)
    evaluations = whole.evaluations + split.evaluations
    wins = split_backward is True or split.result.schedule.makespan_ns < whole.result.schedule.makespan_ns
    return replace(split if wins else whole, evaluations=evaluations)
