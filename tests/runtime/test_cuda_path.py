"""The runtime's CUDA branches under the recording fake (:mod:`tests.fakes`): right numbers, and nothing that rests on luck of timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch

from megatron_dip.runtime.compute import AutogradCompute
from megatron_dip.runtime.executor import AfterStage, Executor, PlanLinks
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.runtime.p2p import PeerError, PointToPoint
from megatron_dip.runtime.timing import CudaTimer, stage_timer
from megatron_dip.spec.plan import Plan, PlanStage
from tests.fakes.cuda import Device, FakeCuda, Violation, current_device
from tests.fakes.hardware_queue import Hang, replay
from tests.fakes.nccl import FakeNccl
from tests.program.graphs import build_graph, random_graph, random_order
from tests.program.plans import make_plan
from tests.runtime.toy import ToyStagedModel, loss_of, whole_run


@dataclass
class _Run:
    cuda: FakeCuda
    nccl: FakeNccl
    grads: dict[Any, list[torch.Tensor]]


def _run(
    plan: Plan, *, free_outputs: bool = False, iterations: int = 1,
    after: Callable[[int], AfterStage] = lambda rank: {},
) -> _Run:
    """A plan on fake devices; gradients are those of one iteration."""
    with FakeCuda(plan.ranks) as cuda, FakeNccl(cuda) as nccl:
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
                executor.run(PlanLinks(plan), AutogradCompute(model, loss_function, free_outputs=free_outputs), timer, after(rank))
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


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_on_devices_that_run_behind_their_hosts(num_ranks: int, seed: int) -> None:
    plan = _plan(num_ranks, seed, split_backward=seed == 2)
    run = _run(plan, free_outputs=seed == 1, iterations=2)
    _, expected = whole_run(plan)
    assert run.grads.keys() == expected.keys()
    for name, tensors in expected.items():
        for ours, theirs in zip(run.grads[name], tensors, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def _index_of(device: Device, name: str) -> int:
    """Where the host began the action of this name."""
    return next(entry.index for entry in device.entries if entry.kind == "host" and entry.name == name)


def test_messages_and_computing_share_one_pool_of_memory() -> None:
    run = _run(_plan(3))
    for device in run.cuda.devices:
        assert set(device.peak) == {0}


def test_a_receive_waits_for_the_start_of_the_stage_before_it_and_not_for_its_end() -> None:
    plan = _plan(2)
    run = _run(plan)
    for rank, device in enumerate(run.cuda.devices):
        stage_at = 0
        checked = 0
        for entry in device.entries:
            if entry.kind == "host" and entry.name[0] in "FBW":
                stage_at = entry.index
            if entry.kind != "recv" or not stage_at:
                continue
            awaited, entries = entry.index - 1, [entry.index - 1]
            while (further := device.entries[awaited].awaited) is not None:  # the pair's stream -> the side stream -> the event's entry
                awaited = further
                entries.append(awaited)
            assert len(entries) >= 3
            assert awaited < stage_at
            checked += 1
        assert checked > 0, rank


def test_what_follows_a_stage_does_not_stand_between_it_and_its_message() -> None:
    plan = _plan(2)

    def after(rank: int) -> AfterStage:
        return {stage: [lambda stage=stage: current_device().note(f"follows {stage}")] for stage in plan.order[rank]}  # type: ignore[misc]

    run = _run(plan, after=after)
    sends = 0
    for rank, device in enumerate(run.cuda.devices):
        order = [entry for entry in device.entries if entry.kind in ("host", "send", "recv")]
        at = {entry.name: index for index, entry in enumerate(order) if entry.kind == "host"}
        compute = [index for index, entry in enumerate(order) if entry.kind == "host" and entry.name[0] in "FBW"]
        for stage in plan.order[rank]:
            follows = at[f"follows {stage}"]
            begun = max(index for index in compute if index < follows)
            assert order[begun].name[1:] == str(stage)
            behind = next((index for index in compute if index > follows), len(order))
            assert not [entry for entry in order[follows:behind] if entry.kind == "send"]
            sends += sum(entry.kind == "send" for entry in order[begun:follows])
    assert sends == len(plan.outputs)


def test_outputs_are_freed_where_megatron_asks_for_it() -> None:
    plan = _plan(2)
    used = [
        [device.peak[0] for device in _run(plan, free_outputs=free).cuda.devices] for free in (False, True)
    ]
    assert all(freed < kept for kept, freed in zip(*used, strict=True))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_devices_with_few_hardware_queues_and_with_one_for_each_stream_come_to_the_end(num_ranks: int, seed: int) -> None:
    """Another model of the queues than the planner's: of every launch that the runtime makes."""
    run = _run(_plan(num_ranks, seed, split_backward=seed == 2), iterations=2)
    assert all(replay(run.cuda.devices, connections=connections) > 0 for connections in (None, 1, 2, 3, 8))


