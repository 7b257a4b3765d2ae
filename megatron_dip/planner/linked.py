"""Plans for replicas that must run their stages in one order, since collectives join them (experts that are spread over replicas).

In: the microbatches of all linked replicas. Every replica makes the same joint plan, for the union of the replicas' work
(:func:`union_of`), and keeps of it the stages for which it has work itself (:func:`restrict`): the same order everywhere, stages without
work left out. What joins the replicas must have work in all of them, in every microbatch: the language model has.

Why the parts cannot hang each other. A part's actions are the joint plan's without those of stages and messages that are left out. All
actions of the joint plan stand on one line behind all that they wait for (:mod:`megatron_dip.program.posting`), so those of all parts do:
a stage that joins the replicas has the same place in each of them. Were each part lowered on a line of its own, a replica could wait for
another one's post at a place that the other reaches only behind a shared stage. :func:`check_together` runs all parts together, each
shared stage a meeting of all replicas, before any of them runs.

The price: the plan's times are those of the largest replica in each place. They are what training takes, since a collective waits for the
slowest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron_dip.program.dry_run import check_program, dry_run, joint_dry_run
from megatron_dip.program.program import NONE, part_of, program_of
from megatron_dip.schedule.checker import check_plan
from megatron_dip.schedule.result import time_order
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.long import LongList
from megatron_dip.spec.plan import Dep, Plan, PlanStage
from megatron_dip.spec.tasks import KIND_NAMES, TaskGraph
from megatron_dip.spec.workload import Microbatch


def union_of(replicas: Sequence[Sequence[Microbatch]]) -> list[Microbatch]:
    """Microbatches that hold, in each place, the longest instance that a replica has there.

    Raises InputError where the replicas have other numbers of microbatches.
    """
    counts = [len(microbatches) for microbatches in replicas]
    if len(set(counts)) != 1:
        raise InputError("microbatches", counts, "replicas that share experts have other numbers of them", "give every replica the same number")
    union: list[Microbatch] = []
    for of_replicas in zip(*replicas, strict=True):
        modules = dict.fromkeys(module for microbatch in of_replicas for module in microbatch)
        union.append({
            module: [max(lengths) for lengths in zip_longest(*(microbatch.get(module, []) for microbatch in of_replicas), fillvalue=0)]
            for module in modules
        })
    return union


def own_part(plan: Plan, replicas: Sequence[Sequence[Microbatch]], index: int, module: str) -> Plan:
    """One replica's part of a joint plan whose parts were run together.

    Args:
        replicas: the microbatches of all replicas, whose union ``plan`` was made for.
        index: of the replica.
        module: whose stages join the replicas.

    Raises:
        ProgramError: the replicas would wait for each other, which no joint plan of :func:`megatron_dip.planner.iteration.plan_iteration`
            lets them.
    """
    check_together(plan, replicas, module)
    return restrict(plan, replicas[index])


def check_together(plan: Plan, replicas: Sequence[Sequence[Microbatch]], module: str) -> None:
    """Runs all replicas' parts of a joint plan together, on devices with one hardware queue and without that limit. Raises ProgramError
    when they wait for each other, also where a replica lacks a stage of ``module`` that another one has."""
    program = program_of(plan)
    joins = np.array([stage.module == module for stage in plan.stages], np.bool_)
    number = np.where(joins, np.arange(len(joins)), NONE)
    kept = [_kept(plan, _shares(plan, microbatches)) for microbatches in replicas]
    joint_dry_run([part_of(program, of_replica) for of_replica in kept], [number[of_replica] for of_replica in kept])


def restrict(plan: Plan, microbatches: Sequence[Microbatch]) -> Plan:
    """The part of a joint plan that one replica runs: its own instances in the plan's sub-microbatches, first ones first.

    Orders, actions, durations and memory strategies are the joint plan's; the times are those that remain. Checked like every plan.

    Args:
        microbatches: of one of the replicas whose union ``plan`` was made for.
    """
    shares = _shares(plan, microbatches)
    is_kept = _kept(plan, shares)
    kept = [stage for stage, stays in zip(plan.stages, is_kept.tolist(), strict=True) if stays]
    new_id = {stage.id: index for index, stage in enumerate(kept)}
    stages: LongList[PlanStage] = LongList()
    for stage in kept:
        instances, tokens = shares[stage.module, stage.microbatch, stage.sub_microbatch]
        deps = tuple([Dep(new_id[dep.stage], dep.lag) for dep in stage.deps if dep.stage in new_id])
        stages.append(msgspec.structs.replace(stage, id=new_id[stage.id], deps=deps, instances=instances, tokens=tokens))
    _settle_memory(stages)
    graph = _graph(plan, kept, stages)
    order = [np.array([new_id[stage] for stage in row if stage in new_id], dtype=np.int32) for row in plan.order]
    schedule = time_order(graph, order)
    assert schedule is not None, "a part of an order that ran cannot wait in a circle"
    program = part_of(program_of(plan), is_kept)
    check_program(program)
    dry_run(program)
    part = msgspec.structs.replace(
        plan, stages=stages, order=[row.tolist() for row in order], claimed_makespan=schedule.makespan_ns,
        lower_bound=max(sum(stages[stage].duration for stage in row) for row in order), bubble_fraction=schedule.bubble_fraction,
        peak_memory=schedule.peak_memory(plan.memory_initial), actions=program.actions(), inputs=program.inputs(),
        local_inputs=program.local_inputs(), outputs=program.outputs(),
    )
    check_plan(part, microbatches)
    return part


def _kept(plan: Plan, shares: Mapping[tuple[str, int, int], tuple[int, int]]) -> NDArray[np.bool_]:
    """[T] whether the replica has work in a stage."""
    return np.array([shares[stage.module, stage.microbatch, stage.sub_microbatch][0] > 0 for stage in plan.stages], np.bool_)


def order_digest(plan: Plan, module: str) -> bytes:
    """What linked replicas must have alike: the order of the module's stages on each rank, and what they recompute."""
    orders = [
        [(stage.kind, stage.vp_stage, stage.microbatch, stage.strategy) for stage in (plan.stages[index] for index in row) if stage.module == module]
        for row in plan.order
    ]
    return hashlib.sha256(msgspec.msgpack.encode(orders)).digest()


