# mypy: no-check-untyped-defs
"""Chooses a memory candidate for each stage pair, rank by rank, for given orders.

In: a rank's order of tasks and the bytes it may hold. Out: for each of its pairs a candidate, so that the sum of times is small and the
live pairs fit at every instant. The sets of live pairs depend on the rank's order alone, so a choice stays feasible when other ranks'
times change. Source: DIP (arXiv 2504.14145), per-layer memory optimisation; its integer programme is solved here by Lagrangian
relaxation: each instant at which memory can peak has a price per byte; prices move by subgradient steps (Polyak's length); at given
prices each pair chooses alone. Candidates of a class cost about the same time per byte, so one such choice takes nearly every pair to an
extreme; the running mean of them all comes near the relaxation's optimum (Barahona, Anbil, the volume algorithm, 2000). Each pair's
candidate next to the mean is taken; what does not fit is repaired (best time per byte first), what is left unused is given back (most
time first); then pairs exchange: one takes a faster candidate, another a slower one where that is needed.
:mod:`megatron_dip.schedule.exact_memory` solves the same programme with HiGHS, as an option and as a judge of the gap.

Memory rises only when a forward starts, so only the last start before something is given back can bind: those are the *points*. A split
backward gives back floor(half) of its pair's bytes at the input part's end, the rest at the weight part's.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.graph import StageProblem

ITERATIONS = 200
"""Subgradient steps; after the exchanges the gap to the exact optimum is then below 0.1 % (tests and the benchmark measure it)."""
_STEP, _PATIENCE, _SHRINK = 1.2, 12, 0.7
"""Share of Polyak's step length at first; after so many steps without a better bound it is cut to so much of itself."""
_MEAN_SHARE = 0.1
"""Weight of the newest relaxed choice in the mean of all of them."""
_LOOK = 40
"""Steps from one rounding of the mean to the next."""
_CLOSE = 1e-4
"""Relative gap to the bound at which the steps end."""
_DEFLECTION = 1.5
"""How strongly a step that would turn back is bent towards the last one."""
_EXCHANGES = 1_500_000
"""Looks at pairs and points that one rank's exchanges may take: some milliseconds."""


class MemoryTables(NamedTuple):
    """What a choice is made from. Letters: T tasks, Q pairs, C classes, S candidates."""

    num_ranks: int
    pair_of_task: NDArray[np.int32]
    """[T]; -1 = absent, as in :class:`~megatron_dip.schedule.graph.StageProblem`"""
    pair_forward: NDArray[np.int32]
    """[Q] task ids, -1 = none; likewise below"""
    pair_backward: NDArray[np.int32]
    pair_weight: NDArray[np.int32]
    pair_class: NDArray[np.int32]
    """[Q]"""
    num_candidates: NDArray[np.int32]
    """[C]"""
    forward_ns: NDArray[np.int64]
    """[C, S]"""
    backward_ns: NDArray[np.int64]
    """[C, S]"""
    held_bytes: NDArray[np.int64]
    """[C, S]"""
    fixed_start: NDArray[np.int64]
    """[T] bytes taken at a task's start besides its pair's"""
    fixed_end: NDArray[np.int64]
    """[T]"""


def make_tables(problem: StageProblem) -> MemoryTables:
    graph = problem.fastest
    tables = MemoryTables(
        num_ranks=graph.num_ranks, pair_of_task=problem.pair_of_task, pair_forward=problem.pair_forward, pair_backward=problem.pair_backward,
        pair_weight=problem.pair_weight, pair_class=problem.pair_class, num_candidates=problem.num_candidates,
        forward_ns=problem.forward_ns, backward_ns=problem.backward_ns, held_bytes=problem.held_bytes,
        fixed_start=np.zeros(graph.num_tasks, dtype=np.int64), fixed_end=np.zeros(graph.num_tasks, dtype=np.int64),
    )
    # What the candidates do not explain of the graph's memory (held encoder outputs).
    duration, start, end = graph.duration_ns.copy(), tables.fixed_start.copy(), tables.fixed_end.copy()
    apply_choice(tables, np.zeros(problem.num_pairs, dtype=np.int32), duration, start, end)
    return tables._replace(fixed_start=graph.mem_start_bytes - start, fixed_end=graph.mem_end_bytes - end)


