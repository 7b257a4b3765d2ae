# mypy: no-check-untyped-defs
"""Lower bounds on the makespan: times that no schedule can beat.

In: a stage problem and its limits. Out: ns. Each bound holds for every order and every choice of memory candidates:

- *chains*: the longest chain of dependencies;
- *rank work*: on each rank, Jackson's preemptive schedule with heads and tails (Carlier 1982): tasks come in as early as their chains
  allow and the rest of their chains follows them; a rank that could interrupt its tasks needs at least that long;
- *memory*: what a pair holds, times how long it must hold it (its two stages and the shortest way between them), fills a rank's bytes
  times the makespan C. For any price mu: C * (1 + mu * limit) >= sum over pairs of the least (time + mu * bytes * stay), with the
  candidate that is least in it.

A bound that does not even depend on how the model is cut is :func:`megatron_dip.partition.offline.cheapest_work_ns` / P.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.result import paths_ns, topological_order
from megatron_dip.spec.tasks import TaskGraph

_PRICES = 48


def problem_bound_ns(problem: StageProblem, limit: NDArray[np.int64]) -> int:
    """The best of the bounds above, whatever memory candidates are chosen.

    Args:
        limit: [P] bytes that live stages may hold on each rank, UNLIMITED for no limit.
    """
    return max(lower_bound_ns(problem.fastest), memory_bound_ns(problem, limit))


def lower_bound_ns(graph: TaskGraph) -> int:
    """For a graph as it is, memory left out: chains, and each rank's work between heads and tails."""
    head, tail = paths_ns(graph)
    bound = int((head + graph.duration_ns + tail).max())
    for rank in range(graph.num_ranks):
        mine = np.flatnonzero(graph.rank == rank)
        mine = mine[np.argsort(head[mine], kind="stable")]
        bound = max(bound, int(_jackson(head[mine], graph.duration_ns[mine], tail[mine])))
    return bound


@numba.njit(nogil=True, cache=True)
def _jackson(head, duration, tail):  # type: ignore[no-untyped-def]
    """Jackson's preemptive schedule of tasks sorted by head: of those that are in, the one with the longest tail runs."""
    count = len(head)
    left = duration.copy()
    heap = np.empty(count, dtype=np.int64)
    size, index, done = 0, 0, 0
    now, bound = np.int64(0), np.int64(0)
    while done < count:
        if size == 0 and head[index] > now:
            now = head[index]
        while index < count and head[index] <= now:
            place = size
            size += 1
            while place > 0 and tail[heap[(place - 1) >> 1]] < tail[index]:
                heap[place] = heap[(place - 1) >> 1]
                place = (place - 1) >> 1
            heap[place] = index
            index += 1
        task = heap[0]
        until = now + left[task]
        if index < count and head[index] < until:
            left[task] -= head[index] - now
            now = head[index]
            continue
        now = until
        bound = max(bound, now + tail[task])
        done += 1
        size -= 1
        moved = heap[size]
        place = 0
        while True:
            child = 2 * place + 1
            if child >= size:
                break
            if child + 1 < size and tail[heap[child + 1]] > tail[heap[child]]:
                child += 1
            if tail[heap[child]] <= tail[moved]:
                break
            heap[place] = heap[child]
            place = child
        heap[place] = moved
    return bound


def memory_bound_ns(problem: StageProblem, limit: NDArray[np.int64]) -> int:
    """Bytes times stay against the rank's bytes times the makespan; 0 where no rank has a limit."""
    graph = problem.fastest
    stay = _stays(problem)
    bound = 0
    kinds = problem.pair_class
    time = problem.forward_ns[kinds] + problem.backward_ns[kinds]
    held = problem.held_bytes[kinds].astype(np.float64)
    with_weight = problem.pair_weight >= 0
    weight_ns = np.zeros(len(kinds), dtype=np.int64)
    weight_ns[with_weight] = graph.duration_ns[problem.pair_weight[with_weight]]
    # The half that a weight stage gives back stays at least that stage longer.
    area = held * (stay + 0.5 * weight_ns)[:, None]
    for rank in range(graph.num_ranks):
        if limit[rank] >= UNLIMITED:
            continue
        mine = graph.rank[problem.pair_forward] == rank
        work = (time[mine] + weight_ns[mine][:, None]).astype(np.float64)
        # From prices at which memory weighs little to prices at which it weighs all.
        scale = work.sum() / max(1.0, float(area[mine][:, 0].sum()))
        for price in np.concatenate(([0.0], np.geomspace(1e-3, 1e3, _PRICES) * scale)):
            least = (work + price * area[mine]).min(axis=1).sum()
            # The tolerance covers the rounding of the sums.
            bound = max(bound, int(least / (1.0 + price * float(limit[rank])) * (1.0 - 1e-9)))
    return bound


def _stays(problem: StageProblem) -> NDArray[np.int64]:
    """[Q] least time from a pair's forward's start to its backward's end (without one: to the forward's end), fastest candidates."""
    graph = problem.fastest
    backward_of = np.full(graph.num_tasks, -1, dtype=np.int32)
    backward_of[problem.pair_forward] = problem.pair_backward
    between = np.zeros(graph.num_tasks, dtype=np.int64)
    line = topological_order(graph)
    _between(line[line < problem.num_pairs], graph.duration_ns, graph.dep_offset, graph.dep_task, graph.dep_lag_ns, backward_of, between)
    stay = graph.duration_ns[problem.pair_forward] + 0
    has_backward = problem.pair_backward >= 0
    stay[has_backward] += (between[problem.pair_forward] + graph.duration_ns[problem.pair_backward])[has_backward]
    return stay


@numba.njit(nogil=True, cache=True)
def _between(line, duration, dep_offset, dep_task, dep_lag, backward_of, between):  # type: ignore[no-untyped-def]
    """between[f] = longest way from the end of forward f to the start of its backward, over later forwards and their backwards."""
    for task in line[::-1]:
        mine = backward_of[task]
        if mine < 0:
            continue
        for edge in range(dep_offset[task], dep_offset[task + 1]):
            before = dep_task[edge]
            theirs = backward_of[before]
            if theirs < 0:
                continue
            for back in range(dep_offset[theirs], dep_offset[theirs + 1]):
                if dep_task[back] == mine:
                    way = dep_lag[edge] + duration[task] + between[task] + duration[mine] + dep_lag[back]
                    between[before] = max(between[before], way)
