"""A plan as arrays: what compiled code reads, and what goes over the network. ``columns_of`` and ``plan_of`` turn one form into the other.

Letters: T stages, E dependencies, A actions of all ranks, I awaited tags, L local inputs, M messages, P ranks. Everything stands in the
plan's own order, and nothing is checked: a plan of any content has columns, unless a number is beyond 64 bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.long import LongDict, LongList
from megatron_dip.spec.plan import Action, Dep, Plan, PlanStage
from megatron_dip.spec.tasks import KIND_NAMES

OP_NAMES = ("fw", "bw", "w", "isend", "irecv", "wait_send", "wait_recv")
"""Op code -> the plan's word; the first three codes are those of the task kinds."""
ABSENT = -1
"""In a column, for a field that the plan does not have there."""
_SLICE = 1 << 12
"""Numbers that become Python's in one call, which holds the interpreter's lock: some hundredths of a millisecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanColumns:
    head: Plan
    """The plan without stages, order, actions and edges"""
    module_names: tuple[str, ...]
    strategies: tuple[tuple[str, ...], ...]
    """Each list of strategies that some stage has"""
    id: NDArray[np.int64]
    """[T]"""
    rank: NDArray[np.int64]
    """[T]"""
    kind: NDArray[np.int8]
    """[T] index into KIND_NAMES"""
    duration: NDArray[np.int64]
    """[T] ns"""
    mem_delta_start: NDArray[np.int64]
    """[T] bytes"""
    mem_delta_end: NDArray[np.int64]
    """[T] bytes"""
    dep_offset: NDArray[np.int64]
    """[T + 1]"""
    dep_stage: NDArray[np.int64]
    """[E]"""
    dep_lag: NDArray[np.int64]
    """[E] ns"""
    module: NDArray[np.int64]
    """[T] index into module_names"""
    vp_stage: NDArray[np.int64]
    """[T]"""
    first_layer: NDArray[np.int64]
    """[T]"""
    num_layers: NDArray[np.int64]
    """[T]"""
    microbatch: NDArray[np.int64]
    """[T]"""
    sub_microbatch: NDArray[np.int64]
    """[T]"""
    tokens: NDArray[np.int64]
    """[T]"""
    instances: NDArray[np.int64]
    """[T]"""
    strategy: NDArray[np.int64]
    """[T] index into strategies"""
    order_offset: NDArray[np.int64]
    """[rows + 1]"""
    order: NDArray[np.int64]
    action_offset: NDArray[np.int64]
    """[rows + 1]"""
    op: NDArray[np.int8]
    """[A] index into OP_NAMES"""
    action_stage: NDArray[np.int64]
    """[A] likewise peer, tag, group: ABSENT where the action has none"""
    peer: NDArray[np.int64]
    tag: NDArray[np.int64]
    group: NDArray[np.int64]
    input_stage: NDArray[np.int64]
    """[I] stage that awaits ..."""
    input_tag: NDArray[np.int64]
    """[I] ... the tag"""
    local_stage: NDArray[np.int64]
    """[L] stage that takes the output of ..."""
    local_source: NDArray[np.int64]
    """[L] ... this one of its rank"""
    output_tag: NDArray[np.int64]
    """[M] tag that is made by ..."""
    output_stage: NDArray[np.int64]
    """[M] ... the stage"""


def columns_of(plan: Plan) -> PlanColumns:
    """Raises OverflowError for numbers beyond 64 bits."""
    stages = plan.stages
    modules: dict[str, int] = {}
    strategies: dict[tuple[str, ...], int] = {}

    def of_stages(name: str) -> NDArray[np.int64]:
        return np.fromiter((getattr(stage, name) for stage in stages), np.int64, len(stages))

    actions = list(itertools.chain.from_iterable(plan.actions))

    def of_actions(name: str) -> NDArray[np.int64]:
        values = (getattr(action, name) for action in actions)
        return np.fromiter((ABSENT if value is msgspec.UNSET else value for value in values), np.int64, len(actions))

    deps = list(itertools.chain.from_iterable(stage.deps for stage in stages))
    ops = {name: code for code, name in enumerate(OP_NAMES)}
    return PlanColumns(
        head=_without_columns(plan),
        **{name: of_stages(name) for name in (
            "id", "rank", "duration", "mem_delta_start", "mem_delta_end", "vp_stage", "microbatch", "sub_microbatch", "tokens", "instances",
        )},
        kind=np.fromiter((KIND_NAMES.index(stage.kind) for stage in stages), np.int8, len(stages)),
        dep_offset=_offsets(len(stage.deps) for stage in stages),
        dep_stage=np.fromiter((dep.stage for dep in deps), np.int64, len(deps)),
        dep_lag=np.fromiter((dep.lag for dep in deps), np.int64, len(deps)),
        module=np.fromiter((modules.setdefault(stage.module, len(modules)) for stage in stages), np.int64, len(stages)),
        first_layer=np.fromiter((stage.layers[0] for stage in stages), np.int64, len(stages)),
        num_layers=np.fromiter((stage.layers[1] for stage in stages), np.int64, len(stages)),
        strategy=np.fromiter((strategies.setdefault(tuple(stage.strategy), len(strategies)) for stage in stages), np.int64, len(stages)),
        module_names=tuple(modules), strategies=tuple(strategies),
        order_offset=_offsets(map(len, plan.order)), order=_flat(plan.order),
        action_offset=_offsets(map(len, plan.actions)), op=np.fromiter((ops[action.op] for action in actions), np.int8, len(actions)),
        action_stage=of_actions("stage"), peer=of_actions("peer"), tag=of_actions("tag"), group=of_actions("group"),
        input_stage=_flat([stage] * len(tags) for stage, tags in plan.inputs.items()), input_tag=_flat(plan.inputs.values()),
        local_stage=_flat([stage] * len(taken) for stage, taken in plan.local_inputs.items()), local_source=_flat(plan.local_inputs.values()),
        output_tag=np.fromiter(plan.outputs, np.int64, len(plan.outputs)),
        output_stage=np.fromiter(plan.outputs.values(), np.int64, len(plan.outputs)),
    )


def plan_of(columns: PlanColumns) -> Plan:
    stages: LongList[PlanStage] = LongList()
    deps = map(Dep, numbers(columns.dep_stage), numbers(columns.dep_lag))
    rows = zip(
        numbers(columns.id), numbers(columns.rank), numbers(columns.kind), numbers(columns.duration), numbers(columns.mem_delta_start),
        numbers(columns.mem_delta_end), numbers(np.diff(columns.dep_offset)), numbers(columns.module), numbers(columns.vp_stage),
        numbers(columns.first_layer), numbers(columns.num_layers), numbers(columns.microbatch), numbers(columns.sub_microbatch),
        numbers(columns.tokens), numbers(columns.instances), numbers(columns.strategy), strict=True,
    )
    strategies = [list(labels) for labels in columns.strategies]
    layers: dict[tuple[int, int], tuple[int, int]] = {}
    for number, rank, kind, duration, start, end, num_deps, module, vp_stage, first, count, microbatch, sub, tokens, instances, strategy in rows:
        stages.append(PlanStage(
            id=number, rank=rank, kind=KIND_NAMES[kind], duration=duration, mem_delta_start=start, mem_delta_end=end,  # type: ignore[arg-type]
            deps=tuple(itertools.islice(deps, num_deps)), module=columns.module_names[module], vp_stage=vp_stage,
            layers=layers.setdefault((first, count), (first, count)), microbatch=microbatch, sub_microbatch=sub, tokens=tokens,
            instances=instances, strategy=strategies[strategy],
        ))
    outputs = LongDict(zip(numbers(columns.output_tag), numbers(columns.output_stage), strict=True))
    return msgspec.structs.replace(
        columns.head, stages=stages, order=_rows(numbers(columns.order), columns.order_offset), actions=_rows(_actions(columns), columns.action_offset),
        inputs=_grouped(columns.input_stage, columns.input_tag), local_inputs=_grouped(columns.local_stage, columns.local_source), outputs=outputs,
    )


def numbers(array: NDArray[Any]) -> Iterator[int]:
    """The entries as Python's, made slice by slice."""
    for first in range(0, len(array), _SLICE):
        yield from array[first : first + _SLICE].tolist()


