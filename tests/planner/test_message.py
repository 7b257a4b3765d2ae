"""Plans come out of their bytes as they went in, and no other version's bytes pass for a plan."""

from __future__ import annotations

import gc

import msgspec
import pytest

from megatron_dip.planner import message
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.planner.message import pack_plan, plan_digest, unpack_plan
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan
from tests.strategies import vlm_case


@pytest.fixture(scope="module")
def plan() -> Plan:
    case = vlm_case(num_microbatches=5, num_ranks=3, chunks={"vit": 2})
    return plan_iteration(case.model, case.partition, case.microbatches, case.costs(None), PlanOptions(evaluations=4, split_backward=True))


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_plan_comes_back_whatever_the_slices(plan: Plan, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message, "_SLICE", size)
    packed = pack_plan(plan)
    assert packed.plan is plan
    assert unpack_plan(packed.data) == plan
    assert packed.digest == plan_digest(packed.data)
    assert gc.isenabled()


def test_the_digest_tells_plans_apart(plan: Plan) -> None:
    other = msgspec.structs.replace(plan, order=[plan.order[0][::-1], *plan.order[1:]])
    assert pack_plan(other).digest != pack_plan(plan).digest


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data.replace(b"claimed_makespan", b"claimed_makespam"), lambda data: b""])
def test_bytes_of_another_version_are_refused(plan: Plan, damage) -> None:
    with pytest.raises(InputError, match="same version of megatron_dip"):
        unpack_plan(damage(pack_plan(plan).data))