def _shares(plan: Plan, microbatches: Sequence[Microbatch]) -> dict[tuple[str, int, int], tuple[int, int]]:
    """(module, microbatch, sub-microbatch) -> the replica's (instances, tokens) in it."""
    sizes: dict[tuple[str, int, int], int] = {}
    for stage in plan.stages:
        if stage.kind == "fw":
            sizes[stage.module, stage.microbatch, stage.sub_microbatch] = stage.instances
    given: dict[tuple[str, int], int] = {}
    shares: dict[tuple[str, int, int], tuple[int, int]] = {}
    for key in sorted(sizes):
        module, microbatch, _ = key
        lengths = microbatches[microbatch].get(module, [])
        first = given.get((module, microbatch), 0)
        own = lengths[first : first + sizes[key]]
        given[module, microbatch] = first + len(own)
        shares[key] = (len(own), sum(own))
    return shares


def _settle_memory(stages: list[PlanStage]) -> None:
    """Where a stage gives back what stages that were left out have taken, it gives back less, so that every microbatch ends even."""
    held: dict[tuple[int, int], int] = {}
    giver: dict[tuple[int, int], int] = {}
    for stage in stages:
        place = (stage.rank, stage.microbatch)
        held[place] = held.get(place, 0) + stage.mem_delta_start + stage.mem_delta_end
        if place not in giver or stage.mem_delta_end < stages[giver[place]].mem_delta_end:
            giver[place] = stage.id
    for place, too_much in held.items():
        if too_much:
            stage = stages[giver[place]]
            stages[stage.id] = msgspec.structs.replace(stage, mem_delta_end=stage.mem_delta_end - too_much)


def _graph(plan: Plan, kept: Sequence[PlanStage], stages: Sequence[PlanStage]) -> TaskGraph:
    """The stages as a task graph. ``kept`` are the same with the joint plan's numbers."""
    modules = tuple(plan.chunks)
    offset = np.cumsum([0, *(len(stage.deps) for stage in stages)], dtype=np.int32)
    remaining = {stage.id for stage in kept}
    is_data: list[bool] = []
    for old in kept:
        sources = {*plan.local_inputs.get(old.id, ()), *(plan.outputs[tag] for tag in plan.inputs.get(old.id, ()))}
        is_data += [dep.stage in sources for dep in old.deps if dep.stage in remaining]
    return TaskGraph(
        num_ranks=plan.ranks,
        module_names=modules,
        rank=np.array([stage.rank for stage in stages], dtype=np.int32),
        kind=np.array([KIND_NAMES.index(stage.kind) for stage in stages], dtype=np.int8),
        module=np.array([modules.index(stage.module) for stage in stages], dtype=np.int16),
        vp_stage=np.array([stage.vp_stage for stage in stages], dtype=np.int16),
        microbatch=np.array([stage.microbatch for stage in stages], dtype=np.int32),
        sub_microbatch=np.array([stage.sub_microbatch for stage in stages], dtype=np.int32),
        duration_ns=np.array([stage.duration for stage in stages], dtype=np.int64),
        mem_start_bytes=np.array([stage.mem_delta_start for stage in stages], dtype=np.int64),
        mem_end_bytes=np.array([stage.mem_delta_end for stage in stages], dtype=np.int64),
        dep_offset=offset,
        dep_task=np.array([dep.stage for stage in stages for dep in stage.deps], dtype=np.int32),
        dep_lag_ns=np.array([dep.lag for stage in stages for dep in stage.deps], dtype=np.int64),
        dep_is_data=np.array(is_data, dtype=np.bool_),
    )
