"""Lowering equals its slow twin, keeps every rule of the program, never deadlocks, and reports orders that cannot run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.program.dry_run import check_program, dry_run
from megatron_dip.program.lower import _sequence, lower
from megatron_dip.program.program import NONE, ProgramError
from tests.program.graphs import build_graph, random_graph, random_order
from tests.program.naive import naive_dry_run, naive_lower, naive_sequence

cases = given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 25), st.integers(0, 10))


@cases
@settings(max_examples=60, deadline=None)
def test_lowering_equals_its_slow_twin(seed: int, num_ranks: int, lookahead: int, send_slack: int) -> None:
    graph = random_graph(seed, num_ranks)
    order = random_order(graph, seed + 1)
    program = lower(graph, order, lookahead=lookahead, send_slack=send_slack)
    got = [
        [
            (action.op, int(program.stage[a]), -1) if program.stage[a] != NONE else (action.op, int(program.message[a]), int(program.peer[a]))
            for a in range(first, last)
            for action in [program.action(a)]
        ]
        for first, last in zip(program.action_offset[:-1], program.action_offset[1:], strict=True)
    ]
    assert got == naive_lower(graph, [row.tolist() for row in order], lookahead, send_slack)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 4), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_line_of_any_orders_equals_its_slow_twin(seed: int, num_ranks: int, swaps: int, coarse: bool) -> None:
    """Also where the orders contradict the dependencies, up to where every rank stands, and where many tasks start at once."""
    graph = random_graph(seed, num_ranks)
    if coarse:
        graph = dataclasses.replace(graph, duration_ns=graph.duration_ns // 700_000, dep_lag_ns=graph.dep_lag_ns // 40_000)
    order = random_order(graph, seed + 1)
    rng = np.random.default_rng(seed)
    for _ in range(swaps):
        row = order[int(rng.integers(num_ranks))]
        if len(row):
            a, b = rng.integers(0, len(row), 2)
            row[a], row[b] = row[b], row[a]
    offset = np.cumsum([0, *map(len, order)], dtype=np.int64)
    next_index, sequence = np.empty(num_ranks, np.int64), np.full(graph.num_tasks, NONE, np.int64)
    placed = _sequence(
        graph.rank, graph.duration_ns, graph.dep_offset, graph.dep_task, graph.dep_lag_ns, offset, np.concatenate(order), next_index, sequence
    )
    place = naive_sequence(graph, [row.tolist() for row in order])
    assert placed == len(place)
    assert sequence.tolist() == [place.get(task, NONE) for task in range(graph.num_tasks)]
    assert (next_index - offset[:-1]).tolist() == [sum(int(task) in place for task in row) for row in order]


@cases
@settings(max_examples=300, deadline=None)
def test_every_lowered_program_passes_the_checks_and_the_dry_run(seed: int, num_ranks: int, lookahead: int, send_slack: int) -> None:
    graph = random_graph(seed, num_ranks)
    program = lower(graph, random_order(graph, seed + 1), lookahead=lookahead, send_slack=send_slack)
    check_program(program)
    dry_run(program)
    if seed % 10 == 0:
        assert naive_dry_run(program)


def test_inputs_and_outputs_describe_every_data_edge() -> None:
    graph = build_graph(2, [1, 2], [[2, 1], [0, 1]])
    program = lower(graph, random_order(graph, 3))
    producers: dict[int, list[int]] = {}
    for stage, tags in program.inputs().items():
        producers.setdefault(stage, []).extend(program.outputs()[tag] for tag in tags)
    for stage, stages in program.local_inputs().items():
        producers.setdefault(stage, []).extend(stages)
    for task in range(graph.num_tasks):
        edges = range(graph.dep_offset[task], graph.dep_offset[task + 1])
        assert sorted(producers.get(task, [])) == sorted(int(graph.dep_task[e]) for e in edges if graph.dep_is_data[e])


def test_one_rank_needs_no_messages() -> None:
    graph = build_graph(1, [1, 1], [[2, 1]])
    program = lower(graph, random_order(graph, 0))
    assert program.num_messages == 0
    assert len(program.op) == graph.num_tasks


def test_an_order_against_the_dependencies_is_reported_with_the_grid() -> None:
    graph = build_graph(2, [1, 1], [[1, 1]])
    order = [row[::-1].copy() for row in random_order(graph, 0)]
    with pytest.raises(ProgramError, match=r"contradict the dependencies[\s\S]*rank 0 +\| rank 1[\s\S]*> [FBW]\d+ <"):
        lower(graph, order)


@pytest.mark.parametrize("change", ["twice", "missing", "foreign", "unknown"])
def test_orders_that_do_not_hold_each_task_once_on_its_rank_are_refused(change: str) -> None:
    graph = build_graph(2, [1, 1], [[1, 1]])
    order = random_order(graph, 0)
    if change == "twice":
        order[0] = np.append(order[0], order[0][0])
    elif change == "missing":
        order[0] = order[0][:-1]
    elif change == "foreign":
        order[0], order[1] = order[1], order[0]
    else:
        order[0][0] = graph.num_tasks
    with pytest.raises(ProgramError, match="task"):
        lower(graph, order)
