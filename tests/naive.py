"""Slow, obvious twins of the compiled kernels: plain lists, no bitmaps, no heaps, no incremental sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dip.schedule import interleave as kernels
from megatron_dip.schedule.interleave import ALTERNATE, FORWARD_FIRST, MAX_TESTS, Policy
from megatron_dip.spec.tasks import BACKWARD, FORWARD, WEIGHT, TaskGraph

UNLIMITED = int(kernels.UNLIMITED)


def groups(graph: TaskGraph, kind: int) -> list[list[int]]:
    """Segments (named by their task on rank 0) of each group of one direction, groups by (microbatch, module)."""
    found: dict[tuple[int, int], list[int]] = {}
    for task in range(0, graph.num_tasks, graph.num_ranks):
        if graph.kind[task] == kind:
            found.setdefault((int(graph.microbatch[task]), int(graph.module[task])), []).append(task)
    sign = -1 if kind == FORWARD else 1
    return [sorted(found[key], key=lambda task: (sign * graph.vp_stage[task], graph.sub_microbatch[task])) for key in sorted(found)]


def edges(graph: TaskGraph, task: int) -> list[tuple[int, int]]:
    """(task waited for, lag)"""
    begin, end = int(graph.dep_offset[task]), int(graph.dep_offset[task + 1])
    return [(int(graph.dep_task[edge]), int(graph.dep_lag_ns[edge])) for edge in range(begin, end)]


@dataclass
class Interleaved:
    start: list[int]
    order: list[list[int]]
    makespan: int


def interleave(
    graph: TaskGraph, limit: Sequence[int], forward_order: Sequence[int], backward_order: Sequence[int], policy: Policy
) -> Interleaved:
    """Twin of :func:`megatron_dip.schedule.interleave.interleave`."""
    num_ranks, num_tasks = graph.num_ranks, graph.num_tasks
    place: dict[int, int] = {}
    for order, kind in ((forward_order, FORWARD), (backward_order, BACKWARD)):
        segments = itertools.chain.from_iterable(groups(graph, kind)[number] for number in order)
        for position, first in enumerate(segments):
            for rank in range(num_ranks):
                place[first + rank] = position
    start, end = [-1] * num_tasks, [-1] * num_tasks
    orders: list[list[int]] = [[] for _ in range(num_ranks)]
    free, last = [0] * num_ranks, [BACKWARD] * num_ranks
    admitted: list[int] = []
    ready_at: dict[int, int] = {task: 0 for task in range(num_tasks) if not edges(graph, task)}
    arrived: dict[int, int] = dict.fromkeys(ready_at, 0)
    arrivals = itertools.count(1)

    def waiting(rank: int, kind: int) -> list[int]:
        return [task for task in ready_at if graph.rank[task] == rank and graph.kind[task] == kind and start[task] < 0]

    def held(unit: int, rank: int) -> int:
        done = [t for t in orders[rank] if graph.microbatch[t] == unit]
        return sum(int(graph.mem_start_bytes[t] + graph.mem_end_bytes[t]) for t in done)

    def unfinished(unit: int, rank: int) -> bool:
        return any(start[t] < 0 for t in range(num_tasks) if graph.microbatch[t] == unit and graph.rank[t] == rank)

    def need(unit: int, rank: int) -> int:
        """Bytes that the unit's forwards on the rank still keep, plus what one of all its forwards takes for a moment."""
        mine = [t for t in range(num_tasks) if graph.microbatch[t] == unit and graph.rank[t] == rank and graph.kind[t] == FORWARD]
        kept = {t: int(graph.mem_start_bytes[t] + graph.mem_end_bytes[t]) for t in mine}
        if all(start[t] >= 0 for t in mine):
            return 0
        keep = sum(max(0, kept[t]) for t in mine if start[t] < 0)
        return keep + max(max(int(graph.mem_start_bytes[t]), kept[t]) - max(0, kept[t]) for t in mine)

    def admissible(task: int, rank: int) -> bool:
        if all(value >= UNLIMITED for value in limit):
            return True
        kept = int(graph.mem_start_bytes[task] + graph.mem_end_bytes[task])
        units = [unit for unit in admitted if unfinished(unit, rank)]
        everything = sum(held(unit, rank) for unit in set(graph.microbatch.tolist()))
        if everything + max(int(graph.mem_start_bytes[task]), kept) > limit[rank]:
            return False
        unit = int(graph.microbatch[task])
        before = admitted[: admitted.index(unit)] if unit in admitted else admitted
        older = [other for other in units if other in before]
        for index, other in enumerate(older):
            still = everything - sum(held(done, rank) for done in older[:index])
            if still + need(other, rank) + max(0, kept) > limit[rank]:
                return False
        return True

    def pick_forward(rank: int, tasks: list[int]) -> int | None:
        tasks = sorted(tasks, key=lambda task: place[task])
        for task in tasks[:MAX_TESTS]:
            if admissible(task, rank):
                return task
        units = [unit for unit in admitted if unfinished(unit, rank)]
        if len(tasks) >= MAX_TESTS and units:
            return next((task for task in tasks if graph.microbatch[task] == units[0]), None)
        return None

    # When a rank looks again: it falls free, or, if it found nothing then, something new arrives.
    looks = [0] * num_ranks
    idle = [False] * num_ranks
    while sum(map(len, orders)) < num_tasks:
        times = []
        for rank in range(num_ranks):
            tasks = [task for kind in (FORWARD, BACKWARD, WEIGHT) for task in waiting(rank, kind)]
            moments = [max(free[rank], ready_at[task]) for task in tasks]
            if idle[rank]:
                # Looked at looks[rank] in vain: only what comes later helps.
                moments = [moment for moment in moments if moment > looks[rank]]
            times.append(min(moments, default=UNLIMITED))
        now = min(times)
        assert now < UNLIMITED, "deadlock"
        rank = times.index(now)
        looks[rank], idle[rank] = now, False
        forwards = [task for task in waiting(rank, FORWARD) if ready_at[task] <= now]
        backwards = [task for task in waiting(rank, BACKWARD) if ready_at[task] <= now]
        weights = sorted((task for task in waiting(rank, WEIGHT) if ready_at[task] <= now), key=lambda task: arrived[task])
        backward = min(backwards, key=lambda task: place[task]) if backwards else None
        task, blocked = None, False
        if backward is None or policy.both == FORWARD_FIRST or (policy.both == ALTERNATE and last[rank] == BACKWARD):
            task = pick_forward(rank, forwards)
            blocked = bool(forwards) and task is None
        if task is None:
            task = backward
        if task is None and weights:
            later = [ready_at[t] for kind in (FORWARD, BACKWARD) for t in waiting(rank, kind) if ready_at[t] > now]
            if blocked or not later or (min(later) - now) * 1000 >= policy.weight_fit * int(graph.duration_ns[weights[0]]):
                task = weights[0]
        if task is None:
            idle[rank] = True
            continue
        start[task], end[task] = now, now + int(graph.duration_ns[task])
        free[rank] = end[task]
        orders[rank].append(task)
        if graph.kind[task] != WEIGHT:
            last[rank] = int(graph.kind[task])
        if int(graph.microbatch[task]) not in admitted:
            admitted.append(int(graph.microbatch[task]))
        for other in range(num_tasks):
            if other not in ready_at and all(end[before] >= 0 for before, _ in edges(graph, other)):
                ready_at[other] = max(end[before] + lag for before, lag in edges(graph, other))
                arrived[other] = next(arrivals)
    return Interleaved(start=start, order=orders, makespan=max(end))


