"""A program: every rank's actions as arrays, the form that lowering makes and the checks run on.

Letters: P ranks, T stages, A actions of all ranks together, M messages, L edges between stages of one rank. Messages are numbered
0..M-1; ``message_tag`` holds the tag that the plan gives each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.long import LongDict, LongList
from megatron_dip.spec.plan import COMPUTE_OPS, Action, Plan
from megatron_dip.spec.plan_columns import OP_NAMES
from megatron_dip.spec.tasks import KIND_NAMES

ISEND, IRECV, WAIT_SEND, WAIT_RECV = 3, 4, 5, 6
NONE = -1


class ProgramError(ValueError):
    """A program that must not run: the message says why and shows the grid with the bad cell marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    num_ranks: int
    action_offset: NDArray[np.int64]
    """[P + 1] actions of rank r are action_offset[r] : action_offset[r + 1]"""
    op: NDArray[np.int8]
    """[A] index into OP_NAMES"""
    stage: NDArray[np.int32]
    """[A] of a compute action, else NONE"""
    peer: NDArray[np.int32]
    """[A] the other rank of a message action, else NONE"""
    message: NDArray[np.int32]
    """[A] of a message action, else NONE"""
    stage_rank: NDArray[np.int32]
    """[T]"""
    stage_kind: NDArray[np.int8]
    """[T]"""
    message_tag: NDArray[np.int64]
    """[M]"""
    producer: NDArray[np.int32]
    """[M] stage that makes the message"""
    consumer: NDArray[np.int32]
    """[M] stage that awaits it"""
    local_before: NDArray[np.int32]
    """[L] stage that must end first ..."""
    local_after: NDArray[np.int32]
    """[L] ... before this one starts, both on one rank"""
    local_is_data: NDArray[np.bool_]
    """[L] whether a tensor is handed over"""

    @property
    def num_stages(self) -> int:
        return len(self.stage_rank)

    @property
    def num_messages(self) -> int:
        return len(self.producer)

    def action(self, index: int) -> Action:
        """One action in the plan's form."""
        op = OP_NAMES[self.op[index]]
        if self.op[index] < ISEND:
            return Action(op=op, stage=int(self.stage[index]))  # type: ignore[arg-type]
        return Action(op=op, peer=int(self.peer[index]), tag=int(self.message_tag[self.message[index]]))  # type: ignore[arg-type]

    def actions(self) -> list[list[Action]]:
        """Every rank's actions in the plan's form."""
        ops = [OP_NAMES[code] for code in self.op.tolist()]
        tags = self.message_tag.tolist()
        rows = zip(ops, self.stage.tolist(), self.peer.tolist(), self.message.tolist(), strict=True)
        flat = [
            Action(op=op, stage=stage) if stage != NONE else Action(op=op, peer=peer, tag=tags[message])  # type: ignore[arg-type]
            for op, stage, peer, message in rows
        ]
        bounds = self.action_offset.tolist()
        return [LongList(flat[first:last]) for first, last in itertools.pairwise(bounds)]

    def inputs(self) -> dict[int, tuple[int, ...]]:
        """Stage -> tags it awaits (only stages that await some)."""
        return _grouped(self.consumer, self.message_tag)

    def local_inputs(self) -> dict[int, tuple[int, ...]]:
        """Stage -> stages of its own rank whose output it takes (only stages that take some)."""
        return _grouped(self.local_after[self.local_is_data], self.local_before[self.local_is_data])

    def outputs(self) -> dict[int, int]:
        """Tag -> stage that makes the message."""
        by_tag = np.argsort(self.message_tag, kind="stable")
        return LongDict(zip(self.message_tag[by_tag].tolist(), self.producer[by_tag].tolist(), strict=True))


