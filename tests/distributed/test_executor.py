"""The executor on real gloo processes: losses and gradients of toy models equal the run without a pipeline, in any valid order."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from megatron_dip.runtime.compute import AutogradCompute, SleepCompute
from megatron_dip.runtime.executor import Executor, PlanLinks
from megatron_dip.runtime.groups import new_process_groups
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.runtime.p2p import PointToPoint
from megatron_dip.runtime.timing import HostTimer, clock_offset, gather_records
from megatron_dip.spec.plan import Plan, PlanStage
from tests.distributed.launcher import launch, launch_all
from tests.program.graphs import build_graph, random_graph, random_order
from tests.program.plans import make_plan
from tests.runtime.toy import ToyStagedModel, loss_of, whole_run

pytestmark = pytest.mark.distributed
CPU = torch.device("cpu")


def _run_plans(rank: int, num_ranks: int, plans: list[Plan]) -> list[tuple[dict[int, float], dict[Any, list[torch.Tensor]]]]:
    groups = new_process_groups(range(num_ranks), replica=0, timeout_s=30.0)
    executor = Executor(rank, PointToPoint(groups, CPU) if num_ranks > 1 else None, CPU)
    results = []
    for plan in plans:
        model = ToyStagedModel(plan, rank)
        losses: dict[int, float] = {}

        def loss_function(stage: PlanStage, result: torch.Tensor, losses: dict[int, float] = losses) -> torch.Tensor:
            loss = loss_of(result)
            losses[stage.microbatch] = float(loss.detach())
            return loss

        timer = HostTimer()
        executor.run(PlanLinks(plan), AutogradCompute(model, loss_function, free_outputs=bool(plan.seed)), timer)
        assert [record.stage for record in timer.records()] == plan.order[rank]
        grads = {
            (module, k, rank): [torch.zeros_like(p) if p.grad is None else p.grad for p in chunk.parameters()]
            for (module, k), chunk in model.chunks.items()
        }
        results.append((losses, grads))
    return results


def _assert_equal_to_whole_run(plans: list[Plan], num_ranks: int, frozen: list[list[str]] | None = None) -> None:
    by_rank = launch(_run_plans, num_ranks, plans)
    for index, plan in enumerate(plans):
        losses, grads = whole_run(plan, frozen=frozen[index] if frozen else ())
        got_losses = {microbatch: loss for results in by_rank for microbatch, loss in results[index][0].items()}
        assert got_losses == pytest.approx(losses, rel=1e-6)
        got = {name: tensors for results in by_rank for name, tensors in results[index][1].items()}
        assert got.keys() == grads.keys()
        for name, tensors in grads.items():
            for ours, theirs in zip(got[name], tensors, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_losses_and_gradients_equal_the_whole_run_in_random_orders(num_ranks: int) -> None:
    plans = []
    for seed in range(12):
        # Two encoders of several sub-microbatches, one microbatch without any; sends waited for from right behind their arrival to far behind it.
        graph = build_graph(num_ranks, [1 + seed % 2, 1, 1 + seed % 3], [[2, 1, 1], [0, 0, 1], [3, 2, 1], [0, 1, 1]])
        plans.append(make_plan(graph, random_order(graph, seed), send_slack=(0, 3, 8)[seed % 3], seed=seed % 2))
    split = build_graph(num_ranks, [2, 1, 2], [[2, 1, 1], [0, 0, 1], [0, 1, 1]], split_backward=True)
    plans.append(make_plan(split, random_order(split, 7)))
    _assert_equal_to_whole_run(plans, num_ranks)


def test_frozen_encoders_run_no_backward_and_get_no_gradient() -> None:
    graph = build_graph(2, [2, 1, 2], [[2, 1, 1], [1, 0, 1]], frozen=[0])
    plan = make_plan(graph, random_order(graph, 5))
    assert not any(stage.module == "encoder0" and stage.kind != "fw" for stage in plan.stages)
    _assert_equal_to_whole_run([plan], 2, frozen=[["encoder0"]])


def _run_forward_only(rank: int, num_ranks: int, plan: Plan) -> dict[int, float]:
    groups = new_process_groups(range(num_ranks), replica=0, timeout_s=30.0)
    losses: dict[int, float] = {}

    def loss_function(stage: PlanStage, result: torch.Tensor) -> None:
        assert not result.requires_grad
        losses[stage.microbatch] = float(loss_of(result))

    Executor(rank, PointToPoint(groups, CPU), CPU).run(PlanLinks(plan), AutogradCompute(ToyStagedModel(plan, rank), loss_function), HostTimer())
    return losses


def test_evaluation_runs_forward_stages_alone_and_keeps_no_graph() -> None:
    graph = build_graph(2, [1, 2], [[2, 1], [0, 1], [1, 1]], forward_only=True)
    plan = make_plan(graph, random_order(graph, 1))
    assert launch(_run_forward_only, 2, plan)[1] == pytest.approx(whole_run(plan)[0], rel=1e-6)


def _sleep_run(rank: int, num_ranks: int, plan: Plan) -> tuple[int, list[list[int]] | None]:
    groups = new_process_groups(range(num_ranks), replica=0, timeout_s=30.0)
    offset = clock_offset(groups)
    timer = HostTimer()
    Executor(rank, PointToPoint(groups, CPU), CPU).run(PlanLinks(plan), SleepCompute(), timer)
    gathered = gather_records(timer.records(), groups, offset)
    if gathered is None:
        return offset, None
    start = {record.stage: record.start_ns for row in gathered for record in row}
    end = {record.stage: record.end_ns for row in gathered for record in row}
    for stage in plan.stages:
        for dep in stage.deps:
            assert end[dep.stage] <= start[stage.id], "a stage started before its dependency ended"
    return offset, [[record.stage for record in row] for row in gathered]


def test_sleeping_stages_keep_order_and_dependencies_on_one_clock() -> None:
    graph = build_graph(4, [1, 1], [[2, 1], [1, 1]], split_backward=True)
    plan = make_plan(graph, random_order(graph, 2))
    results = launch(_sleep_run, 4, plan)
    assert [offset for offset, _ in results] == [0, 0, 0, 0]
    assert results[0][1] == plan.order
    assert [rows for _, rows in results[1:]] == [None, None, None]


def _messages(rank: int, num_ranks: int) -> list[list[float]]:
    """All ranks send three messages of different shapes and types, one of them empty, to every other; nobody waits before all are posted."""
    groups = new_process_groups(range(num_ranks), replica=0, timeout_s=20.0)
    p2p = PointToPoint(groups, CPU)
    shapes = [((2, 3), torch.float32), ((0, 4), torch.float32), ((5,), torch.bfloat16)]
    posts = {}
    sends = []
    for peer in range(num_ranks):
        if peer == rank:
            continue
        posts[peer] = [p2p.irecv(p2p.buffer(PayloadSpec(shape, dtype)), peer) for shape, dtype in shapes]
        for index, (shape, dtype) in enumerate(shapes):
            sends.append(p2p.isend(torch.full(shape, 10.0 * rank + index, dtype=dtype), peer))
    received = {peer: [p2p.wait_recv(post) for post in row] for peer, row in posts.items()}
    for post in sends:
        p2p.wait_send(post)
    assert all([(tuple(t.shape), t.dtype) for t in row] == shapes for row in received.values())
    return [[float(t.float().mean()) for t in row if t.numel()] for _, row in sorted(received.items())]


def test_messages_keep_their_order_between_all_pairs() -> None:
    for rank, received in enumerate(launch(_messages, 3)):
        assert received == [[10.0 * peer, 10.0 * peer + 2] for peer in range(3) if peer != rank]


class _Dying(SleepCompute):
    """Rank 1 vanishes at its fifth forward stage, as a killed process does."""

    def __init__(self, rank: int, how: str) -> None:
        super().__init__()
        self._left = 5 if rank == 1 else 10_000
        self._how = how

    def _sleep(self, stage: PlanStage) -> None:
        self._left -= 1
        if self._left == 0:
            if self._how == "exit":
                os._exit(9)
            if self._how == "hang":
                time.sleep(12)
                os._exit(9)
            raise ValueError("this stage cannot be computed")


def _run_dying(rank: int, num_ranks: int, plan: Plan, how: str, timeout_s: float) -> None:
    groups = new_process_groups(range(num_ranks), replica=0, timeout_s=timeout_s)
    Executor(rank, PointToPoint(groups, CPU), CPU).run(PlanLinks(plan), _Dying(rank, how), HostTimer())


@pytest.mark.parametrize("how", ["exit", "raise", "hang"])
def test_a_rank_that_stops_in_mid_iteration_ends_all_others_with_a_message(how: str) -> None:
    graph = build_graph(4, [1, 1], [[2, 1]] * 4)
    plan = make_plan(graph, random_order(graph, 0))
    results = launch_all(_run_dying, 4, plan, how, 4.0, timeout_s=60.0)
    for rank in (0, 2, 3):
        assert results[rank].exit_code == 1, results[rank]
        assert results[rank].error_message is not None
        assert f"PeerError: pipeline rank {rank} gave up" in results[rank].error_message
        assert "time limit 4 s" in results[rank].error_message
        assert results[rank].error is not None
        assert "in action" in results[rank].error
    if how == "raise":
        assert results[1].error is not None
        assert "this stage cannot be computed" in results[1].error
        assert "in action F" in results[1].error


def test_random_models_of_all_kinds_equal_the_whole_run() -> None:
    plans, frozen = [], []
    for seed in range(10):
        graph = random_graph(seed, 2)
        plan = make_plan(graph, random_order(graph, seed))
        trained = {stage.module for stage in plan.stages if stage.kind == "bw"}
        plans.append(plan)
        frozen.append([module for module in plan.chunks if module not in trained])
    _assert_equal_to_whole_run(plans, 2, frozen)