def earliest_times(graph: TaskGraph, order: Sequence[Sequence[int]]) -> list[int] | None:
    """Twin of :func:`megatron_dip.schedule.result.time_order`: start times by repeated sweeps; None where the orders deadlock."""
    start: dict[int, int] = {}
    while len(start) < graph.num_tasks:
        before = len(start)
        for tasks in order:
            free = 0
            for task in tasks:
                if task not in start:
                    if any(other not in start for other, _ in edges(graph, task)):
                        break
                    ends = [start[other] + int(graph.duration_ns[other]) + lag for other, lag in edges(graph, task)]
                    start[task] = max([free, *ends])
                free = start[task] + int(graph.duration_ns[task])
        if len(start) == before:
            return None
    return [start[task] for task in range(graph.num_tasks)]


def tails(graph: TaskGraph, order: Sequence[Sequence[int]]) -> list[int]:
    """Longest way from each task's end to the end of all, along dependencies and the ranks' orders."""
    behind: list[list[tuple[int, int]]] = [[] for _ in range(graph.num_tasks)]
    for task in range(graph.num_tasks):
        for before, lag in edges(graph, task):
            behind[before].append((task, lag))
    for tasks in order:
        for before, after in itertools.pairwise(tasks):
            behind[before].append((after, 0))
    tail = [0] * graph.num_tasks
    changed = True
    while changed:
        changed = False
        for task in range(graph.num_tasks):
            longest = max((lag + int(graph.duration_ns[after]) + tail[after] for after, lag in behind[task]), default=0)
            changed = changed or longest != tail[task]
            tail[task] = longest
    return tail


