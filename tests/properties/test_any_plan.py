"""Whatever the model, the batch, the order and the memory: the plan holds, nothing deadlocks, checker and planner agree to the ns.

Short by default; ``HYPOTHESIS_PROFILE=thorough`` (CONTRIBUTING.md) runs tens of thousands of cases. Models are arranged as users arrange
them (several encoders of one backbone, a backbone that feeds decoders, encoders without a backbone, any module frozen) or in any acyclic
way at all; every case takes a random permutation of the orders of priority, and a capacity between what the largest microbatch needs
with the leanest strategies and twice that.
"""

from __future__ import annotations

import math

import numpy as np
from hypothesis import event, given
from hypothesis import strategies as st

from megatron_dip.partition.online import split
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.program.dry_run import check_program, dry_run
from megatron_dip.program.lower import lower
from megatron_dip.schedule.checker import inspect_plan
from megatron_dip.schedule.graph import build_problem
from megatron_dip.schedule.interleave import (
    ALTERNATE,
    BACKWARD_FIRST,
    FORWARD_FIRST,
    Policy,
    interleave,
    make_costs,
    make_kernel_graph,
    make_workspace,
)
from megatron_dip.schedule.result import time_order
from tests import naive
from tests.strategies import Case, arrangements, cases

any_case = st.one_of(cases(max_modules=4, max_ranks=4, max_microbatches=5), arrangements())
policies = st.builds(Policy, both=st.sampled_from([ALTERNATE, BACKWARD_FIRST, FORWARD_FIRST]), weight_fit=st.sampled_from([0, 500, 1000]))


def name_shape(case: Case) -> None:
    """Counts kinds of models in hypothesis' statistics."""
    roles = [module.role for module in case.model.modules]
    event(f"{roles.count('encoder')} encoders, {roles.count('backbone')} backbones, {roles.count('decoder')} decoders")
    if not all(module.trainable for module in case.model.modules):
        event("some module frozen")


@given(any_case, st.booleans(), st.booleans(), st.floats(1.0, 2.0), policies, st.integers(0, 2**32 - 1))
def test_any_permutation_under_any_capacity_gives_programs_that_run(case, split_backward, forward_only, tightness, policy, seed):
    name_shape(case)
    costs = case.costs()
    subs = split(case.microbatches, case.model, case.partition, costs)
    problem = build_problem(case.model, case.partition, subs, costs, split_backward=split_backward, forward_only=forward_only)
    rng = np.random.default_rng(seed)
    choice = (rng.integers(0, 1000, problem.num_pairs) % problem.num_candidates[problem.pair_class]).astype(np.int32)
    graph = problem.graph(choice)
    kernel = make_kernel_graph(graph)
    kernel_costs, work = make_costs(graph, kernel), make_workspace(kernel)
    limit = np.ceil(kernel_costs.worst * tightness).astype(np.int64)
    forward = rng.permutation(kernel.num_forward_groups).astype(np.int32)
    backward = rng.permutation(len(kernel.group_unit) - kernel.num_forward_groups).astype(np.int32)
    makespan = interleave(kernel, kernel_costs, limit, forward, backward, policy, work)
    orders = work.orders()
    schedule = time_order(graph, orders)
    assert schedule is not None, "deadlock"
    assert schedule.makespan_ns <= makespan
    assert schedule.start_ns.tolist() == naive.earliest_times(graph, [order.tolist() for order in orders])
    assert all(peak <= most for peak, most in zip(naive.peak_memory(graph, [order.tolist() for order in orders]), limit.tolist(), strict=True))
    program = lower(graph, orders)
    check_program(program)
    dry_run(program)


@given(any_case, st.booleans(), st.booleans(), st.one_of(st.none(), st.floats(1.0, 2.0)), st.integers(0, 2**32 - 1))
def test_planner_and_checker_agree_exactly(case, split_backward, forward_only, tightness, seed):
    name_shape(case)
    capacity = None
    if tightness is not None:
        costs = case.costs()
        subs = split(case.microbatches, case.model, case.partition, costs)
        problem = build_problem(case.model, case.partition, subs, costs, split_backward=split_backward, forward_only=forward_only)
        worst = make_costs(problem.graph(problem.leanest()), make_kernel_graph(problem.fastest)).worst
        capacity = math.ceil(int(worst.max()) * tightness)
    options = PlanOptions(evaluations=6, seed=seed, split_backward=split_backward, forward_only=forward_only)
    plan = plan_iteration(case.model, case.partition, case.microbatches, case.costs(capacity), options)
    report = inspect_plan(plan, case.microbatches)
    assert report.problems == []
    assert report.makespan == plan.claimed_makespan >= plan.lower_bound
    assert report.peak_memory == plan.peak_memory
    assert capacity is None or max(plan.peak_memory) <= capacity
