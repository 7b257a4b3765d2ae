"""The memory choice: it fits at every instant, its bound holds, and exact solutions are hardly better."""

from __future__ import annotations

import itertools
import sys

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.online import split
from megatron_dip.schedule.exact_memory import choose_exactly, load_solver, with_exact_memory
from megatron_dip.schedule.graph import StageProblem, build_problem
from megatron_dip.schedule.interleave import UNLIMITED, Policy, interleave, make_costs, make_kernel_graph, make_workspace
from megatron_dip.schedule.memory import (
    ITERATIONS,
    MemoryTables,
    RankProblem,
    _exchange,
    _give_back,
    _make_hulls,
    _repair,
    _round,
    apply_choice,
    choose,
    choose_kernel,
    make_tables,
    rank_problem,
)
from megatron_dip.schedule.result import time_order
from megatron_dip.schedule.search import SearchOptions, SearchResult, search
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.profile import ModuleProfile, Strategy
from tests import naive, naive_memory
from tests.strategies import Case, arrangements, cases, grid, module, profile, vlm_case


def scheduled(case: Case, split_backward: bool) -> tuple[StageProblem, list[np.ndarray]]:
    """The problem and orders that were made without a limit."""
    costs = case.costs()
    subs = split(case.microbatches, case.model, case.partition, costs)
    problem = build_problem(case.model, case.partition, subs, costs, split_backward=split_backward)
    kernel = make_kernel_graph(problem.fastest)
    work = make_workspace(kernel)
    interleave(
        kernel, make_costs(problem.fastest, kernel), np.full(problem.fastest.num_ranks, UNLIMITED),
        np.arange(kernel.num_forward_groups, dtype=np.int32),
        np.arange(len(kernel.group_unit) - kernel.num_forward_groups, dtype=np.int32), Policy(), work,
    )
    return problem, work.orders()


def total_time(problem: StageProblem, choice: np.ndarray, rank: int) -> int:
    mine = np.flatnonzero(problem.fastest.rank[: problem.num_pairs] == rank)
    kinds = problem.pair_class[mine]
    return int((problem.forward_ns[kinds, choice[mine]] + problem.backward_ns[kinds, choice[mine]]).sum())


@settings(max_examples=150)
@given(cases(max_microbatches=6), st.booleans(), st.floats(0, 1))
def test_fits_at_every_instant(case, split_backward, share):
    problem, orders = scheduled(case, split_backward)
    tables = make_tables(problem)
    fastest = naive.peak_memory(problem.fastest, [order.tolist() for order in orders])
    leanest = naive.peak_memory(problem.graph(problem.leanest()), [order.tolist() for order in orders])
    limit = np.array([int(low + share * (high - low)) for low, high in zip(leanest, fastest, strict=True)], dtype=np.int64)
    choice = np.zeros(problem.num_pairs, dtype=np.int32)
    for rank, order in enumerate(orders):
        total, bound = choose_kernel(tables, order, limit[rank], choice, 60)
        assert bound <= total == total_time(problem, choice, rank)
        if share == 1.0:
            assert (choice[problem.fastest.rank[: problem.num_pairs] == rank] == 0).all()
    peaks = naive.peak_memory(problem.graph(choice), [order.tolist() for order in orders])
    assert all(peak <= most for peak, most in zip(peaks, limit.tolist(), strict=True))
    if any(low > 0 for low in leanest):
        before = choice.copy()
        assert not choose(tables, orders, np.array(leanest, dtype=np.int64) - 1, choice)
        rank = next(rank for rank, low in enumerate(leanest) if low > 0)
        assert choose_kernel(tables, orders[rank], np.int64(leanest[rank] - 1), before, 60)[0] == -1


