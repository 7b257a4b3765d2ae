"""Asynchronous messages between pipeline ranks in planned shapes.

All messages of a directed pair travel through one first-in-first-out channel with one transport tag, as NCCL knows no other; the plan
posts receives in the sender's order (see :mod:`megatron_dip.program.lower`), so nothing depends on tags. NCCL moves data on its own
streams; receives are posted from a side stream as well, since a post waits for the stream it is made on, and a receive need not wait
for the computing before it. Gloo has no CUDA messages: there CUDA tensors are copied through the host (for tests).

The CUDA paths follow PyTorch's documented stream rules; they have not been run.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.interface import PayloadSpec

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


class PointToPoint:
    """Messages of one pipeline rank. Making it is collective over the pipeline group, of at least two ranks."""

    def __init__(self, groups: PipelineGroups, device: torch.device) -> None:
        self.groups = groups
        self.device = device
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
                self.wait_recv(self.irecv(PayloadSpec((1,), torch.float32), sender))

    def isend(self, tensor: torch.Tensor, peer: int) -> Post:
        """Posts the send of a contiguous tensor to pipeline rank ``peer``; the tensor must not change until the send is waited for."""
        if self._through_host:
            tensor = tensor.cpu()
        group = self.groups.up if peer > self.groups.rank else self.groups.down
        work = None
        if tensor.numel():
            try:
                work = dist.isend(tensor, self.groups.ranks[peer], group=group, tag=TRANSPORT_TAG)
            except RuntimeError as error:
                raise self._peer_error("sending to", peer, error) from error
        return Post(tensor, work, peer)

    def irecv(self, spec: PayloadSpec, peer: int) -> Post:
        """Posts the receive of the next message from pipeline rank ``peer``."""
        group = self.groups.up if peer < self.groups.rank else self.groups.down
        device = torch.device("cpu") if self._through_host else self.device
        work = None
        with torch.cuda.stream(self._receive_stream):
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device=device)
            if tensor.numel():
                try:
                    work = dist.irecv(tensor, self.groups.ranks[peer], group=group, tag=TRANSPORT_TAG)
                except RuntimeError as error:
                    raise self._peer_error("receiving from", peer, error) from error
        return Post(tensor, work, peer)

    def wait_send(self, post: Post) -> None:
        """Returns when the buffer may be used again (on the current stream)."""
        self._wait(post, "sending to")

    def wait_recv(self, post: Post) -> torch.Tensor:
        """Returns the message, ready on the current stream."""
        self._wait(post, "receiving from")
        if self._through_host:
            return post.tensor.to(self.device)
        if self._receive_stream is not None:
            # The buffer belongs to the side stream's memory pool but is used, and freed, on this one.
            post.tensor.record_stream(torch.cuda.current_stream())
        return post.tensor

    def _wait(self, post: Post, doing: str) -> None:
        if post.work is None:
            return
        try:
            if self._on_host:
                post.work.wait(self._timeout)
            else:
                post.work.wait()
        except RuntimeError as error:
            raise self._peer_error(doing, post.peer, error) from error

    def _peer_error(self, doing: str, peer: int, error: RuntimeError) -> PeerError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return PeerError(
            f"pipeline rank {self.groups.rank} gave up {doing} pipeline rank {peer} (global rank {self.groups.ranks[peer]}), "
            f"time limit {self.groups.timeout_s:g} s: {reason}"
        )
