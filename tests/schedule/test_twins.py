"""Search and bound kernels against their twins: the same random numbers give the same moves, the same trees, the same results."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.schedule import anneal as anneal_module
from megatron_dip.schedule import interleave as interleave_module
from megatron_dip.schedule.anneal import anneal_kernel, make_state
from megatron_dip.schedule.bounds import _jackson, _stays
from megatron_dip.schedule.interleave import NEVER, UNLIMITED, Policy, make_costs, make_kernel_graph, make_workspace, refresh_costs
from megatron_dip.schedule.memory import _usage, make_tables, rank_problem
from megatron_dip.schedule.paper_search import _ALPHA, _BETA, COMPLETIONS, METHODS, make_paper_state
from megatron_dip.schedule.refine import make_refine_state, refine_kernel
from megatron_dip.schedule.result import _line_kernel, successors, time_order
from tests import naive
from tests.schedule.test_interleave import problem_of
from tests.schedule.test_memory import scheduled
from tests.strategies import cases, vlm_case


@settings(max_examples=100)
@given(st.integers(0, 2**64 - 1), st.integers(2, 40))
def test_random_numbers_and_moves(seed, size):
    state, twin = np.array([seed], dtype=np.uint64), naive.Random(seed)
    assert [float(anneal_module.uniform(state)) for _ in range(3)] == [twin.uniform() for _ in range(3)]
    assert [int(anneal_module.below(state, size)) for _ in range(3)] == [twin.below(size) for _ in range(3)]
    order = np.arange(size, dtype=np.int32)
    expected = order.tolist()
    for _ in range(5):
        anneal_module._step(order, state)
        expected = naive.step(expected, twin)
        assert order.tolist() == expected
    assert int(state[0]) == twin.state


class Small:
    """A problem small enough for the slow interleaver, with what the search kernels take."""

    def __init__(self, num_microbatches: int, seed: int, *, split_backward: bool = False) -> None:
        self.graph = problem_of(vlm_case(num_microbatches, 2), split_backward=split_backward).fastest
        self.kernel = make_kernel_graph(self.graph)
        self.costs, self.work = make_costs(self.graph, self.kernel), make_workspace(self.kernel)
        self.limit = self.costs.worst * 3 // 2
        self.num_forward = self.kernel.num_forward_groups
        self.count = len(self.kernel.group_unit)
        self.state = make_state(np.arange(self.num_forward, dtype=np.int32), np.arange(self.count - self.num_forward, dtype=np.int32), seed)
        self.twin = naive.Random(int(self.state.random[0]))

    def evaluate(self, forward: list[int], backward: list[int]) -> int:
        return naive.interleave(self.graph, self.limit.tolist(), forward, backward, Policy()).makespan


@pytest.mark.parametrize(("num_microbatches", "seed", "split_backward"), [(3, 0, False), (4, 1, False), (3, 2, True)])
def test_annealing_accepts_and_keeps_what_its_twin_does(num_microbatches, seed, split_backward):
    small = Small(num_microbatches, seed, split_backward=split_backward)
    steps, hot, cold = 40, 800.0, 30.0
    forward, backward = list(range(small.num_forward)), list(range(small.count - small.num_forward))
    best, best_forward, best_backward = naive.anneal(small.evaluate, forward, backward, small.twin, steps, hot, cold)
    taken = anneal_kernel(small.kernel, small.costs, small.limit, Policy().array(), small.work, small.state, steps, hot, cold, 0)
    assert taken == steps
    assert int(small.state.makespan[1]) == best
    assert small.state.best_forward.tolist() == best_forward
    assert small.state.best_backward.tolist() == best_backward
    assert int(small.state.random[0]) == small.twin.state


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("method", ["random", "dfs", "mcts"])
def test_the_papers_searches_meet_what_their_twins_meet(method, seed):
    small = Small(2, seed)
    steps = 60
    paper = make_paper_state(method, small.kernel)
    done = METHODS[method](small.kernel, small.costs, small.limit, Policy().array(), small.work, small.state, paper, steps)
    assert done >= steps
    if method == "random":
        expected = naive.random_search(small.evaluate, small.count, small.num_forward, small.twin, steps)
    elif method == "dfs":
        expected = naive.depth_first(small.evaluate, small.count, small.num_forward, steps)
    else:
        expected = naive.tree_search(small.evaluate, small.count, small.num_forward, small.twin, steps, COMPLETIONS, _ALPHA, _BETA)
        assert int(small.state.random[0]) == small.twin.state
    assert int(small.state.makespan[1]) == expected < NEVER


@settings(max_examples=60)
@given(cases(), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_needs_and_rests(case, split_backward, forward_only, seed):
    """Made for the fastest candidates, then refreshed for others and for any memory."""
    problem = problem_of(case, split_backward=split_backward, forward_only=forward_only)
    kernel = make_kernel_graph(problem.fastest)
    costs = make_costs(problem.fastest, kernel)
    rng = np.random.default_rng(seed)
    taken, given = (rng.integers(low, 100, problem.fastest.num_tasks) for low in (0, -100))
    any_memory = dataclasses.replace(problem.fastest, mem_start_bytes=taken, mem_end_bytes=given)
    for graph in (problem.fastest, problem.graph(problem.leanest()), any_memory):
        costs.duration[:], costs.mem_start[:], costs.mem_end[:] = graph.duration_ns, graph.mem_start_bytes, graph.mem_end_bytes
        refresh_costs(kernel, costs)
        worst, rest = naive.needs(graph)
        assert costs.worst.tolist() == worst
        assert costs.rest.tolist() == rest
        assert list(zip(costs.need.tolist(), costs.extra.tolist(), strict=True)) == naive.unit_needs(graph)


@settings(max_examples=60)
@given(cases(), st.booleans(), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_the_line_of_tasks(case, split_backward, redirected, seed):
    """Redirected dependencies mostly close a cycle: the line ends before it."""
    graph = problem_of(case, split_backward=split_backward).fastest
    rng, dep_task = np.random.default_rng(seed), graph.dep_task.copy()
    for _ in range(min(redirected, len(dep_task))):
        dep_task[rng.integers(len(dep_task))] = rng.integers(graph.num_tasks)
    graph = dataclasses.replace(graph, dep_task=dep_task)
    line = np.zeros(graph.num_tasks, dtype=np.int32)
    placed = _line_kernel(graph.dep_offset, *successors(graph), line)
    assert line[:placed].tolist() == naive.first_come_line(graph)


@settings(max_examples=60)
@given(cases(), st.booleans(), st.booleans())
def test_how_long_pairs_hold_their_memory(case, split_backward, forward_only):
    problem = problem_of(case, split_backward=split_backward, forward_only=forward_only)
    pairs = zip(problem.pair_forward.tolist(), problem.pair_backward.tolist(), strict=True)
    stays = naive.mirrored_stays(problem.fastest, {forward: backward for forward, backward in pairs if backward >= 0})
    assert dict(zip(problem.pair_forward.tolist(), _stays(problem).tolist(), strict=True)) == stays


@settings(max_examples=40)
@given(st.sampled_from([1, 63, 64, 65, 200, 5000]), st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_rows_of_bits(size, row, seed):
    """What is available on a rank, as a set of positions."""
    rng = np.random.default_rng(seed)
    words = size // 64 + 1
    high_words = words // 64 + 1
    bits, summary = np.zeros(3 * words, dtype=np.uint64), np.zeros(3 * high_words, dtype=np.uint64)
    available: set[int] = set()
    for _ in range(60):
        if available and rng.random() < 0.45:
            position = int(rng.choice(sorted(available)))
            interleave_module._unmark(bits, summary, row, words, high_words, position)
            available.remove(position)
        else:
            position = int(rng.integers(size))
            interleave_module._mark(bits, summary, row, words, high_words, position)
            available.add(position)
        assert interleave_module._first(bits, summary, row, words, high_words) == min(available, default=-1)
        after = int(rng.integers(size))
        expected = min((other for other in available if other > after), default=-1)
        assert interleave_module._next(bits, row * words, words, after) == expected
    assert not bits.reshape(3, -1)[[other for other in range(3) if other != row]].any()


@settings(max_examples=40)
@given(cases(), st.integers(0, 2**32 - 1))
def test_the_first_forward_of_a_unit(case, seed):
    graph = problem_of(case).fastest
    kernel, rng = make_kernel_graph(graph), np.random.default_rng(seed)
    work = make_workspace(kernel)
    forward = rng.permutation(kernel.num_forward_groups).astype(np.int32)
    backward = np.arange(len(kernel.group_unit) - kernel.num_forward_groups, dtype=np.int32)
    interleave_module._lay_out(kernel, forward, backward, work.position, work.segment_at, work.group_base)
    # The twin of positions: the groups' segments one behind the other.
    groups = naive.groups(graph, 0)
    places = [task // graph.num_ranks for number in forward for task in groups[number]]
    assert work.segment_at[: len(places)].tolist() == places
    assert work.position[places].tolist() == list(range(len(places)))
    words = len(places) // 64 + 1
    bits, summary = np.zeros(words, dtype=np.uint64), np.zeros(words // 64 + 1, dtype=np.uint64)
    marked = [place for place in range(len(places)) if rng.random() < 0.5]
    for place in marked:
        interleave_module._mark(bits, summary, 0, words, len(summary), place)
    for number, unit in enumerate(sorted(set(graph.microbatch.tolist()))):
        mine = [place for place in marked if graph.microbatch[places[place] * graph.num_ranks] == unit]
        assert interleave_module._first_of_unit(kernel, bits, 0, work.group_base, number) == min(mine, default=-1)


@settings(max_examples=40)
@given(st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=60), st.integers(0, 5))
def test_the_heap_of_arrivals(times, base):
    """None takes the earliest away. Of equal times any may come first; none is lost."""
    heap_time, heap_task = np.zeros(base + 60, dtype=np.int64), np.zeros(base + 60, dtype=np.int32)
    inside: list[tuple[int, int]] = []
    for task, time in enumerate(times):
        if time is not None:
            interleave_module._heap_push(heap_time, heap_task, base, len(inside), time, task)
            inside.append((time, task))
        elif inside:
            first = (int(heap_time[base]), int(heap_task[base]))
            assert first[0] == min(inside)[0]
            inside.remove(first)
            interleave_module._heap_pop(heap_time, heap_task, base, len(inside))
        held = zip(heap_time[base : base + len(inside)].tolist(), heap_task[base : base + len(inside)].tolist(), strict=True)
        assert sorted(held) == sorted(inside)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=12))
def test_the_preemptive_bound(tasks):
    tasks = sorted(tasks)
    head, duration, tail = (np.array(column, dtype=np.int64) for column in zip(*tasks, strict=True))
    assert _jackson(head, duration, tail) == naive.preemptive_bound(head.tolist(), duration.tolist(), tail.tolist())


@settings(max_examples=80)
@given(cases(), st.booleans(), st.integers(0, 500), st.integers(0, 2**32 - 1))
def test_the_points_of_a_rank_hold_its_peak(case, split_backward, limit, seed):
    """The largest excess over the points' room is the peak of the whole rank less its limit, for any choice."""
    problem, orders = scheduled(case, split_backward)
    rng = np.random.default_rng(seed)
    choice = (rng.integers(0, 1000, problem.num_pairs) % problem.num_candidates[problem.pair_class]).astype(np.int32)
    tables = make_tables(problem)
    peaks = naive.peak_memory(problem.graph(choice), [order.tolist() for order in orders])
    for rank, order in enumerate(orders):
        points = rank_problem(tables, order, np.int64(limit))
        excess = int(_usage(tables, points, choice[points.pair], np.empty(len(points.room), dtype=np.int64)))
        assert max(excess, -limit) == peaks[rank] - limit


