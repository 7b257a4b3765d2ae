"""Refinement task by task: never worse, valid, within memory, repeatable; and it finds what orders of priority cannot."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.refine import make_refine_state, refine_kernel
from megatron_dip.schedule.result import time_order
from megatron_dip.schedule.search import SearchOptions, search
from tests import naive
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
        assert all(peak <= most for peak, most in zip(naive.peak_memory(schedule.graph, orders), limit.tolist(), strict=True))
        results.append(state.best_order.tolist())
    assert results[0] == results[1]


def test_improves_a_random_order():
    problem = problem_of(vlm_case(num_microbatches=4, num_ranks=3))
    limit = np.full(3, UNLIMITED)
    schedule = search(problem, limit, SearchOptions(method="fifo", evaluations=1)).schedule
    state = make_refine_state(schedule.graph, list(schedule.order))
    assert refine_kernel(state, limit, np.array([0], dtype=np.uint64), 1000, 0) < schedule.makespan_ns