@settings(max_examples=60)
@given(cases(), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_choice_is_written_as_the_graph_has_it(case, split_backward, seed):
    problem, _ = scheduled(case, split_backward)
    rng = np.random.default_rng(seed)
    choice = (rng.integers(0, 1000, problem.num_pairs) % problem.num_candidates[problem.pair_class]).astype(np.int32)
    graph = problem.graph(choice)
    written = [problem.fastest.duration_ns.copy(), np.zeros(graph.num_tasks, np.int64), np.zeros(graph.num_tasks, np.int64)]
    apply_choice(make_tables(problem), choice, *written)
    for found, expected in zip(written, (graph.duration_ns, graph.mem_start_bytes, graph.mem_end_bytes), strict=True):
        assert found.tolist() == expected.tolist()


@numba.njit
def kernel_sort(values):
    """The sort that the kernel uses, which of equal values comes first is its own affair."""
    return np.argsort(values)


def twin_sort(values: list[float]) -> list[int]:
    return kernel_sort(np.array(values)).tolist()


def lone_rank(num_pairs: int, seed: int) -> tuple[MemoryTables, np.ndarray]:
    """One rank's pairs and an order of their tasks, any that the formats allow: pairs without a backward, whole and split, and other bytes.

    Small numbers, so that equal rates and costs are frequent; candidates may hold equal bytes or take equal time. Some have their times
    in large units: a sum of rounded prices then shows in the bound.
    """
    rng = np.random.default_rng(seed)
    num_classes, width, unit = int(rng.integers(1, 4)), int(rng.integers(2, 7)), int(rng.choice([1, 1, 10**6]))
    counts = rng.integers(1 + (rng.random(num_classes) < 0.8), width + 1).astype(np.int32)
    # Rows are padded with their last candidate.
    steps = np.arange(1, width) < counts[:, None]
    time = unit * (5 + np.pad(np.cumsum(rng.integers(0, 20, steps.shape) * steps, axis=1), ((0, 0), (1, 0))))
    held = np.pad(np.cumsum(rng.integers(0, int(rng.choice([3, 20])), steps.shape) * steps, axis=1), ((0, 0), (1, 0)))
    held = held[:, -1:] - held + rng.integers(0, 4, (num_classes, 1))
    num_tasks = rng.choice([1, 2, 2, 3], num_pairs)
    order = np.repeat(np.arange(num_pairs), num_tasks)
    pair_of_task = rng.permutation(order).astype(np.int32) if rng.random() < 0.5 else order.astype(np.int32)
    for _ in range(num_pairs):
        # Else pairs are live one after the other.
        one, other = rng.integers(0, len(order), 2)
        pair_of_task[[one, other]] = pair_of_task[[other, one]]
    tasks = np.full((3, num_pairs), -1, dtype=np.int32)
    for task, pair in enumerate(pair_of_task):
        tasks[int((tasks[:, pair] >= 0).sum()), pair] = task
    start, end = np.zeros(len(order), dtype=np.int64), np.zeros(len(order), dtype=np.int64)
    for giver, size in zip(rng.permutation(tasks[0])[: rng.integers(0, 3)], rng.integers(1, 9, 2), strict=False):
        # Held encoder outputs: from a forward's start to the end of what runs behind it.
        start[giver] += size
        end[rng.integers(giver, len(order))] -= size
    tables = MemoryTables(
        num_ranks=1, pair_of_task=pair_of_task, pair_forward=tasks[0], pair_backward=tasks[1], pair_weight=tasks[2],
        pair_class=rng.integers(0, num_classes, num_pairs).astype(np.int32), num_candidates=counts, forward_ns=time // 3,
        backward_ns=time - time // 3, held_bytes=held, fixed_start=start, fixed_end=end,
    )
    return tables, np.arange(len(order), dtype=np.int32)


lone_ranks = st.builds(lone_rank, st.integers(1, 12), st.integers(0, 2**32 - 1))


def equals_its_twin(tables: MemoryTables, order: np.ndarray, share: float, iterations: int) -> None:
    """Points and choice at a limit that lies so far between what the leanest and the fastest candidates need; below 0 nothing fits."""
    unlimited = naive_memory.rank_of(tables, order.tolist(), 0)
    low, high = (max(unlimited.over([candidate * (len(pair.candidates) - 1) for pair in unlimited.pairs]), default=0) for candidate in (1, 0))
    limit = int(low + share * (high - low)) if share >= 0 else low - 1
    found, expected = rank_problem(tables, order, np.int64(limit)), naive_memory.rank_of(tables, order.tolist(), limit)
    assert [list(row) for row in zip(found.pair, found.first, found.half, found.last, strict=True)] == [
        [pair.number, pair.first, pair.half, pair.last] for pair in expected.pairs
    ]
    assert found.room.tolist() == expected.room
    choice = np.full(len(tables.pair_class), -7, dtype=np.int32)
    total, bound = choose_kernel(tables, order, np.int64(limit), choice, iterations)
    result = naive_memory.choose(tables, order.tolist(), limit, iterations, twin_sort)
    if result is None:
        assert share < 0
        assert (total, bound) == (-1, -1)
        assert (choice == -7).all()
        return
    chosen, expected_total, expected_bound = result
    assert {pair: candidate for pair, candidate in enumerate(choice.tolist()) if candidate != -7} == chosen
    assert (total, bound) == (expected_total, expected_bound)


shares = st.integers(-1, 20).map(lambda share: share / 20)


@settings(max_examples=150)
@given(lone_ranks, shares, st.sampled_from([0, 1, 13, 60, ITERATIONS]))
def test_a_lone_ranks_choice_is_its_twins(lone, share, iterations):
    tables, order = lone
    equals_its_twin(tables, order, share, iterations)


@settings(max_examples=60)
@given(st.one_of(cases(max_microbatches=5), arrangements()), st.booleans(), shares, st.sampled_from([60, ITERATIONS]))
def test_choices_are_their_twins(case, split_backward, share, iterations):
    problem, orders = scheduled(case, split_backward)
    for order in orders:
        equals_its_twin(make_tables(problem), order, share, iterations)


@pytest.mark.parametrize("split_backward", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 0.95])
def test_choices_of_many_equal_pairs_are_their_twins(split_backward, share):
    problem, orders = scheduled(vlm_case(num_microbatches=12, num_ranks=2), split_backward)
    equals_its_twin(make_tables(problem), orders[0], share, 60)


