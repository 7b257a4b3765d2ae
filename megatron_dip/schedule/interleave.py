# mypy: no-check-untyped-defs
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
from numba.cpython.unsafe.numbers import trailing_zeros  # type: ignore[attr-defined]
from numpy.typing import NDArray

from megatron_dip.schedule.result import topological_order
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
    line: NDArray[np.int32]
    """[T] tasks, each behind those it waits for"""
    group_offset: NDArray[np.int32]
    """[G + 1]; forward groups first"""
    group_segment: NDArray[np.int32]
    """[n] segments of each group in their fixed order"""
    group_unit: NDArray[np.int32]
    """[G]"""
    num_forward_groups: int
    task_rank: NDArray[np.int32]
    """[T]"""
    task_segment: NDArray[np.int32]
    """[T]"""
    segment_unit: NDArray[np.int32]
    """[S]"""
    unit_offset: NDArray[np.int32]
    """[U + 1]"""
    unit_group: NDArray[np.int32]
    """forward groups of each unit"""
    unit_tasks: NDArray[np.int32]
    """[U * P] tasks of a unit on a rank"""
    unit_forwards: NDArray[np.int32]
    """[U * P] of these: forwards"""


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
    rest: NDArray[np.int64]
    """[P] ns of a rank's own tasks and of the shortest way from its last task to the end"""


class Workspace(NamedTuple):
    """Scratch of one thread; ``start`` and ``order`` hold the last result."""

    start: NDArray[np.int64]
    """[T] ns"""
    order: NDArray[np.int32]
    """[P * S] task ids as executed, rank by rank"""
    deps_left: NDArray[np.int32]
    """[T]"""
    ready: NDArray[np.int64]
    """[T]"""
    position: NDArray[np.int32]
    """[S]"""
    segment_at: NDArray[np.int32]
    """[S] by forward position, then by backward position"""
    group_base: NDArray[np.int32]
    """[G] first position of a group"""
    bits: NDArray[np.uint64]
    """[2 * P * words] available tasks by position; row 2 r has rank r's forwards, row 2 r + 1 its backwards"""
    summary: NDArray[np.uint64]
    """[2 * P * words of words] which words are not 0"""
    heap_time: NDArray[np.int64]
    """[P * S]"""
    heap_task: NDArray[np.int32]
    """[P * S]"""
    weights: NDArray[np.int32]
    """[P * S] weight tasks in order of arrival"""
    unit_held: NDArray[np.int64]
    """[U * P]"""
    unit_need: NDArray[np.int64]
    """[U * P]"""
    unit_left: NDArray[np.int32]
    """[U * P] tasks"""
    forwards_left: NDArray[np.int32]
    """[U * P]"""
    admitted: NDArray[np.int32]
    """[U] units in order of admission"""
    admitted_at: NDArray[np.int32]
    """[U] place in ``admitted``, -1 = not yet"""
    ranks: NDArray[np.int64]
    """[11, P] clocks and counters of each rank; the kernel names its rows"""

    def orders(self) -> list[NDArray[np.int32]]:
        """Copies of each rank's order."""
        return list(self.order.reshape(self.ranks.shape[1], -1).copy())


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
        line=topological_order(graph),
        group_offset=np.append(group_start, len(queue)).astype(np.int32), group_segment=group_segment.astype(np.int32),
        group_unit=group_unit.astype(np.int32), num_forward_groups=num_forward_groups, segment_unit=segment_unit.astype(np.int32),
        unit_offset=np.concatenate(([0], np.cumsum(np.bincount(group_unit[:num_forward_groups], minlength=len(units))))).astype(np.int32),
        unit_group=np.argsort(group_unit[:num_forward_groups], kind="stable").astype(np.int32),
        unit_tasks=np.repeat(np.bincount(segment_unit, minlength=len(units)), num_ranks).astype(np.int32),
        unit_forwards=np.repeat(np.bincount(segment_unit[:num_forward], minlength=len(units)), num_ranks).astype(np.int32),
        task_rank=(np.arange(num_tasks) % num_ranks).astype(np.int32), task_segment=(np.arange(num_tasks) // num_ranks).astype(np.int32),
    )


def make_costs(graph: TaskGraph, kernel: KernelGraph) -> Costs:
    """Durations and memory of a task graph with what the kernel needs of them."""
    num_ranks, num_units = kernel.num_ranks, len(kernel.unit_offset) - 1
    costs = Costs(
        duration=graph.duration_ns.copy(), mem_start=graph.mem_start_bytes.copy(), mem_end=graph.mem_end_bytes.copy(),
        need=np.zeros(num_units * num_ranks, dtype=np.int64), extra=np.zeros(num_units * num_ranks, dtype=np.int64),
        worst=np.zeros(num_ranks, dtype=np.int64), rest=np.zeros(num_ranks, dtype=np.int64),
    )
    refresh_costs(kernel, costs)
    return costs


