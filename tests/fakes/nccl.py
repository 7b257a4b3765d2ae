"""A fake of NCCL's messages between the ranks of :class:`tests.fakes.cuda.FakeCuda`.

A group is a process group: it has, for each pair of ranks, one stream of its own on either device, as PyTorch has without a device
bound to the group. A post waits for the stream that it is made on, and the stream of the pair for the posts before it. ``wait`` makes
the current stream wait, never the host. Nothing holds a posted tensor's memory but the caller (PyTorch holds more), and what is
received stands in the buffer only once a stream waits: until then it is full of NaN.

Checked: posts come in one order on both ends and fit in shape and type; nothing is awaited that was not posted; at the end nothing is
left that was not posted on the other end, or not waited for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_dip.runtime.groups import PipelineGroups
from tests.fakes.cuda import FakeCuda, Stream, Violation, current_device

PATIENCE_S = 20.0


@dataclass
class _Channel:
    """Messages of one directed pair in one group."""

    sent: list[torch.Tensor] = field(default_factory=list)
    received: list[torch.Tensor | None] = field(default_factory=list)
    """Buffers, None once the message is in; both in the order of posts."""


class FakeGroup:
    """A process group."""

    def __init__(self, world: FakeNccl, name: str) -> None:
        self.world = world
        self.name = name
        self.channels: dict[tuple[int, int], _Channel] = {}
        self.streams: dict[tuple[int, int, int], Stream] = {}
        """(rank, lower rank of the pair, higher rank) -> the pair's stream on that rank."""

    def channel(self, sender: int, receiver: int) -> _Channel:
        return self.channels.setdefault((sender, receiver), _Channel())

    def stream(self, rank: int, peer: int) -> Stream:
        key = (rank, min(rank, peer), max(rank, peer))
        if key not in self.streams:
            self.streams[key] = Stream()
        return self.streams[key]


class FakeWork:
    """dist.Work of a post."""

    def __init__(self, group: FakeGroup, sender: int, receiver: int, number: int, is_send: bool, entry: int, stream: Stream) -> None:
        self._group = group
        self._pair = (sender, receiver)
        self._number = number
        self._is_send = is_send
        self._entry = entry
        self._clock = dict(stream.clock)
        self._arrived = False
        self.waited = False

    def wait(self, timeout: Any = None) -> bool:
        if timeout is not None:
            raise Violation("NCCL's wait with a time limit holds the host up")
        if not self._is_send:
            self._arrive()
        device = current_device()
        device.wait(device.current, self._clock, self._entry, f"{'send to' if self._is_send else 'receive from'} {self._peer}")
        self.waited = True
        return True

    def is_completed(self) -> bool:
        """Whether both ends are posted; the host then knows that the message is over."""
        channel = self._group.channel(*self._pair)
        other = channel.received if self._is_send else channel.sent
        with self._group.world.changed:
            over = len(other) > self._number and self._group.world.keeps_up
        if over:
            if not self._is_send:
                self._arrive()
            device = current_device()
            for stream, tick in self._clock.items():
                device.host[stream] = max(device.host.get(stream, 0), tick)
        return over

    @property
    def _peer(self) -> int:
        return self._pair[1] if self._is_send else self._pair[0]

    def _arrive(self) -> None:
        """Puts the message into the buffer. The host waits until the other rank's host has posted, since the fake computes at once."""
        if self._arrived:
            return
        channel, world = self._group.channel(*self._pair), self._group.world
        with world.changed:
            there = world.changed.wait_for(lambda: len(channel.sent) > self._number or world.cuda.failure is not None, PATIENCE_S)
            if not there or len(channel.sent) <= self._number:
                raise Violation(f"message {self._number} from rank {self._pair[0]} to {self._pair[1]} is awaited and never sent")
            message = channel.sent[self._number]
        buffer, channel.received[self._number] = channel.received[self._number], None
        assert buffer is not None
        if message.shape != buffer.shape or message.dtype != buffer.dtype:
            raise Violation(
                f"message {self._number} from rank {self._pair[0]} to {self._pair[1]} is {tuple(message.shape)} {message.dtype}, "
                f"its receive {tuple(buffer.shape)} {buffer.dtype}"
            )
        with _quietly():
            buffer.detach().copy_(message)
        self._arrived = True


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    device = current_device()
    device.quiet = True
    try:
        with torch.no_grad():
            yield
    finally:
        device.quiet = False


