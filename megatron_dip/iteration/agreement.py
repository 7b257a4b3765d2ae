"""What the ranks of a job agree on before they run an iteration.

In: on the planner rank a plan or the error that kept it from one; on every rank its batch, its cut, its error. Out: the same plan on all ranks of the
replica, or one error on all ranks of all replicas, so that a difference or a bad batch is one clear message and not a hang.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch
import torch.distributed as dist

from megatron_dip.planner.message import PackedPlan, plan_digest, unpack_plan
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.p2p import PeerError
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.workload import Microbatch

_PLAN, _ERROR = 0, 1
_FAILED, _MISFIT = 1, 2
_DIGEST = 32
_TEXT = 384
_ROW = 5 * _DIGEST + _TEXT
"""Bytes that each rank tells the others: digests of plan, batch and cut, health, and the start of an error's message."""


class Agreement:
    """One for each rank and run; its methods are collective over the replica's ranks, or over all ranks of the job.

    Args:
        partition: how modules are cut, equal on all ranks.
    """

    def __init__(self, groups: PipelineGroups, partition: Partition) -> None:
        self._groups = groups
        self._has_agreed = False
        self._cut_digest = sha256(msgspec.json.encode(partition))  # in its own order, in which gradients are reduced

    def share(self, planned: PackedPlan | Exception | None) -> SharedPlan:
        """The planner rank's plan, or the error that kept it from one, on every rank of the replica.

        Args:
            planned: on the planner rank; None elsewhere.

        Raises:
            PeerError: a rank of the replica is gone.
        """
        message = b""
        if isinstance(planned, Exception):
            message = bytes([_ERROR]) + _encoded(planned)
        elif planned is not None:
            message = bytes([_PLAN]) + planned.data
        if len(self._groups.control_ranks) == 1:
            return SharedPlan(error=planned) if isinstance(planned, Exception) else SharedPlan(plan=None if planned is None else planned.plan)
        try:
            message = _broadcast(message, self._groups.control_ranks[0], self._groups.control)
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        if isinstance(planned, PackedPlan):
            return SharedPlan(plan=planned.plan, digest=planned.digest)
        if message[0] == _ERROR:
            return SharedPlan(error=planned if isinstance(planned, Exception) else _decoded(message[1:]))
        try:
            return SharedPlan(plan=unpack_plan(message[1:]), digest=plan_digest(message[1:]))
        except InputError as unreadable:
            return SharedPlan(error=unreadable)

    def compare(
        self, digest: bytes, microbatches: list[Microbatch] | None, conditions: bytes, error: Exception | None, misfit: Exception | None
    ) -> None:
        """Raises on every rank when one of them has an error, or another plan, batch or cut than its planner rank.

        Args:
            misfit: what is wrong with this rank's microbatches under the plan; where ranks hold different things, that is told instead.
        """
        if len(self._groups.control_ranks) == 1:
            verdict = error or misfit
        else:
            verdict = self._verdict_of_replica(digest, microbatches, conditions, error, misfit)
        if self._groups.peers is not None:
            verdict = self._verdict_of_all(self._groups.peers, verdict)
        self._has_agreed = True
        if verdict is not None:
            # All ranks raise now. A process that ends at once would cut off those that have not read what it told them.
            for group in (self._groups.peers, self._groups.control):
                with contextlib.suppress(RuntimeError):
                    if group is not None:
                        dist.barrier(group=group)
            raise verdict

    def _verdict_of_replica(
        self, digest: bytes, microbatches: list[Microbatch] | None, conditions: bytes, error: Exception | None, misfit: Exception | None
    ) -> Exception | None:
        """This rank's error, or what the ranks of the replica do not agree on; None on all of them: nothing."""
        row = bytearray(_ROW)
        row[: len(digest)] = digest
        if microbatches is not None:
            row[_DIGEST : 2 * _DIGEST] = sha256(msgspec.json.encode(microbatches, order="sorted"))
        row[2 * _DIGEST : 3 * _DIGEST] = self._cut_digest
        row[3 * _DIGEST : 3 * _DIGEST + len(conditions)] = conditions
        if (said := error or misfit) is not None:
            row[4 * _DIGEST] = _FAILED if error is not None else _MISFIT
            text = _summary(said)
            row[5 * _DIGEST : 5 * _DIGEST + len(text)] = text
        mine = torch.frombuffer(row, dtype=torch.uint8)
        rows = [torch.empty_like(mine) for _ in self._groups.control_ranks]
        try:
            dist.all_gather(rows, mine, group=self._groups.control)
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        told = [bytes(other.numpy()) for other in rows]
        return error or self._failure(told, _FAILED) or self._difference(told) or misfit or self._failure(told, _MISFIT)

    def _verdict_of_all(self, peers: dist.ProcessGroup, verdict: Exception | None) -> Exception | None:
        """``verdict`` of this rank's replica, or else that of another replica that cannot go on."""
        failed = torch.tensor([0 if verdict is None else dist.get_rank(peers) + 1])
        try:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=peers)
            if not failed:
                return None
            source = dist.get_global_rank(peers, int(failed) - 1)
            text = torch.zeros(_TEXT, dtype=torch.uint8)
            if verdict is not None:
                summary = _summary(verdict)
                text[: len(summary)] = torch.frombuffer(bytearray(summary), dtype=torch.uint8)
            dist.broadcast(text, source, group=peers)
        except RuntimeError as failure:
            return verdict or PeerError(
                f"global rank {dist.get_rank()} lost its peers in other replicas while agreeing to run an iteration, "
                f"time limit {self._groups.timeout_s:g} s: {first_line(failure)}"
            )
        message = bytes(text.numpy()).rstrip(b"\0").decode(errors="replace")
        return verdict or PeerError(
            f"replica {self._groups.replica_of[source]} could not prepare the iteration, so no replica runs it: rank {source}: {message}"
        )

    def _failure(self, told: Sequence[bytes], kind: int) -> PeerError | None:
        for rank, other in zip(self._groups.control_ranks, told, strict=True):
            if other[4 * _DIGEST] == kind:
                message = other[5 * _DIGEST :].rstrip(b"\0").decode(errors="replace")
                return PeerError(f"rank {rank} could not prepare the iteration, so no rank runs it: {message}")
        return None

    def _difference(self, told: Sequence[bytes]) -> InputError | None:
        """What ranks hold differently, by the rows that they told each other."""
        reference = told[0]
        fields = (
            ("plan", 0, "the ranks hold different plans for this iteration", "run the same version of megatron_dip on all ranks"),
            ("data_iterator", 1, "the ranks of one replica got different batches", "give every rank of a replica the same data in the same order"),
            ("partition", 2, "the ranks cut the model differently", "give all ranks the same chunks and sub-microbatch sizes"),
            ("forward_step", 3, "gives the model masks or bounds of packed sequences on some pipeline ranks only, so that layers would attend "
             "differently", "use at most two pipeline ranks where the script reads data on the first and last one, or read it on all"),
        )
        for field, index, problem, remedy in fields:
            part = slice(index * _DIGEST, (index + 1) * _DIGEST)
            differing = [
                rank
                for rank, other in zip(self._groups.control_ranks, told, strict=True)
                # A rank that was given no data (Megatron's tensor ranks beyond the first) cannot compare its batch.
                if other[part] != reference[part] and any(other[part])
            ]
            if differing:
                return InputError(field, {"ranks": differing, "differ from rank": self._groups.control_ranks[0]}, problem, remedy)
        return None

    def _lost(self, failure: RuntimeError) -> PeerError:
        return PeerError(
            f"pipeline rank {self._groups.rank} (global rank {dist.get_rank()}) lost another rank of its replica while agreeing on a plan, "
            f"time limit {self._groups.timeout_s:g} s: {first_line(failure)}"
            + ("" if self._has_agreed else ". The first plan of an installation compiles the planner's kernels, which can take a minute: give more time")
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPlan:
    """What the planner rank told its replica."""

    plan: Plan | None = None
    digest: bytes = b""
    """Of the plan as it was sent; empty where there is nobody to send to."""
    error: Exception | None = None


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class _AsSaid:
    """A value of which another rank has told the text alone."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _encoded(error: Exception) -> bytes:
    """As text: bytes that came from another process are not to make objects of any class."""
    if isinstance(error, InputError):
        return msgspec.json.encode([error.field, repr(error.value), error.problem, error.remedy])
    return msgspec.json.encode([f"{type(error).__name__}: {error}"])


def _decoded(data: bytes) -> Exception:
    texts = msgspec.json.decode(data, type=list[str])
    if len(texts) == 1:
        return PeerError(f"the planner rank failed: {texts[0]}")
    field, value, problem, remedy = texts
    return InputError(field, _AsSaid(value), problem, remedy)


def first_line(failure: RuntimeError) -> str:
    return next(iter(str(failure).strip().splitlines()), type(failure).__name__)


def _summary(error: Exception) -> bytes:
    return f"{type(error).__name__}: {error}".encode()[:_TEXT]


def _broadcast(message: bytes, source: int, group: dist.ProcessGroup) -> bytes:
    """``message`` of global rank ``source`` on every rank of the group."""
    length = torch.tensor([len(message)], dtype=torch.int64)
    dist.broadcast(length, source, group=group)
    data = torch.frombuffer(bytearray(message), dtype=torch.uint8) if dist.get_rank() == source else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    return bytes(data.numpy())
