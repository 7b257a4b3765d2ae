"""A program: every rank's actions as arrays, the form that lowering makes and the checks run on.

Letters: P ranks, T stages, A actions of all ranks together, M messages, L edges between stages of one rank. Messages are numbered
0..M-1; ``message_tag`` holds the tag that the plan gives each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.long import LongDict, LongList
from megatron_dip.spec.plan import Action

OP_NAMES = ("fw", "bw", "w", "isend", "irecv", "wait_send", "wait_recv")
"""Op code -> the plan's word; the first three codes are those of the task kinds."""
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


def _grouped(key: NDArray[np.integer], value: NDArray[np.integer]) -> dict[int, tuple[int, ...]]:
    """Key -> its values in their order, keys rising."""
    by_key = np.argsort(key, kind="stable")
    keys, values = key[by_key], value[by_key].tolist()
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1]))[: len(keys)])
    bounds = [*first.tolist(), len(values)]
    names = zip(keys[first].tolist(), itertools.pairwise(bounds), strict=True)
    return LongDict((name, tuple(values[begin:end])) for name, (begin, end) in names)
