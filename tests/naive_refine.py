"""Slow, obvious twin of the tabu refinement: nothing is kept up from step to step, every time comes from longest paths made anew."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from megatron_dip.spec.tasks import TaskGraph
from tests import naive

REACH, TENURE, PATIENCE, SHAKE = 20, 10, 300, 8
"""As :mod:`megatron_dip.schedule.refine` describes them."""

Orders = list[list[int]]
"""Each rank's tasks."""


class Move(NamedTuple):
    """The task at place ``low`` of a rank goes right behind the one at ``high`` (forward), or that one right before the one at ``low``."""

    rank: int
    low: int
    high: int
    forward: bool

    def made(self, orders: Orders) -> Orders:
        row = list(orders[self.rank])
        if self.forward:
            row.insert(self.high, row.pop(self.low))
        else:
            row.insert(self.low, row.pop(self.high))
        return [row if rank == self.rank else list(other) for rank, other in enumerate(orders)]


class Tabu(NamedTuple):
    """``first`` must not come to stand before ``second`` again, in steps whose number, counted from 1, is below ``until``."""

    first: int
    second: int
    until: int


class Walks:
    """Longest paths over dependencies and orders: ``start`` of each task, ``tail`` from its end to the end of all, the ``makespan``."""

    def __init__(self, graph: TaskGraph, orders: Orders) -> None:
        self.orders = orders
        self.duration: list[int] = graph.duration_ns.tolist()
        self.arrows: list[list[tuple[int, int]]] = [naive.edges(graph, task) for task in range(graph.num_tasks)]
        """by task: (task waited for, lag)"""
        self.out: list[list[tuple[int, int]]] = [[] for _ in range(graph.num_tasks)]
        """by task: (task that waits, lag)"""
        for task, arrows in enumerate(self.arrows):
            for other, lag in arrows:
                self.out[other].append((task, lag))
        self.before: dict[int, int] = {after: task for row in orders for task, after in itertools.pairwise(row)}
        self.after: dict[int, int] = {task: after for row in orders for task, after in itertools.pairwise(row)}

        @functools.cache
        def start(task: int) -> int:
            ways = [start(other) + self.duration[other] + lag for other, lag in self.arrows[task]]
            if task in self.before:
                ways.append(start(self.before[task]) + self.duration[self.before[task]])
            return max(ways, default=0)

        @functools.cache
        def tail(task: int) -> int:
            ways = [lag + self.duration[other] + tail(other) for other, lag in self.out[task]]
            if task in self.after:
                ways.append(self.duration[self.after[task]] + tail(self.after[task]))
            return max(ways, default=0)

        self.start: Callable[[int], int] = start
        self.tail: Callable[[int], int] = tail
        self.makespan = max(self.end(task) for task in range(graph.num_tasks))

    def end(self, task: int) -> int:
        return self.start(task) + self.duration[task]

    def rest(self, task: int) -> int:
        """The task and what lies behind it."""
        return self.duration[task] + self.tail(task)


def critical_path(walks: Walks, random: naive.Random) -> list[int]:
    """From a last task back to a first one; of several ways, each is as likely."""

    def one_of(tasks: list[int]) -> int | None:
        chosen = None
        for count, task in enumerate(tasks, start=1):
            if random.below(count) == 0:
                chosen = task
        return chosen

    path: list[int] = []
    task = one_of([row[-1] for row in walks.orders if walks.end(row[-1]) == walks.makespan])
    while task is not None:
        path.append(task)
        ways = [other for other, lag in walks.arrows[task] if walks.end(other) + lag == walks.start(task)]
        if task in walks.before and walks.end(walks.before[task]) == walks.start(task):
            ways.append(walks.before[task])
        task = one_of(ways)
    return path


def blocks(walks: Walks, path: list[int]) -> list[tuple[int, int, int]]:
    """(rank, first place, last place) of each run of tasks that stand side by side on the path and on a rank, the latest run first."""
    where = {task: (rank, place) for rank, row in enumerate(walks.orders) for place, task in enumerate(row)}
    found: list[tuple[int, int, int]] = []
    for task in path:
        rank, place = where[task]
        if found and (found[-1][0], found[-1][1] - 1) == (rank, place):
            found[-1] = (rank, place, found[-1][2])
        else:
            found.append((rank, place, place))
    return found


def moves(rank: int, begin: int, end: int) -> Iterator[Move]:
    """A task near the end goes to the end, the first one forward; a task near the begin to the begin, the last one backward.

    A swap of neighbours is a forward move only. The whole block's length is met once by the forward moves, twice by the backward ones.
    """
    reach = range(1, min(REACH, end - begin) + 1)
    yield from (Move(rank, end - distance, end, True) for distance in reach)
    yield from (Move(rank, begin, begin + distance, True) for distance in reach if begin + distance < end)
    yield from (Move(rank, begin, begin + distance, False) for distance in reach if distance > 1)
    yield from (Move(rank, end - distance, end, False) for distance in reach if distance > 1)


