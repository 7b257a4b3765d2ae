"""Joint plans of linked replicas: every part is a checked plan of its replica's batch, and all parts keep one order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.planner.linked import order_digest, restrict, union_of
from megatron_dip.spec.errors import InputError
from tests.strategies import cases, vlm_case


@settings(max_examples=80)
@given(cases(max_modules=4, max_ranks=4, max_microbatches=4), st.booleans(), st.booleans(), st.data())
def test_parts_of_a_joint_plan_are_plans(case, split_backward, forward_only, data):
    """A replica has some of the union's work: fewer instances in places, shorter ones in others."""
    own = [
        {
            module: [data.draw(st.integers(1, length)) for length in lengths[: data.draw(st.integers(0, len(lengths)))]]
            for module, lengths in microbatch.items()
        }
        for microbatch in case.microbatches
    ]
    replicas = [case.microbatches, own]
    assert union_of(replicas) == list(case.microbatches)
    joint = plan_iteration(case.model, case.partition, union_of(replicas), case.costs(), PlanOptions(
        evaluations=8, seed=1, split_backward=split_backward, forward_only=forward_only,
    ))
    # The whole is a part of itself, but for its bound, and a part with work is checked within.
    assert restrict(joint, case.microbatches).order == joint.order
    if any(lengths for microbatch in own for lengths in microbatch.values()):
        part = restrict(joint, own)
        kept = {(s.kind, s.module, s.vp_stage, s.rank, s.microbatch, s.sub_microbatch) for s in part.stages}
        for row, joint_row in zip(part.order, joint.order, strict=True):
            keys = [_key(part.stages[stage]) for stage in row]
            assert keys == [key for key in (_key(joint.stages[stage]) for stage in joint_row) if key in kept]


def _key(stage):
    return (stage.kind, stage.module, stage.vp_stage, stage.rank, stage.microbatch, stage.sub_microbatch)


def test_replicas_run_the_language_model_in_one_order():
    case = vlm_case(num_microbatches=6, num_ranks=2, chunks={"vit": 2})
    text = [{"lm": microbatch["lm"]} for microbatch in case.microbatches]
    joint = plan_iteration(
        case.model, case.partition, union_of([case.microbatches, text]), case.costs(400), PlanOptions(evaluations=50, seed=3)
    )
    parts = [restrict(joint, microbatches) for microbatches in (case.microbatches, text)]
    assert len({order_digest(part, "lm") for part in parts}) == 1
    assert {stage.module for stage in parts[1].stages} == {"lm"}
    assert order_digest(parts[0], "vit") != order_digest(parts[1], "vit")


def test_replicas_with_other_numbers_of_microbatches_are_refused():
    with pytest.raises(InputError, match="replicas that share experts"):
        union_of([[{"lm": [1]}], [{"lm": [1]}] * 2])
