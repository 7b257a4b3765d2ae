"""Whole or split backwards: split is never worse, whatever the model, the batch, the memory and the budget."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.cli.plan_command import workload_costs
from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.fixed import WithoutOffload
from megatron_dip.partition.offline import even_partition, paper_partition
from megatron_dip.partition.online import split
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.schedule.backward import search_forms, with_weights_behind
from megatron_dip.schedule.graph import StageProblem, build_problem
from megatron_dip.schedule.interleave import UNLIMITED, make_costs, make_kernel_graph
from megatron_dip.schedule.result import time_order
from megatron_dip.schedule.search import SearchOptions, search
from megatron_dip.spec.codec import resolve_workload
from megatron_dip.spec.named import FIVE_SETUPS, named_setup
from megatron_dip.workloads.generators import default_parallel, make_workload
from tests import naive
from tests.schedule.test_search import vlm_problem
from tests.strategies import Case, arrangements, cases

any_case = st.one_of(cases(max_modules=4, max_ranks=4, max_microbatches=5), arrangements())
tightnesses = st.one_of(st.none(), st.floats(1.0, 2.0))


def forms(case: Case) -> partial[StageProblem]:
    costs = case.costs()
    return partial(_build, case, split(case.microbatches, case.model, case.partition, costs))


def _build(case: Case, subs, split_backward: bool) -> StageProblem:
    return build_problem(case.model, case.partition, subs, case.costs(), split_backward=split_backward)


def limit_of(problem: StageProblem, tightness: float | None) -> np.ndarray:
    if tightness is None:
        return np.full(problem.fastest.num_ranks, UNLIMITED)
    worst = make_costs(problem.graph(problem.leanest()), make_kernel_graph(problem.fastest)).worst
    return np.ceil(worst * tightness).astype(np.int64)


@settings(max_examples=60)
@given(any_case, tightnesses, st.integers(1, 120), st.integers(0, 2**32 - 1))
def test_split_is_never_worse_than_whole_with_as_many_evaluations(case, tightness, evaluations, seed):
    build = forms(case)
    limit = limit_of(build(False), tightness)
    options = SearchOptions(evaluations=evaluations, seed=seed)
    whole = search_forms(build, limit, options, False)
    split_form = search_forms(build, limit, options, True)
    auto = search_forms(build, limit, options, "auto")
    makespan = whole.result.schedule.makespan_ns
    # B and W are rounded to ns each, so that the two together may take a nanosecond more than the whole one.
    assert split_form.result.schedule.makespan_ns <= makespan + split_form.problem.fastest.num_tasks
    assert auto.result.schedule.makespan_ns == min(makespan, split_form.result.schedule.makespan_ns)
    assert auto.evaluations == split_form.evaluations <= 2 * max(evaluations, 1)
    for solved in (split_form, auto):
        schedule = solved.result.schedule
        peaks = naive.peak_memory(schedule.graph, [order.tolist() for order in schedule.order])
        assert all(peak <= most for peak, most in zip(peaks, limit.tolist(), strict=True))


@settings(max_examples=60)
@given(any_case, tightnesses)
def test_a_weight_stage_right_behind_its_input_stage_is_the_whole_backward(case, tightness):
    build = forms(case)
    whole, split_problem = build(False), build(True)
    result = search(whole, limit_of(whole, tightness), SearchOptions(evaluations=20))
    seed = with_weights_behind(whole, result, split_problem)
    schedule = time_order(split_problem.graph(seed.choice), seed.orders)
    assert schedule is not None
    assert sorted(np.concatenate(seed.orders).tolist()) == list(range(split_problem.fastest.num_tasks))
    assert schedule.makespan_ns <= result.schedule.makespan_ns + split_problem.fastest.num_tasks
    assert schedule.peak_memory([0] * whole.fastest.num_ranks) == result.schedule.peak_memory([0] * whole.fastest.num_ranks)


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("name", FIVE_SETUPS)
def test_split_is_never_worse_on_the_papers_setups(name, limited):
    setup, workload = named_setup(name), make_workload(name, seed=3, num_microbatches=8)
    costs = AnalyticCost(
        setup.model, default_parallel(setup), workload.training, setup.device, microbatches=workload.microbatches,
        memory_capacity_bytes=None if limited else 1 << 50,
    )
    partition = paper_partition(setup.model, setup.pipeline, [workload.microbatches], costs)
    plans = {
        form: plan_iteration(setup.model, partition, workload.microbatches, costs, PlanOptions(evaluations=40, seed=1, split_backward=form))
        for form in (False, True, "auto")
    }
    assert plans[True].claimed_makespan <= plans[False].claimed_makespan
    assert plans["auto"].claimed_makespan == plans[True].claimed_makespan


def test_auto_takes_whole_backwards_where_splitting_wins_nothing():
    problem, _ = vlm_problem(num_microbatches=2, num_ranks=1)
    split_problem, _ = vlm_problem(num_microbatches=2, num_ranks=1, split_backward=True)
    limit = np.full(1, UNLIMITED)
    solved = search_forms(lambda form: split_problem if form else problem, limit, SearchOptions(evaluations=50), "auto")
    assert not (solved.problem.pair_weight >= 0).any()


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["vlm-s", "vlm-l", "t2v-s"]), st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_a_choice_is_carried_between_forms_and_strategies(name, num_microbatches, from_split, seed):
    """Fronts of candidates differ between whole and split backwards, and with and without offload."""
    workload = resolve_workload(make_workload(name, num_microbatches=num_microbatches), Path(name))
    model, costs = workload.model_spec, workload_costs(workload)
    sizes = dict.fromkeys((module.name for module in model.modules), 100)
    partition = even_partition(model, workload.parallel.pipeline, dict.fromkeys(sizes, 2), sizes)
    subs = split(workload.microbatches, model, partition, costs)
    problems = [
        build_problem(model, partition, subs, of, split_backward=form) for of in (costs, WithoutOffload(costs)) for form in (False, True)
    ]
    known = problems[from_split]
    choice = np.random.default_rng(seed).integers(0, known.num_candidates[known.pair_class]).astype(np.int32)
    assert (known.nearest_choice(known, choice) == choice).all()
    wanted = known.held_bytes[known.pair_class, choice]
    for problem in problems:
        carried = problem.nearest_choice(known, choice)
        assert (carried < problem.num_candidates[problem.pair_class]).all()
        leanest = carried == problem.leanest()
        assert leanest[problem.held_bytes[problem.pair_class, carried] > wanted].all()
        for pair in range(0, problem.num_pairs, 7):
            counts = known.candidates[known.pair_class[pair]].counts[choice[pair]]
            if counts in problem.candidates[problem.pair_class[pair]].counts:
                assert problem.strategies(pair, carried[pair]) == known.strategies(pair, choice[pair])


def test_a_split_plan_under_memory_with_offload_names_strategies_of_its_own_front():
    """The whole form's choice stood where the split form has a candidate less: no list of strategies had that number."""
    workload = resolve_workload(make_workload("vlm-s"), Path("vlm-s"))
    model, costs = workload.model_spec, workload_costs(workload)
    sizes = dict.fromkeys((module.name for module in model.modules), 100)
    partition = even_partition(model, workload.parallel.pipeline, dict.fromkeys(sizes, 2), sizes)
    plan = plan_iteration(model, partition, workload.microbatches[:16], costs, PlanOptions(
        evaluations=40, split_backward=True, may_exceed_memory=True,
    ))
    assert {label for stage in plan.stages for label in stage.strategy} - {"none"}
