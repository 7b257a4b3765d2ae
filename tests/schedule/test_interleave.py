"""The interleaver against its twin, and against what must hold for any order, limit and arrangement of modules."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.online import split
from megatron_dip.schedule.graph import StageProblem, build_problem
from megatron_dip.schedule.interleave import (
    ALTERNATE,
    BACKWARD_FIRST,
    FORWARD_FIRST,
    MAX_TESTS,
    NEVER,
    UNLIMITED,
    KernelGraph,
    Policy,
    interleave,
    interleave_kernel,
    make_costs,
    make_kernel_graph,
    make_workspace,
)
from megatron_dip.schedule.result import paths_ns, time_order
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.profile import ModuleProfile, Strategy
from tests import naive
from tests.strategies import Case, cases, grid, module, profile, vlm_case

policies = st.builds(Policy, both=st.sampled_from([ALTERNATE, BACKWARD_FIRST, FORWARD_FIRST]), weight_fit=st.sampled_from([0, 500, 1000]))


def problem_of(case: Case, *, split_backward: bool = False, forward_only: bool = False) -> StageProblem:
    costs = case.costs()
    subs = split(case.microbatches, case.model, case.partition, costs)
    return build_problem(case.model, case.partition, subs, costs, split_backward=split_backward, forward_only=forward_only)


def permutations(kernel: KernelGraph, rng: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Random orders of the forward and of the backward groups."""
    num_backward = len(kernel.group_unit) - kernel.num_forward_groups
    return rng.permutation(kernel.num_forward_groups).astype(np.int32), rng.permutation(num_backward).astype(np.int32)


@settings(max_examples=100)
@given(cases(max_microbatches=3), st.booleans(), st.booleans(), policies, st.sampled_from([None, 1.0, 1.4]), st.integers(0, 2**32 - 1))
def test_equals_its_twin(case, split_backward, forward_only, policy, tightness, seed):
    graph = problem_of(case, split_backward=split_backward, forward_only=forward_only).fastest
    kernel = make_kernel_graph(graph)
    costs, work = make_costs(graph, kernel), make_workspace(kernel)
    limit = np.full(graph.num_ranks, UNLIMITED) if tightness is None else np.ceil(costs.worst * tightness).astype(np.int64)
    forward, backward = permutations(kernel, np.random.default_rng(seed))
    makespan = interleave(kernel, costs, limit, forward, backward, policy, work)
    twin = naive.interleave(graph, limit.tolist(), forward.tolist(), backward.tolist(), policy)
    assert [order.tolist() for order in work.orders()] == twin.order
    assert work.start.tolist() == twin.start
    assert makespan == twin.makespan


@settings(max_examples=150)
@given(cases(max_modules=4, max_ranks=4, max_microbatches=7), st.booleans(), policies, st.integers(0, 2**32 - 1))
def test_any_order_and_the_tightest_limit_give_a_valid_schedule(case, split_backward, policy, seed):
    graph = problem_of(case, split_backward=split_backward).fastest
    kernel = make_kernel_graph(graph)
    costs, work = make_costs(graph, kernel), make_workspace(kernel)
    rng = np.random.default_rng(seed)
    for _ in range(100):
        forward, backward = permutations(kernel, rng)
        makespan = interleave(kernel, costs, costs.worst, forward, backward, policy, work)
        schedule = time_order(graph, work.orders())
        assert schedule is not None
        assert (schedule.start_ns <= work.start).all()
        assert makespan == (work.start + graph.duration_ns).max()
        peaks = schedule.peak_memory([0] * graph.num_ranks)
        assert all(peak <= most for peak, most in zip(peaks, costs.worst.tolist(), strict=True))
        assert (np.sort(work.order) == np.arange(graph.num_tasks)).all()
    assert peaks == naive.peak_memory(graph, [order.tolist() for order in work.orders()])


def test_a_frozen_modules_forward_takes_memory_too():
    """It keeps nothing, but needs room for a moment: a younger microbatch must leave that room, or both wait for ever."""
    model = ModelSpec(modules=[module("own", 2), module("frozen", 2, trainable=False), module("lm", 2, role="backbone")])
    parts = {name: ModuleProfile(num_layers=2, layer=grid(1, 1, 1, 1), strategies={"none": Strategy()}) for name in ("own", "frozen")}
    parts["lm"] = ModuleProfile(num_layers=2, layer=grid(1, 1, 1), strategies={"none": Strategy()})
    case = Case(
        model=model, profile=profile(parts), partition=even_partition(model, 2, {}, {}),
        microbatches=[{"own": [1], "frozen": [1], "lm": [1]}, {"own": [1, 1], "lm": [1]}],
    )
    graph = problem_of(case).fastest
    kernel = make_kernel_graph(graph)
    costs, work = make_costs(graph, kernel), make_workspace(kernel)
    backward = np.arange(len(kernel.group_unit) - kernel.num_forward_groups, dtype=np.int32)
    for forward in itertools.permutations(range(kernel.num_forward_groups)):
        interleave(kernel, costs, costs.worst, np.array(forward, dtype=np.int32), backward, Policy(), work)
        assert time_order(graph, work.orders()) is not None


