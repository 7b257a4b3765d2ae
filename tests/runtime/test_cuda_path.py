"""The runtime's CUDA branches under the recording fake (:mod:`tests.fakes`): right numbers, and nothing that rests on luck of timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_dip.runtime.compute import AutogradCompute
from megatron_dip.runtime.executor import Executor, PlanLinks
from megatron_dip.runtime.p2p import PointToPoint
from megatron_dip.runtime.timing import CudaTimer, stage_timer
from megatron_dip.spec.plan import Plan, PlanStage
from tests.fakes.cuda import FakeCuda, current_device
from tests.fakes.nccl import FakeNccl
from tests.program.graphs import build_graph, random_order
from tests.program.plans import make_plan
from tests.runtime.toy import ToyStagedModel, loss_of, whole_run


@dataclass
class _Run:
    cuda: FakeCuda
    nccl: FakeNccl
    grads: dict[Any, list[torch.Tensor]]


def _run(plan: Plan, *, keeps_up: bool = True, free_outputs: bool = False, iterations: int = 1) -> _Run:
    """A plan on fake devices; gradients are those of one iteration."""
    with FakeCuda(plan.ranks) as cuda, FakeNccl(cuda, keeps_up=keeps_up) as nccl:
        up, down = nccl.new_group("up"), nccl.new_group("down")

        def host(rank: int) -> dict[Any, list[torch.Tensor]]:
            device = torch.device("cuda", rank)
            p2p = PointToPoint(nccl.pipeline_groups(rank, up, down), device) if plan.ranks > 1 else None
            executor = Executor(rank, p2p, device)
            model = ToyStagedModel(plan, rank, device)

            def loss_function(stage: PlanStage, result: torch.Tensor) -> torch.Tensor:
                return loss_of(result)

            for _ in range(iterations):
                for chunk in model.chunks.values():
                    chunk.zero_grad()
                timer = stage_timer(device)
                syncs = current_device().host_syncs
                executor.run(PlanLinks(plan), AutogradCompute(model, loss_function, free_outputs=free_outputs), timer)
                copies = sum(stage.kind == "fw" and stage.vp_stage == 0 and stage.rank == 0 == rank for stage in plan.stages)
                assert current_device().host_syncs == syncs + copies  # the toy's own pageable copies; the runtime itself never waits
                assert isinstance(timer, CudaTimer)
                assert [record.stage for record in timer.records()] == plan.order[rank]
            torch.cuda.synchronize()
            return {
                (module, k, rank): [torch.zeros_like(p).cpu() if p.grad is None else p.grad.cpu() for p in chunk.parameters()]
                for (module, k), chunk in model.chunks.items()
            }

        by_rank = cuda.run(host)
        nccl.check_over()
    return _Run(cuda, nccl, {name: tensors for grads in by_rank for name, tensors in grads.items()})


def _plan(num_ranks: int, seed: int = 0, **options: Any) -> Plan:
    graph = build_graph(num_ranks, [1 + seed % 2, 1, 1 + seed % 3], [[2, 1, 1], [0, 0, 1], [3, 2, 1], [0, 1, 1]], **options)
    return make_plan(graph, random_order(graph, seed))


@pytest.mark.parametrize("keeps_up", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_on_devices_that_run_behind_their_hosts(num_ranks: int, seed: int, keeps_up: bool) -> None:
    plan = _plan(num_ranks, seed, split_backward=seed == 2)
    run = _run(plan, keeps_up=keeps_up, free_outputs=seed == 1, iterations=2)
    _, expected = whole_run(plan)
    assert run.grads.keys() == expected.keys()
    for name, tensors in expected.items():
        for ours, theirs in zip(run.grads[name], tensors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
