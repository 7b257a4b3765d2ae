"""The interleaver: from two orders of priority (forwards, backwards) to every rank's schedule.

In: a task graph, a permutation of the forward groups and one of the backward groups, a memory limit for each rank. Out: start times,
each rank's order, the makespan. Source: DIP (arXiv 2504.14145), stage interleaving with two queues a rank; departures from it:

- Memory. Switching the forward queue off while memory is exceeded deadlocks. Here a forward starts only if every unit (microbatch)
  that was admitted before it could still finish, one after the other in order of admission (banker's check, on each rank alone).
  The oldest unit may then always go on, on every rank, so no order of priority can deadlock as long as each unit fits alone.
- When nothing stands in both queues, what is ready when the rank falls free goes by priority, not by smallest start.
- Weight stages fill gaps in their order of arrival, or run at once where memory keeps all forwards back.

Words: a *group* holds interchangeable segments (one module, microbatch and direction) in a fixed order; a *position* is a segment's
place in its queue's order of priority; a *unit* is a microbatch, what memory is admitted for.

The kernel simulates in order of decision times: it always serves the rank that can act soonest, so whatever could be ready at that
instant is known. Available tasks stand in bitmaps by position, tasks that become ready later in a heap for each rank: O(log) a stage.
Not modelled: contention between messages (each takes its lag), and P2P calls' own time on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros
from numpy.typing import NDArray

from megatron_dip.spec.tasks import BACKWARD, FORWARD, WEIGHT, TaskGraph

NEVER = np.int64(1) << 62
UNLIMITED = np.int64(1) << 60
"""Memory limit of a rank without one."""

ALTERNATE, BACKWARD_FIRST, FORWARD_FIRST = 0, 1, 2
"""What a rank takes when both queues have a stage: the other kind than last time (1F1B), always backward, always forward."""
MAX_TESTS = 64
"""Forwards that one decision tests for admission, by priority; then only the oldest unit's, which always passes."""


class KernelGraph(NamedTuple):
    """A task graph as the kernels read it. Letters: T tasks, P ranks, G groups, U units, S segments (T = S * P), n forward segments."""

    num_ranks: int
    num_forward: int
    """Forward segments"""
    num_backward: int
    """Backward segments"""
    succ_offset: NDArray[np.int32]
    """[T + 1] by finished task; edges that another path implies are left out"""
    succ_task: NDArray[np.int32]
    succ_lag: NDArray[np.int64]
    num_deps: NDArray[np.int32]
    """[T] over the same edges"""
    group_offset: NDArray[np.int32]
    """[G + 1]; forward groups first"""
    group_segment: NDArray[np.int32]
    """[n] segments of each group in their fixed order"""
    group_unit: NDArray[np.int32]
    """[G]"""
    num_forward_groups: int
    segment_unit: NDArray[np.int32]
    """[S]"""
    unit_offset: NDArray[np.int32]
    """[U + 1]"""
    unit_group: NDArray[np.int32]
    """forward groups of each unit"""
    unit_tasks: NDArray[np.int32]
    """[U] segments (= tasks on each rank)"""


class Costs(NamedTuple):
    """What a memory choice changes; see :func:`make_costs`."""

    duration: NDArray[np.int64]
    """[T] ns"""
    mem_start: NDArray[np.int64]
    """[T]"""
    mem_end: NDArray[np.int64]
    """[T]"""
    need: NDArray[np.int64]
    """[U * P] bytes that a unit's forwards keep on a rank, together"""
    extra: NDArray[np.int64]
    """[U * P] bytes that one of them takes for a moment on top"""
    worst: NDArray[np.int64]
    """[P] largest need + extra of a unit: what the limit has to fit"""


