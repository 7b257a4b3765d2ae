"""A plan as the bytes that go to the ranks which did not make it.

Packed on the planner's thread, so that the training thread only sends. Everything long is encoded in slices, and decoded likewise, since
one call of the encoder holds the interpreter's lock throughout: a whole plan of tens of thousands of stages would hold other threads up
for tens of milliseconds.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from megatron_dip.planner.courtesy import no_collections
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Action, Plan, PlanStage

_SLICE = 256
"""Entries in one encoder call: some tenths of a millisecond."""


@dataclass(frozen=True, slots=True)
class PackedPlan:
    plan: Plan
    data: bytes
    digest: bytes
    """SHA-256 of ``data``: ranks compare it before they run the plan."""


class _Message(msgspec.Struct, array_like=True):
    head: bytes
    """The plan without what follows."""
    stages: list[bytes]
    order: list[list[bytes]]
    """By rank."""
    actions: list[list[bytes]]
    """By rank."""
    inputs: list[bytes]
    local_inputs: list[bytes]
    outputs: list[bytes]


def pack_plan(plan: Plan) -> PackedPlan:
    with no_collections():
        head = msgspec.structs.replace(plan, stages=[], order=[], actions=[], inputs={}, local_inputs={}, outputs={})
        message = _Message(
            msgspec.msgpack.encode(head), _slices(plan.stages), [_slices(of_rank) for of_rank in plan.order],
            [_slices(of_rank) for of_rank in plan.actions], _dict_slices(plan.inputs), _dict_slices(plan.local_inputs),
            _dict_slices(plan.outputs),
        )
        data = msgspec.msgpack.encode(message)
    return PackedPlan(plan, data, plan_digest(data))


def unpack_plan(data: bytes) -> Plan:
    """Raises InputError for bytes in another form than this version's."""
    try:
        with no_collections():
            message = msgspec.msgpack.decode(data, type=_Message)
            return msgspec.structs.replace(
                msgspec.msgpack.decode(message.head, type=Plan),
                stages=_joined(message.stages, list[PlanStage]),
                order=[_joined(of_rank, list[int]) for of_rank in message.order],
                actions=[_joined(of_rank, list[Action]) for of_rank in message.actions],
                inputs=_merged(message.inputs, dict[int, tuple[int, ...]]),
                local_inputs=_merged(message.local_inputs, dict[int, tuple[int, ...]]),
                outputs=_merged(message.outputs, dict[int, int]),
            )
    except msgspec.MsgspecError as error:
        raise InputError("plan", f"{len(data)} bytes", f"cannot be read: {error}", "run the same version of megatron_dip on all ranks") from None


def plan_digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _slices(items: Sequence[Any]) -> list[bytes]:
    return [msgspec.msgpack.encode(items[first : first + _SLICE]) for first in range(0, len(items), _SLICE)]


def _dict_slices(items: Mapping[int, Any]) -> list[bytes]:
    entries = iter(items.items())
    parts = iter(lambda: dict(itertools.islice(entries, _SLICE)), {})
    return [msgspec.msgpack.encode(part) for part in parts]


def _joined(parts: Iterable[bytes], form: Any) -> list[Any]:
    items: list[Any] = []
    for part in parts:
        items += msgspec.msgpack.decode(part, type=form)
    return items


def _merged(parts: Iterable[bytes], form: Any) -> dict[int, Any]:
    items: dict[int, Any] = {}
    for part in parts:
        items.update(msgspec.msgpack.decode(part, type=form))
    return items
