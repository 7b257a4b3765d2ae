"""Plans of the paper's setups on a device with one hardware queue: none hangs, and the queue costs little.

The cases of ``scripts/bench_one_queue.py`` with 4 microbatches; the record of all 144 is docs/results/one_queue.md.
"""

from __future__ import annotations

import statistics

import numpy as np
import pytest

from megatron_dip.program.dry_run import dry_run
from megatron_dip.program.one_queue import one_queue_makespan, program_makespan
from megatron_dip.program.program import ProgramError, program_of
from scripts.bench_one_queue import cases, lags_of, planner
from tests.program.naive import naive_makespan


@pytest.mark.parametrize("setup", ["vlm-s", "vlm-l", "t2v-s"])
def test_plans_of_named_setups_on_one_hardware_queue(setup: str) -> None:
    ratios = []
    for case in cases():
        if case.setup == setup and case.microbatches == 4:
            plan = planner(case)(None)
            program = program_of(plan)
            dry_run(program)
            duration, lag = [stage.duration for stage in plan.stages], lags_of(plan, program)
            assert program_makespan(program, np.array(duration, np.int64), lag, one_queue=False) == plan.claimed_makespan
            ratios.append(one_queue_makespan(plan) / plan.claimed_makespan)
            if len(plan.stages) < 300:
                assert naive_makespan(program, duration, lag.tolist(), one_queue=True) == one_queue_makespan(plan)
    assert len(ratios) == 16
    assert 1 <= statistics.median(ratios) <= 1.015
    assert max(ratios) <= 1.06


def test_a_plan_that_hangs_on_one_queue_has_no_makespan_there() -> None:
    plan = planner(next(cases()))(None)
    for row in plan.actions:
        row.sort(key=lambda action: action.op != "irecv")
    assert program_makespan(program_of(plan), np.array([stage.duration for stage in plan.stages], np.int64), lags_of(plan, program_of(plan)), one_queue=False) > 0
    with pytest.raises(ProgramError, match="one hardware queue"):
        one_queue_makespan(plan)
