"""A plan as the bytes that go to the ranks which did not make it: its stages and their order, as arrays.

Every rank lowers the order to actions and checks the plan itself; nothing but the order is taken on trust. Actions travel only where a
plan's are not those that its order lowers to by itself (a replica's part of a joint plan). Packed on the planner's thread, so that the
training thread only sends; no call holds the interpreter's lock for longer than a copy of one array takes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron_dip.planner.courtesy import no_collections
from megatron_dip.program.columns import ACTION_COLUMNS, lower_columns, no_actions
from megatron_dip.program.program import ProgramError
from megatron_dip.schedule.checker import PlanInvalid, check_columns
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.plan_columns import PlanColumns, columns_of, plan_of


@dataclass(frozen=True, slots=True)
class PackedPlan:
    plan: Plan
    data: bytes
    digest: bytes
    """SHA-256 of ``data``: ranks compare it before they run the plan."""


class _Array(msgspec.Struct, array_like=True):
    dtype: str
    """In which the entries travel: the smallest that holds them"""
    length: int


class _Contents(msgspec.Struct, array_like=True):
    head: Plan
    module_names: tuple[str, ...]
    strategies: tuple[tuple[str, ...], ...]
    arrays: list[_Array]
    """Of the columns, in their order; those of actions are left out where the receiver lowers the order"""


_ARRAYS = tuple(field.name for field in fields(PlanColumns) if field.name not in ("head", "module_names", "strategies"))
_WITHOUT_ACTIONS = tuple(name for name in _ARRAYS if name not in ACTION_COLUMNS)
_SIZE_BYTES = 8
"""The message begins with its contents' length, in so many bytes, and the contents; the arrays follow."""
_DTYPES = ("int8", "int16", "int32", "int64")


def pack_plan(plan: Plan | PlanColumns) -> PackedPlan:
    """Args:
    plan: a :class:`Plan` travels with its actions; columns are those of a plan whose actions are what its order lowers to.
    """
    with no_collections():
        is_lowered = isinstance(plan, PlanColumns)
        columns = plan if isinstance(plan, PlanColumns) else columns_of(plan)
        arrays = [_narrow(getattr(columns, name)) for name in (_WITHOUT_ACTIONS if is_lowered else _ARRAYS)]
        contents = msgspec.msgpack.encode(_Contents(
            columns.head, columns.module_names, columns.strategies, [_Array(array.dtype.name, len(array)) for array in arrays]
        ))
        data = b"".join((len(contents).to_bytes(_SIZE_BYTES, "little"), contents, *(array.data for array in arrays)))
        return PackedPlan(plan_of(columns) if isinstance(plan, PlanColumns) else plan, data, plan_digest(data))


def unpack_plan(data: bytes) -> Plan:
    """The plan, lowered and checked here.

    Raises:
        InputError: bytes in another form than this version's, or a plan that does not hold.
    """
    try:
        with no_collections():
            columns = _unpack(data)
            check_columns(columns)
            return plan_of(columns)
    except (msgspec.MsgspecError, ProgramError, PlanInvalid, ValueError) as error:
        raise InputError("plan", f"{len(data)} bytes", f"cannot be read: {error}", "run the same version of megatron_dip on all ranks") from None


def _unpack(data: bytes) -> PlanColumns:
    size = int.from_bytes(data[:_SIZE_BYTES], "little")
    contents = msgspec.msgpack.decode(memoryview(data)[_SIZE_BYTES : _SIZE_BYTES + size], type=_Contents)
    names = _ARRAYS if len(contents.arrays) == len(_ARRAYS) else _WITHOUT_ACTIONS
    at = _SIZE_BYTES + size
    arrays = {}
    for name, array in zip(names, contents.arrays, strict=True):
        if array.dtype not in _DTYPES:
            raise ValueError(f"an array of {array.dtype}")
        narrow = np.frombuffer(data, np.dtype(array.dtype), array.length, at)
        arrays[name] = narrow.astype(np.int8 if name in ("kind", "op") else np.int64)
        at += narrow.nbytes
    columns = PlanColumns(
        head=contents.head, module_names=contents.module_names, strategies=contents.strategies,
        **{**({} if names is _ARRAYS else no_actions()), **arrays},
    )
    return columns if names is _ARRAYS else lower_columns(columns)


def plan_digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _narrow(array: NDArray[np.integer]) -> NDArray[np.integer]:
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    return np.ascontiguousarray(array, next(name for name in _DTYPES if np.iinfo(name).min <= low and high <= np.iinfo(name).max))
