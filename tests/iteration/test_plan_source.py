"""Planner threads that fail in every way, over many iterations: each batch gets a plan that holds, and what happened is counted."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec

from megatron_dip.iteration.capture_batch import CapturedBatch
from megatron_dip.iteration.plan_source import PlanSource
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.planner.message import PackedPlan, pack_plan
from megatron_dip.schedule.checker import check_plan
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.workload import Microbatch
from tests.strategies import vlm_case

ITERATIONS = 100
SEARCHED, QUICK = 77, 5
"""Seeds by which plans are told apart."""
LIES = ("another batch's plan", "a wrong makespan", "an order that waits in a circle", "a stage lost")


class BadPlanner:
    """Plans, raises, sleeps or lies, as it is told for each batch by its number of images."""

    def __init__(self) -> None:
        self.case = vlm_case(num_microbatches=2)
        self.behaviour: dict[bytes, str] = {}
        self.wake = threading.Event()

    def plan(self, microbatches: Sequence[Microbatch], seed: int) -> Plan:
        case = self.case
        return plan_iteration(case.model, case.partition, microbatches, case.costs(None), PlanOptions(evaluations=2, seed=seed))

    def __call__(self, microbatches: Sequence[Microbatch], forward_only: bool) -> Plan:
        behaviour = self.behaviour[msgspec.json.encode(microbatches)]
        if behaviour == "raise":
            raise RuntimeError("out of luck")
        if behaviour == "sleep":
            self.wake.wait(30)
        plan = self.plan(microbatches, SEARCHED)
        match behaviour:
            case "another batch's plan":
                return self.plan([{"vit": [4], "lm": [9]}], SEARCHED)
            case "a wrong makespan":
                return msgspec.structs.replace(plan, claimed_makespan=plan.claimed_makespan // 2)
            case "an order that waits in a circle":
                return msgspec.structs.replace(plan, order=[list(row)[::-1] for row in plan.order])
            case "a stage lost":
                return msgspec.structs.replace(plan, order=[list(row)[1:] for row in plan.order])
        return plan


def nothing_to_capture(microbatch: int) -> Any:
    raise AssertionError(microbatch)


def captured(microbatches: list[Microbatch]) -> CapturedBatch:
    return CapturedBatch(calls=[], microbatches=microbatches, conditions=b"", error=None, is_replay=False, inputs=[], recapture=nothing_to_capture)


def test_a_hundred_iterations_with_planners_that_raise_sleep_or_lie() -> None:
    planner, draw = BadPlanner(), random.Random(3)
    source = PlanSource(
        planner, lambda microbatches, _: planner.plan(microbatches, QUICK), pack_plan, deadline_s=0.01, num_threads=1, look_ahead=1, link=None
    )
    service: Any = source._service
    wanted: Counter[str] = Counter()
    for number in range(ITERATIONS):
        microbatches: list[Microbatch] = [{"vit": [4 + number], "lm": [16]}, {"vit": [4] * draw.randrange(4), "lm": [16]}]
        behaviour = draw.choice(["plan", "plan", "raise", "sleep", *LIES])
        planner.behaviour[msgspec.json.encode(microbatches)] = behaviour
        planner.wake.clear()
        service.submit(microbatches)
        if behaviour != "sleep":
            wait_until_idle(service)
        packed = source.take(captured(microbatches), False)
        assert isinstance(packed, PackedPlan), packed
        check_plan(packed.plan, microbatches)
        assert packed.plan.seed == (SEARCHED if behaviour == "plan" else QUICK), behaviour
        wanted["late" if behaviour == "sleep" else "failed"] += behaviour != "plan"
        planner.wake.set()
        wait_until_idle(service)
    counts = source.counts()
    assert counts.taken == ITERATIONS
    assert counts.fallbacks == {kind: count for kind, count in wanted.items() if count}
    assert min(wanted["late"], wanted["failed"]) > 5


def wait_until_idle(service: Any) -> None:
    deadline = time.monotonic() + 60
    while service._unfinished:
        assert time.monotonic() < deadline
        time.sleep(0.001)
