"""Lowering equals its slow twin, keeps every rule of the program, never deadlocks, and reports orders that cannot run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.program.dry_run import check_program, dry_run
from megatron_dip.program.lower import lower
from megatron_dip.program.messages import make_messages
from megatron_dip.program.one_queue import program_makespan
from megatron_dip.program.posting import TASK, run_orders
from megatron_dip.program.program import NONE, ProgramError
from megatron_dip.schedule.result import time_order
from megatron_dip.spec.tasks import TaskGraph
from tests.program.graphs import build_graph, random_graph, random_order
from tests.program.naive import naive_dry_run, naive_launches, naive_lower


def _coarse(graph: TaskGraph) -> TaskGraph:
    """The same with many tasks that take and messages that travel no time, or equally long."""
    return dataclasses.replace(graph, duration_ns=graph.duration_ns // 700_000, dep_lag_ns=graph.dep_lag_ns // 20_000)


def _slow_messages(graph: TaskGraph) -> TaskGraph:
    """The same with messages that travel as long as tasks take: channels are seldom free."""
    return dataclasses.replace(graph, dep_lag_ns=graph.dep_lag_ns * 40)


shapes = st.sampled_from([lambda graph: graph, _coarse, _slow_messages])


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 10), shapes)
@settings(max_examples=60, deadline=None)
def test_lowering_equals_its_slow_twin(seed: int, num_ranks: int, send_slack: int, shape) -> None:
    graph = shape(random_graph(seed, num_ranks))
    order = random_order(graph, seed + 1)
    program = lower(graph, order, send_slack=send_slack)
    got = [
        [
            (action.op, int(program.stage[a]), -1) if program.stage[a] != NONE else (action.op, int(program.message[a]), int(program.peer[a]))
            for a in range(first, last)
            for action in [program.action(a)]
        ]
        for first, last in zip(program.action_offset[:-1], program.action_offset[1:], strict=True)
    ]
    assert got == naive_lower(graph, [row.tolist() for row in order], send_slack)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 4), shapes)
@settings(max_examples=60, deadline=None)
def test_the_line_of_any_orders_equals_its_slow_twin(seed: int, num_ranks: int, swaps: int, shape) -> None:
    """Also where the orders contradict the dependencies, up to where every rank stands."""
    graph = shape(random_graph(seed, num_ranks))
    order = random_order(graph, seed + 1)
    rng = np.random.default_rng(seed)
    for _ in range(swaps):
        row = order[int(rng.integers(num_ranks))]
        if len(row):
            a, b = rng.integers(0, len(row), 2)
            row[a], row[b] = row[b], row[a]
    offset, flat = np.cumsum([0, *map(len, order)], dtype=np.int64), np.concatenate(order)
    launches = run_orders(graph, offset, flat, make_messages(graph, flat))
    line = naive_launches(graph, [row.tolist() for row in order])
    count = launches.num_launches
    assert count == len(line)
    got = zip(launches.start_ns[:count].tolist(), launches.kind[:count].tolist(), launches.item[:count].tolist(), strict=True)
    assert list(got) == [(launch.start, launch.kind, launch.item) for launch in line]
    launched = {launch.item for launch in line if launch.kind == 2}
    assert (launches.next_index - offset[:-1]).tolist() == [sum(int(task) in launched for task in row) for row in order]


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 10), shapes)
@settings(max_examples=300, deadline=None)
def test_every_lowered_program_passes_the_checks_and_the_dry_runs(seed: int, num_ranks: int, send_slack: int, shape) -> None:
    graph = shape(random_graph(seed, num_ranks))
    program = lower(graph, random_order(graph, seed + 1), send_slack=send_slack)
    check_program(program)
    dry_run(program)
    if seed % 10 == 0:
        assert naive_dry_run(program)
        assert naive_dry_run(program, one_queue=True)


@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(0, 10), shapes)
@settings(max_examples=150, deadline=None)
def test_posts_cost_nothing_without_the_limit_and_what_was_foreseen_with_it(seed: int, num_ranks: int, send_slack: int, shape) -> None:
    graph = shape(random_graph(seed, num_ranks))
    order = random_order(graph, seed + 1)
    program = lower(graph, order, send_slack=send_slack)
    flat, offset = np.concatenate(order), np.cumsum([0, *map(len, order)], dtype=np.int64)
    messages = make_messages(graph, flat)
    launches = run_orders(graph, offset, flat, messages)
    tasks = launches.kind == TASK
    foreseen = int((launches.start_ns[tasks] + graph.duration_ns[launches.item[tasks]]).max())
    schedule = time_order(graph, order)
    assert schedule is not None
    assert program_makespan(program, graph.duration_ns, messages.lag_ns, one_queue=False) == schedule.makespan_ns
    assert program_makespan(program, graph.duration_ns, messages.lag_ns, one_queue=True) == foreseen >= schedule.makespan_ns


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