def held_before(graph: TaskGraph, order: Sequence[Sequence[int]]) -> list[int]:
    """Bytes held before each task, rank by rank in order."""
    held = []
    for tasks in order:
        level = 0
        for task in tasks:
            held.append(level)
            level += int(graph.mem_start_bytes[task] + graph.mem_end_bytes[task])
    return held


def peak_memory(graph: TaskGraph, order: Sequence[Sequence[int]]) -> list[int]:
    """Most bytes that live stages hold on each rank."""
    peaks = []
    for tasks in order:
        level = peak = 0
        for task in tasks:
            level += int(graph.mem_start_bytes[task])
            peak = max(peak, level)
            level += int(graph.mem_end_bytes[task])
            peak = max(peak, level)
        assert level == 0, level
        peaks.append(peak)
    return peaks


def best_makespan(graph: TaskGraph, limit: Sequence[int]) -> int:
    """The optimum, by trying every order of every rank (a handful of tasks only)."""
    best = UNLIMITED
    start: dict[int, int] = {}

    def extend(free: list[int], level: list[int]) -> None:
        nonlocal best
        if max(free) >= best:
            return
        if len(start) == graph.num_tasks:
            best = max(free)
            return
        for task in range(graph.num_tasks):
            if task in start or any(other not in start for other, _ in edges(graph, task)):
                continue
            rank = int(graph.rank[task])
            if level[rank] + int(graph.mem_start_bytes[task]) > limit[rank]:
                continue
            ready = max([free[rank]] + [start[other] + int(graph.duration_ns[other]) + lag for other, lag in edges(graph, task)])
            new_free, new_level = list(free), list(level)
            new_free[rank] = ready + int(graph.duration_ns[task])
            new_level[rank] += int(graph.mem_start_bytes[task] + graph.mem_end_bytes[task])
            start[task] = ready
            extend(new_free, new_level)
            del start[task]

    extend([0] * graph.num_ranks, [0] * graph.num_ranks)
    return int(best)


def longest_paths(graph: TaskGraph) -> tuple[np.ndarray, np.ndarray]:
    """Twin of :func:`megatron_dip.schedule.result.paths_ns` by relaxing until nothing changes."""
    head, tail = np.zeros(graph.num_tasks, dtype=np.int64), np.zeros(graph.num_tasks, dtype=np.int64)
    changed = True
    while changed:
        changed = False
        for task in range(graph.num_tasks):
            for other, lag in edges(graph, task):
                through = head[other] + graph.duration_ns[other] + lag
                back = tail[task] + graph.duration_ns[task] + lag
                if through > head[task] or back > tail[other]:
                    head[task], tail[other] = max(head[task], through), max(tail[other], back)
                    changed = True
    return head, tail


def unit_needs(graph: TaskGraph) -> list[tuple[int, int]]:
    """By unit, then by rank: bytes that all forwards of a unit keep on the rank, and most that one of them takes for a moment on top."""
    found = []
    for unit in sorted(set(graph.microbatch.tolist())):
        for rank in range(graph.num_ranks):
            forwards = [t for t in range(graph.num_tasks) if (graph.microbatch[t], graph.rank[t], graph.kind[t]) == (unit, rank, FORWARD)]
            kept = [max(0, int(graph.mem_start_bytes[task] + graph.mem_end_bytes[task])) for task in forwards]
            moments = [int(graph.mem_start_bytes[task]) - keep for task, keep in zip(forwards, kept, strict=True)]
            found.append((sum(kept), max([0, *moments])))
    return found


