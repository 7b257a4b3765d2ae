"""Programs and a plan's columns: a rank that is told the stages and their order lowers them to actions itself.

Lowering depends on nothing else, so all ranks come to the same actions, and orders are all that has to travel.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dip.program.lower import lower
from megatron_dip.program.messages import group_by
from megatron_dip.program.program import NONE, Program
from megatron_dip.spec.plan_columns import ABSENT, PlanColumns
from megatron_dip.spec.tasks import TaskGraph

ACTION_COLUMNS = (
    "action_offset", "op", "action_stage", "peer", "tag", "group", "input_stage", "input_tag", "local_stage", "local_source", "output_tag",
    "output_stage",
)
"""What lowering makes."""


def no_actions() -> dict[str, Any]:
    """The columns of a plan that is not lowered yet."""
    return {name: np.empty(0, np.int8 if name == "op" else np.int64) for name in ACTION_COLUMNS}


def with_program(columns: PlanColumns, program: Program) -> PlanColumns:
    """The plan with these actions and edges."""
    tag = program.message_tag.astype(np.int64)
    is_post = program.message != NONE
    tags = np.full(len(program.op), ABSENT, np.int64)
    tags[is_post] = tag[program.message[is_post]]
    handed = program.local_is_data
    input_stage, input_tag = _by_key(program.consumer, tag, program.num_stages)
    local_stage, local_source = _by_key(program.local_after[handed], program.local_before[handed].astype(np.int64), program.num_stages)
    by_tag = np.argsort(tag, kind="stable")
    return replace(
        columns, action_offset=program.action_offset, op=program.op, action_stage=program.stage.astype(np.int64),
        peer=program.peer.astype(np.int64), tag=tags, group=np.full(len(tags), ABSENT, np.int64), input_stage=input_stage,
        input_tag=input_tag, local_stage=local_stage, local_source=local_source, output_tag=tag[by_tag],
        output_stage=program.producer[by_tag].astype(np.int64),
    )


def lower_columns(columns: PlanColumns) -> PlanColumns:
    """The plan with the actions that its order lowers to.

    Raises:
        ProgramError: the order contradicts the dependencies.
    """
    offset = columns.order_offset
    order = [columns.order[offset[rank] : offset[rank + 1]].astype(np.int32) for rank in range(columns.head.ranks)]
    return with_program(columns, lower(task_graph(columns), order))


def task_graph(columns: PlanColumns) -> TaskGraph:
    """The plan's stages as tasks."""
    after = np.repeat(np.arange(len(columns.id)), np.diff(columns.dep_offset))
    before = columns.dep_stage
    is_own = np.ones(len(before), np.bool_)
    for column in (columns.rank, columns.module, columns.vp_stage, columns.microbatch, columns.sub_microbatch):
        is_own &= column[before] == column[after]
    return TaskGraph(
        num_ranks=columns.head.ranks, module_names=columns.module_names, rank=columns.rank.astype(np.int32), kind=columns.kind,
        module=columns.module.astype(np.int16), vp_stage=columns.vp_stage.astype(np.int16), microbatch=columns.microbatch.astype(np.int32),
        sub_microbatch=columns.sub_microbatch.astype(np.int32), duration_ns=columns.duration, mem_start_bytes=columns.mem_delta_start,
        mem_end_bytes=columns.mem_delta_end, dep_offset=columns.dep_offset.astype(np.int32), dep_task=before.astype(np.int32),
        dep_lag_ns=columns.dep_lag,
        dep_is_data=~is_own,  # activations of a stage pair stay in place
    )


def _by_key(key: NDArray[Any], value: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Both by rising key, entries of one key in their order."""
    _, order = group_by(np.ascontiguousarray(key, np.int64), size, np.arange(len(key)))
    return key[order].astype(np.int64), value[order]
