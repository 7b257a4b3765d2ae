"""Refinement task by task: equal to its twin, never worse, valid, within memory, repeatable; and it finds what orders of priority cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.refine import make_refine_state, refine_kernel
from megatron_dip.schedule.result import time_order
from megatron_dip.schedule.search import SearchOptions, search
from megatron_dip.spec.tasks import TaskGraph
from tests import naive
from tests.naive_refine import Refinement
from tests.program.graphs import random_order
from tests.schedule.test_bounds import problem_of
from tests.strategies import cases, vlm_case


@settings(max_examples=80)
@given(cases(max_microbatches=4), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_never_worse_and_valid(case, split_backward, bounded, seed):
    problem = problem_of(case, split_backward=split_backward)
    limit = np.full(problem.fastest.num_ranks, UNLIMITED)
    schedule = search(problem, limit, SearchOptions(method="random", evaluations=40, seed=seed)).schedule
    peaks = schedule.peak_memory([0] * len(limit))
    if bounded:
        limit = np.array(peaks, dtype=np.int64)
    results = []
    for _ in range(2):
        state = make_refine_state(schedule.graph, list(schedule.order))
        value = refine_kernel(state, limit, np.array([seed], dtype=np.uint64), 200, 0)
        orders = list(state.best_order.reshape(len(limit), -1))
        refined = time_order(schedule.graph, orders)
        assert refined is not None
        assert value == refined.makespan_ns <= schedule.makespan_ns
        assert all(peak <= most for peak, most in zip(naive.peak_memory(schedule.graph, [order.tolist() for order in orders]), limit.tolist(), strict=True))
        results.append(state.best_order.tolist())
    assert results[0] == results[1]


def test_improves_a_random_order():
    problem = problem_of(vlm_case(num_microbatches=4, num_ranks=3))
    limit = np.full(3, UNLIMITED)
    schedule = search(problem, limit, SearchOptions(method="fifo", evaluations=1)).schedule
    state = make_refine_state(schedule.graph, list(schedule.order))
    assert refine_kernel(state, limit, np.array([0], dtype=np.uint64), 1000, 0) < schedule.makespan_ns


def assert_equals_its_twin(graph: TaskGraph, slack: int | None, steps: int, seed: int, bound: int = 0) -> Refinement:
    """From an order at random. Limits leave ``slack`` bytes above what that order holds; None = no limits."""
    orders = random_order(graph, seed)
    rows = [row.tolist() for row in orders]
    limit = [int(UNLIMITED)] * graph.num_ranks if slack is None else [peak + slack for peak in naive.peak_memory(graph, rows)]
    twin = Refinement(graph, rows, limit, naive.Random(seed))
    state, random = make_refine_state(graph, orders), np.array([seed], dtype=np.uint64)
    # The kernel goes on where the last call ended.
    for part in (steps // 3, steps - steps // 3):
        assert refine_kernel(state, np.array(limit, dtype=np.int64), random, part, bound) == twin.run(part, bound)
        assert state.best_order.reshape(graph.num_ranks, -1).tolist() == twin.best_orders
        assert state.order.reshape(graph.num_ranks, -1).tolist() == twin.orders
        assert int(random[0]) == twin.random.state
    return twin


@settings(max_examples=150)
@given(
    cases(max_microbatches=3), st.booleans(), st.sampled_from([None, 0, 30, 200]), st.integers(0, 60), st.sampled_from([0, 0.9, 1.2]),
    st.integers(0, 2**32 - 1),
)
def test_equals_its_twin(case, split_backward, slack, steps, bound, seed):
    graph = problem_of(case, split_backward=split_backward).fastest
    if graph.num_tasks <= 100:
        busiest = max(int(graph.duration_ns[graph.rank == rank].sum()) for rank in range(graph.num_ranks))
        assert_equals_its_twin(graph, slack, steps, seed, int(busiest * bound))


@pytest.mark.parametrize(("num_microbatches", "num_ranks", "split_backward", "slack", "steps"), [
    (4, 2, False, None, 900), (4, 2, True, 20, 900), (5, 3, False, 0, 900), (3, 2, True, 0, 900), (6, 1, True, None, 350),
])
def test_equals_its_twin_when_it_goes_back_to_the_best(num_microbatches, num_ranks, split_backward, slack, steps):
    graph = problem_of(vlm_case(num_microbatches, num_ranks), split_backward=split_backward).fastest
    twin = assert_equals_its_twin(graph, slack, steps, 5)
    assert twin.times_back > 0
    assert twin.times_tabu > 0
    assert slack is None or twin.times_full > 0