@settings(max_examples=400)
@given(lone_ranks, st.floats(0, 1), st.integers(0, 2**32 - 1), st.integers(0, 300))
def test_steps_from_anywhere_are_their_twins(lone, share, seed, looks):
    """Rounding, repair, giving back and exchanges from any choice, exchanges also with looks that run out on the way."""
    tables, order = lone
    rank = naive_memory.rank_of(tables, order.tolist(), 0)
    top = np.array([len(pair.candidates) - 1 for pair in rank.pairs], dtype=np.int32)
    low, high = max(rank.over(top.tolist())), max(rank.over([0] * len(top)))
    limit = int(low + share * (high - low))
    rank, problem = naive_memory.rank_of(tables, order.tolist(), limit), rank_problem(tables, order, np.int64(limit))
    use = np.empty(len(problem.room), dtype=np.int64)
    # Halves: often as near to one candidate as to another.
    mean = np.random.default_rng(seed).integers(0, 160, len(top)) / 2
    trial, expected = np.empty_like(top), naive_memory.rounded(rank, mean.tolist())
    _round(tables, problem, mean, top, trial)
    assert trial.tolist() == expected
    _repair(tables, problem, trial, top, use)
    expected = naive_memory.repair(rank, expected)
    assert trial.tolist() == expected
    # From the leanest choices there is more to give back and to exchange.
    for found in (trial, naive_memory.repair(rank, (top - np.minimum(top, seed % 3)).tolist())):
        found = np.array(found, dtype=np.int32)
        before = found.tolist()
        _give_back(tables, problem, found, use)
        assert found.tolist() == naive_memory.give_back(rank, before, twin_sort)
        found = np.array(before, dtype=np.int32)
        expected, won = naive_memory.exchange(rank, before, looks)
        assert _exchange(tables, problem, found, use, looks) == won
        assert found.tolist() == expected


