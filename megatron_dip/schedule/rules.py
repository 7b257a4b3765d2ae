"""Orders by rule, as other schedules have them: a registry that planner, simulator and executor share.

In: a stage problem, so our cut, sub-microbatches and costs. Out: :class:`~megatron_dip.schedule.search.SearchResult`, which is lowered,
checked and run as a searched one is; only the order differs, for comparisons.

=========== ============================================================================================================
1f1b        Megatron-LM's 1F1B: one module in one chunk a rank, since every microbatch passes each rank once
interleaved Megatron-LM's interleaved 1F1B over the chain of all modules' chunks, microbatches in groups of P
optimus     Optimus, coarse: all forwards of the modules before the last one, the last one's (interleaved) 1F1B, all their backwards
three-phase the same with the heaviest microbatches' encoders first; encoders are cut over the ranks here, not replicated
entrain     Entrain (arXiv 2605.27918): backwards first, microbatches in flight bounded by what is fastest and fits
=========== ============================================================================================================

A module's sub-microbatches of one microbatch and chunk run one after the other, weight stages right behind their backwards. Where memory
is short all layers take the first level of saving under which the rule fits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.result import Schedule, time_order
from megatron_dip.schedule.search import DoesNotFit, SearchFunction, SearchOptions, SearchResult, Seed
from megatron_dip.schedule.space import Priorities
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.orders import OrderName
from megatron_dip.spec.tasks import BACKWARD, FORWARD, WEIGHT


class Cell(NamedTuple):
    """What a rank does next under Megatron's rule."""

    is_forward: bool
    chunk: int
    """Along the chain of chunks"""
    microbatch: int
    """Its place in the batch"""


def interleaved_rows(num_ranks: int, num_chunks: int, count: int) -> list[list[Cell]]:
    """Megatron's (interleaved) 1F1B of ``count`` microbatches for each rank; with one chunk it is 1F1B."""
    groups = [range(start, min(start + num_ranks, count)) for start in range(0, count, num_ranks)]
    table = [(chunk, microbatch) for group in groups for chunk in range(num_chunks) for microbatch in group]
    rows = []
    for rank in range(num_ranks):
        ahead = num_ranks - rank - 1 if num_chunks == 1 else 2 * (num_ranks - rank - 1) + (num_chunks - 1) * num_ranks
        warmup = min(ahead, len(table))
        row = [Cell(True, *entry) for entry in table[:warmup]]
        for step in range(len(table)):
            if step + warmup < len(table):
                row.append(Cell(True, *table[step + warmup]))
            chunk, microbatch = table[step]
            row.append(Cell(False, num_chunks - 1 - chunk, microbatch))
        rows.append(row)
    return rows


class ListedTask(NamedTuple):
    """A task of a list schedule."""

    rank: int
    duration_ns: int
    deps: Sequence[tuple[int, int]]
    """(task, lag in ns)"""
    owner: int
    """The microbatch whose admission lets it start"""
    priority: tuple[int, ...]
    """The smallest goes first"""


def listed_order(tasks: Sequence[ListedTask], num_ranks: int, in_flight: int) -> list[list[int]]:
    """A work-conserving list schedule: a free rank starts the ready task of the smallest priority.

    Owner m is admitted once fewer than ``in_flight`` earlier ones are unfinished; tasks of owners that are never admitted are left out.
    """
    followers: list[list[tuple[int, int]]] = [[] for _ in tasks]
    waiting = [len(task.deps) for task in tasks]
    left: dict[int, int] = {}
    sources: dict[int, list[int]] = {}
    for index, task in enumerate(tasks):
        for source, lag in task.deps:
            followers[source].append((index, lag))
        left[task.owner] = left.get(task.owner, 0) + 1
        if not waiting[index]:
            sources.setdefault(task.owner, []).append(index)
    groups = sorted(left)
    events: list[tuple[int, int, int]] = []
    admitted = finished = 0

    def admit(now: int) -> None:
        nonlocal admitted
        while admitted < len(groups) and admitted < finished + in_flight:
            for source in sources.get(groups[admitted], ()):
                heapq.heappush(events, (now, 0, source))
            admitted += 1

    ready: list[list[tuple[tuple[int, ...], int]]] = [[] for _ in range(num_ranks)]
    busy = [False] * num_ranks
    order: list[list[int]] = [[] for _ in range(num_ranks)]
    admit(0)
    while events:
        now = events[0][0]
        touched = set()
        while events and events[0][0] == now:
            _, ended, index = heapq.heappop(events)
            task = tasks[index]
            touched.add(task.rank)
            if not ended:
                heapq.heappush(ready[task.rank], (task.priority, index))
                continue
            busy[task.rank] = False
            for follower, lag in followers[index]:
                waiting[follower] -= 1
                # The last dependency to end need not be the last to arrive; lags differ by microseconds only.
                if not waiting[follower]:
                    heapq.heappush(events, (now + lag, 0, follower))
            left[task.owner] -= 1
            if not left[task.owner]:
                finished += 1
                admit(now)
        for rank in sorted(touched):
            if not busy[rank] and ready[rank]:
                _, index = heapq.heappop(ready[rank])
                busy[rank] = True
                order[rank].append(index)
                heapq.heappush(events, (now + tasks[index].duration_ns, 1, index))
    return order


