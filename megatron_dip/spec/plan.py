"""One iteration's plan: the ``megatron-dip/plan/1`` format, read and written here.

Integers throughout: ids, times in nanoseconds, memory in bytes, so that sums are exact and equal plans are equal bytes.

Words: a *stage* is one task of one rank (``fw``, ``bw`` or ``w``); ``actions`` are each rank's instructions; a *tag* names one
message, unique over the plan. Instances are never split and stay in order: sub-microbatch s of a module holds the ``instances`` that
follow those of sub-microbatches 0..s-1 of its microbatch.

Data edges. ``inputs[stage]`` lists the tags that a stage awaits from other ranks, ``local_inputs[stage]`` the stages of its own rank
whose output it takes; together they are the stage's data edges, one for each producer. Of a stage's ``deps`` the others (a backward
on its own forward, a W on its B) carry no tensor and stand in neither. ``outputs[tag]`` is the stage that makes the message. One
message goes from one producer stage to one consumer stage.

The small structs are not tracked by the garbage collector (``gc=False``; they cannot be in a cycle), and what there is many of is a
tuple, which the collector lets go of: a plan has tens of thousands of them, and the collections that they would set off hold the
interpreter's lock for a tenth of a second beside training.
"""

from __future__ import annotations

from typing import Literal

import msgspec

PLAN_FORMAT = "megatron-dip/plan/1"

StageKind = Literal["fw", "bw", "w"]
Op = Literal["fw", "bw", "w", "isend", "irecv", "wait_send", "wait_recv"]
COMPUTE_OPS = frozenset({"fw", "bw", "w"})


class Dep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, gc=False):
    """The stage starts no earlier than ``lag`` ns after the end of ``stage``."""

    stage: int
    lag: int


class PlanStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, gc=False):
    id: int
    rank: int
    kind: StageKind
    duration: int
    """ns"""
    mem_delta_start: int
    """Bytes taken at the start (after the ends that fall on the same instant)."""
    mem_delta_end: int
    """Bytes taken at the end; negative = given back."""
    deps: tuple[Dep, ...]
    module: str
    vp_stage: int
    """Chunk of the module on this rank, 0..K-1."""
    layers: tuple[int, int]
    """First layer (0-based, of the module) and number of layers."""
    microbatch: int
    sub_microbatch: int
    tokens: int
    instances: int
    strategy: list[str]
    """Memory strategy of each layer of the stage; empty on ``w``."""


class Action(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """One instruction of a rank. Which fields belong to which op: compute ops have ``stage``; sends, receives and waits have ``peer``
    and ``tag``; posts (isend, irecv) may have ``group``, and consecutive posts of one group are one batched call."""

    op: Op
    stage: int | msgspec.UnsetType = msgspec.UNSET
    peer: int | msgspec.UnsetType = msgspec.UNSET
    tag: int | msgspec.UnsetType = msgspec.UNSET
    group: int | msgspec.UnsetType = msgspec.UNSET


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: Literal["megatron-dip/plan/1"]
    ranks: int
    memory_capacity: list[int] | None
    """Bytes on each rank; null = unlimited."""
    memory_initial: list[int]
    """Bytes on each rank before the first stage."""
    stages: list[PlanStage]
    """Stage i has id i."""
    order: list[list[int]]
    """For each rank its stage ids as executed."""
    claimed_makespan: int
    lower_bound: int
    bubble_fraction: float
    peak_memory: list[int]
    planning_ns: int
    evaluations: int
    seed: int
    chunks: dict[str, list[list[int]]]
    """Module -> for each vp_stage the number of layers on each rank."""
    sub_microbatch_size: dict[str, int]
    """Module -> instances in a full sub-microbatch."""
    actions: list[list[Action]]
    inputs: dict[int, tuple[int, ...]]
    local_inputs: dict[int, tuple[int, ...]]
    outputs: dict[int, int]
