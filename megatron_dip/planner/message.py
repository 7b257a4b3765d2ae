"""A plan as the bytes that go to the ranks which did not make it.

Packed on the planner's thread, so that the training thread only sends. Stages and actions are encoded in slices, since one encoder call
holds the interpreter's lock throughout: a whole plan of tens of thousands of stages would hold training up for tens of milliseconds.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Action, Plan, PlanStage

_SLICE = 2048
"""Stages or actions in one encoder call: below a millisecond."""


@dataclass(frozen=True, slots=True)
class PackedPlan:
    plan: Plan
    data: bytes
    digest: bytes
    """SHA-256 of ``data``: ranks compare it before they run the plan."""


class _Message(msgspec.Struct, array_like=True):
    head: bytes
    """The plan without stages and actions."""
    stages: list[bytes]
    actions: list[list[bytes]]
    """By rank."""


def pack_plan(plan: Plan) -> PackedPlan:
    message = _Message(
        msgspec.msgpack.encode(msgspec.structs.replace(plan, stages=[], actions=[])), _slices(plan.stages),
        [_slices(of_rank) for of_rank in plan.actions],
    )
    data = msgspec.msgpack.encode(message)
    return PackedPlan(plan, data, plan_digest(data))


def unpack_plan(data: bytes) -> Plan:
    """Raises InputError for bytes in another form than this version's."""
    # Tens of thousands of small objects in one go set off full collections, which take longer than the decoding.
    collecting = gc.isenabled()
    gc.disable()
    try:
        message = msgspec.msgpack.decode(data, type=_Message)
        stages = [stage for part in message.stages for stage in msgspec.msgpack.decode(part, type=list[PlanStage])]
        actions = [
            [action for part in of_rank for action in msgspec.msgpack.decode(part, type=list[Action])] for of_rank in message.actions
        ]
        return msgspec.structs.replace(msgspec.msgpack.decode(message.head, type=Plan), stages=stages, actions=actions)
    except msgspec.MsgspecError as error:
        raise InputError("plan", f"{len(data)} bytes", f"cannot be read: {error}", "run the same version of megatron_dip on all ranks") from None
    finally:
        if collecting:
            gc.enable()


def plan_digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _slices(items: Sequence[Any]) -> list[bytes]:
    return [msgspec.msgpack.encode(items[first : first + _SLICE]) for first in range(0, len(items), _SLICE)]
