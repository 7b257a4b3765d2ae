"""Slow, obvious twin of the memory choice (:mod:`megatron_dip.schedule.memory`): every candidate looked at, every sum made anew.

The same decisions as the kernels make, in plain lists. Bytes are whole numbers, and relaxed ones multiples of one half, so their sums are
the same in any order; prices are not, so whatever prices enter is added up from left to right (Python's ``sum`` would round otherwise).
Relies on what candidates are: from one to the next time does not fall and bytes do not rise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_dip.schedule.memory import MemoryTables

# Not the kernels' own: a change there is to be seen here.
STEP, PATIENCE, SHRINK = 1.2, 12, 0.7
MEAN_SHARE, LOOK, CLOSE, DEFLECTION = 0.1, 40, 1e-4, 1.5
EXCHANGES = 1_500_000

Sort = Callable[[list[float]], Sequence[int]]
"""Indices by rising value. Which of equal ones comes first is the caller's to say: the kernels' sort leaves it open."""


class Candidate(NamedTuple):
    time: int
    held: int


@dataclass(frozen=True)
class Pair:
    """A stage pair of one rank: whole from point ``first`` to before ``half``, then what its backward leaves to before ``last``."""

    number: int
    candidates: list[Candidate]
    """from the fastest to the leanest"""
    first: int
    half: int
    last: int

    def held(self, candidate: int, point: int) -> int:
        held = self.candidates[candidate].held
        return held if self.first <= point < self.half else held - held // 2 if self.half <= point < self.last else 0


@dataclass(frozen=True)
class Rank:
    pairs: list[Pair]
    """by their forwards' places in the order"""
    room: list[int]

    def over(self, trial: Sequence[int]) -> list[int]:
        """Bytes above the room at each point; below it where negative."""
        return [
            sum(pair.held(candidate, point) for pair, candidate in zip(self.pairs, trial, strict=True)) - room
            for point, room in enumerate(self.room)
        ]

    def fits(self, trial: Sequence[int]) -> bool:
        return max(self.over(trial), default=0) <= 0

    def time(self, trial: Sequence[int]) -> int:
        return sum(pair.candidates[candidate].time for pair, candidate in zip(self.pairs, trial, strict=True))


