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
from megatron_dip.spec.long import LongDict, LongList
from megatron_dip.spec.plan import Action, Plan, PlanStage

_SLICE = 256
"""Entries in one encoder call: some tenths of a millisecond."""


@dataclass(frozen=True, slots=True)
class PackedPlan:
    plan: Plan
    data: bytes
    digest: bytes
    """SHA-256 of ``data``: ranks compare it before they run the plan."""


class _Contents(msgspec.Struct, array_like=True):
    """Bytes of each encoded slice; the slices follow in this order. The one call that makes the message only copies them."""

    head: int
    """The plan without what follows."""
    stages: list[int]
    order: list[list[int]]
    """By rank."""
    actions: list[list[int]]
    """By rank."""
    inputs: list[int]
    local_inputs: list[int]
    outputs: list[int]


_SIZE_BYTES = 8
"""The message begins with its contents' length, in so many bytes, and the contents."""


def pack_plan(plan: Plan) -> PackedPlan:
    parts: list[bytes] = []

    def sizes(encoded: Iterable[bytes]) -> list[int]:
        first = len(parts)
        parts.extend(encoded)
        return [len(part) for part in parts[first:]]

    with no_collections():
        head = msgspec.structs.replace(plan, stages=[], order=[], actions=[], inputs={}, local_inputs={}, outputs={})
        (head_size,) = sizes([msgspec.msgpack.encode(head)])
        contents = msgspec.msgpack.encode(_Contents(
            head_size, sizes(_slices(plan.stages)), [sizes(_slices(of_rank)) for of_rank in plan.order],
            [sizes(_slices(of_rank)) for of_rank in plan.actions], sizes(_dict_slices(plan.inputs)),
            sizes(_dict_slices(plan.local_inputs)), sizes(_dict_slices(plan.outputs)),
        ))
        data = b"".join((len(contents).to_bytes(_SIZE_BYTES, "little"), contents, *parts))
    return PackedPlan(plan, data, plan_digest(data))


def unpack_plan(data: bytes) -> Plan:
    """Raises InputError for bytes in another form than this version's."""
    view = memoryview(data)
    at = 0

    def part(size: int) -> memoryview:
        nonlocal at
        at += size
        return view[at - size : at]

    try:
        with no_collections():
            contents = msgspec.msgpack.decode(part(int.from_bytes(part(_SIZE_BYTES), "little")), type=_Contents)
            return msgspec.structs.replace(
                msgspec.msgpack.decode(part(contents.head), type=Plan),
                stages=_joined(map(part, contents.stages), list[PlanStage]),
                order=[_joined(map(part, of_rank), list[int]) for of_rank in contents.order],
                actions=[_joined(map(part, of_rank), list[Action]) for of_rank in contents.actions],
                inputs=_merged(map(part, contents.inputs), dict[int, tuple[int, ...]]),
                local_inputs=_merged(map(part, contents.local_inputs), dict[int, tuple[int, ...]]),
                outputs=_merged(map(part, contents.outputs), dict[int, int]),
            )
    except msgspec.MsgspecError as error:
        raise InputError("plan", f"{len(data)} bytes", f"cannot be read: {error}", "run the same version of megatron_dip on all ranks") from None


def plan_digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _slices(items: Sequence[Any]) -> Iterable[bytes]:
    return (msgspec.msgpack.encode(items[first : first + _SLICE]) for first in range(0, len(items), _SLICE))


def _dict_slices(items: Mapping[int, Any]) -> Iterable[bytes]:
    entries = iter(items.items())
    parts = iter(lambda: dict(itertools.islice(entries, _SLICE)), {})
    return (msgspec.msgpack.encode(part) for part in parts)


def _joined(parts: Iterable[memoryview], form: Any) -> list[Any]:
    items: LongList[Any] = LongList()
    for part in parts:
        items += msgspec.msgpack.decode(part, type=form)
    return items


def _merged(parts: Iterable[memoryview], form: Any) -> dict[int, Any]:
    items: LongDict[int, Any] = LongDict()
    for part in parts:
        items.update(msgspec.msgpack.decode(part, type=form))
    return items