class Workspace(NamedTuple):
    """Scratch of one thread; ``start`` and ``order`` hold the last result."""

    start: NDArray[np.int64]
    """[T] ns"""
    order: NDArray[np.int32]
    """[P, S] task ids as executed"""
    deps_left: NDArray[np.int32]
    ready: NDArray[np.int64]
    position: NDArray[np.int32]
    """[S]"""
    segment_at: NDArray[np.int32]
    """[S] forward positions, then backward positions"""
    group_base: NDArray[np.int32]
    """[G] first position of a group"""
    bits: NDArray[np.uint64]
    """[2, P, words] available tasks by position"""
    summary: NDArray[np.uint64]
    """[2, P, words of words]"""
    heap_time: NDArray[np.int64]
    """[P, S]"""
    heap_task: NDArray[np.int32]
    """[P, S]"""
    weights: NDArray[np.int32]
    """[P, S] weight tasks in order of arrival"""
    unit_held: NDArray[np.int64]
    """[U * P]"""
    unit_need: NDArray[np.int64]
    """[U * P]"""
    unit_left: NDArray[np.int32]
    """[U * P] tasks"""
    admitted: NDArray[np.int32]
    """[U] units in order of admission"""
    admitted_at: NDArray[np.int32]
    """[U] place in ``admitted``, -1 = not yet"""
    rank_state: NDArray[np.int64]
    """[10, P] see the indices below"""
    peak: NDArray[np.int64]
    """[P] most memory held at once"""


