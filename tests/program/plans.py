"""A Plan around a task graph and an order: what the executor runs in tests that need no planner."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_dip.program.lower import SEND_SLACK, lower
from megatron_dip.spec.plan import PLAN_FORMAT, Dep, Plan, PlanStage
from megatron_dip.spec.tasks import KIND_NAMES, TaskGraph


def make_plan(
    graph: TaskGraph, order: Sequence[NDArray[np.int32]], *, send_slack: int = SEND_SLACK, seed: int = 0
) -> Plan:
    program = lower(graph, order, send_slack=send_slack)
    chunks = {
        name: [[1] * graph.num_ranks for _ in range(int(graph.vp_stage[graph.module == index].max(initial=0)) + 1)]
        for index, name in enumerate(graph.module_names)
    }
    stages = [
        PlanStage(
            id=task,
            rank=int(graph.rank[task]),
            kind=KIND_NAMES[graph.kind[task]],  # type: ignore[arg-type]
            duration=int(graph.duration_ns[task]),
            mem_delta_start=0,
            mem_delta_end=0,
            deps=tuple([Dep(int(graph.dep_task[e]), int(graph.dep_lag_ns[e])) for e in range(graph.dep_offset[task], graph.dep_offset[task + 1])]),
            module=graph.module_names[graph.module[task]],
            vp_stage=int(graph.vp_stage[task]),
            layers=(int(graph.vp_stage[task]) * graph.num_ranks + int(graph.rank[task]), 1),
            microbatch=int(graph.microbatch[task]),
            sub_microbatch=int(graph.sub_microbatch[task]),
            tokens=1,
            instances=1,
            strategy=[] if KIND_NAMES[graph.kind[task]] == "w" else ["none"],
        )
        for task in range(graph.num_tasks)
    ]
    return Plan(
        format=PLAN_FORMAT,
        ranks=graph.num_ranks,
        memory_capacity=None,
        memory_initial=[0] * graph.num_ranks,
        stages=stages,
        order=[row.tolist() for row in order],
        claimed_makespan=0,
        lower_bound=0,
        bubble_fraction=0.0,
        peak_memory=[0] * graph.num_ranks,
        planning_ns=0,
        evaluations=0,
        seed=seed,
        chunks=chunks,
        sub_microbatch_size=dict.fromkeys(graph.module_names, 1),
        actions=program.actions(),
        inputs=program.inputs(),
        local_inputs=program.local_inputs(),
        outputs=program.outputs(),
    )