def test_receives_ahead_of_what_their_sender_waits_for_hang_one_hardware_queue() -> None:
    plan = _plan(3)
    early = [sorted(row, key=lambda action: action.op != "irecv") for row in plan.actions]
    run = _run(msgspec.structs.replace(plan, actions=early))
    assert replay(run.cuda.devices) > 0
    with pytest.raises(Hang):
        replay(run.cuda.devices, connections=1)


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_devices_with_one_hardware_queue_come_to_the_end(num_ranks: int) -> None:
    """What the runtime really launches (buffers' events, the posts' and waits' streams), not what the plan's actions say of it."""
    for seed in range(4):
        graph = random_graph(seed, num_ranks)
        run = _run(make_plan(graph, random_order(graph, seed)))
        assert replay(run.cuda.devices, connections=1) >= replay(run.cuda.devices)


def test_both_ends_of_a_channel_post_in_one_order() -> None:
    run = _run(_plan(3))
    posts = run.nccl.posts
    for sender in range(3):
        for receiver in range(3):
            sent = [post[1:].split(".")[1] for post in posts[sender] if post.startswith(f"S{receiver}.")]
            received = [post[1:].split(".")[1] for post in posts[receiver] if post.startswith(f"R{sender}.")]
            assert sent == received


@pytest.mark.parametrize("error", [RuntimeError("NCCL communicator was aborted\nlong story"), torch.OutOfMemoryError("CUDA out of memory")])
def test_what_nccl_says_at_a_post_names_the_peer_unless_memory_ran_out(error: RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(2) as cuda, FakeNccl(cuda) as nccl:
        up, down = nccl.new_group("up"), nccl.new_group("down")

        def fail(*args: object, **kwargs: object) -> None:
            raise error

        def host(rank: int) -> None:
            p2p = PointToPoint(nccl.pipeline_groups(rank, up, down), torch.device("cuda", rank))
            monkeypatch.setattr("torch.distributed.isend", fail)
            expected = torch.OutOfMemoryError if isinstance(error, torch.OutOfMemoryError) else PeerError
            with pytest.raises(expected) as caught:
                p2p.isend(torch.ones(1, device=torch.device("cuda", rank)), 1 - rank)
            if expected is PeerError:
                assert str(caught.value) == (
                    f"pipeline rank {rank} gave up sending to pipeline rank {1 - rank} (global rank {1 - rank}), time limit 30 s: "
                    "NCCL communicator was aborted"
                )

        cuda.run(host)


def test_a_wait_over_nccl_is_the_streams_and_has_no_time_limit() -> None:
    """A dead peer is the watchdog's to find: the host does not wait (the fake raises where a time limit is given)."""
    with FakeCuda(2) as cuda, FakeNccl(cuda) as nccl:
        up, down = nccl.new_group("up"), nccl.new_group("down")

        def host(rank: int) -> None:
            device = torch.device("cuda", rank)
            p2p = PointToPoint(nccl.pipeline_groups(rank, up, down), device)
            if rank == 0:
                p2p.wait_send(p2p.isend(torch.full((2,), 3.0, device=device), 1))
                return
            syncs = current_device().host_syncs
            buffer = p2p.buffer(PayloadSpec((2,), torch.float32))
            post = p2p.irecv(buffer, 0)
            with pytest.raises(Violation, match="before"):
                buffer.tensor.sum()
            message = p2p.wait_recv(post)
            assert current_device().host_syncs == syncs
            assert message.tolist() == [3.0, 3.0]

        cuda.run(host)
        nccl.check_over()