def may_deadlock(walks: Walks, move: Move) -> bool:
    """Whether, by their times, a way might lead from the moved task around to the task at the other end (or from that one to it)."""
    row = walks.orders[move.rank]
    low, high = row[move.low], row[move.high]
    if move.forward:
        return any(
            other == high or (walks.end(other) <= walks.start(high) and walks.rest(other) >= walks.rest(high)) for other, _ in walks.out[low]
        )
    return any(
        other == low or (walks.end(low) <= walks.start(other) and walks.tail(low) >= walks.rest(other)) for other, _ in walks.arrows[high]
    )


def estimate(walks: Walks, move: Move) -> int:
    """Longest path through the tasks between the move's places, if what lies on other ranks kept its times and tails."""
    row = move.made(walks.orders)[move.rank]
    places = range(move.low, move.high + 1)
    start: dict[int, int] = {}
    now = walks.end(row[move.low - 1]) if move.low else 0
    for place in places:
        task = row[place]
        start[place] = max([now, *(walks.end(other) + lag for other, lag in walks.arrows[task])])
        now = start[place] + walks.duration[task]
    rest: dict[int, int] = {}
    behind = walks.rest(row[move.high + 1]) if move.high + 1 < len(row) else 0
    for place in reversed(places):
        task = row[place]
        behind = walks.duration[task] + max([behind, *(lag + walks.rest(other) for other, lag in walks.out[task])])
        rest[place] = behind
    return max(start[place] + rest[place] for place in places)


def is_tabu(orders: Orders, move: Move, tabus: list[Tabu], step: int) -> bool:
    """Whether the move puts a remembered pair back into the order that it was taken out of."""
    then, now = orders[move.rank], move.made(orders)[move.rank]
    return any(
        step < tabu.until and {tabu.first, tabu.second} <= set(now)
        and then.index(tabu.first) > then.index(tabu.second) and now.index(tabu.first) < now.index(tabu.second)
        for tabu in tabus
    )


def fits(graph: TaskGraph, orders: Orders, limit: Sequence[int]) -> bool:
    """Memory of whole orders, played from their begin."""
    return all(peak <= most for peak, most in zip(naive.peak_memory(graph, orders), limit, strict=True))


class Refinement:
    """Twin of :func:`megatron_dip.schedule.refine.refine_kernel`; orders that fit their limits, few enough tasks for recursion."""

    def __init__(self, graph: TaskGraph, orders: Sequence[Sequence[int]], limit: Sequence[int], random: naive.Random) -> None:
        self.graph, self.limit, self.random = graph, limit, random
        self.orders: Orders = [list(row) for row in orders]
        self.best_orders, self.best = self.orders, Walks(graph, self.orders).makespan
        self.tabus: list[Tabu] = []
        self.step = self.patience = self.shakes = 0
        self.times_back = self.times_tabu = self.times_full = 0
        """How often each rule counted: went back to the best, a tabu move left out, one that exceeds memory left out."""

    def run(self, steps: int, bound: int) -> int:
        for _ in range(steps):
            if self.best <= bound:
                break
            self._take_step()
        return self.best

    def _take_step(self) -> None:
        self.step += 1
        walks = Walks(self.graph, self.orders)
        move = self._best_move(walks)
        if move is None:
            self.patience += PATIENCE // 8
        else:
            row = self.orders[move.rank]
            # The tenure counts from this step on: 8 to 17 steps behind it may not undo the move.
            self.tabus.append(Tabu(row[move.low], row[move.high], self.step - 1 + TENURE + self.random.below(TENURE)))
            self.orders = move.made(self.orders)
            makespan = Walks(self.graph, self.orders).makespan
            self.patience += 1
            self.shakes -= self.shakes > 0
            if makespan < self.best:
                self.best_orders, self.best, self.patience = self.orders, makespan, 0
        if self.patience >= PATIENCE:
            self.orders, self.patience, self.tabus = self.best_orders, 0, []
            self.shakes = self.random.below(SHAKE + 1)
            self.times_back += 1

    def _best_move(self, walks: Walks) -> Move | None:
        """The least estimate; while shaking, any move. Of equal ones each is as likely."""
        least: int | None = None
        chosen, equal = None, 0
        for block in blocks(walks, critical_path(walks, self.random)):
            for move in moves(*block):
                if may_deadlock(walks, move):
                    continue
                value = estimate(walks, move)
                if self.shakes == 0 and least is not None and value > least:
                    continue
                if value >= self.best and is_tabu(walks.orders, move, self.tabus, self.step):
                    self.times_tabu += 1
                    continue
                if not fits(self.graph, move.made(walks.orders), self.limit):
                    self.times_full += 1
                    continue
                if self.shakes == 0 and (least is None or value < least):
                    equal = 0
                equal += 1
                if self.random.below(equal) == 0:
                    least, chosen = value, move
        return chosen
