"""Asynchronous messages between pipeline ranks in planned shapes.

All messages of a directed pair travel through one first-in-first-out channel with one transport tag, as NCCL knows no other; the plan
posts receives in the sender's order (see :mod:`megatron_dip.program.lower`), so nothing depends on tags. Gloo has no CUDA messages:
there CUDA tensors are copied through the host (for tests).

On CUDA, over NCCL:

* NCCL moves data on streams of its own, one for each channel, and a post waits for the stream that it is made on. A receive is posted
  from a side stream, since it need not wait for the computing before it; what it must wait for is the former owner of its buffer.
  :meth:`PointToPoint.buffer` takes the buffer from the computing stream's pool and notes how far that stream was. Taken ahead of the
  stage that runs while the message travels, the receive starts with that stage. One pool serves messages and computing, and a buffer
  goes back to it in the order of the computing stream.
* Waits hold up the computing stream, never the host, so a time limit cannot be kept here. A peer that died ends the run by NCCL's
  watchdog (after the process group's time limit, torch's abort of the process), not by :class:`PeerError`, which is for what NCCL says
  when a message is posted, and for gloo.
* :meth:`PointToPoint.wait_send` makes the computing stream wait for the receiver. Keeping the tensor until the host sees that the send
  is over would not: but hosts run far ahead of their devices, so nearly everything sent would still be kept, which no plan counts
  (docs/results/send_waits.md).

These paths run under the fake of ``tests/fakes``; on a GPU they have not been run.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.runtime.memory_meter import MemoryMeter

TRANSPORT_TAG = 0


class PeerError(RuntimeError):
    """A message did not come or could not be handed over: the peer died, hangs, or runs something else."""


@dataclass(slots=True)
class Post:
    """A posted send or receive. Holds its buffer until it is waited for."""

    tensor: torch.Tensor
    work: dist.Work | None
    """None: an empty tensor, which does not travel."""
    peer: int


@dataclass(slots=True)
class Buffer:
    """Where a message is to be received."""

    tensor: torch.Tensor
    free: torch.cuda.Event | None
    """Set where NCCL receives: from there on nobody else uses the memory."""


class PointToPoint:
    """Messages of one pipeline rank. Making it is collective over the pipeline group, of at least two ranks."""

    def __init__(self, groups: PipelineGroups, device: torch.device) -> None:
        self.groups = groups
        self.device = device
        self.meter: MemoryMeter | None = None
        """Told what messages are received into."""
        self._timeout = datetime.timedelta(seconds=groups.timeout_s)
        backend = dist.get_backend(groups.up) if groups.up is not None else "gloo"
        self._through_host = device.type == "cuda" and backend == "gloo"
        self._on_host = backend == "gloo"
        self._receive_stream = torch.cuda.Stream(device) if device.type == "cuda" and not self._on_host else None
        self._connect()

    def _connect(self) -> None:
        """Sends one message along every channel of the ring.

        NCCL sets a pair's communicator up at its first message and holds both ranks until then. In the order of a plan these first
        messages could wait for each other in a circle; here all ranks go through the channels in one order.
        """
        count = self.groups.num_ranks
        channels = sorted({channel for rank in range(count) for channel in ((rank, (rank + 1) % count), ((rank + 1) % count, rank))})
        for sender, receiver in channels:
            if self.groups.rank == sender:
                self.wait_send(self.isend(torch.zeros(1, device=self.device), receiver))
            elif self.groups.rank == receiver:
                self.wait_recv(self.irecv(self.buffer(PayloadSpec((1,), torch.float32)), sender))

    def isend(self, tensor: torch.Tensor, peer: int) -> Post:
        """Posts the send of a contiguous tensor to pipeline rank ``peer``; the tensor must not change until the send is waited for."""
        if self._through_host:
            tensor = tensor.cpu()
        group = self.groups.up if peer > self.groups.rank else self.groups.down
        work = None
        if tensor.numel():
            with self._naming_the_peer("sending to", peer):
                work = dist.isend(tensor, self.groups.ranks[peer], group=group, tag=TRANSPORT_TAG)
        return Post(tensor, work, peer)

    def buffer(self, spec: PayloadSpec) -> Buffer:
        """Memory for a message, from the current stream's pool."""
        device = torch.device("cpu") if self._through_host else self.device
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
        if self.meter is not None:
            self.meter.add(tensor)
        return Buffer(tensor, None if self._receive_stream is None else torch.cuda.current_stream().record_event())

    def irecv(self, buffer: Buffer, peer: int) -> Post:
        """Posts the receive of the next message from pipeline rank ``peer`` into a buffer that is used once."""
        group = self.groups.up if peer < self.groups.rank else self.groups.down
        work = None
        if buffer.tensor.numel():
            if self._receive_stream is not None and buffer.free is not None:
                self._receive_stream.wait_event(buffer.free)
            with torch.cuda.stream(self._receive_stream), self._naming_the_peer("receiving from", peer):
                work = dist.irecv(buffer.tensor, self.groups.ranks[peer], group=group, tag=TRANSPORT_TAG)
        return Post(buffer.tensor, work, peer)

    def wait_send(self, post: Post) -> None:
        """Returns when the buffer may be used again (on the current stream)."""
        self._wait(post, "sending to")

    def wait_recv(self, post: Post) -> torch.Tensor:
        """Returns the message, ready on the current stream."""
        self._wait(post, "receiving from")
        return post.tensor.to(self.device) if self._through_host else post.tensor

    def _wait(self, post: Post, doing: str) -> None:
        if post.work is None:
            return
        with self._naming_the_peer(doing, post.peer):
            if self._on_host:
                post.work.wait(self._timeout)
            else:
                post.work.wait()

    @contextlib.contextmanager
    def _naming_the_peer(self, doing: str, peer: int) -> Iterator[None]:
        """Around a call of torch.distributed: what it raises becomes a PeerError. Running out of memory is no fault of the peer's."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise PeerError(
                f"pipeline rank {self.groups.rank} gave up {doing} pipeline rank {peer} (global rank {self.groups.ranks[peer]}), "
                f"time limit {self.groups.timeout_s:g} s: {reason}"
            ) from error
