"""Measured start and end of every compute action, on one clock for all ranks.

Times are ns of the host's monotonic clock; on CUDA they come from events, which are put on that clock when they are read.
:func:`clock_offset` aligns hosts; :func:`gather_records` brings an iteration's records together for the Gantt chart and the profile.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_dip.runtime.groups import PipelineGroups


@dataclass(frozen=True, slots=True)
class StageRecord:
    stage: int
    """Id in the plan."""
    start_ns: int
    end_ns: int


class StageTimer(Protocol):
    def begin(self) -> None:
        """Called right before a compute action."""
        ...

    def end(self, stage: int) -> None:
        """Called right behind it."""
        ...

    def records(self) -> list[StageRecord]:
        """All records so far, in order. On CUDA it waits for the device."""
        ...


class HostTimer:
    """Times of stages that compute on the host."""

    def __init__(self) -> None:
        self._begin = 0
        self._records: list[tuple[int, int, int]] = []

    def begin(self) -> None:
        self._begin = time.perf_counter_ns()

    def end(self, stage: int) -> None:
        self._records.append((stage, self._begin, time.perf_counter_ns()))

    def records(self) -> list[StageRecord]:
        return [StageRecord(*record) for record in self._records]


class CudaTimer:
    """Times of stages on the current CUDA stream; costs two event records a stage and no synchronisation until read."""

    def __init__(self) -> None:
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero.record()
        self._begin: torch.cuda.Event | None = None
        self._records: list[tuple[int, torch.cuda.Event, torch.cuda.Event]] = []

    def begin(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._begin.record()

    def end(self, stage: int) -> None:
        end = torch.cuda.Event(enable_timing=True)
        end.record()
        assert self._begin is not None
        self._records.append((stage, self._begin, end))

    def records(self) -> list[StageRecord]:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        torch.cuda.synchronize()
        zero_ns = time.perf_counter_ns() - round(self._zero.elapsed_time(now) * 1e6)

        def at(event: torch.cuda.Event) -> int:
            return zero_ns + round(self._zero.elapsed_time(event) * 1e6)

        return [StageRecord(stage, at(begin), at(end)) for stage, begin, end in self._records]


def stage_timer(device: torch.device) -> StageTimer:
    """A timer for one iteration on ``device``."""
    return CudaTimer() if device.type == "cuda" else HostTimer()


def clock_offset(groups: PipelineGroups, rounds: int = 16) -> int:
    """ns to add to this rank's clock to get that of pipeline rank 0; every pipeline rank must call it together.

    Ranks of one boot of one machine share the clock: 0, exactly. Others answer rank 0 in turn, and the round trip of least length
    bounds the error by half its length (Cristian's algorithm).
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = boot.read_text().strip() if boot.exists() else socket.gethostname()
    hosts: list[str] = [""] * len(groups.control_ranks)
    dist.all_gather_object(hosts, host, group=groups.control)
    if len(set(hosts)) == 1:
        return 0
    offset = 0
    stamp = torch.zeros(1, dtype=torch.int64)
    for peer in range(1, groups.num_ranks):
        if groups.rank == 0:
            for _ in range(rounds):
                dist.recv(stamp, groups.ranks[peer], group=groups.control)
                stamp[0] = time.perf_counter_ns()
                dist.send(stamp, groups.ranks[peer], group=groups.control)
        elif groups.rank == peer:
            best = None
            for _ in range(rounds):
                sent = time.perf_counter_ns()
                dist.send(stamp, groups.ranks[0], group=groups.control)
                dist.recv(stamp, groups.ranks[0], group=groups.control)
                received = time.perf_counter_ns()
                if best is None or received - sent < best:
                    best = received - sent
                    offset = int(stamp[0]) - (sent + received) // 2
    return offset


def gather_records(records: list[StageRecord], groups: PipelineGroups, offset_ns: int = 0) -> list[list[StageRecord]] | None:
    """Every pipeline rank's records on pipeline rank 0's clock; None on the other ranks. All ranks of the control group must call it
    together; only one tensor-parallel rank of each pipeline rank is kept."""
    shifted = [(record.stage, record.start_ns + offset_ns, record.end_ns + offset_ns) for record in records]
    gathered: list[tuple[int, list[tuple[int, int, int]]]] = [(0, [])] * len(groups.control_ranks)
    dist.all_gather_object(gathered, (groups.rank, shifted), group=groups.control)
    if groups.rank != 0:
        return None
    by_rank = dict(reversed(gathered))
    return [[StageRecord(*row) for row in by_rank[rank]] for rank in range(groups.num_ranks)]