def test_more_forwards_than_one_decision_tests_still_go_on():
    """Far more blocked forwards stand in the queue than a decision looks at; the oldest microbatch's must be found behind them."""
    case = vlm_case(num_microbatches=200, num_ranks=2, chunks={"vit": 2})
    graph = problem_of(case).fastest
    kernel = make_kernel_graph(graph)
    costs, work = make_costs(graph, kernel), make_workspace(kernel)
    for order in (np.arange(kernel.num_forward_groups), np.arange(kernel.num_forward_groups)[::-1]):
        num_backward = len(kernel.group_unit) - kernel.num_forward_groups
        interleave(
            kernel, costs, costs.worst, np.ascontiguousarray(order, np.int32), np.arange(num_backward, dtype=np.int32), Policy(FORWARD_FIRST), work
        )
        schedule = time_order(graph, work.orders())
        assert schedule is not None
        assert all(peak <= most for peak, most in zip(schedule.peak_memory([0, 0]), costs.worst.tolist(), strict=True))


@pytest.mark.parametrize("both", [ALTERNATE, BACKWARD_FIRST, FORWARD_FIRST])
def test_more_blocked_forwards_than_one_decision_tests_equal_the_twin(both):
    """The first microbatch takes one small forward, the second fills what the first leaves and is blocked with more forwards than are tested."""
    model = ModelSpec(modules=[module("small", 1), module("many", 1), module("lm", 1, role="backbone")])
    parts = {name: ModuleProfile(num_layers=1, layer=grid(5, 7, 3, 1), strategies={"none": Strategy()}) for name in ("small", "many")}
    parts["lm"] = ModuleProfile(num_layers=1, layer=grid(4, 4, 4), strategies={"none": Strategy()})
    case = Case(
        model=model, profile=profile(parts), partition=even_partition(model, 1, {}, {"small": 1, "many": 1, "lm": 1}),
        microbatches=[{"small": [1], "many": [MAX_TESTS + 2], "lm": [1]}, {"many": [1] * (MAX_TESTS + 6), "lm": [1]}],
    )
    graph = problem_of(case).fastest
    kernel = make_kernel_graph(graph)
    costs, work = make_costs(graph, kernel), make_workspace(kernel)
    # Groups by microbatch, then by module: the first microbatch's large forward stands behind all of the second's.
    forward, backward = np.array([0, 3, 1, 2, 4], dtype=np.int32), np.arange(5, dtype=np.int32)
    makespan = interleave(kernel, costs, costs.worst, forward, backward, Policy(both), work)
    twin = naive.interleave(graph, costs.worst.tolist(), forward.tolist(), backward.tolist(), Policy(both))
    assert work.order.tolist() == twin.order[0]
    assert work.start.tolist() == twin.start
    assert makespan == twin.makespan
    large = np.flatnonzero((graph.microbatch == 0) & (graph.kind == 0))[1]
    before = graph.microbatch[twin.order[0][: twin.order[0].index(large)]].tolist()
    assert 0 < before.count(1) <= 6


def test_gives_up_only_above_the_cutoff():
    graph = problem_of(vlm_case(num_microbatches=8, num_ranks=3)).fastest
    kernel = make_kernel_graph(graph)
    costs, work = make_costs(graph, kernel), make_workspace(kernel)
    limit = np.full(3, UNLIMITED)
    rng = np.random.default_rng(0)
    gave_up = 0
    for _ in range(100):
        forward, backward = permutations(kernel, rng)
        makespan = interleave(kernel, costs, limit, forward, backward, Policy(), work)
        for cutoff in (makespan - 1, makespan, makespan + 1):
            value = interleave_kernel(kernel, costs, limit, forward, backward, Policy().array(), cutoff, work)
            # Below the makespan it may still return it, when only the last task shows the excess.
            assert value == makespan or (value == NEVER and cutoff < makespan)
            gave_up += value == NEVER
    assert gave_up > 0


def test_a_limit_below_the_largest_microbatch_is_refused():
    graph = problem_of(vlm_case()).fastest
    kernel = make_kernel_graph(graph)
    costs, work = make_costs(graph, kernel), make_workspace(kernel)
    forward = np.arange(kernel.num_forward_groups, dtype=np.int32)
    backward = np.arange(len(kernel.group_unit) - kernel.num_forward_groups, dtype=np.int32)
    with pytest.raises(AssertionError):
        interleave(kernel, costs, costs.worst - 1, forward, backward, Policy(), work)
    with pytest.raises(AssertionError):
        interleave(kernel, costs, costs.worst, forward[1:], backward, Policy(), work)


@settings(max_examples=100)
@given(cases(), st.booleans(), st.integers(0, 2**32 - 1))
def test_times_of_any_order_equal_the_twin(case, split_backward, seed):
    graph = problem_of(case, split_backward=split_backward).fastest
    rng = np.random.default_rng(seed)
    order = [rng.permutation(np.flatnonzero(graph.rank == rank)).tolist() for rank in range(graph.num_ranks)]
    if rng.random() < 0.7:
        # Sorted by heads an order is mostly possible; shuffled it mostly deadlocks.
        head, _ = paths_ns(graph)
        order = [sorted(tasks, key=lambda task: (head[task], graph.kind[task], task)) for tasks in order]
    schedule = time_order(graph, [np.array(tasks, np.int32) for tasks in order])
    twin = naive.earliest_times(graph, order)
    assert (schedule is None) == (twin is None)
    if schedule is not None:
        assert schedule.start_ns.tolist() == twin


@settings(max_examples=50)
@given(cases(), st.booleans())
def test_longest_paths_equal_the_twin(case, split_backward):
    graph = problem_of(case, split_backward=split_backward).fastest
    for found, expected in zip(paths_ns(graph), naive.longest_paths(graph), strict=True):
        assert found.tolist() == expected.tolist()
