"""The checker accepts what the planner makes and refuses every way of spoiling it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.schedule.checker import PlanInvalid, check_plan, inspect_plan
from megatron_dip.spec.plan import Plan
from tests.strategies import Case, cases, vlm_case


def plan_of_case(case: Case, *, split_backward: bool = False, forward_only: bool = False) -> Plan:
    return plan_iteration(
        case.model, case.partition, case.microbatches, case.costs(),
        PlanOptions(evaluations=8, split_backward=split_backward, forward_only=forward_only),
    )


@pytest.fixture(scope="module")
def good() -> Plan:
    return plan_of_case(vlm_case(chunks={"vit": 2}), split_backward=True)


@settings(max_examples=60)
@given(case=cases(), split_backward=st.booleans(), forward_only=st.booleans())
def test_what_the_planner_makes_holds(case: Case, split_backward: bool, forward_only: bool) -> None:
    plan = plan_of_case(case, split_backward=split_backward, forward_only=forward_only)
    report = check_plan(plan, case.microbatches)
    assert report.makespan == plan.claimed_makespan
    assert report.peak_memory == plan.peak_memory


Spoil = Callable[[dict[str, Any]], None]


def first(plan: dict[str, Any], kind: str, **fields: object) -> dict[str, Any]:
    return next(s for s in plan["stages"] if s["kind"] == kind and all(s[name] == value for name, value in fields.items()))


def first_action(plan: dict[str, Any], op: str) -> tuple[int, int]:
    return next((r, i) for r, actions in enumerate(plan["actions"]) for i, action in enumerate(actions) if action["op"] == op)


def swap_order(plan: dict[str, Any]) -> None:
    row = plan["order"][0]
    row[0], row[-1] = row[-1], row[0]


def lose_stage(plan: dict[str, Any]) -> None:
    plan["order"][1].pop()


def place_before_the_first(plan: dict[str, Any]) -> None:
    next(stage for stage in plan["stages"] if stage["kind"] == "fw")["vp_stage"] = -1


def repeat_stage(plan: dict[str, Any]) -> None:
    plan["order"][1].append(plan["order"][1][0])


def move_stage(plan: dict[str, Any]) -> None:
    plan["order"][0].append(plan["order"][1].pop())


def lose_dependency(kind: str, index: int) -> Spoil:
    def spoil(plan: dict[str, Any]) -> None:
        stage = next(s for s in plan["stages"] if s["kind"] == kind and len(s["deps"]) > index)
        del stage["deps"][index]

    return spoil


def cycle(plan: dict[str, Any]) -> None:
    last = plan["order"][0][-1]
    plan["stages"][plan["order"][0][0]]["deps"].append({"stage": last, "lag": 0})


def set_field(name: str, change: Callable[[Any], Any]) -> Spoil:
    def spoil(plan: dict[str, Any]) -> None:
        plan[name] = change(plan[name])

    return spoil


def longer_stage(plan: dict[str, Any]) -> None:
    plan["stages"][0]["duration"] += 1


def more_memory(plan: dict[str, Any]) -> None:
    first(plan, "fw")["mem_delta_start"] += 1


def over_capacity(plan: dict[str, Any]) -> None:
    plan["memory_capacity"] = [peak - 1 for peak in plan["peak_memory"]]


def lose_layer(plan: dict[str, Any]) -> None:
    plan["chunks"]["vit"][0][0] -= 1


def other_strategy(plan: dict[str, Any]) -> None:
    stage = first(plan, "bw", module="vit")
    stage["strategy"] = ["full" if label == "none" else "none" for label in stage["strategy"]]


def other_instances(plan: dict[str, Any]) -> None:
    first(plan, "fw")["tokens"] += 1


def drop_action(op: str) -> Spoil:
    def spoil(plan: dict[str, Any]) -> None:
        rank, index = first_action(plan, op)
        del plan["actions"][rank][index]

    return spoil


def swap_sends(plan: dict[str, Any]) -> None:
    for actions in plan["actions"]:
        sends = [index for index, action in enumerate(actions) if action["op"] == "isend"]
        for one, other in pairwise(sends):
            if actions[one]["peer"] == actions[other]["peer"] and actions[one]["tag"] != actions[other]["tag"]:
                actions[one]["tag"], actions[other]["tag"] = actions[other]["tag"], actions[one]["tag"]
                return


def wait_twice(plan: dict[str, Any]) -> None:
    rank, index = first_action(plan, "wait_recv")
    plan["actions"][rank].append(plan["actions"][rank][index])


def wrong_peer(plan: dict[str, Any]) -> None:
    rank, index = first_action(plan, "irecv")
    plan["actions"][rank][index]["peer"] = rank


def compute_out_of_order(plan: dict[str, Any]) -> None:
    actions = plan["actions"][0]
    computes = [index for index, action in enumerate(actions) if "stage" in action]
    actions[computes[0]], actions[computes[1]] = actions[computes[1]], actions[computes[0]]


def lose_message(plan: dict[str, Any]) -> None:
    tag = next(iter(plan["outputs"]))
    del plan["outputs"][tag]


def invent_local_input(plan: dict[str, Any]) -> None:
    plan["local_inputs"].setdefault(str(plan["order"][0][-1]), []).append(plan["order"][0][0])


def receive_all_first(plan: dict[str, Any]) -> None:
    """Rank 0 posts all receives before anything else, which only a device with one queue hangs on."""
    plan["actions"][0].sort(key=lambda action: action["op"] != "irecv")


def block_on_every_message(plan: dict[str, Any]) -> None:
    """Sends are awaited at once, receives are posted just before they are awaited: as with blocking calls, both sides wait."""
    for rank, actions in enumerate(plan["actions"]):
        blocking = []
        for action in actions:
            if action["op"] in ("isend", "wait_recv"):
                post, wait = ("isend", "wait_send") if action["op"] == "isend" else ("irecv", "wait_recv")
                ends = {"peer": action["peer"], "tag": action["tag"]}
                blocking.extend([{"op": post, **ends}, {"op": wait, **ends}])
            elif "stage" in action:
                blocking.append(action)
        plan["actions"][rank] = blocking


SPOILED: list[tuple[Spoil, str]] = [
    (swap_order, "waits in a circle|do not"),
    (lose_stage, "stands 0 times"),
    (repeat_stage, "stands 2 times"),
    (move_stage, "stands in the order of rank 0"),
    (lose_dependency("fw", 0), "does not wait for"),
    (lose_dependency("bw", 0), "does not wait for|has a tensor|without a dependency"),
    (lose_dependency("w", 0), "does not wait for its backward"),
    (cycle, "waits in a circle|feeds it nothing|no message"),
    (set_field("claimed_makespan", lambda value: value - 1), "claimed_makespan"),
    (set_field("lower_bound", lambda value: value * 10), "lower_bound"),
    (set_field("bubble_fraction", lambda value: value + 0.01), "bubble_fraction"),
    (set_field("peak_memory", lambda value: [peak + 1 for peak in value]), "peak_memory of rank 0"),
    (set_field("memory_initial", lambda value: value[:1]), "memory_initial has 1 entries"),
    (set_field("ranks", lambda value: value + 1), "entries for 3 ranks"),
    (longer_stage, "claimed_makespan"),
    (more_memory, "not given back"),
    (over_capacity, "peaks at"),
    (lose_layer, "do not follow from chunks"),
    (place_before_the_first, "do not follow from chunks"),
    (other_strategy, "strategy differs"),
    (other_instances, "differ from its forward's"),
    (drop_action("isend"), "sends of rank"),
    (drop_action("wait_send"), "waits for sends"),
    (drop_action("wait_recv"), "before it has waited"),
    (drop_action("irecv"), "before it was posted|receives of rank"),
    (drop_action("fw"), "are not its order"),
    (swap_sends, "sent before|channel from rank|peer is"),
    (wait_twice, "waited for twice"),
    (wrong_peer, "peer is"),
    (compute_out_of_order, "are not its order|before it has waited"),
    (lose_message, "outputs lacks"),
    (invent_local_input, "local_inputs are"),
    (block_on_every_message, "deadlock: rank 0 stands at action .*"),
    (receive_all_first, "deadlock on a device with one hardware queue: rank 0 stands at action .*irecv"),
]


@pytest.mark.parametrize(("spoil", "problem"), SPOILED, ids=lambda value: value.__qualname__.split(".")[0] if callable(value) else "")
def test_a_spoiled_plan_is_refused(good: Plan, spoil: Spoil, problem: str) -> None:
    raw = msgspec.json.decode(msgspec.json.encode(good))
    spoil(raw)
    plan = msgspec.convert(raw, Plan, str_keys=True)
    with pytest.raises(PlanInvalid, match=problem):
        check_plan(plan, vlm_case().microbatches)


def test_other_data_are_noticed(good: Plan) -> None:
    microbatches = vlm_case().microbatches
    assert not inspect_plan(good, microbatches).problems
    microbatches[1] = {"vit": [1, 1, 1], "lm": [10]}
    assert any("vit of microbatch 1" in problem for problem in inspect_plan(good, microbatches).problems)


def test_the_bad_cell_is_marked(good: Plan) -> None:
    raw = msgspec.json.decode(msgspec.json.encode(good))
    swap_order(raw)
    with pytest.raises(PlanInvalid) as caught:
        check_plan(msgspec.convert(raw, Plan, str_keys=True))
    assert "rank 0 | " in str(caught.value)
    assert ">" in str(caught.value)
