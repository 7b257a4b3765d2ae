"""Lower bounds: below every schedule and below the exact optimum of small cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.partition.online import split
from megatron_dip.schedule.bounds import lower_bound_ns, problem_bound_ns
from megatron_dip.schedule.graph import StageProblem, build_problem
from megatron_dip.schedule.interleave import UNLIMITED, make_costs, make_kernel_graph
from megatron_dip.schedule.search import SearchOptions, search
from megatron_dip.spec.tasks import TaskGraph
from tests import naive
from tests.strategies import Case, cases, vlm_case


def problem_of(case: Case, *, split_backward: bool = False) -> StageProblem:
    costs = case.costs()
    subs = split(case.microbatches, case.model, case.partition, costs)
    return build_problem(case.model, case.partition, subs, costs, split_backward=split_backward)


@settings(max_examples=100)
@given(cases(max_modules=2, max_ranks=2, max_microbatches=2), st.sampled_from([None, 1.0, 1.5]))
def test_below_the_optimum_of_tiny_cases(case, tightness):
    """Brute force over all orders; every pair keeps its fastest candidate, the bound may use any."""
    problem = problem_of(case)
    graph = problem.fastest
    if graph.num_tasks > 10:
        return
    worst = make_costs(graph, make_kernel_graph(graph)).worst
    limit = np.full(graph.num_ranks, UNLIMITED) if tightness is None else np.ceil(worst * tightness).astype(np.int64)
    optimum = naive.best_makespan(graph, limit.tolist())
    assert problem_bound_ns(problem, limit) <= optimum
    found = search(problem, limit, SearchOptions(evaluations=60)).schedule.makespan_ns
    assert problem_bound_ns(problem, limit) <= found
    if tightness is None:
        assert optimum <= found


@settings(max_examples=80)
@given(cases(max_modules=3, max_ranks=4, max_microbatches=6), st.booleans(), st.sampled_from([None, 1.0, 1.3]))
def test_below_what_search_finds(case, split_backward, tightness):
    problem = problem_of(case, split_backward=split_backward)
    lean = make_costs(problem.graph(problem.leanest()), make_kernel_graph(problem.fastest)).worst
    limit = np.full(len(lean), UNLIMITED) if tightness is None else np.ceil(lean * tightness).astype(np.int64)
    found = search(problem, limit, SearchOptions(evaluations=40))
    assert problem_bound_ns(problem, limit) <= found.schedule.makespan_ns
    peaks = naive.peak_memory(found.schedule.graph, [order.tolist() for order in found.schedule.order])
    assert all(peak <= most for peak, most in zip(peaks, limit.tolist(), strict=True))


def test_counts_heads_and_tails():
    """One microbatch on three ranks: the chain is the bound, and it is reached."""
    problem = problem_of(vlm_case(num_microbatches=1, num_ranks=3))
    found = search(problem, np.full(3, UNLIMITED), SearchOptions(evaluations=1))
    assert lower_bound_ns(problem.fastest) == found.schedule.makespan_ns


_CP_SAT = Path(__file__).parents[2] / "scripts" / "cp_sat.py"


def exact(graph: TaskGraph, horizon: int) -> dict:
    """CP-SAT's answer, from a process of its own: ortools and highspy cannot be loaded into one."""
    case = {
        "horizon": horizon, "seconds": 20,
        "tasks": [[int(rank), int(duration)] for rank, duration in zip(graph.rank, graph.duration_ns, strict=True)],
        "edges": [[task, before, lag] for task in range(graph.num_tasks) for before, lag in naive.edges(graph, task)],
    }
    done = subprocess.run([sys.executable, str(_CP_SAT)], input=json.dumps(case), capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(("num_microbatches", "num_ranks", "split_backward"), [
    (3, 2, False), (4, 2, True), (3, 3, False), (5, 3, True), (3, 4, False),
])
def test_search_reaches_the_optimum_of_cp_sat(num_microbatches, num_ranks, split_backward):
    pytest.importorskip("importlib.metadata").distribution("ortools")
    problem = problem_of(vlm_case(num_microbatches, num_ranks), split_backward=split_backward)
    limit = np.full(num_ranks, UNLIMITED)
    bound = problem_bound_ns(problem, limit)
    found = search(problem, limit, SearchOptions(evaluations=20_000), bound).schedule.makespan_ns
    answer = exact(problem.fastest, found)
    assert bound <= answer["value"]
    assert answer["bound"] <= found
    # A slow machine may leave the proof open.
    assert found == answer["value"] or not answer["optimal"]