@numba.njit(nogil=True, cache=True)
def refresh_costs(kernel, costs):  # type: ignore[no-untyped-def]
    """Fills ``need``, ``extra``, ``worst`` and ``rest`` anew after durations or memory have changed."""
    num_ranks = kernel.num_ranks
    need, extra = costs.need, costs.extra
    need[:] = 0
    extra[:] = 0
    for task in range(kernel.num_forward * num_ranks):
        at = kernel.segment_unit[task // num_ranks] * num_ranks + task % num_ranks
        start, kept = costs.mem_start[task], costs.mem_start[task] + costs.mem_end[task]
        need[at] += max(kept, 0)
        extra[at] = max(extra[at], max(start, kept) - max(kept, 0))
    costs.worst[:] = 0
    for at in range(len(need)):
        costs.worst[at % num_ranks] = max(costs.worst[at % num_ranks], need[at] + extra[at])
    tail = np.zeros(len(costs.duration), dtype=np.int64)
    shortest = np.full(num_ranks, NEVER)
    costs.rest[:] = 0
    for index in range(len(kernel.line) - 1, -1, -1):
        task = kernel.line[index]
        for edge in range(kernel.succ_offset[task], kernel.succ_offset[task + 1]):
            behind = kernel.succ_task[edge]
            tail[task] = max(tail[task], kernel.succ_lag[edge] + costs.duration[behind] + tail[behind])
        rank = task % num_ranks
        costs.rest[rank] += costs.duration[task]
        if costs.duration[task] > 0:  # others, absent tasks among them, hold nothing up
            shortest[rank] = min(shortest[rank], tail[task])
    for rank in range(num_ranks):
        if shortest[rank] < NEVER:
            costs.rest[rank] += shortest[rank]


def make_workspace(kernel: KernelGraph) -> Workspace:
    num_ranks, num_segments = kernel.num_ranks, len(kernel.segment_unit)
    num_tasks, num_units = num_ranks * num_segments, len(kernel.unit_offset) - 1
    words = max(kernel.num_forward, kernel.num_backward) // 64 + 1

    def int64(size: int) -> NDArray[np.int64]:
        return np.zeros(size, dtype=np.int64)

    def int32(size: int) -> NDArray[np.int32]:
        return np.zeros(size, dtype=np.int32)

    return Workspace(
        start=int64(num_tasks), order=int32(num_tasks), deps_left=int32(num_tasks), ready=int64(num_tasks), position=int32(num_segments),
        segment_at=int32(num_segments), group_base=int32(len(kernel.group_unit)), bits=np.zeros(2 * num_ranks * words, dtype=np.uint64),
        summary=np.zeros(2 * num_ranks * (words // 64 + 1), dtype=np.uint64), heap_time=int64(num_tasks), heap_task=int32(num_tasks),
        weights=int32(num_tasks), unit_held=int64(num_units * num_ranks), unit_need=int64(num_units * num_ranks),
        unit_left=int32(num_units * num_ranks), forwards_left=int32(num_units * num_ranks), admitted=int32(num_units), admitted_at=int32(num_units),
        ranks=np.zeros((11, num_ranks), dtype=np.int64),
    )


def interleave(
    kernel: KernelGraph, costs: Costs, limit: NDArray[np.int64], forward_order: NDArray[np.int32], backward_order: NDArray[np.int32],
    policy: Policy, workspace: Workspace,
) -> int:
    """Schedules once and returns the makespan in ns; times and orders are left in ``workspace``.

    The orders' earliest times (:func:`megatron_dip.schedule.result.time_order`) may be sooner still: a weight stage that waited for a
    gap starts as early as its place allows.

    Args:
        limit: [P] bytes that each rank may hold; at least ``costs.worst``, UNLIMITED for none.
        forward_order: permutation of the forward groups 0..Gf-1, most urgent first.
        backward_order: permutation of the backward groups, counted from 0.
    """
    num_backward_groups = len(kernel.group_unit) - kernel.num_forward_groups
    assert np.array_equal(np.sort(forward_order), np.arange(kernel.num_forward_groups)), forward_order
    assert np.array_equal(np.sort(backward_order), np.arange(num_backward_groups)), backward_order
    assert (limit >= costs.worst).all(), (limit, costs.worst)
    return int(interleave_kernel(kernel, costs, limit, forward_order, backward_order, policy.array(), NEVER, workspace))


@numba.njit(nogil=True, cache=True)
def interleave_kernel(kernel, costs, limit, forward_order, backward_order, policy, cutoff, work):  # type: ignore[no-untyped-def]
    """Returns the makespan, or NEVER as soon as it is sure to exceed ``cutoff``.

    Long since it is one loop over events whose steps share some thirty local arrays and counters; what repeats is inlined from helpers.
    """
    # Locals throughout: each access through a tuple's field would count references.
    num_ranks, num_forward, num_segments = kernel.num_ranks, kernel.num_forward, len(kernel.segment_unit)
    num_forward_tasks = num_forward * num_ranks
    num_queue_tasks = num_forward_tasks + kernel.num_backward * num_ranks
    succ_offset, succ_task, succ_lag, segment_unit = kernel.succ_offset, kernel.succ_task, kernel.succ_lag, kernel.segment_unit
    task_rank, task_segment = kernel.task_rank, kernel.task_segment
    duration, mem_start, mem_end, extra, worst = costs.duration, costs.mem_start, costs.mem_end, costs.extra, costs.worst
    start, order, deps_left, ready = work.start, work.order, work.deps_left, work.ready
    position, segment_at, bits, summary = work.position, work.segment_at, work.bits, work.summary
    heap_time, heap_task, weights = work.heap_time, work.heap_task, work.weights
    unit_held, unit_need, unit_left, forwards_left, admitted, admitted_at = (
        work.unit_held, work.unit_need, work.unit_left, work.forwards_left, work.admitted, work.admitted_at,
    )
    free_at, act_at, heap_size, available, executed = work.ranks[0], work.ranks[1], work.ranks[2], work.ranks[3], work.ranks[4]
    weight_head, weight_tail, last_queue = work.ranks[5], work.ranks[6], work.ranks[7]
    held, oldest, idle_left = work.ranks[8], work.ranks[9], work.ranks[10]
    words, high_words = len(bits) // (2 * num_ranks), len(summary) // (2 * num_ranks)
    both, weight_fit = policy[0], policy[1]

    _lay_out(kernel, forward_order, backward_order, position, segment_at, work.group_base)
    deps_left[:] = kernel.num_deps
    ready[:] = 0
    bits[:] = 0
    summary[:] = 0
    work.ranks[:] = 0
    last_queue[:] = 1
    bounded = False
    for rank in range(num_ranks):
        bounded = bounded or limit[rank] < UNLIMITED
        act_at[rank] = NEVER
        idle_left[rank] = cutoff - costs.rest[rank]
        if idle_left[rank] < 0:
            return NEVER
    if bounded:
        unit_held[:] = 0
        unit_need[:] = costs.need
        unit_left[:] = kernel.unit_tasks
        forwards_left[:] = kernel.unit_forwards
        admitted_at[:] = -1
    for task in range(num_forward_tasks):
        if deps_left[task] == 0:
            rank = task_rank[task]
            _mark(bits, summary, 2 * rank, words, high_words, position[task_segment[task]])
            available[rank] += 1
            act_at[rank] = 0

    num_admitted = np.int64(0)
    makespan = np.int64(0)
    left = len(start)
    while left > 0:
        rank, now = 0, act_at[0]
        for other in range(1, num_ranks):
            if act_at[other] < now:
                rank, now = other, act_at[other]
        assert now < NEVER, "deadlock"
        base = rank * num_segments
        while heap_size[rank] > 0 and heap_time[base] <= now:
            task = heap_task[base]
            heap_size[rank] -= 1
            _heap_pop(heap_time, heap_task, base, heap_size[rank])
            row = 2 * rank + (1 if task >= num_forward_tasks else 0)
            _mark(bits, summary, row, words, high_words, position[task_segment[task]])
            available[rank] += 1

        # Which task: a forward, a backward or a weight stage.
        backward = _first(bits, summary, 2 * rank + 1, words, high_words)
        place = np.int64(-1)
        blocked = False
        if backward < 0 or both == FORWARD_FIRST or (both == ALTERNATE and last_queue[rank] == 1):
            place = _first(bits, summary, 2 * rank, words, high_words)
            if bounded and place >= 0:
                tests = 0
                while place >= 0:
                    segment = np.int64(segment_at[place])
                    unit = segment_unit[segment]
                    before = np.int64(admitted_at[unit]) if admitted_at[unit] >= 0 else num_admitted
                    if _admissible(
                        mem_start, mem_end, segment * num_ranks + rank, held[rank], limit[rank], worst[rank], oldest[rank], before,
                        rank, num_ranks, admitted, unit_left, forwards_left, unit_need, unit_held, extra,
                    ):
                        break
                    tests += 1
                    if tests == MAX_TESTS:
                        # The oldest unit always passes; look for its forwards alone.
                        place = np.int64(-1)
                        if oldest[rank] < num_admitted:
                            place = _first_of_unit(kernel, bits, 2 * rank * words, work.group_base, admitted[oldest[rank]])
                        break
                    place = _next(bits, 2 * rank * words, words, place)
                blocked = place < 0
        if place >= 0:
            queue = 0
            task = np.int64(segment_at[place]) * num_ranks + rank
        elif backward >= 0:
            queue, place = 1, backward
            task = np.int64(segment_at[num_forward + place]) * num_ranks + rank
        else:
            queue, task = 2, np.int64(-1)
            if weight_head[rank] < weight_tail[rank]:
                task = np.int64(weights[base + weight_head[rank]])
                if not blocked and heap_size[rank] > 0 and (heap_time[base] - now) * 1000 < weight_fit * duration[task]:
                    task = np.int64(-1)
            if task < 0:
                act_at[rank] = heap_time[base] if heap_size[rank] > 0 else NEVER
                continue

        idle_left[rank] -= now - free_at[rank]
        if idle_left[rank] < 0:
            return NEVER
        end = now + duration[task]
        start[task] = now
        order[base + executed[rank]] = task
        executed[rank] += 1
        free_at[rank] = end
        makespan = max(makespan, end)
        left -= 1
        if queue < 2:
            last_queue[rank] = queue
            available[rank] -= 1
            _unmark(bits, summary, 2 * rank + queue, words, high_words, place)
        else:
            weight_head[rank] += 1
        if bounded:
            unit = segment_unit[task_segment[task]]
            if admitted_at[unit] < 0:
                admitted_at[unit] = num_admitted
                admitted[num_admitted] = unit
                num_admitted += 1
            at = unit * num_ranks + rank
            kept = mem_start[task] + mem_end[task]
            unit_held[at] += kept
            held[rank] += kept
            if queue == 0:
                unit_need[at] -= max(kept, 0)
                forwards_left[at] -= 1
            unit_left[at] -= 1
            while oldest[rank] < num_admitted and unit_left[admitted[oldest[rank]] * num_ranks + rank] == 0:
                oldest[rank] += 1

        for edge in range(succ_offset[task], succ_offset[task + 1]):
            target = np.int64(succ_task[edge])
            ready[target] = max(ready[target], end + succ_lag[edge])
            deps_left[target] -= 1
            if deps_left[target] > 0:
                continue
            other = np.int64(task_rank[target])
            if target >= num_queue_tasks:
                # A weight stage waits for its own rank's backward alone, so it is ready when the rank falls free.
                weights[other * num_segments + weight_tail[other]] = target
                weight_tail[other] += 1
            elif ready[target] <= free_at[other]:
                row = 2 * other + (1 if target >= num_forward_tasks else 0)
                _mark(bits, summary, row, words, high_words, position[task_segment[target]])
                available[other] += 1
                act_at[other] = min(act_at[other], free_at[other])
            else:
                _heap_push(heap_time, heap_task, other * num_segments, heap_size[other], ready[target], target)
                heap_size[other] += 1
                act_at[other] = min(act_at[other], ready[target])
        if available[rank] > 0 or weight_head[rank] < weight_tail[rank]:
            act_at[rank] = end
        elif heap_size[rank] > 0:
            act_at[rank] = max(end, heap_time[base])
        else:
            act_at[rank] = NEVER
    return makespan


@numba.njit(nogil=True, cache=True)
def _lay_out(kernel, forward_order, backward_order, position, segment_at, group_base):  # type: ignore[no-untyped-def]
    """Gives every queue's segments their positions by the orders of priority."""
    group_offset, group_segment = kernel.group_offset, kernel.group_segment
    first_group, base = 0, 0
    for order in (forward_order, backward_order):
        shift = base
        for number in order:
            group = first_group + number
            group_base[group] = base - shift
            for index in range(group_offset[group], group_offset[group + 1]):
                position[group_segment[index]] = base - shift
                segment_at[base] = group_segment[index]
                base += 1
        first_group = kernel.num_forward_groups


@numba.njit(nogil=True, cache=True)
def _mark(bits, summary, row, words, high_words, position):  # type: ignore[no-untyped-def]
    word = position >> 6
    bits[row * words + word] |= np.uint64(1) << np.uint64(position & 63)
    summary[row * high_words + (word >> 6)] |= np.uint64(1) << np.uint64(word & 63)


@numba.njit(nogil=True, cache=True)
def _unmark(bits, summary, row, words, high_words, position):  # type: ignore[no-untyped-def]
    word = position >> 6
    bits[row * words + word] &= ~(np.uint64(1) << np.uint64(position & 63))
    if bits[row * words + word] == 0:
        summary[row * high_words + (word >> 6)] &= ~(np.uint64(1) << np.uint64(word & 63))


@numba.njit(nogil=True, cache=True)
def _first(bits, summary, row, words, high_words):  # type: ignore[no-untyped-def]
    """Most urgent available position of a row, -1 = none."""
    for high in range(high_words):
        mask = summary[row * high_words + high]
        if mask != 0:
            word = high * 64 + np.int64(trailing_zeros(mask))
            return word * 64 + np.int64(trailing_zeros(bits[row * words + word]))
    return np.int64(-1)


@numba.njit(nogil=True, cache=True)
def _next(bits, base, words, position):  # type: ignore[no-untyped-def]
    """Next available position after ``position`` in the row of bits at ``base``, -1 = none."""
    word = position >> 6
    # Two shifts, since a shift by 64 is undefined.
    mask = bits[base + word] & ((~np.uint64(0) << np.uint64(position & 63)) << np.uint64(1))
    while mask == 0:
        word += 1
        if word >= words:
            return np.int64(-1)
        mask = bits[base + word]
    return word * 64 + np.int64(trailing_zeros(mask))


@numba.njit(nogil=True, cache=True)
def _first_of_unit(kernel, bits, base, group_base, unit):  # type: ignore[no-untyped-def]
    """Most urgent available forward position of a unit, -1 = none."""
    best = np.int64(-1)
    for index in range(kernel.unit_offset[unit], kernel.unit_offset[unit + 1]):
        group = kernel.unit_group[index]
        first = np.int64(group_base[group])
        for place in range(first, first + kernel.group_offset[group + 1] - kernel.group_offset[group]):
            if (bits[base + (place >> 6)] >> np.uint64(place & 63)) & np.uint64(1) != 0 and (best < 0 or place < best):
                best = place
    return best


@numba.njit(nogil=True, cache=True)
def _admissible(
    mem_start, mem_end, task, held, limit, worst, oldest, before, rank, num_ranks, admitted, unit_left, forwards_left, unit_need, unit_held,
    extra,
):  # type: ignore[no-untyped-def]
    """Banker's check: the forward fits now, and after it the units admitted ``before`` its own can finish in order of admission."""
    kept = mem_start[task] + mem_end[task]
    if held + max(mem_start[task], kept) > limit:
        return False
    kept = max(kept, 0)
    if held + kept + worst <= limit:
        return True
    for index in range(oldest, before):
        at = admitted[index] * num_ranks + rank
        if unit_left[at] > 0:
            need = unit_need[at]
            # Also a forward that keeps nothing (a frozen module's) takes memory for a moment.
            if forwards_left[at] > 0:
                need += extra[at]
            if held + need + kept > limit:
                return False
            held -= unit_held[at]
    return True


@numba.njit(nogil=True, cache=True)
def _heap_push(heap_time, heap_task, base, size, time, task):  # type: ignore[no-untyped-def]
    index = size
    while index > 0:
        parent = (index - 1) >> 1
        if heap_time[base + parent] <= time:
            break
        heap_time[base + index] = heap_time[base + parent]
        heap_task[base + index] = heap_task[base + parent]
        index = parent
    heap_time[base + index] = time
    heap_task[base + index] = task


@numba.njit(nogil=True, cache=True)
def _heap_pop(heap_time, heap_task, base, size):  # type: ignore[no-untyped-def]
    """Drops the first entry of a heap that has ``size`` entries afterwards."""
    time, task = heap_time[base + size], heap_task[base + size]
    index = 0
    while True:
        child = 2 * index + 1
        if child >= size:
            break
        if child + 1 < size and heap_time[base + child + 1] < heap_time[base + child]:
            child += 1
        if heap_time[base + child] >= time:
            break
        heap_time[base + index] = heap_time[base + child]
        heap_task[base + index] = heap_task[base + child]
        index = child
    heap_time[base + index] = time
    heap_task[base + index] = task