def _actions(columns: PlanColumns) -> Iterator[Action]:
    ops, unset = OP_NAMES, msgspec.UNSET
    rows = zip(
        numbers(columns.op), numbers(columns.action_stage), numbers(columns.peer), numbers(columns.tag), numbers(columns.group), strict=True
    )
    for op, stage, peer, tag, group in rows:
        if group != ABSENT:
            yield Action(op=ops[op], peer=peer, tag=tag, group=group)  # type: ignore[arg-type]
        elif stage != ABSENT:
            yield Action(op=ops[op], stage=stage)  # type: ignore[arg-type]
        else:
            yield Action(ops[op], unset, peer, tag)  # type: ignore[arg-type]


def _without_columns(plan: Plan) -> Plan:
    return msgspec.structs.replace(plan, stages=[], order=[], actions=[], inputs={}, local_inputs={}, outputs={})


def _offsets(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.array([0, *itertools.accumulate(lengths)], np.int64)


def _flat(rows: Iterable[Sequence[int]]) -> NDArray[np.int64]:
    return np.fromiter(itertools.chain.from_iterable(rows), np.int64)


def _rows(items: Iterator[Any], offset: NDArray[np.int64]) -> list[list[Any]]:
    return [LongList(itertools.islice(items, int(length))) for length in np.diff(offset)]


def _grouped(keys: NDArray[np.int64], values: NDArray[np.int64]) -> dict[int, tuple[int, ...]]:
    """Key -> its values; entries of one key are neighbours."""
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))[: len(keys)])
    entries = numbers(values)
    counts = numbers(np.diff(np.append(first, len(keys))))
    return LongDict((key, tuple(itertools.islice(entries, count))) for key, count in zip(numbers(keys[first]), counts, strict=True))
