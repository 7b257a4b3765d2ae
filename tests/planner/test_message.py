"""Plans come out of their bytes as they went in, and no other version's bytes pass for a plan."""

from __future__ import annotations

import dataclasses
import gc

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.planner import iteration
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.planner.message import pack_plan, plan_digest, unpack_plan
from megatron_dip.spec import plan_columns
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.plan_columns import columns_of
from tests.strategies import Case, cases, vlm_case


@pytest.fixture(scope="module")
def plan() -> Plan:
    case = vlm_case(num_microbatches=5, num_ranks=3, chunks={"vit": 2})
    return plan_iteration(case.model, case.partition, case.microbatches, case.costs(None), PlanOptions(evaluations=4, split_backward=True))


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_plan_comes_back_whatever_the_slices(plan: Plan, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_columns, "_SLICE", size)
    packed = pack_plan(plan)
    assert packed.plan is plan
    assert unpack_plan(packed.data) == plan
    assert packed.digest == plan_digest(packed.data)
    assert gc.isenabled()


@settings(max_examples=30)
@given(case=cases(), split_backward=st.booleans(), forward_only=st.booleans())
def test_every_rank_lowers_the_order_to_the_same_actions(case: Case, split_backward: bool, forward_only: bool) -> None:
    options = PlanOptions(evaluations=4, split_backward=split_backward, forward_only=forward_only)
    packed = pack_plan(iteration.plan_columns(case.model, case.partition, case.microbatches, case.costs(), options))
    assert unpack_plan(packed.data) == packed.plan


def test_an_order_is_less_to_send_than_its_actions(plan: Plan) -> None:
    assert len(pack_plan(columns_of(plan)).data) < 0.7 * len(pack_plan(plan).data)


def test_a_plan_that_does_not_hold_is_refused_by_who_gets_it(plan: Plan) -> None:
    waits_in_a_circle = msgspec.structs.replace(plan, order=[plan.order[0][::-1], *plan.order[1:]])
    with pytest.raises(InputError, match="does not hold"):
        unpack_plan(pack_plan(waits_in_a_circle).data)
    late = msgspec.structs.replace(columns_of(plan).head, claimed_makespan=plan.claimed_makespan + 1)
    with pytest.raises(InputError, match="claimed_makespan"):
        unpack_plan(pack_plan(dataclasses.replace(columns_of(plan), head=late)).data)


def test_the_digest_tells_plans_apart(plan: Plan) -> None:
    other = msgspec.structs.replace(plan, order=[plan.order[0][::-1], *plan.order[1:]])
    assert pack_plan(other).digest != pack_plan(plan).digest


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data.replace(b"claimed_makespan", b"claimed_makespam"), lambda data: b""])
def test_bytes_of_another_version_are_refused(plan: Plan, damage) -> None:
    with pytest.raises(InputError, match="same version of megatron_dip"):
        unpack_plan(damage(pack_plan(plan).data))
