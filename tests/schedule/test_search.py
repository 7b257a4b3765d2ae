"""The search: repeatable, never worse with more to spend, valid under every method, and plain about what cannot fit."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dip.partition.online import split
from megatron_dip.schedule.bounds import problem_bound_ns
from megatron_dip.schedule.graph import StageProblem, build_problem
from megatron_dip.schedule.interleave import UNLIMITED, make_costs, make_kernel_graph
from megatron_dip.schedule.search import DoesNotFit, SearchOptions, search
from tests import naive
from tests.strategies import vlm_case


def vlm_problem(num_microbatches: int = 12, num_ranks: int = 4, *, split_backward: bool = False) -> tuple[StageProblem, np.ndarray]:
    """A problem and a limit of one and a half times what the largest microbatch takes without recomputation."""
    case = vlm_case(num_microbatches, num_ranks)
    costs = case.costs()
    problem = build_problem(
        case.model, case.partition, split(case.microbatches, case.model, case.partition, costs), costs, split_backward=split_backward
    )
    return problem, make_costs(problem.fastest, make_kernel_graph(problem.fastest)).worst * 3 // 2


@pytest.mark.parametrize("method", ["anneal", "mcts", "dfs", "random", "fifo"])
@pytest.mark.parametrize("bounded", [False, True])
def test_repeatable_and_never_worse_with_more(method, bounded):
    problem, limit = vlm_problem()
    if not bounded:
        limit = np.full(4, UNLIMITED)
    makespans = []
    for evaluations in (1, 30, 700, 2000):
        first, second = (search(problem, limit, SearchOptions(method=method, evaluations=evaluations, seed=3)) for _ in range(2))
        assert [order.tolist() for order in first.schedule.order] == [order.tolist() for order in second.schedule.order]
        assert first.choice.tolist() == second.choice.tolist()
        makespans.append(first.schedule.makespan_ns)
        peaks = naive.peak_memory(first.schedule.graph, [order.tolist() for order in first.schedule.order])
        assert all(peak <= most for peak, most in zip(peaks, limit.tolist(), strict=True))
    assert makespans == sorted(makespans, reverse=True)


def test_threads_are_repeatable_and_share_the_work():
    problem, limit = vlm_problem(split_backward=True)
    options = SearchOptions(evaluations=2000, threads=3, seed=1)
    first, second = search(problem, limit, options), search(problem, limit, options)
    assert [order.tolist() for order in first.schedule.order] == [order.tolist() for order in second.schedule.order]
    assert 1700 < first.evaluations <= 2000


@pytest.mark.parametrize("split_backward", [False, True])
def test_annealing_beats_the_first_come_order(split_backward):
    problem, _ = vlm_problem(split_backward=split_backward)
    limit = np.full(4, UNLIMITED)
    bound = problem_bound_ns(problem, limit)
    fifo = search(problem, limit, SearchOptions(method="fifo", evaluations=1), bound).schedule.makespan_ns
    found = search(problem, limit, SearchOptions(evaluations=3000), bound).schedule.makespan_ns
    assert bound <= found < fifo
    assert found <= 1.15 * bound


def test_stops_at_the_bound():
    problem, _ = vlm_problem(num_microbatches=1)
    limit = np.full(4, UNLIMITED)
    result = search(problem, limit, SearchOptions(evaluations=10**9), problem_bound_ns(problem, limit))
    assert result.evaluations <= 4


def test_what_cannot_fit_says_how_much_is_missing_where():
    problem, _ = vlm_problem()
    lean = make_costs(problem.graph(problem.leanest()), make_kernel_graph(problem.fastest)).worst
    search(problem, lean, SearchOptions(evaluations=20))
    limit = lean.copy()
    limit[2] -= 7
    with pytest.raises(DoesNotFit) as caught:
        search(problem, limit, SearchOptions(evaluations=20))
    assert caught.value.missing.tolist() == [0, 0, 7, 0]
