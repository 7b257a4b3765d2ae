# mypy: no-check-untyped-defs
"""Improves a schedule task by task: a tabu search over the blocks of the critical path.

In: a task graph and each rank's order. Out: orders that are at least as good. The interleaver never leaves a rank idle on purpose,
keeps groups together and gives every rank the same priorities; this step is bound by none of it. A *block* is a run of critical tasks
that one rank executes without a gap. Only moves across a block's ends can shorten the path (on small problems they reach the optimum,
on large ones they tighten ramp-up and drain), so one step

1. walks one critical path at random,
2. estimates, for each of its blocks, the moves of a task near an end to that end, and of the task at an end to places near it,
3. makes the best one that is not tabu (or that promises a new best) and times all tasks anew.

Sources: the neighbourhood and its estimate are N6 of Balas and Vazacopoulos, Guided local search with shifting bottleneck for job shop
scheduling (1998); tabu search over it as in Zhang et al., A very fast TS/SA algorithm for the job shop problem (2008). Both speak of
jobs with one predecessor; here tasks have several, with lags. A move that could deadlock or exceeds a rank's memory is not made.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.anneal import below
from megatron_dip.schedule.result import successors
from megatron_dip.spec.tasks import TaskGraph

_REACH = 20
"""Places from a block's end that moves reach."""
_TENURE = 10
"""A move may not be undone for a number of steps drawn from this to twice this, less the two at its ends: 8 to 17."""
_REMEMBERED = 64
"""Moves that are remembered; more than twice the tenure."""
_PATIENCE = 300
"""Steps without a new best after which the search goes back to the best."""
_SHAKE = 8
"""Most steps with random moves after going back."""
_NEVER = np.int64(1) << 62
_UNLIMITED = np.int64(1) << 60


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
    succ_lag: NDArray[np.int64]
    order: NDArray[np.int32]
    """[P * S] current, rank by rank"""
    best_order: NDArray[np.int32]
    """[P * S]"""
    place: NDArray[np.int32]
    """[T] index into order"""
    start: NDArray[np.int64]
    """[T]"""
    tail: NDArray[np.int64]
    """[T] longest way from a task's end to the end of all, along dependencies and orders"""
    held: NDArray[np.int64]
    """[P * S] bytes held before the task at a place"""
    waits: NDArray[np.int32]
    """[T] scratch"""
    line: NDArray[np.int32]
    """[T] scratch: tasks, each behind those it waits for"""
    path: NDArray[np.int32]
    """[T] scratch"""
    trial: NDArray[np.int64]
    """[reach + 1] scratch"""
    tabu_first: NDArray[np.int32]
    """[remembered] this task must not come to stand before ..."""
    tabu_second: NDArray[np.int32]
    """... that one"""
    tabu_until: NDArray[np.int64]
    """until this step"""
    counters: NDArray[np.int64]
    """[5] current and best makespan (0 = not timed yet), steps taken, steps without a new best, random steps to come"""


def make_refine_state(graph: TaskGraph, orders: list[NDArray[np.int32]]) -> RefineState:
    order = np.concatenate(orders).astype(np.int32)
    size = graph.num_tasks
    place = np.empty(size, dtype=np.int32)
    place[order] = np.arange(size)
    succ_offset, succ_task = successors(graph)
    succ_lag = np.ascontiguousarray(graph.dep_lag_ns[np.argsort(graph.dep_task, kind="stable")])
    return RefineState(
        rank_size=len(orders[0]), duration=graph.duration_ns, mem_start=graph.mem_start_bytes, mem_end=graph.mem_end_bytes,
        dep_offset=graph.dep_offset, dep_task=graph.dep_task, dep_lag=graph.dep_lag_ns, succ_offset=succ_offset, succ_task=succ_task,
        succ_lag=succ_lag, order=order, best_order=order.copy(), place=place, start=np.zeros(size, dtype=np.int64),
        tail=np.zeros(size, dtype=np.int64), held=np.zeros(size, dtype=np.int64), waits=np.zeros(size, dtype=np.int32),
        line=np.zeros(size, dtype=np.int32), path=np.zeros(size, dtype=np.int32), trial=np.zeros(_REACH + 1, dtype=np.int64),
        tabu_first=np.zeros(_REMEMBERED, dtype=np.int32), tabu_second=np.zeros(_REMEMBERED, dtype=np.int32),
        tabu_until=np.zeros(_REMEMBERED, dtype=np.int64), counters=np.zeros(5, dtype=np.int64),
    )


