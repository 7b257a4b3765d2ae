# mypy: no-check-untyped-defs
"""A schedule: each rank's tasks in order, with times; and the times of any given order.

In: a task graph and an order of tasks for each rank. Out: earliest start times, or None where the orders wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.tasks import TaskGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Letters: T tasks, P ranks."""

    graph: TaskGraph
    order: tuple[NDArray[np.int32], ...]
    """P arrays of task ids as executed"""
    start_ns: NDArray[np.int64]
    """[T]"""

    @property
    def end_ns(self) -> NDArray[np.int64]:
        return self.start_ns + self.graph.duration_ns

    @property
    def makespan_ns(self) -> int:
        return int(self.end_ns.max())

    @property
    def bubble_fraction(self) -> float:
        """Idle time within the makespan as a share of all ranks' time."""
        makespan = self.makespan_ns
        return 1.0 - int(self.graph.duration_ns.sum()) / (self.graph.num_ranks * makespan) if makespan else 0.0

    def peak_memory(self, initial: Sequence[int]) -> list[int]:
        """Most bytes held at once on each rank, ``initial`` included. A rank runs one task at a time, so its order alone decides."""
        peaks = []
        for rank, tasks in enumerate(self.order):
            start, end = self.graph.mem_start_bytes[tasks], self.graph.mem_end_bytes[tasks]
            before = np.concatenate(([0], np.cumsum(start + end)[:-1]))
            peaks.append(initial[rank] + max(0, int((before + start).max(initial=0)), int((before + start + end).max(initial=0))))
        return peaks


def time_order(graph: TaskGraph, order: Sequence[NDArray[np.int32]]) -> Schedule | None:
    """Gives every task its earliest start under ``order`` (each task once, on its rank); None if the orders deadlock."""
    follows = np.full(graph.num_tasks, -1, dtype=np.int32)
    for tasks in order:
        follows[tasks[1:]] = tasks[:-1]
    start = np.zeros(graph.num_tasks, dtype=np.int64)
    succ_offset, succ_edge = successors(graph)
    done = _time_kernel(follows, graph.duration_ns, graph.dep_offset, graph.dep_task, graph.dep_lag_ns, succ_offset, succ_edge, start)
    if done < graph.num_tasks:
        return None
    return Schedule(graph=graph, order=tuple(order), start_ns=start)


def successors(graph: TaskGraph) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(offset [T + 1], waiting task [E]) of the dependency edges by the task waited for."""
    waiting = np.repeat(np.arange(graph.num_tasks, dtype=np.int32), np.diff(graph.dep_offset))
    by_source = np.argsort(graph.dep_task, kind="stable")
    offset = np.concatenate(([0], np.cumsum(np.bincount(graph.dep_task, minlength=graph.num_tasks)))).astype(np.int32)
    return offset, waiting[by_source]


@numba.njit(nogil=True, cache=True)
def _time_kernel(follows, duration, dep_offset, dep_task, dep_lag, succ_offset, succ_task, start):  # type: ignore[no-untyped-def]
    """Topological pass over dependencies and rank orders; writes ``start`` and returns how many tasks could run."""
    num_tasks = len(duration)
    waits = np.zeros(num_tasks, dtype=np.int32)
    next_on_rank = np.full(num_tasks, -1, dtype=np.int32)
    for task in range(num_tasks):
        waits[task] = dep_offset[task + 1] - dep_offset[task]
        if follows[task] >= 0:
            waits[task] += 1
            next_on_rank[follows[task]] = task
    stack = np.empty(num_tasks, dtype=np.int32)
    size = 0
    for task in range(num_tasks):
        if waits[task] == 0:
            stack[size] = task
            size += 1
    done = 0
    while size > 0:
        size -= 1
        task = stack[size]
        done += 1
        earliest = np.int64(0)
        if follows[task] >= 0:
            earliest = start[follows[task]] + duration[follows[task]]
        for edge in range(dep_offset[task], dep_offset[task + 1]):
            other = dep_task[edge]
            earliest = max(earliest, start[other] + duration[other] + dep_lag[edge])
        start[task] = earliest
        for edge in range(succ_offset[task], succ_offset[task + 1]):
            other = succ_task[edge]
            waits[other] -= 1
            if waits[other] == 0:
                stack[size] = other
                size += 1
        other = next_on_rank[task]
        if other >= 0:
            waits[other] -= 1
            if waits[other] == 0:
                stack[size] = other
                size += 1
    return done


def topological_order(graph: TaskGraph) -> NDArray[np.int32]:
    """[T] all tasks, each behind those it waits for."""
    line = np.zeros(graph.num_tasks, dtype=np.int32)
    placed = _line_kernel(graph.dep_offset, *successors(graph), line)
    assert placed == graph.num_tasks, "the task graph has a cycle"
    return line


def paths_ns(graph: TaskGraph) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """([T] heads, [T] tails): longest chain of dependencies before a task's start, and from its end to the end of all."""
    head, tail = np.zeros(graph.num_tasks, dtype=np.int64), np.zeros(graph.num_tasks, dtype=np.int64)
    _path_kernel(topological_order(graph), graph.duration_ns, graph.dep_offset, graph.dep_task, graph.dep_lag_ns, head, tail)
    return head, tail


@numba.njit(nogil=True, cache=True)
def _line_kernel(dep_offset, succ_offset, succ_task, line):  # type: ignore[no-untyped-def]
    waits = dep_offset[1:] - dep_offset[:-1]
    size = 0
    for task in range(len(waits)):
        if waits[task] == 0:
            line[size] = task
            size += 1
    done = 0
    while done < size:
        task = line[done]
        done += 1
        for edge in range(succ_offset[task], succ_offset[task + 1]):
            waits[succ_task[edge]] -= 1
            if waits[succ_task[edge]] == 0:
                line[size] = succ_task[edge]
                size += 1
    return size


@numba.njit(nogil=True, cache=True)
def _path_kernel(line, duration, dep_offset, dep_task, dep_lag, head, tail):  # type: ignore[no-untyped-def]
    for task in line:
        for edge in range(dep_offset[task], dep_offset[task + 1]):
            before = dep_task[edge]
            head[task] = max(head[task], head[before] + duration[before] + dep_lag[edge])
    for task in line[::-1]:
        for edge in range(dep_offset[task], dep_offset[task + 1]):
            before = dep_task[edge]
            tail[before] = max(tail[before], tail[task] + duration[task] + dep_lag[edge])
