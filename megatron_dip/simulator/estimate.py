"""What DIP would gain on a model, beside the other ways to train it on the same GPUs.

In: a workload without parallel sizes of its own (a model, a device, a global batch) and a number of GPUs. Out: the best layout of each system: DIP, Megatron's
own schedules, encoders data-parallel over the tensor and pipeline ranks (three-phase; LoongForge's ``--enable-full-hetero-dp``), and FSDP2. All are simulated
on the same batch by :mod:`megatron_dip.simulator.step`.

Every layout of the GPUs is tried with the quick systems. DIP is tried on all layouts with a pipeline, those first that were good for any of these, with its
cut chosen jointly for each, except where a bound says that the layout cannot be the best: its share of the batch's cheapest work, and the head, a stem or a
layer that some rank must run whole. Layouts are tried side by side on several processes; how many changes nothing but the time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec

from megatron_dip.cost.analytic import KnownParts
from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.offline import least_work
from megatron_dip.simulator.grid import grid_parallels
from megatron_dip.simulator.step import SimulateOptions, make_costs, simulate_whole
from megatron_dip.simulator.workers import Workers
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.simulation import SimulationResult
from megatron_dip.spec.workload import Parallel, ScheduleName, Workload

System = Literal["dip", "megatron", "encoder-dp", "fsdp2"]

_SCHEDULES: dict[System, tuple[ScheduleName, ...]] = {
    "megatron": ("1f1b", "interleaved"), "encoder-dp": ("three-phase",), "fsdp2": ("fsdp2",),
}

_ALWAYS = 4
"""Most promising layouts, which DIP is tried on however slow the machine is."""

PartitionFunction = Callable[[Workload, CostModel], Partition]
"""(workload with its parallel sizes, its costs) -> a cut chosen for it. Raises InputError where nothing fits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One system's best layout."""

    system: System
    parallel: Parallel | None
    """None: no layout can train it."""
    result: SimulationResult | None
    partition: Partition | None = None
    """DIP's cut."""
    dealing: float = 1.0
    """How much more work the heaviest replica would have if the microbatches were trained where they were read, over what it has as dealt."""
    problem: str = ""
    """Why no layout can."""
    untried: int = 0
    """Layouts that were left for want of time: one of them may be better."""