@numba.njit(nogil=True, cache=True)
def apply_choice(tables, choice, duration, mem_start, mem_end):  # type: ignore[no-untyped-def]
    """Writes every task's duration and memory under ``choice`` [Q] (durations of weight stages stay as they are)."""
    for pair in range(len(choice)):
        kind, candidate = tables.pair_class[pair], choice[pair]
        forward, backward, weight = tables.pair_forward[pair], tables.pair_backward[pair], tables.pair_weight[pair]
        held = tables.held_bytes[kind, candidate]
        duration[forward] = tables.forward_ns[kind, candidate]
        mem_start[forward] = tables.fixed_start[forward] + held
        mem_end[forward] = tables.fixed_end[forward]
        if backward < 0:
            mem_end[forward] -= held
            continue
        duration[backward] = tables.backward_ns[kind, candidate]
        mem_start[backward] = tables.fixed_start[backward]
        mem_end[backward] = tables.fixed_end[backward] - held
        if weight >= 0:
            mem_end[backward] += held - held // 2
            mem_start[weight] = tables.fixed_start[weight]
            mem_end[weight] = tables.fixed_end[weight] - (held - held // 2)


class RankProblem(NamedTuple):
    """One rank's choice. Letters: n pairs, m points."""

    pair: NDArray[np.int32]
    """[n]"""
    first: NDArray[np.int32]
    """[n] first point at which the pair is live"""
    half: NDArray[np.int32]
    """[n] first point behind its backward's end"""
    last: NDArray[np.int32]
    """[n] first point behind its last task's end"""
    room: NDArray[np.int64]
    """[m] bytes for the pairs at each point"""


@numba.njit(nogil=True, cache=True)
def rank_problem(tables, order, limit):  # type: ignore[no-untyped-def]
    """Points and live ranges of one rank's ``order``."""
    size = len(order)
    pair = np.empty(size, dtype=np.int32)
    first, half, last = np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32), np.empty(size, dtype=np.int32)
    room = np.empty(size, dtype=np.int64)
    index_of = np.full(len(tables.pair_class), -1, dtype=np.int32)
    num_pairs, num_points = 0, 0
    fixed = np.int64(0)
    pending = False
    pending_room = np.int64(0)
    for position in range(size):
        task = order[position]
        number = tables.pair_of_task[task]
        if number < 0:
            continue
        if tables.pair_forward[number] == task:
            index_of[number] = num_pairs
            pair[num_pairs] = number
            first[num_pairs] = num_points
            half[num_pairs] = num_points
            num_pairs += 1
            peak = tables.fixed_start[task]
            if tables.fixed_start[task] + tables.fixed_end[task] > peak:
                peak = tables.fixed_start[task] + tables.fixed_end[task]
            pending_room = limit - fixed - peak
            pending = True
            fixed += tables.fixed_start[task] + tables.fixed_end[task]
            gives_back = tables.pair_backward[number] < 0 or tables.fixed_end[task] < 0
        else:
            fixed += tables.fixed_start[task] + tables.fixed_end[task]
            gives_back = True
        if gives_back and pending:
            room[num_points] = pending_room
            num_points += 1
            pending = False
        if tables.pair_backward[number] == task or tables.pair_backward[number] < 0:
            half[index_of[number]] = num_points
        last[index_of[number]] = num_points
    if pending:
        room[num_points] = pending_room
        num_points += 1
    return RankProblem(pair[:num_pairs], first[:num_pairs], half[:num_pairs], last[:num_pairs], room[:num_points])


class _Hulls(NamedTuple):
    """Each pair's candidates that are best at some price per byte, from the fastest to the leanest. Letters: n pairs, S candidates."""

    size: NDArray[np.int32]
    """[n]"""
    time: NDArray[np.float64]
    """[n, S] ns"""
    held: NDArray[np.float64]
    """[n, S] bytes"""


@numba.njit(nogil=True, cache=True)
def _make_hulls(tables, problem, top):  # type: ignore[no-untyped-def]
    pairs, width = len(top), tables.held_bytes.shape[1]
    size = np.zeros(pairs, dtype=np.int32)
    times, helds = np.empty((pairs, width)), np.empty((pairs, width))
    for index in range(pairs):
        kind = tables.pair_class[problem.pair[index]]
        count = 0
        for candidate in range(top[index] + 1):
            time = np.float64(tables.forward_ns[kind, candidate] + tables.backward_ns[kind, candidate])
            held = np.float64(tables.held_bytes[kind, candidate])
            # The last one goes where the way past it is no dearer (the slopes rise along a hull).
            while count > 1 and (
                (times[index, count - 1] - times[index, count - 2]) * (helds[index, count - 1] - held)
                >= (time - times[index, count - 1]) * (helds[index, count - 2] - helds[index, count - 1])
            ):
                count -= 1
            times[index, count], helds[index, count] = time, held
            count += 1
        size[index] = count
    return _Hulls(size, times, helds)