@numba.njit(nogil=True, cache=True)
def refine_kernel(state, limit, random, steps, bound):  # type: ignore[no-untyped-def]
    """Takes up to ``steps`` steps from where the last call ended; returns the best makespan so far. Stops at ``bound``."""
    order, place, best_order, counters = state.order, state.place, state.best_order, state.counters
    tabu_first, tabu_second, tabu_until = state.tabu_first, state.tabu_second, state.tabu_until
    if counters[0] == 0:
        counters[0] = _time(state)
        counters[1] = counters[0]
        _hold(state, 0, len(order))
    for _ in range(steps):
        if counters[1] <= bound:
            break
        step = counters[2]
        counters[2] += 1
        length = _critical(state, counters[0], random)
        shaking = counters[4] > 0
        first, second, forward = _best_move(state, limit, random, length, shaking)
        if second < 0:
            # Another walk may find another path; if there is none, the search goes back.
            counters[3] += _PATIENCE // 8
        else:
            slot = step % _REMEMBERED
            tabu_first[slot], tabu_second[slot] = order[first], order[second]
            tabu_until[slot] = step + _TENURE + below(random, _TENURE)
            if forward:
                task = order[first]
                for index in range(first, second):
                    order[index] = order[index + 1]
                order[second] = task
            else:
                task = order[second]
                for index in range(second, first, -1):
                    order[index] = order[index - 1]
                order[first] = task
            for index in range(first, second + 1):
                place[order[index]] = index
            _hold(state, first, second + 1)
            counters[0] = _time(state)
            assert counters[0] < _NEVER, "deadlock"
            counters[3] += 1
            if shaking:
                counters[4] -= 1
            if counters[0] < counters[1]:
                counters[1] = counters[0]
                counters[3] = 0
                best_order[:] = order
        if counters[3] >= _PATIENCE:
            order[:] = best_order
            for index in range(len(order)):
                place[order[index]] = index
            _hold(state, 0, len(order))
            counters[0] = _time(state)
            counters[3] = 0
            counters[4] = below(random, _SHAKE + 1)
            tabu_until[:] = 0
    return counters[1]


@numba.njit(nogil=True, cache=True)
def _time(state):  # type: ignore[no-untyped-def]
    """Writes starts and tails; returns the makespan, or a very large number where the orders deadlock."""
    order, place, start, tail, waits, line = state.order, state.place, state.start, state.tail, state.waits, state.line
    duration, rank_size = state.duration, state.rank_size
    dep_offset, dep_task, dep_lag = state.dep_offset, state.dep_task, state.dep_lag
    succ_offset, succ_task, succ_lag = state.succ_offset, state.succ_task, state.succ_lag
    size, done, makespan = 0, 0, np.int64(0)
    for task in range(len(order)):
        waits[task] = dep_offset[task + 1] - dep_offset[task] + (1 if place[task] % rank_size > 0 else 0)
        if waits[task] == 0:
            line[size] = task
            size += 1
    while done < size:
        task = line[done]
        done += 1
        index = place[task]
        earliest = np.int64(0)
        if index % rank_size > 0:
            before = order[index - 1]
            earliest = start[before] + duration[before]
        for edge in range(dep_offset[task], dep_offset[task + 1]):
            other = dep_task[edge]
            earliest = max(earliest, start[other] + duration[other] + dep_lag[edge])
        start[task] = earliest
        makespan = max(makespan, earliest + duration[task])
        for edge in range(succ_offset[task], succ_offset[task + 1]):
            other = succ_task[edge]
            waits[other] -= 1
            if waits[other] == 0:
                line[size] = other
                size += 1
        if (index + 1) % rank_size > 0:
            other = order[index + 1]
            waits[other] -= 1
            if waits[other] == 0:
                line[size] = other
                size += 1
    if done < len(order):
        return _NEVER
    for at in range(done - 1, -1, -1):
        task = line[at]
        index = place[task]
        longest = np.int64(0)
        if (index + 1) % rank_size > 0:
            other = order[index + 1]
            longest = duration[other] + tail[other]
        for edge in range(succ_offset[task], succ_offset[task + 1]):
            other = succ_task[edge]
            longest = max(longest, succ_lag[edge] + duration[other] + tail[other])
        tail[task] = longest
    return makespan