def program_of(plan: Plan) -> Program:
    """A plan's actions as arrays; messages are numbered by rising tag.

    Raises:
        ProgramError: a tag that no stage awaits, or a post that belongs to a group (groups are not modelled).
    """
    consumer_of = {tag: stage for stage, tags in plan.inputs.items() for tag in tags}
    tags = sorted(plan.outputs)
    number = {tag: index for index, tag in enumerate(tags)}
    missing = [tag for tag in tags if tag not in consumer_of]
    if missing:
        raise ProgramError(f"no stage awaits tag {missing[0]}")
    flat = [action for row in plan.actions for action in row]
    if any(isinstance(action.group, int) for action in flat):
        raise ProgramError("posts in groups are not modelled")
    local = [
        (dep.stage, stage.id) for stage in plan.stages for dep in stage.deps if plan.stages[dep.stage].rank == stage.rank
    ]
    handed_over = {(before, after) for after, stages in plan.local_inputs.items() for before in stages}
    computes = [action.op in COMPUTE_OPS for action in flat]
    return Program(
        num_ranks=plan.ranks,
        action_offset=np.cumsum([0, *map(len, plan.actions)], dtype=np.int64),
        op=np.array([OP_NAMES.index(action.op) for action in flat], np.int8),
        stage=np.array([action.stage if compute else NONE for action, compute in zip(flat, computes, strict=True)], np.int32),
        peer=np.array([NONE if compute else action.peer for action, compute in zip(flat, computes, strict=True)], np.int32),
        message=np.array([NONE if compute else number[action.tag] for action, compute in zip(flat, computes, strict=True)], np.int32),  # type: ignore[index]
        stage_rank=np.array([stage.rank for stage in plan.stages], np.int32),
        stage_kind=np.array([KIND_NAMES.index(stage.kind) for stage in plan.stages], np.int8),
        message_tag=np.array(tags, np.int64),
        producer=np.array([plan.outputs[tag] for tag in tags], np.int32),
        consumer=np.array([consumer_of[tag] for tag in tags], np.int32),
        local_before=np.array([before for before, _ in local], np.int32),
        local_after=np.array([after for _, after in local], np.int32),
        local_is_data=np.array([edge in handed_over for edge in local], np.bool_),
    )


def part_of(program: Program, kept: NDArray[np.bool_]) -> Program:
    """The program without some stages and without the messages that come from them or go to them; what is left keeps its order.

    Stages and messages are numbered anew, in their order, and tags with the messages.

    Args:
        kept: [T] whether a stage stays.
    """
    with_message = kept[program.producer] & kept[program.consumer]
    stage, message = np.cumsum(kept, dtype=np.int32) - 1, np.cumsum(with_message, dtype=np.int32) - 1
    is_stage = program.stage != NONE
    stays = np.where(is_stage, kept[program.stage], False)
    stays[~is_stage] = with_message[program.message[~is_stage]]
    local = kept[program.local_before] & kept[program.local_after]
    new_stage = np.full(len(is_stage), NONE, np.int32)
    new_stage[is_stage] = stage[program.stage[is_stage]]
    new_message = np.full(len(is_stage), NONE, np.int32)
    new_message[~is_stage] = message[program.message[~is_stage]]
    return Program(
        num_ranks=program.num_ranks,
        action_offset=np.concatenate(([0], np.cumsum(stays)))[program.action_offset].astype(np.int64),
        op=program.op[stays],
        stage=new_stage[stays],
        peer=program.peer[stays],
        message=new_message[stays],
        stage_rank=program.stage_rank[kept],
        stage_kind=program.stage_kind[kept],
        message_tag=np.arange(int(with_message.sum()), dtype=np.int64),
        producer=stage[program.producer[with_message]],
        consumer=stage[program.consumer[with_message]],
        local_before=stage[program.local_before[local]],
        local_after=stage[program.local_after[local]],
        local_is_data=program.local_is_data[local],
    )


def side_by_side(programs: Sequence[Program]) -> Program:
    """Several programs as one, each on ranks of its own: those of the i-th come behind those of the i-1 before it."""

    def joined(name: str, count: str | None) -> NDArray[Any]:
        """A field of all, its numbers raised by how many of ``count`` the programs before have."""
        shift, arrays = 0, []
        for program in programs:
            array = getattr(program, name)
            arrays.append(array if count is None else np.where(array == NONE, NONE, array + shift).astype(array.dtype))
            shift += 0 if count is None else getattr(program, count)
        return np.concatenate(arrays)

    sizes = np.concatenate([np.diff(program.action_offset) for program in programs])
    return Program(
        num_ranks=sum(program.num_ranks for program in programs),
        action_offset=np.concatenate(([0], np.cumsum(sizes))).astype(np.int64),
        op=joined("op", None),
        stage=joined("stage", "num_stages"),
        peer=joined("peer", "num_ranks"),
        message=joined("message", "num_messages"),
        stage_rank=joined("stage_rank", "num_ranks"),
        stage_kind=joined("stage_kind", None),
        message_tag=joined("message_tag", None),
        producer=joined("producer", "num_stages"),
        consumer=joined("consumer", "num_stages"),
        local_before=joined("local_before", "num_stages"),
        local_after=joined("local_after", "num_stages"),
        local_is_data=joined("local_is_data", None),
    )


def _grouped(key: NDArray[np.integer], value: NDArray[np.integer]) -> dict[int, tuple[int, ...]]:
    """Key -> its values in their order, keys rising."""
    by_key = np.argsort(key, kind="stable")
    keys, values = key[by_key], value[by_key].tolist()
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))[: len(keys)])
    bounds = [*first.tolist(), len(values)]
    names = zip(keys[first].tolist(), itertools.pairwise(bounds), strict=True)
    return LongDict((name, tuple(values[begin:end])) for name, (begin, end) in names)
