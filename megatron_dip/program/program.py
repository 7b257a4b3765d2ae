"""A program: every rank's actions as arrays, the form that lowering makes and the checks run on.

Letters: P ranks, T stages, A actions of all ranks together, M messages, L edges between stages of one rank. Messages are numbered
0..M-1; ``message_tag`` holds the tag that the plan gives each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.plan import Action, Plan
from megatron_dip.spec.tasks import KIND_NAMES

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
        return [flat[first:last] for first, last in itertools.pairwise(bounds)]

    def inputs(self) -> dict[int, list[int]]:
        """Stage -> tags it awaits (only stages that await some)."""
        result: dict[int, list[int]] = {}
        for consumer, tag in zip(self.consumer.tolist(), self.message_tag.tolist(), strict=True):
            result.setdefault(consumer, []).append(tag)
        return dict(sorted(result.items()))

    def local_inputs(self) -> dict[int, list[int]]:
        """Stage -> stages of its own rank whose output it takes (only stages that take some)."""
        result: dict[int, list[int]] = {}
        for before, after, is_data in zip(self.local_before.tolist(), self.local_after.tolist(), self.local_is_data.tolist(), strict=True):
            if is_data:
                result.setdefault(after, []).append(before)
        return dict(sorted(result.items()))

    def outputs(self) -> dict[int, int]:
        """Tag -> stage that makes the message."""
        return dict(sorted(zip(self.message_tag.tolist(), self.producer.tolist(), strict=True)))


def program_of_plan(plan: Plan) -> Program:
    """The program that stands in a plan, for the checks. Raises ProgramError where the plan names stages or tags that do not exist."""
    num_stages = len(plan.stages)
    tags = sorted(plan.outputs)
    number = {tag: index for index, tag in enumerate(tags)}
    consumer = np.full(len(tags), NONE, np.int32)
    for stage, awaited in plan.inputs.items():
        for tag in awaited:
            if tag not in number:
                raise ProgramError(f"stage {stage} awaits tag {tag}, which no stage outputs")
            if consumer[number[tag]] != NONE:
                raise ProgramError(f"tag {tag} is awaited by two stages, {consumer[number[tag]]} and {stage}")
            if not 0 <= stage < num_stages:
                raise ProgramError(f"inputs name stage {stage}; the plan has {num_stages} stages")
            consumer[number[tag]] = stage
    for tag, stage in plan.outputs.items():
        if not 0 <= stage < num_stages:
            raise ProgramError(f"tag {tag} comes from stage {stage}; the plan has {num_stages} stages")
        if consumer[number[tag]] == NONE:
            raise ProgramError(f"tag {tag} is awaited by no stage")
    local = [
        (dep.stage, stage.id, dep.stage in plan.local_inputs.get(stage.id, ()))
        for stage in plan.stages
        for dep in stage.deps
        if plan.stages[dep.stage].rank == stage.rank
    ]
    op, stages, peers, messages = [], [], [], []
    codes = {name: code for code, name in enumerate(OP_NAMES)}
    for rank, row in enumerate(plan.actions):
        for action in row:
            code = codes[action.op]
            op.append(code)
            if code < ISEND:
                if not isinstance(action.stage, int) or not 0 <= action.stage < num_stages:
                    raise ProgramError(f"rank {rank} computes stage {action.stage}; the plan has {num_stages} stages")
                stages.append(action.stage)
                peers.append(NONE)
                messages.append(NONE)
            else:
                if not isinstance(action.tag, int) or action.tag not in number:
                    raise ProgramError(f"rank {rank} has {action.op} of tag {action.tag}, which no stage outputs")
                if not isinstance(action.peer, int) or not 0 <= action.peer < plan.ranks:
                    raise ProgramError(f"rank {rank} has {action.op} with rank {action.peer}; the plan has {plan.ranks} ranks")
                stages.append(NONE)
                peers.append(action.peer)
                messages.append(number[action.tag])
    return Program(
        num_ranks=plan.ranks,
        action_offset=np.cumsum([0, *map(len, plan.actions)], dtype=np.int64),
        op=np.array(op, np.int8),
        stage=np.array(stages, np.int32),
        peer=np.array(peers, np.int32),
        message=np.array(messages, np.int32),
        stage_rank=np.array([stage.rank for stage in plan.stages], np.int32),
        stage_kind=np.array([KIND_NAMES.index(stage.kind) for stage in plan.stages], np.int8),
        message_tag=np.array(tags, np.int64),
        producer=np.array([plan.outputs[tag] for tag in tags], np.int32),
        consumer=consumer,
        local_before=np.array([edge[0] for edge in local], np.int32),
        local_after=np.array([edge[1] for edge in local], np.int32),
        local_is_data=np.array([edge[2] for edge in local], np.bool_),
    )