@numba.njit(nogil=True, cache=True)
def choose_kernel(tables, order, limit, choice, iterations):  # type: ignore[no-untyped-def]
    """Writes the candidates of one rank's pairs into ``choice`` [Q]. Returns (sum of their times, a lower bound on it).

    The sum is -1 and ``choice`` untouched where even the leanest candidates do not fit this order.
    Long since its rounds of prices share a dozen local arrays.
    """
    problem = rank_problem(tables, order, limit)
    size, points = len(problem.pair), len(problem.room)
    top = np.empty(size, dtype=np.int32)
    for index in range(size):
        top[index] = tables.num_candidates[tables.pair_class[problem.pair[index]]] - 1
    use = np.empty(points, dtype=np.int64)
    trial = np.zeros(size, dtype=np.int32)
    if _usage(tables, problem, trial, use) <= 0:
        time = _time(tables, problem, trial)
        for index in range(size):
            choice[problem.pair[index]] = 0
        return time, time
    trial[:] = top
    if _usage(tables, problem, trial, use) > 0:
        return np.int64(-1), np.int64(-1)
    best = trial.copy()
    _give_back(tables, problem, best, use)
    best_time = _time(tables, problem, best)

    hulls = _make_hulls(tables, problem, top)
    price, way, excess = np.zeros(points), np.zeros(points), np.zeros(points)
    summed, change = np.zeros(points + 1), np.zeros(points + 1)
    at = np.zeros(size, dtype=np.int32)
    mean_held = hulls.held[:, 0].copy()
    bound, share, since = -np.inf, _STEP, 0
    for iteration in range(iterations):
        total, value = 0.0, 0.0
        for point in range(points):
            total += price[point]
            summed[point + 1] = total
            value -= price[point] * problem.room[point]
        change[:] = 0.0
        for index in range(size):
            first, half, last = problem.first[index], problem.half[index], problem.last[index]
            per_byte = 0.5 * (summed[half] + summed[last]) - summed[first]
            # Along a hull costs fall, then rise; from one iteration to the next the least moves little.
            now = at[index]
            cost = hulls.time[index, now] + per_byte * hulls.held[index, now]
            step = 1
            for _ in range(2):
                while 0 <= now + step < hulls.size[index]:
                    other = hulls.time[index, now + step] + per_byte * hulls.held[index, now + step]
                    if other >= cost:
                        break
                    cost = other
                    now += step
                step = -1
            at[index] = now
            value += cost
            held = hulls.held[index, now]
            change[first] += held
            change[half] -= 0.5 * held
            change[last] -= 0.5 * held
            mean_held[index] += _MEAN_SHARE * (held - mean_held[index])
        since += 1
        if value > bound:
            bound, since = value, 0
        elif since >= _PATIENCE:
            share, since = share * _SHRINK, 0
        # Against zigzagging: no step back along the way that led here (Camerini, Fratta, Maffioli 1975).
        total, along, norm = 0.0, 0.0, 0.0
        for point in range(points):
            total += change[point]
            excess[point] = total - problem.room[point]
            along += excess[point] * way[point]
            norm += way[point] * way[point]
        turn = max(0.0, -_DEFLECTION * along / norm) if norm > 0.0 else 0.0
        norm = 0.0
        for point in range(points):
            way[point] = excess[point] + turn * way[point]
            if way[point] > 0.0 or price[point] > 0.0:
                norm += way[point] * way[point]
        if (iteration + 1) % _LOOK == 0 or iteration == iterations - 1 or norm == 0.0:
            _round(tables, problem, mean_held, top, trial)
            _repair(tables, problem, trial, top, use)
            _give_back(tables, problem, trial, use)
            time = _time(tables, problem, trial)
            if time < best_time:
                best_time = time
                best[:] = trial
            if norm == 0.0 or best_time - bound <= _CLOSE * best_time:
                break
        # Polyak's step towards the best known sum.
        length = share * max(best_time - value, 1e-6 * best_time) / norm
        for point in range(points):
            price[point] = max(0.0, price[point] + length * way[point])
    best_time -= _exchange(tables, problem, best, use, _EXCHANGES)
    for index in range(size):
        choice[problem.pair[index]] = best[index]
    # Less what adding up floats may have added.
    return best_time, np.int64(np.ceil(max(bound, 0.0) * (1.0 - 1e-9)))


