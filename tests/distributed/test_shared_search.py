"""All ranks of a replica search one problem: the best result wins, it repeats, and a rank that ends holds nobody up."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import pytest

from tests.distributed.launcher import launch, launch_all

pytestmark = pytest.mark.distributed
EVALUATIONS = 60
RANKS = 3


def _problem() -> Any:
    from megatron_dip.partition.online import split
    from megatron_dip.schedule.graph import build_problem
    from tests.strategies import vlm_case

    case = vlm_case(num_microbatches=12, num_ranks=3, chunks={"vit": 2, "lm": 2})
    costs = case.costs(None)
    return build_problem(case.model, case.partition, split(case.microbatches, case.model, case.partition, costs), costs)


def _limit(problem: Any) -> Any:
    from megatron_dip.schedule.interleave import make_costs, make_kernel_graph

    return np.ceil(make_costs(problem.graph(problem.leanest()), make_kernel_graph(problem.fastest)).worst * 1.5).astype(np.int64)


def _groups(rank: int, num_ranks: int) -> Any:
    from megatron_dip.runtime.groups import new_process_groups

    return new_process_groups(tuple(range(num_ranks)), 0, timeout_s=30)


def _search(rank: int, num_ranks: int) -> Any:
    import torch.distributed as dist

    from megatron_dip.iteration.shared_search import _SEEDS_APART, SharedSearch
    from megatron_dip.schedule.result import time_order
    from megatron_dip.schedule.search import DoesNotFit, SearchOptions, Seed, search

    shared = SharedSearch(_groups(rank, num_ranks), 1, 60.0)
    problem, options = _problem(), SearchOptions(evaluations=EVALUATIONS, seed=3)
    limit = _limit(problem)
    seen: Any = None
    if rank == 0:
        found = [shared(problem, limit, options) for _ in range(2)]
        alone = [
            search(problem, limit, SearchOptions(evaluations=EVALUATIONS, seed=(3 + place * _SEEDS_APART) % (1 << 32))).schedule.makespan_ns
            for place in range(num_ranks)
        ]
        timed = time_order(problem.graph(found[0].choice), found[0].schedule.order)
        assert timed is not None
        assert timed.makespan_ns == found[0].schedule.makespan_ns
        assert (np.array(found[0].schedule.peak_memory([0] * 3)) <= limit).all()
        # From a schedule that is known already no rank comes back with a worse one.
        seeded = shared(problem, limit, SearchOptions(evaluations=1), 0, Seed(orders=list(found[0].schedule.order), choice=found[0].choice, priorities=found[0].priorities))
        # By the clock the others stop when the planner rank does.
        began = time.monotonic()
        shared(problem, limit, SearchOptions(time_budget_s=0.3, is_needed=lambda: time.monotonic() > began + 0.05))
        seen = {
            "found": [one.schedule.makespan_ns for one in found], "alone": alone, "seeded": seeded.schedule.makespan_ns,
            "orders": [[row.tolist() for row in one.schedule.order] for one in found], "figures": shared.figures(),
            "elsewhere": int(np.argmin(alone)) != 0,
        }
        with pytest.raises(DoesNotFit):
            shared(problem, limit // 100, options)
        again = shared(problem, limit, options)  # a problem without an answer upsets nobody
        assert again.schedule.makespan_ns == found[0].schedule.makespan_ns
        shared.close()
    dist.barrier()
    return seen


def test_the_best_of_all_ranks_wins_and_repeats() -> None:
    seen = launch(_search, RANKS)[0]
    assert seen["found"] == [min(seen["alone"])] * 2
    assert seen["orders"][0] == seen["orders"][1]
    assert seen["seeded"] <= seen["found"][0]
    assert seen["figures"].ranks == RANKS
    assert seen["figures"].searches == 4, "before the last two"
    assert seen["figures"].won_elsewhere >= 2 * seen["elsewhere"]


def _search_with_a_dead_rank(rank: int, num_ranks: int) -> Any:
    from megatron_dip.iteration import shared_search
    from megatron_dip.schedule.search import SearchOptions, search

    shared = shared_search.SharedSearch(_groups(rank, num_ranks), 1, 60.0)
    if rank == 1:
        os._exit(7)
    problem, options = _problem(), SearchOptions(evaluations=EVALUATIONS, seed=3)
    if rank:
        time.sleep(20)  # ended by the launcher, or here
        return None
    found = [shared(problem, _limit(problem), options) for _ in range(2)]
    own = search(problem, _limit(problem), options)
    assert [one.schedule.makespan_ns for one in found] == [own.schedule.makespan_ns] * 2
    assert shared.figures().searches == 0
    os._exit(0)


@pytest.mark.long
def test_a_rank_that_ends_leaves_the_planner_rank_its_own_result() -> None:
    results = launch_all(_search_with_a_dead_rank, RANKS, timeout_s=60.0)
    assert results[0].exit_code == 0, results[0].error
    assert results[1].exit_code == 7


def _search_with_a_rank_that_hangs(rank: int, num_ranks: int) -> Any:
    from megatron_dip.iteration import shared_search
    from megatron_dip.schedule.search import SearchOptions, search

    if rank == 1:
        shared_search.search = lambda *_: time.sleep(60)
    shared_search._ANSWER_S = 0.5
    shared = shared_search.SharedSearch(_groups(rank, num_ranks), 1, 60.0)
    if rank:
        time.sleep(20)
        os._exit(0)
    problem = _problem()
    own = search(problem, _limit(problem), SearchOptions(evaluations=EVALUATIONS))
    while not shared._ready.is_completed():
        time.sleep(0.01)
    began = time.monotonic()
    found = shared(problem, _limit(problem), SearchOptions(time_budget_s=0.2))
    waited = time.monotonic() - began
    assert found.schedule.makespan_ns > 0
    assert own.schedule.makespan_ns > 0
    assert shared.figures().searches == 0
    shared(problem, _limit(problem), SearchOptions(evaluations=1))
    os._exit(0 if waited < 15 else 3)


@pytest.mark.long
def test_a_rank_that_does_not_answer_is_waited_for_no_longer_than_the_limit() -> None:
    results = launch_all(_search_with_a_rank_that_hangs, RANKS, timeout_s=60.0)
    assert results[0].exit_code == 0, results[0].error