@settings(max_examples=60)
@given(cases(max_microbatches=3), st.booleans(), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_what_refinement_keeps_up_equals_what_its_orders_say(case, split_backward, steps, seed):
    """Starts, tails and held bytes, changed from move to move, against the same made anew from the orders that it stands at."""
    problem, orders = scheduled(case, split_backward)
    graph = problem.fastest
    limit = np.array(naive.peak_memory(graph, [order.tolist() for order in orders]), dtype=np.int64)
    state = make_refine_state(graph, orders)
    refine_kernel(state, limit, np.array([seed], dtype=np.uint64), steps, 0)
    stands = [row.tolist() for row in state.order.reshape(graph.num_ranks, -1)]
    assert state.place[state.order].tolist() == list(range(graph.num_tasks))
    assert state.start.tolist() == naive.earliest_times(graph, stands)
    assert state.tail.tolist() == naive.tails(graph, stands)
    assert state.held.tolist() == naive.held_before(graph, stands)


def test_limits_of_the_small_problem_bind():
    """Else the twins above would never see the admission check."""
    small = Small(4, 0)
    free = naive.interleave(small.graph, [int(UNLIMITED)] * 2, [0, 1, 2, 3, 4, 5, 6], list(range(small.count - small.num_forward)), Policy())
    schedule = time_order(small.graph, [np.array(order, dtype=np.int32) for order in free.order])
    assert schedule is not None
    assert any(peak > most for peak, most in zip(schedule.peak_memory([0, 0]), small.limit.tolist(), strict=True))