@settings(max_examples=60)
@given(lone_ranks, st.integers(0, 2**32 - 1))
def test_a_choice_is_written_as_its_twin_writes_it(lone, seed):
    tables, order = lone
    choice = (np.random.default_rng(seed).integers(0, 1000, len(tables.pair_class)) % tables.num_candidates[tables.pair_class]).astype(np.int32)
    duration, start, end = (np.full(len(order), -5, dtype=np.int64) for _ in range(3))
    apply_choice(tables, choice, duration, start, end)
    expected = naive_memory.written(tables, choice.tolist())
    assert sorted(expected) == list(range(len(order)))
    for task, (longs, at_start, at_end) in expected.items():
        assert (duration[task], start[task], end[task]) == (-5 if longs is None else longs, at_start, at_end)


def test_equal_bytes_after_rounding_are_no_obstacle():
    """Layers of one byte that the lean strategy makes a quarter: two of their mixes hold four bytes."""
    costs = profile({"lm": ModuleProfile(
        num_layers=10, layer=grid(10, 10, 10, 1), strategies={"none": Strategy(), "full": Strategy(extra_forward=1.0, activation=0.25)},
    )})
    model = ModelSpec(modules=[module("lm", 10, role="backbone")])
    case = Case(model=model, profile=costs, partition=even_partition(model, 2, {}, {"lm": 1}), microbatches=[{"lm": [1]}] * 4)
    problem, orders = scheduled(case, False)
    assert (np.diff(problem.held_bytes[0]) == 0).any()
    for share in (0.0, 0.3, 0.7):
        equals_its_twin(make_tables(problem), orders[0], share, ITERATIONS)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=9), st.floats(0, 20), st.floats(0, 450))
def test_hulls_hold_the_best_at_every_price_and_means_are_rounded_to_the_next_candidate(steps, per_byte, mean):
    """One pair whose candidates take ever more time and hold ever less: (ns more, bytes less) from one to the next."""
    time = 1000 + np.cumsum([more for more, _ in steps])
    held = 500 - np.cumsum([less for _, less in steps])
    none = np.zeros(1, dtype=np.int32)
    tables = MemoryTables(
        num_ranks=1, pair_of_task=none, pair_forward=none, pair_backward=none, pair_weight=none, pair_class=none,
        num_candidates=np.array([len(steps)], dtype=np.int32), forward_ns=time[None] // 3, backward_ns=(time - time // 3)[None],
        held_bytes=held[None], fixed_start=np.zeros(1, dtype=np.int64), fixed_end=np.zeros(1, dtype=np.int64),
    )
    problem, top = RankProblem(none, none, none, none, np.zeros(1, dtype=np.int64)), np.array([len(steps) - 1], dtype=np.int32)
    hulls = _make_hulls(tables, problem, top)
    size = int(hulls.size[0])
    on_hull = (hulls.time[0, :size] + per_byte * hulls.held[0, :size]).tolist()
    assert min(on_hull) == pytest.approx(min((time + per_byte * held).tolist()), rel=1e-12)
    # Costs fall, then rise: what the kernel's walk along a hull relies on.
    least = on_hull.index(min(on_hull))
    assert all(before >= after - 1e-6 for before, after in itertools.pairwise(on_hull[: least + 1]))
    assert all(before <= after + 1e-6 for before, after in itertools.pairwise(on_hull[least:]))
    trial = np.zeros(1, dtype=np.int32)
    _round(tables, problem, np.array([mean]), top, trial)
    assert abs(held[trial[0]] - mean) == min(abs(held - mean))


