# mypy: no-check-untyped-defs
"""Improves a schedule task by task: swaps neighbours on the critical path, one rank's order at a time.

In: a task graph and each rank's order. Out: orders that are at least as good. The interleaver never leaves a rank idle on purpose and
keeps groups together; this step is bound by neither, so on small problems it closes what the orders of priority leave open. One step
picks a random place of the critical path where a task starts the moment the one before it on its rank ends, swaps the two, times the
orders anew, and keeps the change by the Metropolis rule, drawn beforehand. Source of the neighbourhood: van Laarhoven, Aarts, Lenstra,
Job shop scheduling by simulated annealing (1992). A swap that would deadlock or exceed a rank's memory is not kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.anneal import below, uniform
from megatron_dip.schedule.result import successors
from megatron_dip.spec.tasks import TaskGraph


class RefineState(NamedTuple):
    """Letters: T tasks, E edges, P ranks, S tasks on a rank."""

    rank_size: int
    duration: NDArray[np.int64]
    """[T]"""
    mem_start: NDArray[np.int64]
    mem_end: NDArray[np.int64]
    dep_offset: NDArray[np.int32]
    dep_task: NDArray[np.int32]
    dep_lag: NDArray[np.int64]
    succ_offset: NDArray[np.int32]
    succ_task: NDArray[np.int32]
    order: NDArray[np.int32]
    """[P * S] current, rank by rank"""
    best_order: NDArray[np.int32]
    """[P * S]"""
    place: NDArray[np.int32]
    """[T] index into order"""
    start: NDArray[np.int64]
    """[T]"""
    waits: NDArray[np.int32]
    """[T] scratch"""
    stack: NDArray[np.int32]
    """[T] scratch"""


def make_refine_state(graph: TaskGraph, orders: list[NDArray[np.int32]]) -> RefineState:
    order = np.concatenate(orders).astype(np.int32)
    place = np.empty(graph.num_tasks, dtype=np.int32)
    place[order] = np.arange(graph.num_tasks)
    succ_offset, succ_task = successors(graph)
    return RefineState(
        rank_size=len(orders[0]), duration=graph.duration_ns, mem_start=graph.mem_start_bytes, mem_end=graph.mem_end_bytes,
        dep_offset=graph.dep_offset, dep_task=graph.dep_task, dep_lag=graph.dep_lag_ns, succ_offset=succ_offset, succ_task=succ_task,
        order=order, best_order=order.copy(), place=place, start=np.zeros(graph.num_tasks, dtype=np.int64),
        waits=np.zeros(graph.num_tasks, dtype=np.int32), stack=np.zeros(graph.num_tasks, dtype=np.int32),
    )


@numba.njit(nogil=True, cache=True)
def refine_kernel(state, limit, random, steps, hot, cold, bound):  # type: ignore[no-untyped-def]
    """Takes up to ``steps`` steps, cooling from ``hot`` to ``cold`` ns; returns the best makespan. Stops at ``bound``."""
    order, place, best_order = state.order, state.place, state.best_order
    current = _time(state)
    best = current
    best_order[:] = order
    temperature, cooling = hot, (cold / hot) ** (1.0 / max(1, steps))
    path = np.empty(len(order), dtype=np.int32)
    fresh = True
    length = 0
    for _ in range(steps):
        if best <= bound:
            break
        temperature *= cooling
        if fresh:
            length = _critical(state, current, path, random)
        if length == 0:
            # Another walk may find another critical path.
            continue
        fresh = False
        second = path[below(random, length)]
        index = place[second]
        first = order[index - 1]
        if not _fits(state, index, limit):
            continue
        order[index - 1], order[index] = second, first
        place[second], place[first] = index - 1, index
        value = _time(state)
        if value <= current - temperature * np.log(uniform(random)):
            current = value
            fresh = True
            if value < best:
                best = value
                best_order[:] = order
        else:
            order[index - 1], order[index] = first, second
            place[first], place[second] = index - 1, index
    return best


@numba.njit(nogil=True, cache=True)
def _time(state):  # type: ignore[no-untyped-def]
    """Writes start times; returns the makespan, or a very large number where the orders deadlock."""
    order, place, start, waits, stack = state.order, state.place, state.start, state.waits, state.stack
    size, makespan, done = 0, np.int64(0), 0
    for task in range(len(order)):
        waits[task] = state.dep_offset[task + 1] - state.dep_offset[task] + (1 if place[task] % state.rank_size > 0 else 0)
        if waits[task] == 0:
            stack[size] = task
            size += 1
    while size > 0:
        size -= 1
        task = stack[size]
        done += 1
        index = place[task]
        earliest = np.int64(0)
        if index % state.rank_size > 0:
            before = order[index - 1]
            earliest = start[before] + state.duration[before]
        for edge in range(state.dep_offset[task], state.dep_offset[task + 1]):
            other = state.dep_task[edge]
            earliest = max(earliest, start[other] + state.duration[other] + state.dep_lag[edge])
        start[task] = earliest
        makespan = max(makespan, earliest + state.duration[task])
        for edge in range(state.succ_offset[task], state.succ_offset[task + 1]):
            other = state.succ_task[edge]
            waits[other] -= 1
            if waits[other] == 0:
                stack[size] = other
                size += 1
        if (index + 1) % state.rank_size > 0:
            other = order[index + 1]
            waits[other] -= 1
            if waits[other] == 0:
                stack[size] = other
                size += 1
    return makespan if done == len(order) else np.int64(1) << 62


@numba.njit(nogil=True, cache=True)
def _critical(state, makespan, path, random):  # type: ignore[no-untyped-def]
    """Walks one critical path back from a last task; fills ``path`` with tasks that could be swapped with the one before them."""
    order, place, start, duration = state.order, state.place, state.start, state.duration
    task = np.int64(-1)
    for other in range(len(order)):
        if start[other] + duration[other] == makespan and (task < 0 or below(random, 2) == 0):
            task = np.int64(other)
    length = 0
    while task >= 0:
        before = np.int64(-1)
        linked = False
        for edge in range(state.dep_offset[task], state.dep_offset[task + 1]):
            other = np.int64(state.dep_task[edge])
            if start[other] + duration[other] + state.dep_lag[edge] == start[task]:
                before = other
            if place[task] % state.rank_size > 0 and order[place[task] - 1] == other:
                linked = True
        if place[task] % state.rank_size > 0:
            other = np.int64(order[place[task] - 1])
            if start[other] + duration[other] == start[task]:
                if not linked:
                    path[length] = task
                    length += 1
                if before < 0 or below(random, 2) == 0:
                    before = other
        task = before if start[task] > 0 or before >= 0 else np.int64(-1)
    return length


@numba.njit(nogil=True, cache=True)
def _fits(state, index, limit):  # type: ignore[no-untyped-def]
    """Whether the rank keeps its limit when the tasks at ``index - 1`` and ``index`` change places."""
    rank = index // state.rank_size
    if limit[rank] >= np.int64(1) << 60:
        return True
    held = np.int64(0)
    for place in range(rank * state.rank_size, index - 1):
        held += state.mem_start[state.order[place]] + state.mem_end[state.order[place]]
    for task in (state.order[index], state.order[index - 1]):
        kept = state.mem_start[task] + state.mem_end[task]
        if held + max(state.mem_start[task], kept) > limit[rank]:
            return False
        held += kept
    return True