def estimate(
    workload: Workload, gpus: int, choose: PartitionFunction, *, options: SimulateOptions | None = None, time_limit_s: float = 35.0,
    processes: int = 1, progress: Callable[[str], None] | None = None,
) -> list[Candidate]:
    """Each system's best layout, DIP's first.

    Args:
        workload: its parallel sizes are not read, but for ``context``.
        choose: chooses DIP's cut (:func:`megatron_dip.planner.partitioning.joint_partition`, which lives in a sibling room).
        time_limit_s: no further layout is tried with DIP after this long, but for the most promising ones.
        processes: layouts tried side by side. Processes are forked.

    Raises:
        InputError: the GPUs cannot be shared out at all.
    """
    tell = progress or (lambda text: None)
    began = time.monotonic()
    layouts = grid_parallels(workload, gpus)
    if not layouts:
        raise InputError("--gpus", gpus, f"cannot be shared out for this model and {len(workload.microbatches)} microbatches",
                         "use a number with small factors, or more --microbatches")
    trials = _Trials(workload, SimulateOptions() if options is None else options, choose)
    # Of the layouts of one tensor size, which share what parts cost.
    groups = [[parallel for parallel in layouts if parallel.tensor == tensor] for tensor in sorted({p.tensor for p in layouts}, reverse=True)]
    # The same processes for both rounds: they know by then what parts cost.
    with Workers(trials.run, min(processes, len(layouts))) as workers:
        tell("Megatron, encoders data-parallel, FSDP2")
        # DIP's kernels take longest to load, or to compile where they never ran: one process begins with them, on what it may have to try anyway.
        piped = sorted((parallel for parallel in layouts if parallel.pipeline > 1), key=lambda parallel: parallel.pipeline)
        shallow = [parallel for parallel in piped if parallel.pipeline == piped[0].pipeline]
        early = shallow[len(shallow) // 2 : len(shallow) // 2 + 1] if processes > 1 else []
        tasks: list[_Task] = [*early, *groups]
        found = list(workers.results(iter(tasks)))
        stocks = sorted((one for one in found if isinstance(one, _Stock)), key=lambda stock: stock.tensor)
        tried = dict(zip(map(_key, early), (one for one in found if isinstance(one, Candidate)), strict=True))
        return _with_dip(layouts, stocks, tried, workers, began + time_limit_s, tell)


def _with_dip(
    layouts: Sequence[Parallel], stocks: Sequence[_Stock], tried: Mapping[tuple[int, int], Candidate], workers: Workers[_Task, _Found], deadline: float,
    tell: Callable[[str], None],
) -> list[Candidate]:
    """Tries DIP where it may be best, and puts it before the other systems' best layouts.

    Args:
        tried: what is known already.
    """
    bounds = {_key(parallel): bound for stock in stocks for parallel, bound in stock.bounds}
    promising = {_key(parallel): seconds for stock in stocks for parallel, seconds in stock.promising}
    # Equal ones in the layouts' order.
    ranked = sorted((p for p in layouts if p.pipeline > 1), key=lambda p: promising.get(_key(p), math.inf))
    best = Candidate(system="dip", parallel=None, result=None, problem="no layout of these GPUs has a pipeline, which DIP is for")
    for known in tried.values():
        best = _better(best, known, ranked)
    untried = 0

    def to_try() -> Iterator[_Task]:
        nonlocal untried
        for parallel in ranked:
            if _key(parallel) in tried or (best.result is not None and bounds[_key(parallel)] >= best.result.iteration_time_s):
                continue
            if best.result is not None and time.monotonic() > deadline and ranked.index(parallel) >= _ALWAYS:
                untried += 1
                continue
            tell(f"dip: TP {parallel.tensor}, PP {parallel.pipeline}, DP {parallel.data}")
            yield parallel

    for candidate in workers.results(to_try()):
        assert isinstance(candidate, Candidate)
        best = _better(best, candidate, ranked)
    return [replace(best, untried=untried), *(_best_of(system, stocks) for system in _SCHEDULES)]


def _key(parallel: Parallel) -> tuple[int, int]:
    return parallel.tensor, parallel.pipeline


def _better(one: Candidate, other: Candidate, order: Sequence[Parallel]) -> Candidate:
    """Whichever is faster; of equal ones that whose layout comes first, so that it does not matter which was done first."""
    if one.result is None or other.result is None:
        return other if one.result is None and (other.result is not None or other.problem) else one
    assert one.parallel is not None
    assert other.parallel is not None
    return min((one, other), key=lambda candidate: (candidate.result.iteration_time_s, order.index(candidate.parallel)))  # type: ignore[union-attr, arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stock:
    """All layouts of one tensor size under the quick systems."""

    tensor: int
    best: dict[System, Candidate]
    promising: list[tuple[Parallel, float]]
    """Layouts with a pipeline, and seconds of the best of Megatron's and three-phase there"""
    bounds: list[tuple[Parallel, float]]
    """Seconds that DIP takes there at least"""


_Task = Parallel | Sequence[Parallel]
"""A layout for DIP, or those of one tensor size for the other systems."""
_Found = Candidate | _Stock


def _best_of(system: System, stocks: Sequence[_Stock]) -> Candidate:
    found = [stock.best[system] for stock in stocks]
    fitting = [candidate for candidate in found if candidate.result is not None]
    if not fitting:
        return next((candidate for candidate in found if candidate.problem), found[0])
    return min(fitting, key=lambda candidate: candidate.result.iteration_time_s if candidate.result else 0.0)


class _Trials:
    """What is tried of one layout, or of those that share what parts cost. Forked processes have a copy each."""

    def __init__(self, workload: Workload, options: SimulateOptions, choose: PartitionFunction) -> None:
        self._workload, self._options, self._choose = workload, options, choose
        self._known = KnownParts()

    def run(self, task: _Task) -> _Found:
        return self._dip(task) if isinstance(task, Parallel) else self._stock(task)

    def _stock(self, layouts: Sequence[Parallel]) -> _Stock:
        """The quick systems on layouts of one tensor size."""
        best: dict[System, Candidate] = {}
        promising: dict[tuple[int, int], tuple[Parallel, float]] = {}
        has_encoder = any(module.role == "encoder" for module in self._workload.model_spec.modules)
        for system, schedules in _SCHEDULES.items():
            best[system] = Candidate(system=system, parallel=None, result=None)
            for parallel in layouts:
                if (system == "fsdp2" and _key(parallel) != (1, 1)) or (system == "encoder-dp" and not has_encoder):
                    continue
                for schedule in schedules:
                    candidate = self._simulated(system, parallel, schedule)
                    best[system] = _better(best[system], candidate, layouts)
                    if candidate.result is not None and system != "fsdp2" and parallel.pipeline > 1:
                        seconds = candidate.result.iteration_time_s
                        promising[_key(parallel)] = min(promising.get(_key(parallel), (parallel, seconds)), (parallel, seconds), key=lambda pair: pair[1])
        return _Stock(tensor=layouts[0].tensor, best=best, promising=list(promising.values()), bounds=self._bounds(layouts))

    def _simulated(self, system: System, parallel: Parallel, schedule: ScheduleName) -> Candidate:
        sized = msgspec.structs.replace(self._workload, parallel=parallel)
        try:
            costs = None if system == "fsdp2" else make_costs(sized, self._options, known=self._known)
            result = simulate_whole(sized, schedule, options=self._options, costs=costs).result
        except InputError as error:
            return Candidate(system=system, parallel=None, result=None, problem=error.problem)
        return Candidate(system=system, parallel=parallel, result=result)

    def _bounds(self, layouts: Sequence[Parallel]) -> list[tuple[Parallel, float]]:
        """Seconds below which no cut and order come on a layout, whichever way the microbatches are dealt."""
        piped = [parallel for parallel in layouts if parallel.pipeline > 1]
        if not piped:
            return []
        workload = msgspec.structs.replace(self._workload, parallel=piped[0])
        try:
            costs = make_costs(workload, self._options, known=self._known)
            least = least_work(workload.model_spec, workload.microbatches, costs)
        except InputError:
            return [(parallel, 0.0) for parallel in piped]
        return [(parallel, max(least.total / parallel.pipeline, least.whole) / parallel.data / 1e9) for parallel in piped]

    def _dip(self, parallel: Parallel) -> Candidate:
        """One layout with DIP, its cut chosen for it."""
        sized = msgspec.structs.replace(self._workload, parallel=parallel)
        try:
            costs = make_costs(sized, self._options, known=self._known)
            partition = self._choose(sized, costs)
            simulation = simulate_whole(sized, "dip", partition=partition, options=self._options, costs=costs)
        except InputError as error:
            return Candidate(system="dip", parallel=None, result=None, problem=error.problem)
        dealt = simulation.dealt
        dealing = 1.0 if dealt is None else dealt.imbalance_before / dealt.imbalance
        return Candidate(system="dip", parallel=parallel, result=simulation.result, partition=partition, dealing=dealing)
