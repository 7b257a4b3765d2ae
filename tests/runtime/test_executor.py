"""The executor on one rank: what it calls when, what it says when a stage fails, and that nothing is left behind."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_dip.runtime.compute import AutogradCompute
from megatron_dip.runtime.executor import Executor, PlanLinks
from megatron_dip.runtime.timing import HostTimer
from megatron_dip.spec.plan import Plan, PlanStage
from tests.program.graphs import build_graph, random_order
from tests.program.plans import make_plan
from tests.runtime.toy import ToyStagedModel, loss_of, whole_run

CPU = torch.device("cpu")


def _plan(seed: int = 0) -> Plan:
    graph = build_graph(1, [1, 2], [[2, 1], [0, 1]])
    return make_plan(graph, random_order(graph, seed))


def _loss(stage: PlanStage, result: torch.Tensor) -> torch.Tensor:
    return loss_of(result)


def test_links_say_who_takes_what_and_who_is_owed_a_gradient() -> None:
    plan = _plan()
    links = PlanLinks(plan)
    for stage in plan.stages:
        if stage.kind != "fw":
            continue
        of = links.of(stage)
        assert of.backward is not None
        assert (of.backward.module, of.backward.vp_stage, of.backward.microbatch) == (stage.module, stage.vp_stage, stage.microbatch)
        assert [consumer.id for consumer in of.consumers] == sorted(
            other.id for other in plan.stages if other.kind == "fw" and stage.id in [dep.stage for dep in other.deps]
        )
        assert sorted(of.grad_inputs) == sorted(dep.stage for dep in stage.deps)


def test_what_is_to_follow_a_stage_is_called_right_behind_it() -> None:
    plan = _plan()
    timer = HostTimer()
    seen: list[tuple[str, int]] = []
    after = {
        plan.order[0][2]: [lambda: seen.append(("third", len(timer.records()))), lambda: seen.append(("again", len(timer.records())))],
        plan.order[0][-1]: [lambda: seen.append(("last", len(timer.records())))],
    }
    Executor(0, None, CPU).run(PlanLinks(plan), AutogradCompute(ToyStagedModel(plan, 0), _loss), timer, after)
    assert seen == [("third", 3), ("again", 3), ("last", len(plan.stages))]


def test_times_are_measured_in_order_and_without_overlap() -> None:
    plan = _plan()
    timer = HostTimer()
    Executor(0, None, CPU).run(PlanLinks(plan), AutogradCompute(ToyStagedModel(plan, 0), _loss), timer)
    records = timer.records()
    assert [record.stage for record in records] == plan.order[0]
    assert all(record.start_ns <= record.end_ns for record in records)
    assert all(before.end_ns <= after.start_ns for before, after in itertools.pairwise(records))


def test_outputs_without_their_memory_give_the_same_gradients() -> None:
    plan = _plan()
    model = ToyStagedModel(plan, 0)
    Executor(0, None, CPU).run(PlanLinks(plan), AutogradCompute(model, _loss, free_outputs=True), HostTimer())
    _, grads = whole_run(plan)
    for (module, vp_stage), chunk in model.chunks.items():
        for parameter, expected in zip(chunk.parameters(), grads[module, vp_stage, 0], strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("free_outputs", [False, True])
def test_a_sent_output_keeps_its_memory_only_where_outputs_are_not_freed(free_outputs: bool) -> None:
    class Summed(ToyStagedModel):
        """Its chunks end in a sum, which needs nothing of its output for its backward."""

        def forward(self, stage, inputs, consumers):  # type: ignore[no-untyped-def]
            output = super().forward(stage, inputs, consumers)
            output.payloads = {consumer: payload + 0 for consumer, payload in output.payloads.items()}
            return output

    plan = _plan()
    links = PlanLinks(plan)
    first = next(stage for stage in plan.stages if stage.kind == "fw" and not stage.deps)
    compute = AutogradCompute(Summed(plan, 0), _loss, free_outputs=free_outputs)
    payloads = compute.forward(links.of(first), {})
    memory = [StorageWeakRef(payload.untyped_storage()) for payload in payloads.values()]
    assert memory
    assert not any(one.expired() for one in memory)
    payloads.clear()
    assert [one.expired() for one in memory] == [free_outputs] * len(memory)


def test_an_error_in_a_stage_names_the_stage() -> None:
    plan = _plan()
    failing = next(stage for stage in plan.stages if stage.module == "backbone" and stage.kind == "fw" and stage.vp_stage == 1)

    class Failing(ToyStagedModel):
        def forward(self, stage, inputs, consumers):  # type: ignore[no-untyped-def]
            if stage.id == failing.id:
                raise RuntimeError("out of memory")
            return super().forward(stage, inputs, consumers)

    with pytest.raises(RuntimeError, match="out of memory") as caught:
        Executor(0, None, CPU).run(PlanLinks(plan), AutogradCompute(Failing(plan, 0), _loss), HostTimer())
    assert caught.value.__notes__ == [
        f"in action F{failing.id} of pipeline rank 0 (fw backbone chunk 1 rank 0 microbatch {failing.microbatch}.0)"
    ]


def test_a_program_that_leaves_something_behind_is_caught() -> None:
    plan = _plan()
    cut = msgspec.structs.replace(plan, actions=[[action for action in plan.actions[0] if action.stage != plan.order[0][-1]]])
    with pytest.raises(AssertionError, match=r"never taken|ran forward but not backward"):
        Executor(0, None, CPU).run(PlanLinks(cut), AutogradCompute(ToyStagedModel(plan, 0), _loss), HostTimer())
