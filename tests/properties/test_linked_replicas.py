"""Replicas that share experts never wait for each other for ever, on devices with one hardware queue and without that limit.

A hundred cases; five thousand, for the record in docs/results/one_queue.md, with HYPOTHESIS_PROFILE=long (see tests/conftest.py).
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.planner.linked import check_together, order_digest, restrict
from megatron_dip.program.program import program_of
from tests.planner.linked_cases import linked_case
from tests.program.naive import naive_stands


@given(st.integers(0, 2**32 - 1))
def test_parts_of_any_joint_plan_run_together(seed: int) -> None:
    case = linked_case(seed)
    check_together(case.joint, case.replicas, "lm")
    if seed % 20 == 0 and len(case.joint.stages) < 500:
        # Slowly, and over the plans that the replicas would run.
        parts = [restrict(case.joint, microbatches) for microbatches in case.replicas]
        assert len({order_digest(part, "lm") for part in parts}) == 1
        shared = [{stage: number for number, stage in enumerate(_shared(part))} for part in parts]
        for one_queue in (False, True):
            ends = [len(row) for part in parts for row in part.actions]
            assert naive_stands([program_of(part) for part in parts], one_queue, shared) == ends


def _shared(part):
    """The language model's stages in an order that all replicas have in common."""
    stages = [stage for stage in part.stages if stage.module == "lm"]
    return [stage.id for stage in sorted(stages, key=lambda s: (s.rank, s.kind, s.vp_stage, s.microbatch, s.sub_microbatch))]
