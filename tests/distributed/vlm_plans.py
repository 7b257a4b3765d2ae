"""Plans for the cases of :mod:`tests.distributed.tiny_vlm`, made in the test's own process: searched ones and random ones."""

from __future__ import annotations

import msgspec

from megatron_dip.cost.profile import ProfileCost
from megatron_dip.partition.online import split
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.program.dry_run import check_program, dry_run
from megatron_dip.program.lower import lower
from megatron_dip.schedule.graph import build_task_graph
from megatron_dip.schedule.result import time_order
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.profile import ModuleProfile, PointToPoint, Profile, ProfileGrid, ProfilePoint, Strategy
from megatron_dip.spec.workload import Microbatch
from tests.distributed.dip_runs import even_cut
from tests.distributed.tiny_vlm import Case, counts_of, microbatches, tiny_model
from tests.program.graphs import random_order

STRATEGIES = {
    "none": Strategy(), "selective": Strategy(extra_forward=0.2, activation=0.5), "full": Strategy(extra_forward=1.0, activation=0.1),
}


def _module(num_layers: int, tokens: int) -> ModuleProfile:
    point = ProfilePoint(
        instances=1, tokens=tokens, forward_ns=100.0 * tokens, backward_input_ns=110.0 * tokens, backward_weight_ns=90.0 * tokens,
        activation_bytes=1000.0 * tokens, boundary_bytes=100.0 * tokens,
    )
    return ModuleProfile(num_layers=num_layers, layer=ProfileGrid(points=[point]), strategies=STRATEGIES)


def costs_of(case: Case, memory_capacity_bytes: int | None = None) -> ProfileCost:
    profile = Profile(
        format="megatron-dip/profile/1", p2p=PointToPoint(latency_ns=1000, bytes_per_second=1e9),
        modules={"vit": _module(case.num_layers[0], tiny_model(case).image.patches), "lm": _module(case.num_layers[1], 48)},
    )
    return ProfileCost(profile, memory_capacity_bytes)


def metadata_of(case: Case, replica: int, step: int = 0) -> list[Microbatch]:
    if case.option("tower") is None:
        return [{"lm": [48], **({"vit": [tiny_model(case).image.patches] * count} if count else {})} for count in counts_of(case, replica, step)]
    lengths = [
        [rows * columns for time, rows, columns in item["image_grid_thw"].tolist() for _ in range(time)] for item in microbatches(case, replica, step)
    ]
    return [{"lm": [64], **({"vit": frames} if frames else {})} for frames in lengths]


def make_plan(case: Case, replica: int = 0, step: int = 0, *, forward_only: bool = False) -> Plan:
    """A plan by a short search; ``memory`` in the case's options is a capacity that makes layers recompute."""
    options = PlanOptions(
        evaluations=30, seed=case.seed, split_backward=case.option("split_backward", False), forward_only=forward_only
    )
    return plan_iteration(
        tiny_model(case).modules, even_cut(case), metadata_of(case, replica, step), costs_of(case, case.option("memory")), options
    )


def make_random_plan(case: Case, replica: int, step: int, seed: int) -> Plan:
    """A random order that keeps every dependency, lowered and dry-run; the plan says of itself what is so."""
    model, partition, costs = tiny_model(case).modules, even_cut(case), costs_of(case)
    plan = make_plan(case, replica, step)
    split_backward = case.option("split_backward", False)
    graph = build_task_graph(model, partition, split(metadata_of(case, replica, step), model, partition, costs), costs,
                             split_backward=split_backward)
    order = random_order(graph, seed)
    program = lower(graph, order)
    check_program(program)
    dry_run(program)
    schedule = time_order(graph, order)
    assert schedule is not None
    return msgspec.structs.replace(
        plan, claimed_makespan=schedule.makespan_ns, bubble_fraction=schedule.bubble_fraction,
        peak_memory=schedule.peak_memory(plan.memory_initial), order=[row.tolist() for row in order], actions=program.actions(), inputs=program.inputs(),
        local_inputs=program.local_inputs(), outputs=program.outputs(),
    )


def plans_of(case: Case) -> list[list[Plan]]:
    """For each replica the plans of its steps. The option ``random`` is a seed for random orders."""
    seed = case.option("random")
    return [
        [
            make_plan(case, replica, step) if seed is None else make_random_plan(case, replica, step, 1000 * seed + 10 * step + replica)
            for step in range(max(1, case.steps))
        ]
        for replica in range(len(case.image_counts))
    ]
