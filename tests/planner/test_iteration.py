"""Whole plans for any arrangement of modules: the facade's own checks pass, and checker and planner agree on the makespan."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.cost.profile import ProfileCost
from megatron_dip.partition.online import split
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.program.one_queue import one_queue_makespan
from megatron_dip.schedule.checker import check_plan
from megatron_dip.schedule.graph import build_problem
from megatron_dip.schedule.interleave import make_costs, make_kernel_graph
from megatron_dip.spec.errors import InputError
from tests.strategies import cases, vlm_case


@settings(max_examples=120)
@given(cases(max_modules=4, max_ranks=4, max_microbatches=5), st.booleans(), st.booleans(), st.sampled_from([None, 1.0, 1.5]))
def test_any_model_gives_a_checked_plan(case, split_backward, forward_only, tightness):
    capacity = None
    if tightness is not None:
        costs = case.costs()
        subs = split(case.microbatches, case.model, case.partition, costs)
        problem = build_problem(case.model, case.partition, subs, costs, split_backward=split_backward, forward_only=forward_only)
        worst = make_costs(problem.graph(problem.leanest()), make_kernel_graph(problem.fastest)).worst
        capacity = math.ceil(int(worst.max()) * tightness)
    options = PlanOptions(evaluations=24, seed=1, split_backward=split_backward, forward_only=forward_only)
    plan = plan_iteration(case.model, case.partition, case.microbatches, case.costs(capacity), options)
    report = check_plan(plan, case.microbatches)
    assert report.makespan == plan.claimed_makespan >= plan.lower_bound
    assert capacity is None or max(plan.peak_memory) <= capacity


def test_equal_bytes_for_equal_input():
    case = vlm_case(num_microbatches=8, num_ranks=3, chunks={"vit": 2})
    options = PlanOptions(evaluations=200, seed=5, split_backward=True)
    first, second = (plan_iteration(case.model, case.partition, case.microbatches, case.costs(400), options) for _ in range(2))
    same = [msgspec.json.encode(msgspec.structs.replace(plan, planning_ns=0)) for plan in (first, second)]
    assert same[0] == same[1]


def test_on_one_hardware_queue_no_plan_ends_later_and_some_end_sooner():
    """Messages as long as stages, so that channels are seldom free; the same search, scored for the device."""
    sooner = 0
    for seed in range(12):
        case = vlm_case(num_microbatches=8, num_ranks=4, chunks={"vit": 1})
        slow = msgspec.structs.replace(case.profile, p2p=msgspec.structs.replace(case.profile.p2p, latency_ns=900.0 + 100 * seed))
        anywhere, on_one = (
            plan_iteration(case.model, case.partition, case.microbatches, ProfileCost(slow, None), PlanOptions(
                evaluations=60, seed=seed, hardware_queues=queues,
            ))
            for queues in (None, 1)
        )
        assert anywhere.claimed_makespan <= on_one.claimed_makespan <= one_queue_makespan(on_one) <= one_queue_makespan(anywhere)
        sooner += one_queue_makespan(on_one) < one_queue_makespan(anywhere)
    assert sooner


def test_too_little_memory_names_rank_and_bytes():
    case = vlm_case(num_microbatches=4, num_ranks=2)
    with pytest.raises(InputError, match="bytes are missing on pipeline rank") as caught:
        plan_iteration(case.model, case.partition, case.microbatches, case.costs(10), PlanOptions(evaluations=5))
    assert caught.value.field == "memory_capacity_bytes"
    assert "full recompute" in caught.value.remedy


@pytest.mark.parametrize("options", [
    PlanOptions(time_budget_s=float("inf")), PlanOptions(time_budget_s=float("nan")), PlanOptions(time_budget_s=-1.0),
    PlanOptions(evaluations=0), PlanOptions(hardware_queues=0), PlanOptions(hardware_queues=33), PlanOptions(evaluations=10**12), PlanOptions(threads=0),
])
def test_budgets_that_cannot_be(options):
    case = vlm_case(num_microbatches=2)
    with pytest.raises(InputError):
        plan_iteration(case.model, case.partition, case.microbatches, case.costs(), options)


def test_no_work_at_all():
    case = vlm_case(num_microbatches=2)
    with pytest.raises(InputError, match="no microbatch"):
        plan_iteration(case.model, case.partition, [{"vit": []}, {}], case.costs(), PlanOptions(evaluations=1))
