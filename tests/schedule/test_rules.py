"""Other schedules' orders in our task graphs: they are what their rules say, hold under every check, and are never called DIP's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.schedule.rules import RULES, interleaved_rows
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.plan import Plan
from tests.strategies import Case, cases, grid, module, profile, vlm_case


def one_module(num_ranks: int, chunks: int, count: int) -> Case:
    from megatron_dip.spec.profile import ModuleProfile

    model = ModelSpec(modules=[module("lm", 16, role="backbone")])
    costs = profile({"lm": ModuleProfile(num_layers=16, layer=grid(300, 310, 290, 40, 20, tokens=10))}, latency_ns=1.0)
    return Case(
        model=model, profile=costs, partition=even_partition(model, num_ranks, {"lm": chunks}, {"lm": 1}),
        microbatches=[{"lm": [10]}] * count,
    )


def plan_of_case(case: Case, rule: str, **options: object) -> Plan:
    return plan_iteration(
        case.model, case.partition, case.microbatches, case.costs(), PlanOptions(evaluations=1, schedule=rule, **options)  # type: ignore[arg-type]
    )


def cells(plan: Plan) -> list[list[tuple[bool, int, int]]]:
    return [[(s.kind == "fw", s.vp_stage, s.microbatch) for s in (plan.stages[stage] for stage in row)] for row in plan.order]


@pytest.mark.parametrize(("ranks", "count"), [(2, 5), (4, 8), (4, 2)])
def test_1f1b_on_one_chunk_is_megatrons(ranks: int, count: int) -> None:
    assert cells(plan_of_case(one_module(ranks, 1, count), "1f1b")) == [list(map(tuple, row)) for row in interleaved_rows(ranks, 1, count)]


def test_interleaved_on_two_chunks_is_megatrons() -> None:
    assert cells(plan_of_case(one_module(4, 2, 8), "interleaved")) == [list(map(tuple, row)) for row in interleaved_rows(4, 2, 8)]


def test_megatrons_interleaved_order_for_two_ranks_and_two_chunks() -> None:
    """Written out by hand from ``get_schedule_table``: rank 1 runs warm-up chunk 0 of both, then alternates."""
    f, b = True, False
    rows = interleaved_rows(2, 2, 2)
    assert [tuple(cell) for cell in rows[1]] == [
        (f, 0, 0), (f, 0, 1), (f, 1, 0), (b, 1, 0), (f, 1, 1), (b, 1, 1), (b, 0, 0), (b, 0, 1),
    ]


@pytest.mark.parametrize("rule", ["optimus", "three-phase"])
def test_encoders_stand_before_and_behind_the_backbone(rule: str) -> None:
    plan = plan_of_case(vlm_case(chunks={"lm": 2}), rule)
    for row in plan.order:
        stages = [plan.stages[stage] for stage in row]
        phase = [0 if (s.module, s.kind) == ("vit", "fw") else 2 if s.module == "vit" else 1 for s in stages]
        assert phase == sorted(phase)
        if rule == "three-phase":
            work = [s.instances for s in stages if (s.module, s.kind) == ("vit", "fw") and s.sub_microbatch == 0]
            assert work == sorted(work, reverse=True)


@settings(max_examples=60)
@given(case=cases(), rule=st.sampled_from(sorted(RULES)), split_backward=st.booleans(), forward_only=st.booleans())
def test_every_rule_makes_plans_that_hold(case: Case, rule: str, split_backward: bool, forward_only: bool) -> None:
    problem = ""
    try:
        plan = plan_of_case(case, rule, split_backward=split_backward, forward_only=forward_only)
    except InputError as error:
        problem = error.problem
    if problem:
        assert "circle" in problem or ("passes every rank once" in problem) == (rule == "1f1b")
        return
    if split_backward:
        for row in plan.order:
            kinds = [plan.stages[stage].kind for stage in row]
            assert all(kinds[index - 1] == "bw" for index, kind in enumerate(kinds) if kind == "w")


def test_memory_is_saved_where_the_rule_needs_more_than_there_is() -> None:
    case = vlm_case()
    free = plan_of_case(case, "interleaved")
    costs = case.costs(max(free.peak_memory) - 1)
    plan = plan_iteration(case.model, case.partition, case.microbatches, costs, PlanOptions(evaluations=1, schedule="interleaved"))
    assert max(plan.peak_memory) < max(free.peak_memory)
    assert plan.claimed_makespan > free.claimed_makespan
    levels = {tuple(stage.strategy).count("full") for stage in plan.stages if stage.kind == "fw"}
    assert len(levels) == 1, "one level of saving for all"
    assert levels != {0}