def in_flight_bounds(num_ranks: int) -> list[int]:
    """Microbatches in flight that are worth trying."""
    return sorted({max(1, bound) for bound in (num_ranks, 3 * num_ranks // 2, 2 * num_ranks, 3 * num_ranks)})


class _Stages:
    """The tasks of a problem by what a rule names.

    Args:
        modules: names, each behind those that feed it.
    """

    def __init__(self, problem: StageProblem, modules: Sequence[str]) -> None:
        graph = self.graph = problem.fastest
        self.num_ranks = graph.num_ranks
        self.present = (problem.pair_of_task >= 0).tolist()
        self.microbatches = np.unique(graph.microbatch).tolist()
        self.of_place: dict[tuple[int, int, int, int, int], list[int]] = {}
        """(kind, module, vp_stage, microbatch, rank) -> its tasks by sub-microbatch"""
        columns = (graph.kind, graph.module, graph.vp_stage, graph.microbatch, graph.rank)
        for task, place in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
            if self.present[task]:
                self.of_place.setdefault(place, []).append(task)
        weights = np.flatnonzero(graph.kind == WEIGHT)
        pairs = zip(graph.dep_task[graph.dep_offset[weights]].tolist(), weights.tolist(), strict=True)
        self.weight_of = {backward: weight for backward, weight in pairs if self.present[weight]}
        used = {(module, vp_stage) for _, module, vp_stage, _, _ in self.of_place}
        places = {name: index for index, name in enumerate(modules)}
        self.chain = sorted(used, key=lambda chunk: (places[graph.module_names[chunk[0]]], chunk[1]))
        """(module, vp_stage) of all chunks, in the direction of the forward"""
        self.last = max((module for module, _ in used), key=lambda module: places[graph.module_names[module]])
        self.depth = {chunk: index for index, chunk in enumerate(self.chain)}

    def tasks(self, is_forward: bool, chunk: tuple[int, int], microbatch: int, rank: int) -> Iterator[int]:
        for task in self.of_place.get((FORWARD if is_forward else BACKWARD, *chunk, microbatch, rank), ()):
            yield task
            if task in self.weight_of:
                yield self.weight_of[task]


Orders = list[list[int]]
Rule = Callable[[_Stages], Iterator[Orders]]
"""A problem's stages -> orders to choose from, each rank's tasks"""


def _by_cells(stages: _Stages, chunks: Sequence[tuple[int, int]]) -> Orders:
    rows = interleaved_rows(stages.num_ranks, len(chunks), len(stages.microbatches))
    return [
        [task for cell in row for task in stages.tasks(cell.is_forward, chunks[cell.chunk], stages.microbatches[cell.microbatch], rank)]
        for rank, row in enumerate(rows)
    ]


def _interleaved(stages: _Stages) -> Iterator[Orders]:
    yield _by_cells(stages, stages.chain)


def _one_pass(stages: _Stages) -> Iterator[Orders]:
    if len(stages.chain) > 1:
        raise InputError(
            "--dip-schedule", "1f1b", f"passes every rank once, and this cut has {len(stages.chain)} chunks on each", "use interleaved"
        )
    yield _by_cells(stages, stages.chain)


def _phases(stages: _Stages, *, heaviest_first: bool) -> Iterator[Orders]:
    before = [chunk for chunk in stages.chain if chunk[0] != stages.last]
    work = dict.fromkeys(stages.microbatches, 0)
    for (kind, module, _, microbatch, _), tasks in stages.of_place.items():
        if kind == FORWARD and module != stages.last:
            work[microbatch] += int(stages.graph.duration_ns[tasks].sum())
    microbatches = sorted(stages.microbatches, key=lambda one: -work[one]) if heaviest_first else stages.microbatches
    middle = _by_cells(stages, [chunk for chunk in stages.chain if chunk[0] == stages.last])
    yield [
        [
            *(task for chunk in before for one in microbatches for task in stages.tasks(True, chunk, one, rank)),
            *middle[rank],
            *(task for chunk in reversed(before) for one in microbatches for task in stages.tasks(False, chunk, one, rank)),
        ]
        for rank in range(stages.num_ranks)
    ]


def _listed(stages: _Stages, bounds: Sequence[int]) -> Iterator[Orders]:
    """Backwards before forwards, earlier microbatches first, and of a microbatch what is nearest to its end."""
    graph = stages.graph
    offset, dep_task, dep_lag = graph.dep_offset.tolist(), graph.dep_task.tolist(), graph.dep_lag_ns.tolist()
    kept = [task for task, present in enumerate(stages.present) if present]
    number = {task: index for index, task in enumerate(kept)}
    tasks = []
    for task in kept:
        kind, microbatch = int(graph.kind[task]), int(graph.microbatch[task])
        depth = stages.depth[int(graph.module[task]), int(graph.vp_stage[task])]
        tasks.append(ListedTask(
            rank=int(graph.rank[task]), duration_ns=int(graph.duration_ns[task]), owner=microbatch,
            deps=[(number[dep_task[edge]], dep_lag[edge]) for edge in range(offset[task], offset[task + 1])],
            # Weight stages right behind their backwards: nothing that is ready goes before them.
            priority=(0 if kind == WEIGHT else 1 if kind == BACKWARD else 2, microbatch, depth if kind == BACKWARD else -depth),
        ))
    for bound in bounds:
        order = listed_order(tasks, stages.num_ranks, bound)
        if sum(map(len, order)) == len(tasks):
            yield [[kept[index] for index in row] for row in order]


def _entrain(stages: _Stages) -> Iterator[Orders]:
    yield from _listed(stages, [*in_flight_bounds(stages.num_ranks), len(stages.microbatches)])


RULES: Mapping[OrderName, Rule] = {
    "1f1b": _one_pass,
    "interleaved": _interleaved,
    "optimus": partial(_phases, heaviest_first=False),
    "three-phase": partial(_phases, heaviest_first=True),
    "entrain": _entrain,
}
"""Every schedule but ``dip``, which is searched."""


def by_rule(name: OrderName, modules: Sequence[str]) -> SearchFunction:
    """A search that tries the rule's orders alone.

    Args:
        modules: names, each behind those that feed it.
    """

    def order(
        problem: StageProblem, limit: NDArray[np.int64], options: SearchOptions, bound_ns: int = 0, seed: Seed | None = None
    ) -> SearchResult:
        orders = [[np.array(row, np.int32) for row in rows] for rows in RULES[name](_Stages(problem, modules))]
        nothing = np.zeros(0, np.int32)
        least: NDArray[np.int64] | None = None
        for level in range(int(problem.leanest().max()) + 1):
            choice = np.minimum(level, problem.leanest()).astype(np.int32)
            timed = [time_order(problem.graph(choice), rows) for rows in orders]
            over = [_over(schedule, limit) for schedule in timed if schedule is not None]
            fitting = [schedule for schedule in timed if schedule is not None and (_over(schedule, limit) <= 0).all()]
            if fitting:
                best = min(fitting, key=lambda schedule: schedule.makespan_ns)
                return SearchResult(
                    schedule=best, choice=choice, priorities=Priorities(nothing, nothing), evaluations=len(orders) * (level + 1), others=()
                )
            if not over:
                raise InputError("--dip-schedule", name, "its order waits in a circle for this batch", "use another, or microbatches in multiples of the ranks")
            least = min(over, key=lambda missing: int(missing.max()))
        assert least is not None
        raise DoesNotFit(least, np.full(len(limit), -1))

    return order


def _over(schedule: Schedule, limit: NDArray[np.int64]) -> NDArray[np.int64]:
    """[P] bytes that the schedule holds beyond the limit at its peak."""
    return np.array(schedule.peak_memory([0] * len(limit)), np.int64) - limit