_FREE, _NEXT, _HEAP, _AVAILABLE, _W_HEAD, _W_TAIL, _DONE, _LAST, _HELD, _OLDEST = range(10)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a rank decides between stages that are ready."""

    both: int = ALTERNATE
    """ALTERNATE, BACKWARD_FIRST or FORWARD_FIRST"""
    weight_fit: int = 1000
    """A weight stage starts in a gap of at least this many thousandths of its time."""

    def array(self) -> NDArray[np.int64]:
        return np.array([self.both, self.weight_fit], dtype=np.int64)


def make_kernel_graph(graph: TaskGraph) -> KernelGraph:
    """Groups, units and reduced edges of a task graph whose tasks lie by segment (see :mod:`megatron_dip.schedule.graph`)."""
    num_ranks, num_tasks = graph.num_ranks, graph.num_tasks
    num_segments = num_tasks // num_ranks
    heads = np.arange(num_segments) * num_ranks
    kind = graph.kind[heads]
    num_forward, num_backward = int((kind == FORWARD).sum()), int((kind == BACKWARD).sum())
    assert (np.diff(kind) >= 0).all()
    assert num_segments * num_ranks == num_tasks
    units, segment_unit = np.unique(graph.microbatch[heads], return_inverse=True)

    waiting = np.repeat(np.arange(num_tasks), np.diff(graph.dep_offset))
    # A backward that waits for another stage's backward waits, through it, for its own forward.
    has_data = np.zeros(num_tasks, dtype=bool)
    has_data[waiting[graph.dep_is_data]] = True
    keep = graph.dep_is_data | (graph.kind[waiting] == WEIGHT) | ~has_data[waiting]
    source, target, lag = graph.dep_task[keep], waiting[keep], graph.dep_lag_ns[keep]
    by_source = np.argsort(source, kind="stable")
    succ_offset = np.concatenate(([0], np.cumsum(np.bincount(source, minlength=num_tasks))))

    # Within a group: what is nearest to its end comes first (forward: later chunks; backward: earlier chunks), then by sub-microbatch.
    queue = np.flatnonzero(kind != WEIGHT)
    depth = np.where(kind[queue] == FORWARD, -graph.vp_stage[heads[queue]], graph.vp_stage[heads[queue]])
    module, unit = graph.module[heads[queue]], segment_unit[queue]
    ranked = np.lexsort((graph.sub_microbatch[heads[queue]], depth, module, unit, kind[queue]))
    group_segment = queue[ranked]
    key = np.stack((kind[group_segment], unit[ranked], module[ranked]), axis=1)
    new_group = np.concatenate(([True], (key[1:] != key[:-1]).any(axis=1)))
    group_start = np.flatnonzero(new_group)
    group_unit = unit[ranked][group_start]
    num_forward_groups = int((kind[group_segment[group_start]] == FORWARD).sum())
    return KernelGraph(
        num_ranks=num_ranks, num_forward=num_forward, num_backward=num_backward,
        succ_offset=succ_offset.astype(np.int32), succ_task=target[by_source].astype(np.int32),
        succ_lag=np.ascontiguousarray(lag[by_source]), num_deps=np.bincount(target, minlength=num_tasks).astype(np.int32),
        group_offset=np.append(group_start, len(queue)).astype(np.int32), group_segment=group_segment.astype(np.int32),
        group_unit=group_unit.astype(np.int32), num_forward_groups=num_forward_groups, segment_unit=segment_unit.astype(np.int32),
        unit_offset=np.concatenate(([0], np.cumsum(np.bincount(group_unit[:num_forward_groups], minlength=len(units))))).astype(np.int32),
        unit_group=np.argsort(group_unit[:num_forward_groups], kind="stable").astype(np.int32),
        unit_tasks=np.bincount(segment_unit, minlength=len(units)).astype(np.int32),
    )


def make_costs(graph: TaskGraph, kernel: KernelGraph) -> Costs:
    """Durations and memory of a task graph with what the admission check needs of them."""
    num_ranks, num_units = kernel.num_ranks, len(kernel.unit_tasks)
    forward = np.arange(kernel.num_forward * num_ranks)
    start, end = graph.mem_start_bytes[forward], graph.mem_end_bytes[forward]
    kept = np.maximum(start + end, 0)
    place = kernel.segment_unit[forward // num_ranks].astype(np.int64) * num_ranks + forward % num_ranks
    need = np.zeros(num_units * num_ranks, dtype=np.int64)
    extra = np.zeros(num_units * num_ranks, dtype=np.int64)
    np.add.at(need, place, kept)
    np.maximum.at(extra, place, np.maximum(start, start + end) - kept)
    return Costs(
        duration=np.ascontiguousarray(graph.duration_ns), mem_start=graph.mem_start_bytes, mem_end=graph.mem_end_bytes,
        need=need, extra=extra, worst=(need + extra).reshape(num_units, num_ranks).max(axis=0),
    )


def make_workspace(kernel: KernelGraph) -> Workspace:
    num_ranks, num_segments = kernel.num_ranks, len(kernel.segment_unit)
    num_units, num_groups = len(kernel.unit_tasks), len(kernel.group_unit)
    words = max(kernel.num_forward, kernel.num_backward) // 64 + 1
    return Workspace(
        start=np.zeros(num_segments * num_ranks, dtype=np.int64),
        order=np.zeros((num_ranks, num_segments), dtype=np.int32),
        deps_left=np.zeros(num_segments * num_ranks, dtype=np.int32),
        ready=np.zeros(num_segments * num_ranks, dtype=np.int64),
        position=np.zeros(num_segments, dtype=np.int32),
        segment_at=np.zeros(num_segments, dtype=np.int32),
        group_base=np.zeros(num_groups, dtype=np.int32),
        bits=np.zeros((2, num_ranks, words), dtype=np.uint64),
        summary=np.zeros((2, num_ranks, words // 64 + 1), dtype=np.uint64),
        heap_time=np.zeros((num_ranks, num_segments), dtype=np.int64),
        heap_task=np.zeros((num_ranks, num_segments), dtype=np.int32),
        weights=np.zeros((num_ranks, num_segments), dtype=np.int32),
        unit_held=np.zeros(num_units * num_ranks, dtype=np.int64),
        unit_need=np.zeros(num_units * num_ranks, dtype=np.int64),
        unit_left=np.zeros(num_units * num_ranks, dtype=np.int32),
        admitted=np.zeros(num_units, dtype=np.int32),
        admitted_at=np.zeros(num_units, dtype=np.int32),
        rank_state=np.zeros((10, num_ranks), dtype=np.int64),
        peak=np.zeros(num_ranks, dtype=np.int64),
    )


def interleave(
    kernel: KernelGraph, costs: Costs, limit: NDArray[np.int64], forward_order: NDArray[np.int32], backward_order: NDArray[np.int32],
    policy: Policy, workspace: Workspace,
) -> int:
    """Schedules once and returns the makespan in ns; times and orders are left in ``workspace``.

    Args:
        limit: [P] bytes that each rank may hold; at least ``costs.worst``, UNLIMITED for none.
        forward_order: permutation of the forward groups 0..Gf-1, most urgent first.
        backward_order: permutation of the backward groups, counted from 0.
    """
    num_backward_groups = len(kernel.group_unit) - kernel.num_forward_groups
    assert (np.sort(forward_order) == np.arange(kernel.num_forward_groups)).all(), forward_order
    assert (np.sort(backward_order) == np.arange(num_backward_groups)).all(), backward_order
    assert (limit >= costs.worst).all(), (limit, costs.worst)
    return int(interleave_kernel(kernel, costs, limit, forward_order, backward_order, policy.array(), workspace))


@numba.njit(nogil=True, cache=True, boundscheck=False)
def interleave_kernel(kernel, costs, limit, forward_order, backward_order, policy, work):  # type: ignore[no-untyped-def]
    num_ranks = kernel.num_ranks
    bounded = _reset(kernel, costs, limit, forward_order, backward_order, work)
    state = work.rank_state
    num_forward_tasks = kernel.num_forward * num_ranks
    num_queue_tasks = num_forward_tasks + kernel.num_backward * num_ranks
    num_admitted = 0
    left = len(work.start)
    makespan = np.int64(0)
    while left > 0:
        rank, now = 0, state[_NEXT, 0]
        for other in range(1, num_ranks):
            if state[_NEXT, other] < now:
                rank, now = other, state[_NEXT, other]
        assert now < NEVER, "deadlock"
        while state[_HEAP, rank] > 0 and work.heap_time[rank, 0] <= now:
            _make_available(kernel, work, rank, _heap_pop(work, rank), num_forward_tasks)

        backward = _first(work, 1, rank)
        task = -1
        blocked = False
        if backward < 0 or policy[0] == FORWARD_FIRST or (policy[0] == ALTERNATE and state[_LAST, rank] == BACKWARD):
            task = _pick_forward(kernel, costs, work, rank, limit[rank], num_admitted, bounded)
            blocked = task == -2
        if task < 0 and backward >= 0:
            task = (work.segment_at[kernel.num_forward + backward]) * num_ranks + rank
        if task < 0 and state[_W_HEAD, rank] < state[_W_TAIL, rank]:
            weight = work.weights[rank, state[_W_HEAD, rank]]
            gap = NEVER if state[_HEAP, rank] == 0 else work.heap_time[rank, 0] - now
            if blocked or gap >= NEVER // 2 or gap * 1000 >= policy[1] * costs.duration[weight]:
                task = weight
        if task < 0:
            state[_NEXT, rank] = NEVER if state[_HEAP, rank] == 0 else work.heap_time[rank, 0]
            continue

        end = now + costs.duration[task]
        work.start[task] = now
        work.order[rank, state[_DONE, rank]] = task
        state[_DONE, rank] += 1
        state[_FREE, rank] = end
        left -= 1
        makespan = max(makespan, end)
        if task < num_queue_tasks:
            queue = 0 if task < num_forward_tasks else 1
            state[_LAST, rank] = queue
            state[_AVAILABLE, rank] -= 1
            _clear(work, queue, rank, work.position[task // num_ranks])
        else:
            state[_W_HEAD, rank] += 1
        if bounded:
            num_admitted = _account(kernel, costs, work, task, rank, num_admitted, task < num_forward_tasks)
        for edge in range(kernel.succ_offset[task], kernel.succ_offset[task + 1]):
            target = kernel.succ_task[edge]
            work.ready[target] = max(work.ready[target], end + kernel.succ_lag[edge])
            work.deps_left[target] -= 1
            if work.deps_left[target] == 0:
                _release(kernel, work, target, num_forward_tasks, num_queue_tasks)
        if state[_AVAILABLE, rank] > 0 or state[_W_HEAD, rank] < state[_W_TAIL, rank]:
            state[_NEXT, rank] = end
        elif state[_HEAP, rank] > 0:
            state[_NEXT, rank] = max(end, work.heap_time[rank, 0])
        else:
            state[_NEXT, rank] = NEVER
    return makespan


@numba.njit(nogil=True, cache=True)
def _reset(kernel, costs, limit, forward_order, backward_order, work):  # type: ignore[no-untyped-def]
    """Empties the workspace, lays the groups out by priority, makes the first stages available. Returns whether any rank has a limit."""
    num_ranks = kernel.num_ranks
    work.deps_left[:] = kernel.num_deps
    work.ready[:] = 0
    work.bits[:] = 0
    work.summary[:] = 0
    work.rank_state[:] = 0
    work.rank_state[_LAST] = BACKWARD
    base = 0
    for group in forward_order:
        work.group_base[group] = base
        for index in range(kernel.group_offset[group], kernel.group_offset[group + 1]):
            segment = kernel.group_segment[index]
            work.position[segment] = base
            work.segment_at[base] = segment
            base += 1
    base = 0
    for number in backward_order:
        group = number + kernel.num_forward_groups
        for index in range(kernel.group_offset[group], kernel.group_offset[group + 1]):
            segment = kernel.group_segment[index]
            work.position[segment] = base
            work.segment_at[kernel.num_forward + base] = segment
            base += 1
    bounded = False
    for rank in range(num_ranks):
        bounded = bounded or limit[rank] < UNLIMITED
    if bounded:
        work.unit_held[:] = 0
        work.unit_need[:] = costs.need
        for unit in range(len(kernel.unit_tasks)):
            work.unit_left[unit * num_ranks : (unit + 1) * num_ranks] = kernel.unit_tasks[unit]
        work.admitted_at[:] = -1
        work.peak[:] = 0
    num_forward_tasks = kernel.num_forward * num_ranks
    for task in range(num_forward_tasks):
        if kernel.num_deps[task] == 0:
            _make_available(kernel, work, task % num_ranks, task, num_forward_tasks)
    for rank in range(num_ranks):
        work.rank_state[_NEXT, rank] = 0 if work.rank_state[_AVAILABLE, rank] > 0 else NEVER
    return bounded


@numba.njit(nogil=True, cache=True)
def _make_available(kernel, work, rank, task, num_forward_tasks):  # type: ignore[no-untyped-def]
    position = work.position[task // kernel.num_ranks]
    queue = 0 if task < num_forward_tasks else 1
    word = position >> 6
    work.bits[queue, rank, word] |= np.uint64(1) << np.uint64(position & 63)
    work.summary[queue, rank, word >> 6] |= np.uint64(1) << np.uint64(word & 63)
    work.rank_state[_AVAILABLE, rank] += 1


@numba.njit(nogil=True, cache=True)
def _clear(work, queue, rank, position):  # type: ignore[no-untyped-def]
    word = position >> 6
    work.bits[queue, rank, word] &= ~(np.uint64(1) << np.uint64(position & 63))
    if work.bits[queue, rank, word] == 0:
        work.summary[queue, rank, word >> 6] &= ~(np.uint64(1) << np.uint64(word & 63))


@numba.njit(nogil=True, cache=True)
def _first(work, queue, rank):  # type: ignore[no-untyped-def]
    """Most urgent available position, -1 = none."""
    for high in range(work.summary.shape[2]):
        mask = work.summary[queue, rank, high]
        if mask != 0:
            word = high * 64 + np.int64(trailing_zeros(mask))
            return word * 64 + np.int64(trailing_zeros(work.bits[queue, rank, word]))
    return np.int64(-1)


@numba.njit(nogil=True, cache=True)
def _next(work, rank, position):  # type: ignore[no-untyped-def]
    """Next available forward position after ``position``, -1 = none."""
    word = position >> 6
    shift = np.uint64(position & 63)
    # Two shifts, since a shift by 64 is undefined.
    mask = ((work.bits[0, rank, word] >> shift) >> np.uint64(1)) << shift << np.uint64(1)
    while mask == 0:
        word += 1
        if word >= work.bits.shape[2]:
            return np.int64(-1)
        mask = work.bits[0, rank, word]
    return word * 64 + np.int64(trailing_zeros(mask))


@numba.njit(nogil=True, cache=True)
def _pick_forward(kernel, costs, work, rank, limit, num_admitted, bounded):  # type: ignore[no-untyped-def]
    """Most urgent available forward that may be admitted; -1 = none available, -2 = memory keeps all of them back."""
    position = _first(work, 0, rank)
    if position < 0:
        return np.int64(-1)
    num_ranks = kernel.num_ranks
    if not bounded:
        return np.int64(work.segment_at[position]) * num_ranks + rank
    for _ in range(MAX_TESTS):
        segment = np.int64(work.segment_at[position])
        if _admissible(kernel, costs, work, segment * num_ranks + rank, rank, limit, num_admitted):
            return segment * num_ranks + rank
        position = _next(work, rank, position)
        if position < 0:
            return np.int64(-2)
    # The oldest unit passes always; look for its forwards alone.
    oldest = work.rank_state[_OLDEST, rank]
    best = np.int64(-1)
    if oldest < num_admitted:
        unit = work.admitted[oldest]
        for index in range(kernel.unit_offset[unit], kernel.unit_offset[unit + 1]):
            group = kernel.unit_group[index]
            base = work.group_base[group]
            for place in range(base, base + kernel.group_offset[group + 1] - kernel.group_offset[group]):
                if work.bits[0, rank, place >> 6] >> np.uint64(place & 63) & np.uint64(1) and (best < 0 or place < best):
                    best = np.int64(place)
    return np.int64(-2) if best < 0 else np.int64(work.segment_at[best]) * num_ranks + rank


@numba.njit(nogil=True, cache=True)
def _admissible(kernel, costs, work, task, rank, limit, num_admitted):  # type: ignore[no-untyped-def]
    """Banker's check: the forward fits now, and after it every unit admitted earlier can still finish in order of admission."""
    start, kept = costs.mem_start[task], costs.mem_start[task] + costs.mem_end[task]
    held = work.rank_state[_HELD, rank]
    if held + max(start, kept) > limit:
        return False
    kept = max(kept, 0)
    if held + kept + costs.worst[rank] <= limit:
        return True
    num_ranks = kernel.num_ranks
    place = work.admitted_at[kernel.segment_unit[task // num_ranks]]
    if place < 0:
        place = num_admitted
    for index in range(work.rank_state[_OLDEST, rank], place):
        at = work.admitted[index] * num_ranks + rank
        if work.unit_left[at] > 0:
            need = work.unit_need[at]
            if need > 0:
                need += costs.extra[at]
            if held + need + kept > limit:
                return False
            held -= work.unit_held[at]
    return True


@numba.njit(nogil=True, cache=True)
def _account(kernel, costs, work, task, rank, num_admitted, is_forward):  # type: ignore[no-untyped-def]
    """Books a task's memory; its unit is admitted by its first task anywhere. Returns the number of units admitted."""
    num_ranks = kernel.num_ranks
    unit = kernel.segment_unit[task // num_ranks]
    if work.admitted_at[unit] < 0:
        work.admitted_at[unit] = num_admitted
        work.admitted[num_admitted] = unit
        num_admitted += 1
    at = unit * num_ranks + rank
    state = work.rank_state
    start, kept = costs.mem_start[task], costs.mem_start[task] + costs.mem_end[task]
    work.peak[rank] = max(work.peak[rank], state[_HELD, rank] + max(start, kept))
    work.unit_held[at] += kept
    state[_HELD, rank] += kept
    if is_forward:
        work.unit_need[at] -= max(kept, 0)
    work.unit_left[at] -= 1
    while state[_OLDEST, rank] < num_admitted and work.unit_left[work.admitted[state[_OLDEST, rank]] * num_ranks + rank] == 0:
        state[_OLDEST, rank] += 1
    return num_admitted


@numba.njit(nogil=True, cache=True)
def _release(kernel, work, task, num_forward_tasks, num_queue_tasks):  # type: ignore[no-untyped-def]
    """All that ``task`` waits for is scheduled: into its rank's bitmap, heap or list of weights."""
    rank = task % kernel.num_ranks
    state = work.rank_state
    ready = work.ready[task]
    if task >= num_queue_tasks:
        # A weight stage waits for its own rank's backward alone, so it is ready when the rank falls free.
        work.weights[rank, state[_W_TAIL, rank]] = task
        state[_W_TAIL, rank] += 1
    elif ready <= state[_FREE, rank]:
        _make_available(kernel, work, rank, task, num_forward_tasks)
        state[_NEXT, rank] = min(state[_NEXT, rank], state[_FREE, rank])
    else:
        _heap_push(work, rank, ready, task)
        state[_NEXT, rank] = min(state[_NEXT, rank], ready)


@numba.njit(nogil=True, cache=True)
def _heap_push(work, rank, time, task):  # type: ignore[no-untyped-def]
    index = work.rank_state[_HEAP, rank]
    work.rank_state[_HEAP, rank] += 1
    while index > 0:
        parent = (index - 1) >> 1
        if work.heap_time[rank, parent] <= time:
            break
        work.heap_time[rank, index] = work.heap_time[rank, parent]
        work.heap_task[rank, index] = work.heap_task[rank, parent]
        index = parent
    work.heap_time[rank, index] = time
    work.heap_task[rank, index] = task


@numba.njit(nogil=True, cache=True)
def _heap_pop(work, rank):  # type: ignore[no-untyped-def]
    result = work.heap_task[rank, 0]
    work.rank_state[_HEAP, rank] -= 1
    size = work.rank_state[_HEAP, rank]
    time, task = work.heap_time[rank, size], work.heap_task[rank, size]
    index = 0
    while True:
        child = 2 * index + 1
        if child >= size:
            break
        if child + 1 < size and work.heap_time[rank, child + 1] < work.heap_time[rank, child]:
            child += 1
        if work.heap_time[rank, child] >= time:
            break
        work.heap_time[rank, index] = work.heap_time[rank, child]
        work.heap_task[rank, index] = work.heap_task[rank, child]
        index = child
    work.heap_time[rank, index] = time
    work.heap_task[rank, index] = task
    return result