def written(tables: MemoryTables, choice: Sequence[int]) -> dict[int, tuple[int | None, int, int]]:
    """Twin of :func:`megatron_dip.schedule.memory.apply_choice`: task -> (duration, None as it was; bytes at its start; at its end)."""
    found: dict[int, tuple[int | None, int, int]] = {}
    for pair, candidate in enumerate(choice):
        kind = tables.pair_class[pair]
        held = int(tables.held_bytes[kind, candidate])
        forward, backward, weight = (int(tasks[pair]) for tasks in (tables.pair_forward, tables.pair_backward, tables.pair_weight))
        if backward < 0:
            gives = {forward: held}
        elif weight < 0:
            gives = {backward: held}
        else:
            gives = {backward: held // 2, weight: held - held // 2}
        durations = {forward: int(tables.forward_ns[kind, candidate]), backward: int(tables.backward_ns[kind, candidate])}
        for task in {forward, *gives}:
            start = int(tables.fixed_start[task]) + (held if task == forward else 0)
            found[task] = durations.get(task), start, int(tables.fixed_end[task]) - gives.get(task, 0)
    return found


def rank_of(tables: MemoryTables, order: Sequence[int], limit: int) -> Rank:
    """Twin of :func:`megatron_dip.schedule.memory.rank_problem`.

    A forward is a point where something is given back before the next forward starts: at its own end, or by a task right behind it. The
    last one is a point too.
    """
    order = [task for task in order if tables.pair_of_task[task] >= 0]
    fixed = [(int(tables.fixed_start[task]), int(tables.fixed_end[task])) for task in order]
    pair_of = [int(tables.pair_of_task[task]) for task in order]
    forwards = [place for place, task in enumerate(order) if tables.pair_forward[pair_of[place]] == task]
    points = [
        place for place in forwards
        if tables.pair_backward[pair_of[place]] < 0 or fixed[place][1] < 0 or place + 1 == len(order) or place + 1 not in forwards
    ]
    room = []
    for place in points:
        before = sum(start + end for start, end in fixed[:place])
        start, end = fixed[place]
        room.append(limit - before - max(start, start + end))

    def behind(place: int) -> int:
        """The first point behind the end of what is at ``place``."""
        return sum(point <= place for point in points)

    pairs = []
    for place in forwards:
        number = pair_of[place]
        kind = tables.pair_class[number]
        places = {task: at for at, task in enumerate(order) if pair_of[at] == number}
        backward = int(tables.pair_backward[number])
        pairs.append(Pair(
            number,
            [
                Candidate(int(tables.forward_ns[kind, candidate] + tables.backward_ns[kind, candidate]), int(tables.held_bytes[kind, candidate]))
                for candidate in range(tables.num_candidates[kind])
            ],
            sum(point < place for point in points), behind(places[backward] if backward >= 0 else place), behind(max(places.values())),
        ))
    return Rank(pairs, room)


def corners(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those alone the best at some price per byte: on or above no straight line between one before and one behind them."""
    points = list(dict.fromkeys(candidates))
    return [
        point for index, point in enumerate(points)
        if not any(
            (point.time - before.time) * (before.held - behind.held) >= (behind.time - before.time) * (before.held - point.held)
            for before in points[:index] for behind in points[index + 1 :]
        )
    ]


def added(values: Iterable[float]) -> float:
    total = 0.0
    for value in values:
        total += value
    return total


def choose(tables: MemoryTables, order: Sequence[int], limit: int, iterations: int, sort: Sort) -> tuple[dict[int, int], int, int] | None:
    """Twin of :func:`megatron_dip.schedule.memory.choose_kernel`: (pair -> candidate, the sum of their times, a bound on it).

    None where even the leanest candidates do not fit.
    """
    rank = rank_of(tables, order, limit)
    fastest, leanest = [0] * len(rank.pairs), [len(pair.candidates) - 1 for pair in rank.pairs]
    if rank.fits(fastest):
        return {pair.number: 0 for pair in rank.pairs}, rank.time(fastest), rank.time(fastest)
    if not rank.fits(leanest):
        return None
    best, bound = relaxation(rank, give_back(rank, leanest, sort), iterations, sort)
    best, _ = exchange(rank, best, EXCHANGES)
    chosen = {pair.number: candidate for pair, candidate in zip(rank.pairs, best, strict=True)}
    return chosen, rank.time(best), math.ceil(max(bound, 0.0) * (1.0 - 1e-9))


def relaxation(rank: Rank, best: list[int], iterations: int, sort: Sort) -> tuple[list[int], float]:
    """Prices of the points' bytes go where the room is exceeded; the best choice made from the means on the way, or ``best``; a bound."""
    hulls = [corners(pair.candidates) for pair in rank.pairs]
    at = [0] * len(hulls)
    mean = [float(hull[0].held) for hull in hulls]
    price, way = [0.0] * len(rank.room), [0.0] * len(rank.room)
    bound, share, since = -math.inf, STEP, 0
    for iteration in range(iterations):
        # Each pair alone, at these prices. Of two equally good corners the one next to the last taken.
        before = list(itertools.accumulate(price, initial=0.0))
        paid = [-each * room for each, room in zip(price, rank.room, strict=True)]
        for index, (pair, hull) in enumerate(zip(rank.pairs, hulls, strict=True)):
            per_byte = 0.5 * (before[pair.half] + before[pair.last]) - before[pair.first]
            costs = [corner.time + per_byte * corner.held for corner in hull]
            last = at[index]
            at[index] = min(range(len(hull)), key=lambda corner: (costs[corner], abs(corner - last)))
            paid.append(costs[at[index]])
        taken = [hull[corner].held for hull, corner in zip(hulls, at, strict=True)]
        mean = [old + MEAN_SHARE * (held - old) for old, held in zip(mean, taken, strict=True)]
        value = added(paid)
        since += 1
        if value > bound:
            bound, since = value, 0
        elif since >= PATIENCE:
            share, since = share * SHRINK, 0
        # The way: by what exceeds the room, bent towards the last way where it would turn back.
        excess = []
        for point, room in enumerate(rank.room):
            whole = sum(held for pair, held in zip(rank.pairs, taken, strict=True) if pair.first <= point < pair.half)
            halves = sum(held for pair, held in zip(rank.pairs, taken, strict=True) if pair.half <= point < pair.last)
            excess.append(whole + 0.5 * halves - room)
        along, norm = added(over * old for over, old in zip(excess, way, strict=True)), added(old * old for old in way)
        turn = max(0.0, -DEFLECTION * along / norm) if norm > 0.0 else 0.0
        way = [over + turn * old for over, old in zip(excess, way, strict=True)]
        # A price of nothing cannot fall.
        norm = added(new * new for new, each in zip(way, price, strict=True) if new > 0.0 or each > 0.0)
        if (iteration + 1) % LOOK == 0 or iteration + 1 == iterations or norm == 0.0:
            trial = give_back(rank, repair(rank, rounded(rank, mean)), sort)
            if rank.time(trial) < rank.time(best):
                best = trial
            if norm == 0.0 or rank.time(best) - bound <= CLOSE * rank.time(best):
                break
        goal = rank.time(best)
        length = share * max(goal - value, 1e-6 * goal) / norm
        price = [max(0.0, each + length * new) for each, new in zip(price, way, strict=True)]
    return best, bound


def rounded(rank: Rank, mean: Sequence[float]) -> list[int]:
    """The candidates whose bytes are nearest to the mean, the faster of two."""
    return [
        min(range(len(pair.candidates)), key=lambda candidate: abs(pair.candidates[candidate].held - held))
        for pair, held in zip(rank.pairs, mean, strict=True)
    ]


def repair(rank: Rank, trial: Sequence[int]) -> list[int]:
    """Point by point, while it exceeds the room: of the pairs that are live there, that with the best rate takes its next candidate."""
    trial = list(trial)
    for point in range(len(rank.room)):
        while (lacking := rank.over(trial)[point]) > 0:
            rates = {}
            for index, pair in enumerate(rank.pairs):
                if pair.first <= point < pair.last and trial[index] + 1 < len(pair.candidates):
                    now, then = pair.candidates[trial[index]], pair.candidates[trial[index] + 1]
                    saved = now.held - then.held
                    if point >= pair.half:
                        saved -= saved // 2
                    # Bytes that are needed here count once, all of them a little more for each point that they help.
                    worth = min(saved, lacking) + 0.01 * saved * (pair.last - point)
                    rates[index] = (then.time - now.time) / max(worth, 1e-6)
            trial[min(rates, key=lambda index: rates[index])] += 1
    return trial


def give_back(rank: Rank, trial: Sequence[int], sort: Sort) -> list[int]:
    """Pair by pair, that first whose way back to the fastest wins most time per byte and point: the fastest candidate that fits."""
    result, values = list(trial), []
    for pair, candidate in zip(rank.pairs, result, strict=True):
        now, fastest = pair.candidates[candidate], pair.candidates[0]
        more = max(fastest.held - now.held, 1)
        values.append(-(now.time - fastest.time) / (float(more) * (1 + pair.last - pair.first)) if candidate else 0.0)
    order = sort(values)
    assert [values[index] for index in order] == sorted(values)
    for index in order:
        options = [changed(result, index, candidate) for candidate in range(result[index])]
        result = next((option for option in options if rank.fits(option)), result)
    return result


def exchange(rank: Rank, trial: Sequence[int], looks: int) -> tuple[list[int], int]:
    """In turn each pair's best move: a faster candidate, and one slower candidate of another pair where the room is exceeded.

    Ends after a whole round without one, or when the looks are used up: one for each point at which the pair is live and, where the room
    is exceeded, one for each pair; candidates that win no more than the best move so far are not looked at. Returns the ns won too.
    """
    trial = list(trial)
    before, index, in_vain = rank.time(trial), 0, 0
    while in_vain < len(rank.pairs) and looks > 0:
        pair, now = rank.pairs[index], rank.time(trial)
        moves = [(0, trial)]
        for candidate in range(trial[index]):
            faster = changed(trial, index, candidate)
            if now - rank.time(faster) <= max(won for won, _ in moves):
                break
            looks -= pair.last - pair.first
            lacking = {point: over for point, over in enumerate(rank.over(faster)) if over > 0}
            if not lacking:
                moves.append((now - rank.time(faster), faster))
                continue
            looks -= len(rank.pairs)
            low, high = min(lacking), max(lacking)
            for other, their in enumerate(rank.pairs):
                if other == index or their.first > low or their.last <= high:
                    continue
                for slower in range(trial[other] + 1, len(their.candidates)):
                    # At the last of the points, where a split pair may have given back one half.
                    if their.held(trial[other], high) - their.held(slower, high) >= max(lacking.values()):
                        both = changed(faster, other, slower)
                        moves.append((now - rank.time(both), both))
        won, then = max(moves, key=lambda move: move[0])
        in_vain = 0 if won > 0 else in_vain + 1
        trial = then
        index = (index + 1) % len(rank.pairs)
    return trial, before - rank.time(trial)


def changed(trial: Sequence[int], index: int, candidate: int) -> list[int]:
    return [*trial[:index], candidate, *trial[index + 1 :]]
