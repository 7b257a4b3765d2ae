"""The compiled checker and the plain one decide alike, on what the planner makes and on every way of spoiling it."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.schedule.checker import check_plan, inspect_plan
from megatron_dip.schedule.fast_check import plan_holds
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.plan_columns import columns_of, plan_of
from tests.schedule.test_checker import SPOILED, Spoil, plan_of_case
from tests.strategies import Case, cases, vlm_case


def raw_form(plan: Plan) -> dict[str, Any]:
    return msgspec.json.decode(msgspec.json.encode(plan))


def spots(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every number, list and word inside."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, inner in list(entries):
        found.append((value, key))
        found.extend(spots(inner))
    return found


def spoil_anything(raw: dict[str, Any], draw: random.Random) -> None:
    """Changes one number, drops, repeats or swaps one entry of a list, anywhere in the plan."""
    container, key = draw.choice(spots(raw))
    value = container[key]
    if isinstance(value, bool) or value is None or isinstance(value, (str, float)):
        return
    if isinstance(value, int):
        container[key] = draw.choice([value + 1, value - 1, -value, value + 7, 0])
    elif isinstance(value, list) and value:
        index, other = draw.randrange(len(value)), draw.randrange(len(value))
        match draw.randrange(3):
            case 0:
                del value[index]
            case 1:
                value.insert(other, value[index])
            case _:
                value[index], value[other] = value[other], value[index]


def decide_alike(plan: Plan, microbatches: Any, *, surely: bool = False) -> bool:
    """Whether the plan holds. What the compiled checker takes for good is good; ``surely``: the other way round as well."""
    report, holds = inspect_plan(plan, microbatches), plan_holds(columns_of(plan), microbatches)
    if holds is not None or surely:
        assert (holds is not None) == (not report.problems), report.problems
    if holds is not None:
        assert (holds.start.tolist(), holds.makespan, holds.peak_memory) == (report.start, report.makespan, report.peak_memory)
    return holds is not None


@settings(max_examples=40)
@given(case=cases(), split_backward=st.booleans(), forward_only=st.booleans(), seed=st.integers(0, 2**32))
def test_plans_and_spoiled_plans(case: Case, split_backward: bool, forward_only: bool, seed: int) -> None:
    plan = plan_of_case(case, split_backward=split_backward, forward_only=forward_only)
    assert plan_of(columns_of(plan)) == plan
    assert decide_alike(plan, case.microbatches, surely=True)
    draw = random.Random(seed)
    for _ in range(6):
        raw = raw_form(plan)
        for _ in range(draw.choice([1, 1, 2])):
            spoil_anything(raw, draw)
        try:
            spoiled = msgspec.convert(raw, Plan, str_keys=True)
        except msgspec.ValidationError:
            continue
        decide_alike(spoiled, case.microbatches)


@pytest.mark.parametrize("spoil", [spoil for spoil, _ in SPOILED], ids=lambda spoil: spoil.__qualname__.split(".")[0])
def test_known_ways_of_spoiling(spoil: Spoil) -> None:
    case = vlm_case(chunks={"vit": 2})
    raw = raw_form(plan_of_case(case, split_backward=True))
    spoil(raw)
    assert not decide_alike(msgspec.convert(raw, Plan, str_keys=True), case.microbatches, surely=True)


def test_numbers_beyond_64_bits_are_left_to_plain_python() -> None:
    raw = raw_form(plan_of_case(vlm_case()))
    raw["stages"][0]["duration"] = 10**30
    with pytest.raises(ValueError, match="claimed_makespan"):
        check_plan(msgspec.convert(raw, Plan, str_keys=True))
