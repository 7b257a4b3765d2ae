"""What DIP would gain on a model, beside the other ways to train it on the same GPUs.

In: a workload without parallel sizes of its own (a model, a device, a global batch) and a number of GPUs. Out: the best layout of each system: DIP, Megatron's
own schedules, encoders data-parallel over the tensor and pipeline ranks (three-phase; LoongForge's ``--enable-full-hetero-dp``), and FSDP2. All are simulated
on the same batch by :mod:`megatron_dip.simulator.step`.

Every layout of the GPUs is tried with the quick systems. DIP is tried on the layouts that were best for any of these, with its cut chosen jointly for each
until the time is used up: a layout that nobody else likes may be better still, and ``megatron-dip simulate --grid`` tries them all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from megatron_dip.simulator.grid import grid_parallels
from megatron_dip.simulator.step import SimulateOptions, make_costs, simulate_whole
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.simulation import SimulationResult
from megatron_dip.spec.workload import Parallel, ScheduleName, Workload

System = Literal["dip", "megatron", "encoder-dp", "fsdp2"]

_SCHEDULES: dict[System, tuple[ScheduleName, ...]] = {
    "megatron": ("1f1b", "interleaved"), "encoder-dp": ("three-phase",), "fsdp2": ("fsdp2",),
}

PartitionFunction = Callable[[Workload], Partition]
"""(workload with its parallel sizes) -> a cut chosen for it. Raises InputError where nothing fits."""


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


def estimate(
    workload: Workload, gpus: int, choose: PartitionFunction, *, options: SimulateOptions | None = None, time_limit_s: float = 40.0,
    progress: Callable[[str], None] | None = None,
) -> list[Candidate]:
    """Each system's best layout, DIP's first.

    Args:
        workload: its parallel sizes are not read, but for ``context``.
        choose: chooses DIP's cut (:func:`megatron_dip.planner.partitioning.joint_partition`, which lives in a sibling room).
        time_limit_s: no further layout is tried with DIP after this long.

    Raises:
        InputError: the GPUs cannot be shared out at all.
    """
    options = SimulateOptions() if options is None else options
    tell = progress or (lambda text: None)
    began = time.monotonic()
    layouts = grid_parallels(workload, gpus)
    if not layouts:
        raise InputError("--gpus", gpus, f"cannot be shared out for this model and {len(workload.microbatches)} microbatches",
                         "use a number with small factors, or more --microbatches")
    found: list[Candidate] = []
    promising: dict[tuple[int, int, int], float] = {}
    for system, schedules in _SCHEDULES.items():
        best = Candidate(system=system, parallel=None, result=None)
        for parallel in layouts:
            if system == "fsdp2" and (parallel.tensor, parallel.pipeline) != (1, 1):
                continue
            if system == "encoder-dp" and not any(module.role == "encoder" for module in workload.model_spec.modules):
                continue
            tell(f"{system}: TP {parallel.tensor}, PP {parallel.pipeline}, DP {parallel.data}")
            for schedule in schedules:
                sized = msgspec.structs.replace(workload, parallel=parallel)
                try:
                    result = simulate_whole(sized, schedule, options=options).result
                except InputError as error:
                    best = best if best.result is not None or best.problem else _with_problem(best, error)
                    continue
                if system != "fsdp2" and parallel.pipeline > 1:
                    key = (parallel.tensor, parallel.pipeline, parallel.data)
                    promising[key] = min(promising.get(key, result.iteration_time_s), result.iteration_time_s)
                if best.result is None or result.iteration_time_s < best.result.iteration_time_s:
                    best = Candidate(system=system, parallel=parallel, result=result)
        found.append(best)
    ranked = sorted(layouts, key=lambda p: promising.get((p.tensor, p.pipeline, p.data), float("inf")))
    dip = _best_dip([p for p in ranked if p.pipeline > 1], workload, choose, options, began + time_limit_s, tell)
    return [dip, *found]


def _best_dip(
    layouts: list[Parallel], workload: Workload, choose: PartitionFunction, options: SimulateOptions, deadline: float, tell: Callable[[str], None]
) -> Candidate:
    best = Candidate(system="dip", parallel=None, result=None, problem="no layout of these GPUs has a pipeline, which DIP is for")
    for parallel in layouts:
        if best.result is not None and time.monotonic() > deadline:
            break
        tell(f"dip: TP {parallel.tensor}, PP {parallel.pipeline}, DP {parallel.data}")
        sized = msgspec.structs.replace(workload, parallel=parallel)
        try:
            partition = choose(sized)
            simulation = simulate_whole(sized, "dip", partition=partition, options=options, costs=make_costs(sized, options))
        except InputError as error:
            best = best if best.result is not None else _with_problem(best, error)
            continue
        result, dealt = simulation.result, simulation.dealt
        if best.result is None or result.iteration_time_s < best.result.iteration_time_s:
            dealing = 1.0 if dealt is None else dealt.imbalance_before / dealt.imbalance
            best = Candidate(system="dip", parallel=parallel, result=result, partition=partition, dealing=dealing)
    return best


def _with_problem(candidate: Candidate, error: InputError) -> Candidate:
    return Candidate(system=candidate.system, parallel=None, result=None, problem=error.problem)