def needs(graph: TaskGraph) -> tuple[list[int], list[int]]:
    """Twin of what :func:`megatron_dip.schedule.interleave.refresh_costs` gives each rank: (largest unit's bytes, own work and shortest tail)."""
    worst, rest = [], []
    _, tail = longest_paths(graph)
    for rank in range(graph.num_ranks):
        mine = [task for task in range(graph.num_tasks) if graph.rank[task] == rank]
        worst.append(max(keep + moment for keep, moment in unit_needs(graph)[rank :: graph.num_ranks]))
        # Tasks without a duration hold nothing up.
        rest.append(sum(int(graph.duration_ns[task]) for task in mine) + min((int(tail[task]) for task in mine if graph.duration_ns[task]), default=0))
    return worst, rest


def first_come_line(graph: TaskGraph) -> list[int]:
    """Twin of :func:`megatron_dip.schedule.result.topological_order`; tasks of a cycle, and those behind them, are left out."""
    waits = [{other for other, _ in edges(graph, task)} for task in range(graph.num_tasks)]
    placed = [task for task in range(graph.num_tasks) if not waits[task]]
    for done, task in enumerate(placed, start=1):
        placed += [other for other in range(graph.num_tasks) if task in waits[other] and waits[other] <= set(placed[:done])]
    return placed


def mirrored_stays(graph: TaskGraph, backward_of: dict[int, int]) -> dict[int, int]:
    """Twin of the memory bound's stays: by forward, the least time from its start to its backward's end (without one: to its own end).

    That is over the longest chain of later forwards whose backwards come back the same way, by following every such chain.
    """
    duration = graph.duration_ns.tolist()

    def way(forward: int) -> int:
        """From the forward's end to its backward's start."""
        longest = 0
        for later in range(graph.num_tasks):
            if later in backward_of:
                for out in (lag for other, lag in edges(graph, later) if other == forward):
                    for back in (lag for other, lag in edges(graph, backward_of[forward]) if other == backward_of[later]):
                        longest = max(longest, out + duration[later] + way(later) + duration[backward_of[later]] + back)
        return longest

    forwards = [task for task in range(graph.num_tasks) if graph.kind[task] == FORWARD]
    return {
        task: duration[task] + (way(task) + duration[backward_of[task]] if task in backward_of else 0) for task in forwards
    }


def preemptive_bound(head: Sequence[int], duration: Sequence[int], tail: Sequence[int]) -> int:
    """Twin of Jackson's preemptive schedule: at every instant at which something comes in or ends, what is in and has the longest tail runs."""
    left = list(duration)
    now = bound = 0
    while any(left) or now < max(head):
        ready = [task for task in range(len(left)) if head[task] <= now and left[task]]
        coming = [moment for moment in head if moment > now]
        if not ready:
            now = min(coming)
            continue
        task = max(ready, key=lambda task: tail[task])
        until = min([now + left[task], *coming])
        left[task] -= until - now
        now = until
        if not left[task]:
            bound = max(bound, now + tail[task])
    return max([bound, *(head[task] + tail[task] for task in range(len(left)) if duration[task] == 0)])


class Random:
    """Twin of the kernels' generator (splitmix64), on Python's whole numbers."""

    def __init__(self, state: int) -> None:
        self.state = state

    def draw(self) -> int:
        mask = (1 << 64) - 1
        self.state = (self.state + 0x9E3779B97F4A7C15) & mask
        value = self.state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    def uniform(self) -> float:
        return ((self.draw() >> 11) + 1.0) / 2.0**53

    def below(self, limit: int) -> int:
        return self.draw() % limit

    def shuffle(self, items: list[int], begin: int) -> None:
        for index in range(len(items) - 1, begin, -1):
            other = begin + self.below(index - begin + 1)
            items[index], items[other] = items[other], items[index]


def step(order: list[int], random: Random) -> list[int]:
    """Twin of one annealing step: a group taken elsewhere (half of them), two swapped, a run turned around."""
    size = len(order)
    first = random.below(size)
    distance = min(max(int(size ** random.uniform()), 1), size - 1)
    sign = 1 if random.below(2) == 0 else -1
    second = first + sign * distance
    if not 0 <= second < size:
        second = first - sign * distance
    if not 0 <= second < size:
        second = size - 1 - first if size - 1 - first != first else (first + 1) % size
    kind = random.below(8)
    if kind < 4:
        rest = order[:first] + order[first + 1 :]
        return [*rest[:second], order[first], *rest[second:]]
    result = list(order)
    if kind < 7:
        result[first], result[second] = order[second], order[first]
    else:
        low, high = min(first, second), max(first, second)
        result[low : high + 1] = order[low : high + 1][::-1]
    return result