@numba.njit(nogil=True, cache=True)
def _round(tables, problem, mean_held, top, trial):  # type: ignore[no-untyped-def]
    """Writes each pair's candidate whose bytes are nearest to ``mean_held`` [n]."""
    for index in range(len(trial)):
        held = tables.held_bytes[tables.pair_class[problem.pair[index]]]
        nearest = 0
        for candidate in range(1, top[index] + 1):
            if abs(held[candidate] - mean_held[index]) < abs(held[nearest] - mean_held[index]):
                nearest = candidate
        trial[index] = nearest


@numba.njit(nogil=True, cache=True)
def _time(tables, problem, trial):  # type: ignore[no-untyped-def]
    total = np.int64(0)
    for index in range(len(trial)):
        kind = tables.pair_class[problem.pair[index]]
        total += tables.forward_ns[kind, trial[index]] + tables.backward_ns[kind, trial[index]]
    return total


@numba.njit(nogil=True, cache=True)
def _usage(tables, problem, trial, use):  # type: ignore[no-untyped-def]
    """Fills ``use`` with the live pairs' bytes at each point; returns the largest excess over the room (far below 0 on a rank without stages)."""
    points = len(use)
    if points == 0:
        return -np.int64(1 << 62)
    change = np.zeros(points + 1, dtype=np.int64)
    for index in range(len(trial)):
        held = tables.held_bytes[tables.pair_class[problem.pair[index]], trial[index]]
        rest = held - held // 2
        change[problem.first[index]] += held
        change[problem.half[index]] += rest - held
        change[problem.last[index]] -= rest
    total, excess = np.int64(0), -problem.room[0]
    for point in range(points):
        total += change[point]
        use[point] = total
        excess = max(excess, total - problem.room[point])
    return excess