@numba.njit(nogil=True, cache=True)
def _hold(state, first, end):  # type: ignore[no-untyped-def]
    """Writes the bytes held before the places ``first`` .. ``end - 1``; those before ``first`` on its rank are right."""
    order, held = state.order, state.held
    for index in range(first, end):
        if index % state.rank_size == 0:
            held[index] = 0
        else:
            before = order[index - 1]
            held[index] = held[index - 1] + state.mem_start[before] + state.mem_end[before]


@numba.njit(nogil=True, cache=True)
def _critical(state, makespan, random):  # type: ignore[no-untyped-def]
    """Walks one critical path back from a last task to a first one into ``path``; returns its length."""
    order, place, start, duration, path = state.order, state.place, state.start, state.duration, state.path
    task, ways = np.int64(-1), 0
    for index in range(state.rank_size - 1, len(order), state.rank_size):
        other = np.int64(order[index])
        if start[other] + duration[other] == makespan:
            ways += 1
            if below(random, ways) == 0:
                task = other
    length = 0
    while task >= 0:
        path[length] = task
        length += 1
        before, ways = np.int64(-1), 0
        for edge in range(state.dep_offset[task], state.dep_offset[task + 1]):
            other = np.int64(state.dep_task[edge])
            if start[other] + duration[other] + state.dep_lag[edge] == start[task]:
                ways += 1
                if below(random, ways) == 0:
                    before = other
        if place[task] % state.rank_size > 0:
            other = np.int64(order[place[task] - 1])
            if start[other] + duration[other] == start[task]:
                ways += 1
                if below(random, ways) == 0:
                    before = other
        task = before
    return length


@numba.njit(nogil=True, cache=True)
def _best_move(state, limit, random, length, shaking):  # type: ignore[no-untyped-def]
    """(first place, last place, whether the first task goes behind the last or the last before the first); last place -1 = no move.

    The best by estimate; when ``shaking``, any that is allowed.
    """
    place, path, rank_size, step = state.place, state.path, state.rank_size, state.counters[2]
    least, chosen_first, chosen_second, chosen_forward, ties = _NEVER, -1, -1, True, 0
    end = 0
    while end < length:
        begin = end
        while begin + 1 < length and place[path[begin]] % rank_size > 0 and place[path[begin + 1]] == place[path[begin]] - 1:
            begin += 1
        low, high = np.int64(place[path[begin]]), np.int64(place[path[end]])
        end = begin + 1
        for kind in range(4):
            # Forward: near the end to the end, from the begin inwards. Backward: near the begin to the begin, from the end inwards.
            forward, at_end = kind < 2, kind == 0 or kind == 3
            for distance in range(1, min(_REACH, high - low) + 1):
                if (distance == 1 and not forward) or (distance == high - low and not at_end and forward):
                    continue
                first = high - distance if at_end else low
                second = high if at_end else low + distance
                cutoff = _NEVER if shaking or least == _NEVER else least + 1
                value = _after_forward(state, first, second, cutoff) if forward else _after_backward(state, first, second, cutoff)
                if value >= _NEVER or (value > least and not shaking):
                    continue
                if value >= state.counters[1] and _tabu(state, first, second, forward, step):
                    continue
                if not _fits(state, limit, first, second, forward):
                    continue
                if value < least and not shaking:
                    ties = 0
                ties += 1
                if below(random, ties) == 0:
                    least, chosen_first, chosen_second, chosen_forward = value, first, second, forward
    return chosen_first, chosen_second, chosen_forward


@numba.njit(nogil=True, cache=True)
def _tabu(state, first, second, forward, step):  # type: ignore[no-untyped-def]
    """Whether the move puts a remembered pair back into its old order."""
    place = state.place
    for slot in range(len(state.tabu_until)):
        if state.tabu_until[slot] > step:
            before, behind = place[state.tabu_first[slot]], place[state.tabu_second[slot]]
            if forward:
                if behind == first and first < before <= second:
                    return True
            elif before == second and first <= behind < second:
                return True
    return False


