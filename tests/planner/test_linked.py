"""Joint plans of linked replicas: every part is a checked plan of its replica's batch, and all parts keep one order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.planner.linked import order_digest, own_part, restrict, union_of
from megatron_dip.program.program import ProgramError
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


def test_parts_are_the_joint_plans_actions_without_what_is_left_out():
    case = vlm_case(num_microbatches=6, num_ranks=2, chunks={"vit": 2})
    text = [{"lm": microbatch["lm"]} for microbatch in case.microbatches]
    joint = plan_iteration(
        case.model, case.partition, union_of([case.microbatches, text]), case.costs(400), PlanOptions(evaluations=50, seed=3)
    )
    whole = restrict(joint, case.microbatches)
    assert (whole.actions, whole.inputs, whole.outputs, whole.local_inputs) == (joint.actions, joint.inputs, joint.outputs, joint.local_inputs)
    part = own_part(joint, [case.microbatches, text], 1, "lm")

    def text_form(plan, row):
        """Each action with the stage, or the stages at both ends of the message, in words that all replicas share."""
        consumer = {tag: stage for stage, tags in plan.inputs.items() for tag in tags}
        ends = [(a.op, (a.stage,) if a.op in ("fw", "bw", "w") else (plan.outputs[a.tag], consumer[a.tag])) for a in row]
        return [(op, *(_key(plan.stages[stage]) for stage in stages)) for op, stages in ends]

    for row, joint_row in zip(part.actions, joint.actions, strict=True):
        left = [action for action in text_form(joint, joint_row) if all(key[1] == "lm" for key in action[1:])]
        assert text_form(part, row) == left


def test_a_replica_without_the_work_that_all_share_is_found():
    case = vlm_case(num_microbatches=3, num_ranks=2)
    lacking = [*case.microbatches[:2], {"vit": case.microbatches[2]["vit"]}]
    joint = plan_iteration(case.model, case.partition, case.microbatches, case.costs(), PlanOptions(evaluations=5))
    with pytest.raises(ProgramError, match="deadlock"):
        own_part(joint, [case.microbatches, lacking], 0, "lm")


def test_replicas_with_other_numbers_of_microbatches_are_refused():
    with pytest.raises(InputError, match="replicas that share experts"):
        union_of([[{"lm": [1]}], [{"lm": [1]}] * 2])