@numba.njit(nogil=True, cache=True)
def _move(tables, problem, use, index, before, after):  # type: ignore[no-untyped-def]
    """Changes ``use`` for pair ``index`` going from one candidate to another."""
    kind = tables.pair_class[problem.pair[index]]
    old, new = tables.held_bytes[kind, before], tables.held_bytes[kind, after]
    for point in range(problem.first[index], problem.half[index]):
        use[point] += new - old
    rest = (new - new // 2) - (old - old // 2)
    for point in range(problem.half[index], problem.last[index]):
        use[point] += rest


@numba.njit(nogil=True, cache=True)
def _repair(tables, problem, trial, top, use):  # type: ignore[no-untyped-def]
    """Makes ``trial`` fit: at the worst point, the pair that gives bytes for least time takes its next candidate, and again."""
    points = len(use)
    _usage(tables, problem, trial, use)
    for point in range(points):
        while use[point] > problem.room[point]:
            best, best_rate = -1, np.inf
            for index in range(len(trial)):
                if problem.first[index] > point:
                    break
                if problem.last[index] <= point or trial[index] >= top[index]:
                    continue
                kind, now = tables.pair_class[problem.pair[index]], trial[index]
                saved = tables.held_bytes[kind, now] - tables.held_bytes[kind, now + 1]
                if problem.half[index] <= point:
                    saved -= saved // 2
                cost = (
                    tables.forward_ns[kind, now + 1] + tables.backward_ns[kind, now + 1]
                    - tables.forward_ns[kind, now] - tables.backward_ns[kind, now]
                )
                # Points to come count too: what stays live longer helps them.
                # Candidates may hold equal bytes once rounded.
                rate = cost / max(min(saved, use[point] - problem.room[point]) + 0.01 * saved * (problem.last[index] - point), 1e-6)
                if rate < best_rate:
                    best, best_rate = index, rate
            assert best >= 0, "the leanest candidates fit"
            _move(tables, problem, use, best, trial[best], trial[best] + 1)
            trial[best] += 1


@numba.njit(nogil=True, cache=True)
def _give_back(tables, problem, trial, use):  # type: ignore[no-untyped-def]
    """Takes faster candidates where a feasible ``trial`` leaves room, most time per byte and point first, until nothing more fits."""
    size = len(trial)
    gain = np.empty(size)
    _usage(tables, problem, trial, use)
    for index in range(size):
        kind, now = tables.pair_class[problem.pair[index]], trial[index]
        gain[index] = 0.0
        if now > 0:
            saved = tables.forward_ns[kind, now] + tables.backward_ns[kind, now] - tables.forward_ns[kind, 0] - tables.backward_ns[kind, 0]
            more = max(tables.held_bytes[kind, 0] - tables.held_bytes[kind, now], 1)
            gain[index] = -saved / (np.float64(more) * (1 + problem.last[index] - problem.first[index]))
    for index in np.argsort(gain):
        if trial[index] == 0:
            continue
        room, half_room = np.int64(1) << 60, np.int64(1) << 60
        for point in range(problem.first[index], problem.half[index]):
            room = min(room, problem.room[point] - use[point])
        for point in range(problem.half[index], problem.last[index]):
            half_room = min(half_room, problem.room[point] - use[point])
        kind, now = tables.pair_class[problem.pair[index]], trial[index]
        held = tables.held_bytes[kind, now]
        for candidate in range(now):
            other = tables.held_bytes[kind, candidate]
            if other - held <= room and (other - other // 2) - (held - held // 2) <= half_room:
                _move(tables, problem, use, index, now, candidate)
                trial[index] = candidate
                break


@numba.njit(nogil=True, cache=True)
def _exchange(tables, problem, trial, use, looks):  # type: ignore[no-untyped-def]
    """Improves a feasible ``trial``: a pair takes a faster candidate, and where that exceeds the room another pair a slower one.

    Ends when no such exchange wins time, or after so many looks at points and pairs. Returns the ns won.
    """
    size = len(trial)
    _usage(tables, problem, trial, use)
    won, since, index = np.int64(0), 0, -1
    while since < size and looks > 0:
        since += 1
        index = (index + 1) % size
        kind, now = tables.pair_class[problem.pair[index]], trial[index]
        time = tables.forward_ns[kind, now] + tables.backward_ns[kind, now]
        held = tables.held_bytes[kind, now]
        best, best_candidate, best_other, best_other_candidate = np.int64(0), -1, -1, -1
        for candidate in range(now):
            gain = time - tables.forward_ns[kind, candidate] - tables.backward_ns[kind, candidate]
            if gain <= best:
                break
            more = tables.held_bytes[kind, candidate]
            more_half = (more - more // 2) - (held - held // 2)
            more -= held
            # Where it exceeds the room, and by how much.
            low, high, lacking = -1, -1, np.int64(0)
            looks -= problem.last[index] - problem.first[index]
            for point in range(problem.first[index], problem.last[index]):
                over = use[point] - problem.room[point] + (more if point < problem.half[index] else more_half)
                if over > 0:
                    if low < 0:
                        low = point
                    high = point
                    lacking = max(lacking, over)
            if low < 0:
                best, best_candidate, best_other = gain, candidate, -1
                break
            looks -= size
            for other in range(size):
                if problem.first[other] > low:
                    break
                if problem.last[other] <= high or other == index:
                    continue
                theirs, before = tables.pair_class[problem.pair[other]], trial[other]
                given, their_time = tables.held_bytes[theirs, before], tables.forward_ns[theirs, before] + tables.backward_ns[theirs, before]
                whole = problem.half[other] > high
                for slower in range(before + 1, tables.num_candidates[theirs]):
                    cost = tables.forward_ns[theirs, slower] + tables.backward_ns[theirs, slower] - their_time
                    if gain - cost <= best:
                        break
                    less = tables.held_bytes[theirs, slower]
                    freed = given - less if whole else (given - given // 2) - (less - less // 2)
                    if freed >= lacking:
                        best, best_candidate, best_other, best_other_candidate = gain - cost, candidate, other, slower
                        break
        if best_candidate >= 0:
            won += best
            since = 0
            _move(tables, problem, use, index, now, best_candidate)
            trial[index] = best_candidate
            if best_other >= 0:
                _move(tables, problem, use, best_other, trial[best_other], best_other_candidate)
                trial[best_other] = best_other_candidate
    return won


def choose(
    tables: MemoryTables, orders: list[NDArray[np.int32]], limit: NDArray[np.int64], choice: NDArray[np.int32], iterations: int = ITERATIONS
) -> bool:
    """Chooses for every rank, in place. False where some rank's order does not fit even with the leanest candidates."""
    for rank, order in enumerate(orders):
        total, _ = choose_kernel(tables, order, limit[rank], choice, iterations)
        if total < 0:
            return False
    return True