@numba.njit(nogil=True, cache=True)
def _after_forward(state, first, second, cutoff):  # type: ignore[no-untyped-def]
    """Estimate of the longest path through the tasks moved when ``order[first]`` goes right behind ``order[second]``.

    NEVER if the move might deadlock; any value >= ``cutoff`` once it is sure to reach that.
    """
    order, start, tail, duration, trial = state.order, state.start, state.tail, state.duration, state.trial
    moved, last = order[first], order[second]
    for edge in range(state.succ_offset[moved], state.succ_offset[moved + 1]):
        other = state.succ_task[edge]
        # A way from ``other`` to ``last`` would make its tail longer and its end no later than the start of ``last``.
        if other == last or (duration[other] + tail[other] >= duration[last] + tail[last] and start[other] + duration[other] <= start[last]):
            return _NEVER
    now = np.int64(0)
    if first % state.rank_size > 0:
        before = order[first - 1]
        now = start[before] + duration[before]
    for index in range(first + 1, second + 1):
        now = _ready(state, order[index], now)
        trial[index - first] = now
        now += duration[order[index]]
    now = _ready(state, moved, now)
    behind = np.int64(0)
    if (second + 1) % state.rank_size > 0:
        other = order[second + 1]
        behind = duration[other] + tail[other]
    behind = _rest(state, moved, behind) + duration[moved]
    longest = now + behind
    for index in range(second, first, -1):
        if longest >= cutoff:
            return longest
        behind = _rest(state, order[index], behind) + duration[order[index]]
        longest = max(longest, trial[index - first] + behind)
    return longest


@numba.njit(nogil=True, cache=True)
def _after_backward(state, first, second, cutoff):  # type: ignore[no-untyped-def]
    """As :func:`_after_forward`, when ``order[second]`` goes right before ``order[first]``."""
    order, start, tail, duration, trial = state.order, state.start, state.tail, state.duration, state.trial
    moved, foremost = order[second], order[first]
    for edge in range(state.dep_offset[moved], state.dep_offset[moved + 1]):
        other = state.dep_task[edge]
        if other == foremost or (start[other] >= start[foremost] + duration[foremost] and tail[foremost] >= duration[other] + tail[other]):
            return _NEVER
    now = np.int64(0)
    if first % state.rank_size > 0:
        before = order[first - 1]
        now = start[before] + duration[before]
    start_moved = _ready(state, moved, now)
    now = start_moved + duration[moved]
    for index in range(first, second):
        now = _ready(state, order[index], now)
        trial[index - first] = now
        now += duration[order[index]]
    behind = np.int64(0)
    if (second + 1) % state.rank_size > 0:
        other = order[second + 1]
        behind = duration[other] + tail[other]
    longest = np.int64(0)
    for index in range(second - 1, first - 1, -1):
        behind = _rest(state, order[index], behind) + duration[order[index]]
        longest = max(longest, trial[index - first] + behind)
        if longest >= cutoff:
            return longest
    return max(longest, start_moved + duration[moved] + _rest(state, moved, behind))


@numba.njit(nogil=True, cache=True)
def _ready(state, task, now):  # type: ignore[no-untyped-def]
    """``now``, or when what the task waits for has come, if that is later."""
    for edge in range(state.dep_offset[task], state.dep_offset[task + 1]):
        other = state.dep_task[edge]
        now = max(now, state.start[other] + state.duration[other] + state.dep_lag[edge])
    return now


@numba.njit(nogil=True, cache=True)
def _rest(state, task, behind):  # type: ignore[no-untyped-def]
    """``behind``, or the longest way from the task's end over its dependents, if that is longer."""
    for edge in range(state.succ_offset[task], state.succ_offset[task + 1]):
        other = state.succ_task[edge]
        behind = max(behind, state.succ_lag[edge] + state.duration[other] + state.tail[other])
    return behind


@numba.njit(nogil=True, cache=True)
def _fits(state, limit, first, second, forward):  # type: ignore[no-untyped-def]
    """Whether the rank keeps its limit after the move."""
    order, mem_start, mem_end = state.order, state.mem_start, state.mem_end
    most = limit[first // state.rank_size]
    if most >= _UNLIMITED:
        return True
    held = state.held[first]
    for index in range(first, second + 1):
        if forward:
            task = order[index + 1] if index < second else order[first]
        else:
            task = order[second] if index == first else order[index - 1]
        kept = mem_start[task] + mem_end[task]
        if held + max(mem_start[task], kept) > most:
            return False
        held += kept
    return True