Evaluate = Callable[[list[int], list[int]], int]
"""(forward order, backward order) -> makespan"""


def anneal(
    evaluate: Evaluate, forward: list[int], backward: list[int], random: Random, steps: int, hot: float, cold: float
) -> tuple[int, list[int], list[int]]:
    """Twin of :func:`megatron_dip.schedule.anneal.anneal_kernel` from a fresh state: (best makespan, its orders)."""
    current = evaluate(forward, backward)
    best = (current, forward, backward)
    temperature = hot
    for _ in range(steps - 1):
        at_forward = len(backward) < 2 or (len(forward) > 1 and random.below(len(forward) + len(backward)) < len(forward))
        new_forward, new_backward = (step(forward, random), backward) if at_forward else (forward, step(backward, random))
        allowed = current + int(-temperature * math.log(random.uniform()))
        value = evaluate(new_forward, new_backward)
        if value <= allowed:
            current, forward, backward = value, new_forward, new_backward
            if value < best[0]:
                best = (value, forward, backward)
        temperature *= (cold / hot) ** (1.0 / steps)
    return best


def halves(sequence: Sequence[int], num_forward: int) -> tuple[list[int], list[int]]:
    """The two queues' orders in a sequence of all groups."""
    return [item for item in sequence if item < num_forward], [item - num_forward for item in sequence if item >= num_forward]


def random_search(evaluate: Evaluate, count: int, num_forward: int, random: Random, steps: int) -> int:
    """Twin of the paper's random search."""
    sequence, best = list(range(count)), UNLIMITED
    for _ in range(steps):
        random.shuffle(sequence, 0)
        best = min(best, evaluate(*halves(sequence, num_forward)))
    return int(best)


def depth_first(evaluate: Evaluate, count: int, num_forward: int, steps: int) -> int:
    """Twin of the paper's depth-first search: permutations in lexicographic order."""
    first = itertools.islice(itertools.permutations(range(count)), steps)
    return min(evaluate(*halves(sequence, num_forward)) for sequence in first)


class _Node:
    def __init__(self, item: int, parent: _Node | None) -> None:
        self.item, self.parent = item, parent
        self.children: list[_Node] = []
        self.visits, self.best = 0, UNLIMITED


def tree_search(
    evaluate: Evaluate, count: int, num_forward: int, random: Random, steps: int, completions: int, alpha: float, beta: float
) -> int:
    """Twin of the paper's Monte Carlo tree search."""
    root, reference, best, done = _Node(-1, None), 0, UNLIMITED, 0
    sequence = list(range(count))

    def bring_to(depth: int, item: int) -> None:
        place = sequence.index(item, depth)
        sequence[place], sequence[depth] = sequence[depth], sequence[place]

    while done < steps:
        node, depth = root, 0
        while len(node.children) >= count - depth and node.children:
            # Newest child first, as the kernel keeps them: it decides ties.
            chances = math.log(max(2, node.visits))
            node = max(
                reversed(node.children),
                key=lambda child, chances=chances: (reference / child.best) ** alpha + beta * math.sqrt(chances / child.visits),  # type: ignore[misc]
            )
            bring_to(depth, node.item)
            depth += 1
        if depth < count:
            for place in range(depth, count):
                other = depth + random.below(count - depth)
                sequence[place], sequence[other] = sequence[other], sequence[place]
            known = {child.item for child in node.children}
            item = next(item for item in sequence[depth:] if item not in known)
            bring_to(depth, item)
            child = _Node(item, node)
            node.children.append(child)
            node = child
            depth += 1
        least = UNLIMITED
        for _ in range(completions):
            random.shuffle(sequence, depth)
            least = min(least, evaluate(*halves(sequence, num_forward)))
            done += 1
            if depth >= count - 1:
                break
        best = min(best, least)
        reference = reference or least
        above: _Node | None = node
        while above is not None:
            above.visits += 1
            above.best = min(above.best, least)
            above = above.parent
    return int(best)