class FakeNccl:
    """torch.distributed's messages within ``with``.

    Args:
        keeps_up: whether the devices are as far as their hosts, so that a message with both ends posted is over when a host asks;
            False: the hosts are far ahead, and nothing is ever over.
    """

    def __init__(self, cuda: FakeCuda, *, keeps_up: bool = True) -> None:
        self.cuda = cuda
        self.keeps_up = keeps_up
        self.changed = threading.Condition()
        self.groups: list[FakeGroup] = []
        self.works: list[FakeWork] = []
        self.posts: list[list[str]] = [[] for _ in cuda.devices]
        """Rank -> its posts in order, as text."""
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> FakeNccl:
        real = dist.get_backend

        def get_backend(group: Any = None) -> str:
            return "nccl" if isinstance(group, FakeGroup) else real(group)

        self._stack.enter_context(mock.patch.object(dist, "isend", self._isend))
        self._stack.enter_context(mock.patch.object(dist, "irecv", self._irecv))
        self._stack.enter_context(mock.patch.object(dist, "get_backend", get_backend))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def new_group(self, name: str) -> FakeGroup:
        self.groups.append(FakeGroup(self, name))
        return self.groups[-1]

    def pipeline_groups(self, rank: int, up: FakeGroup, down: FakeGroup) -> PipelineGroups:
        """The groups of one pipeline over all devices; ``control`` and ``peers`` are of no use."""
        count = len(self.cuda.devices)
        nothing: Any = None
        return PipelineGroups(
            ranks=tuple(range(count)), rank=rank, up=up, down=down, control=nothing, control_ranks=tuple(range(count)), peers=None,  # type: ignore[arg-type]
            replica_of={}, timeout_s=30.0,
        )

    def _isend(self, tensor: torch.Tensor, dst: int, group: Any = None, tag: int = 0) -> FakeWork:
        return self._post(tensor, dst, group, is_send=True)

    def _irecv(self, tensor: torch.Tensor, src: int, group: Any = None, tag: int = 0) -> FakeWork:
        return self._post(tensor, src, group, is_send=False)

    def _post(self, tensor: torch.Tensor, peer: int, group: FakeGroup, *, is_send: bool) -> FakeWork:
        device = current_device()
        if not device.holds(tensor):
            raise Violation("NCCL was given a tensor of the host")
        if not tensor.is_contiguous():
            raise Violation("NCCL was given a tensor that is not contiguous")
        sender, receiver = (device.rank, peer) if is_send else (peer, device.rank)
        stream, channel = group.stream(device.rank, peer), group.channel(sender, receiver)
        device.wait(stream, device.current.clock, device.current.last_entry, "the stream of the post")
        with self.changed:
            number = len(channel.sent if is_send else channel.received)
            message = ((group.name, sender, receiver), number)
            reads, writes = ([tensor], []) if is_send else ([], [tensor])
            entry = device.launch(f"{'send to' if is_send else 'receive from'} {peer}", reads, writes, stream, "send" if is_send else "recv", message)
            with _quietly():
                if is_send:
                    channel.sent.append(tensor.detach().clone())
                else:
                    if tensor.is_floating_point():
                        tensor.detach().fill_(float("nan"))
                    channel.received.append(tensor)
            self.posts[device.rank].append(f"{'S' if is_send else 'R'}{peer}.{number}")
            work = FakeWork(group, sender, receiver, number, is_send, entry.index, stream)
            self.works.append(work)
            self.changed.notify_all()
        return work

    def check_over(self) -> None:
        """At the end of a run: every post has its other end and was waited for."""
        for group in self.groups:
            for (sender, receiver), channel in group.channels.items():
                if len(channel.sent) != len(channel.received):
                    raise Violation(f"rank {sender} sent {len(channel.sent)} messages to {receiver}, which posted {len(channel.received)} receives")
        left = [work for work in self.works if not work.waited]
        if left:
            raise Violation(f"{len(left)} posts were never waited for")
