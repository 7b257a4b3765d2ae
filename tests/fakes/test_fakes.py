"""The fakes see each of the faults that they are there for."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from tests.fakes.cuda import FakeCuda, Violation
from tests.fakes.hardware_queue import Hang, replay
from tests.fakes.nccl import FakeNccl

CUDA = torch.device("cuda", 0)


def test_tensors_of_the_device_stay_on_it() -> None:
    with FakeCuda(1) as cuda, cuda.on(0):
        x = torch.ones(3, device=CUDA)
        assert x.device == CUDA
        assert (x * 2).is_cuda
        assert torch.empty_like(x).device == CUDA
        assert torch.ones(3).to(CUDA).device == CUDA
        assert not x.cpu().is_cuda
        layer = torch.nn.Linear(3, 3).to(CUDA)
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.is_cuda
        with pytest.raises(Violation, match="mixes"):
            x + torch.ones(3)


def test_a_read_that_waits_for_nothing_is_seen() -> None:
    with FakeCuda(1) as cuda, cuda.on(0):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x = torch.ones(3, device=CUDA)
        with pytest.raises(Violation, match="before"):
            x.sum()
        torch.cuda.current_stream().wait_stream(side)
        x.sum()
        with torch.cuda.stream(side), pytest.raises(Violation, match="may still read"):
            x.add_(1)


def test_an_event_says_no_more_than_what_was_launched_before_it() -> None:
    with FakeCuda(1) as cuda, cuda.on(0):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            x = torch.zeros(3, device=CUDA)
            event = torch.cuda.Event()
            event.record()
            x.add_(1)
        torch.cuda.current_stream().wait_event(event)
        with pytest.raises(Violation, match="before"):
            x.sum()
        torch.cuda.synchronize()
        x.sum()


@pytest.mark.parametrize("remedy", ["none", "record_stream", "wait"])
def test_memory_that_another_stream_may_use_must_not_be_freed(remedy: str) -> None:
    with FakeCuda(1) as cuda, cuda.on(0) as device:
        side = torch.cuda.Stream()
        x = torch.ones(1000, device=CUDA)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x * 2
        if remedy == "record_stream":
            x.record_stream(side)
        if remedy == "wait":
            torch.cuda.current_stream().wait_stream(side)
        del x
        if remedy == "none":
            with pytest.raises(Violation, match="goes back to the pool"):
                device.sweep()
        else:
            device.sweep()
            assert (device.allocated[0] == 0) == (remedy == "wait")  # what was recorded comes back when the stream is there
            torch.cuda.synchronize()
            assert device.allocated[0] == 0
        assert y.is_cuda


def test_memory_of_another_pool_may_have_a_former_owner() -> None:
    with FakeCuda(1) as cuda, cuda.on(0):
        torch.ones(3, device=CUDA)
        x = torch.empty(3, device=CUDA)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side), pytest.raises(Violation, match="another owner"):
            x.zero_()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.zero_()


def test_pinned_memory_must_not_be_written_while_it_is_copied() -> None:
    with FakeCuda(1) as cuda, cuda.on(0) as device:
        host = torch.ones(3).pin_memory()
        before = device.host_syncs
        x = host.to(CUDA, non_blocking=True)
        assert device.host_syncs == before
        with pytest.raises(Violation, match="pinned"):
            host.zero_()
        torch.cuda.synchronize()
        host.zero_()
        torch.ones(3).to(CUDA, non_blocking=True)
        assert device.host_syncs == before + 2  # pageable memory holds the host up
        assert x.tolist() == [1, 1, 1]


def _exchange(cuda: FakeCuda, nccl: FakeNccl, program: list[list[str]]) -> None:
    """Runs posts such as ``s1`` (send to rank 1), ``r0`` (receive from 0), ``c`` (compute) and ``w`` (wait for all) on each rank."""
    up, down = nccl.new_group("up"), nccl.new_group("down")

    def host(rank: int) -> None:
        device = torch.device("cuda", rank)
        posted, buffers = [], []
        value = torch.ones(4, device=device)
        side = torch.cuda.Stream()
        for step in program[rank]:
            if step == "c":
                value = value * 2
            elif step == "w":
                for work in posted:
                    work.wait()
            elif step[0] == "s":
                posted.append(dist.isend(value, int(step[1:]), group=up if int(step[1:]) > rank else down))
                buffers.append(value)
            else:
                with torch.cuda.stream(side):
                    buffers.append(torch.empty(4, device=device))
                    posted.append(dist.irecv(buffers[-1], int(step[1:]), group=up if int(step[1:]) < rank else down))
        torch.cuda.synchronize()

    cuda.run(host)


def test_messages_arrive_and_are_read_only_behind_a_wait() -> None:
    with FakeCuda(2) as cuda, FakeNccl(cuda) as nccl:
        group = nccl.new_group("up")

        def host(rank: int) -> list[float]:
            x = torch.full((2,), 7.0, device=torch.device("cuda", rank))
            if rank == 0:
                work = dist.isend(x, 1, group=group)
                with pytest.raises(Violation, match="may still read"):
                    x.zero_()
                work.wait()
                x.zero_()
                return []
            work = dist.irecv(x, 0, group=group)
            with pytest.raises(Violation, match="reads"):
                x.sum()
            work.wait()
            return x.tolist()

        assert cuda.run(host)[1] == [7.0, 7.0]
        nccl.check_over()


@pytest.mark.parametrize("keeps_up", [True, False])
def test_a_host_that_sees_a_send_over_may_write_what_it_sent(keeps_up: bool) -> None:
    with FakeCuda(2) as cuda, FakeNccl(cuda, keeps_up=keeps_up) as nccl:
        group = nccl.new_group("up")
        posted = threading.Event()

        def host(rank: int) -> None:
            x = torch.ones(2, device=torch.device("cuda", rank))
            if rank == 1:
                work = dist.irecv(x, 0, group=group)
                posted.set()
                work.wait()
                return
            work = dist.isend(x, 1, group=group)
            assert posted.wait(10.0)
            assert work.is_completed() == keeps_up
            if not keeps_up:  # the devices are far behind
                with pytest.raises(Violation, match="may still read"):
                    x.zero_()
                work.wait()
            x.zero_()

        cuda.run(host)


def test_posts_without_their_other_end_or_wait_are_seen() -> None:
    for program, said in ([["s1", "w"], []], "posted 0 receives"), ([["s1", "w"], ["r0"]], "never waited"):
        with FakeCuda(2) as cuda, FakeNccl(cuda) as nccl:
            _exchange(cuda, nccl, program)
            with pytest.raises(Violation, match=said):
                nccl.check_over()


def test_one_hardware_queue_hangs_where_more_do_not() -> None:
    """Rank 1 posts two receives ahead, as far as its channel goes: the second waits for the first, and holds up what the first waits for."""
    program = [["r1", "w", "s1", "s1", "w"], ["r0", "r0", "c", "s0", "w"]]
    with FakeCuda(2) as cuda, FakeNccl(cuda) as nccl:
        _exchange(cuda, nccl, program)
        nccl.check_over()
        replay(cuda.devices)
        with pytest.raises(Hang, match="rank 1: wait"):
            replay(cuda.devices, connections=1)
    with FakeCuda(2) as cuda, FakeNccl(cuda) as nccl:
        _exchange(cuda, nccl, [program[0], ["r0", "c", "s0", "r0", "w"]])
        assert replay(cuda.devices, connections=1) >= replay(cuda.devices)