def test_best_of_all_choices_on_a_tiny_case():
    problem, orders = scheduled(vlm_case(num_microbatches=2, num_ranks=2), False)
    tables = make_tables(problem)
    order = orders[0]
    mine = np.flatnonzero(problem.fastest.rank[: problem.num_pairs] == 0)
    high = naive.peak_memory(problem.fastest, [order.tolist() for order in orders])[0]
    low = naive.peak_memory(problem.graph(problem.leanest()), [order.tolist() for order in orders])[0]
    for limit in (low, (2 * low + high) // 3, (low + 2 * high) // 3):
        best = UNLIMITED
        for candidates in itertools.product(*(range(problem.num_candidates[kind]) for kind in problem.pair_class[mine])):
            choice = np.zeros(problem.num_pairs, dtype=np.int32)
            choice[mine] = candidates
            if naive.peak_memory(problem.graph(choice), [order.tolist() for order in orders])[0] <= limit:
                best = min(best, total_time(problem, choice, 0))
        choice = np.zeros(problem.num_pairs, dtype=np.int32)
        total, bound = choose_kernel(tables, order, np.int64(limit), choice, ITERATIONS)
        assert bound <= best <= total <= 1.05 * best
        assert choose_exactly(tables, order, limit, choice) == best


@pytest.mark.parametrize("split_backward", [False, True])
def test_gap_to_the_exact_choice_is_small(split_backward):
    """Four fifths of the memory that the fastest candidates would take, 100 stage pairs a rank."""
    problem, orders = scheduled(vlm_case(num_microbatches=40, num_ranks=2), split_backward)
    tables = make_tables(problem)
    choice = np.zeros(problem.num_pairs, dtype=np.int32)
    high = naive.peak_memory(problem.fastest, [order.tolist() for order in orders])
    for rank in range(2):
        limit = high[rank] * 4 // 5
        total, bound = choose_kernel(tables, orders[rank], np.int64(limit), choice, ITERATIONS)
        exact = choose_exactly(tables, orders[rank], limit, choice, time_limit_s=20.0, gap=1e-5)
        assert bound <= exact * (1 + 1e-5)
        assert exact <= total * (1 + 1e-5)
        assert total <= 1.002 * exact


@pytest.mark.parametrize("split_backward", [False, True])
def test_the_exact_option_is_never_worse_and_fits(split_backward):
    problem, orders = scheduled(vlm_case(num_microbatches=12, num_ranks=2), split_backward)
    limit = np.array([peak * 3 // 4 for peak in naive.peak_memory(problem.fastest, [order.tolist() for order in orders])], dtype=np.int64)
    found = search(problem, limit, SearchOptions(evaluations=30))
    better = with_exact_memory(problem, limit, found)
    assert better.schedule.makespan_ns <= found.schedule.makespan_ns
    peaks = naive.peak_memory(better.schedule.graph, [order.tolist() for order in better.schedule.order])
    assert all(peak <= most for peak, most in zip(peaks, limit.tolist(), strict=True))
    assert better.schedule.graph.duration_ns.tolist() == problem.graph(better.choice).duration_ns.tolist()


def test_the_exact_choice_improves_a_lean_schedule():
    """Every pair at its leanest, though there is room: the exact choice takes it back."""
    problem, orders = scheduled(vlm_case(num_microbatches=6, num_ranks=2), False)
    schedule = time_order(problem.graph(problem.leanest()), orders)
    lean = SearchResult(schedule=schedule, choice=problem.leanest(), evaluations=1, priorities=np.arange(1), others=())
    limit = np.full(2, 10**6)
    assert with_exact_memory(problem, limit, lean).choice.tolist() == [0] * problem.num_pairs
    assert with_exact_memory(problem, np.full(2, UNLIMITED), lean) is lean


def test_no_choice_and_no_solver_are_said(monkeypatch):
    problem, orders = scheduled(vlm_case(num_microbatches=3, num_ranks=2), False)
    with pytest.raises(InputError, match="no choice of memory strategies"):
        choose_exactly(make_tables(problem), orders[0], 3, np.zeros(problem.num_pairs, dtype=np.int32))
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(InputError, match="highspy is not installed"):
        load_solver()
