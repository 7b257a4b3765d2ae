"""Balance across data-parallel replicas: the microbatches of the next global batches change replicas while an iteration trains.

Replicas tell each other the metadata of batches that they have read ahead, the first one deals them (:mod:`megatron_dip.partition.deal`),
and whole microbatches travel to the replicas that train them: on a thread of their own and on process groups of their own, raw, between
ranks of one place in their replicas. When the batch's iteration comes, all ranks of all replicas agree (:meth:`ReplicaBalance.settle`)
whether it is trained as dealt. It is not where the exchange is late or failed on any of them: then every replica trains what it read,
counted. So a microbatch is trained once, by its reader or by the one replica that it was dealt to, and a data loader's state stands for
the same global batches as without.

Memory: the items of the batches ahead, those that come for them, and copies of those under way. One exchange runs at a time; while one
that was late still runs, batches are left as read.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import pickle
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_dip.iteration.lookahead import LookaheadIterator
from megatron_dip.iteration.travel import PackedItem, pack, unpack
from megatron_dip.partition.deal import deal
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.p2p import PeerError
from megatron_dip.spec.workload import Microbatch

logger = logging.getLogger(__name__)

WORTH = 0.005
"""A deal moves data where it lowers the largest load by this share."""
_PATIENCE = 0.5
"""Share of what a deal gains that an iteration waits for it."""
_PROBED_EVERY = 16
"""Batches after which a link that was too slow is tried again."""
_NEUTRAL = (1 << 62) - 1

Estimate = Callable[[Sequence[Microbatch]], NDArray[np.int64]]
"""Microbatches -> ns on each pipeline rank [microbatches, ranks]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceFigures:
    """What balancing came to so far, as this rank knows it. Loads are estimated, largest over mean."""

    dealt: int
    """Batches trained as dealt."""
    left: dict[str, int]
    """Why others were not -> batches: ``even`` (nothing to win), ``late``, ``failed``, ``slow`` (the link), ``unknown`` (items that
    cannot be read or travel), ``short`` (fewer microbatches ahead, or other numbers of them), ``paused`` (behind a late one)."""
    moves: int
    """Microbatches that changed replicas, of all replicas."""
    bytes_sent: int
    """By this rank."""
    seconds: float
    """That exchanges took on this rank, in the background."""
    waited_s: float
    """That iterations waited for them."""
    imbalance_before: float
    """Of the last batch that was dealt or found even, as read."""
    imbalance: float
    """Of the same, as trained."""
    measured_imbalance: float
    """Of the last iteration: pipeline time of the slowest replica over the mean."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """What the first replica's planner rank says of a batch."""

    shares: list[list[int]] | None
    """Each replica's microbatches as numbers in the global batch; None: as read."""
    reason: str
    imbalance_before: float = 1.0
    imbalance: float = 1.0
    gain_ns: int = 0
    moves: int = 0


@dataclass(slots=True)
class _Job:
    """One batch ahead, from being read to being trained."""

    lookahead: LookaheadIterator | None
    items: list[Any] | None
    """None: not that many are ahead."""
    descriptions: list[Microbatch] | None
    """Of the planner rank's items; None elsewhere and where one cannot be read."""
    size: int
    done: threading.Event = field(default_factory=threading.Event)
    verdict: _Verdict | None = None
    """None: left as read without asking, or not known yet."""
    reason: str = ""
    new_items: list[Any] | None = None


class ReplicaBalance:
    """One for each rank and run.

    Args:
        groups: of this rank; there are several replicas.
        estimate: work of microbatches; asked on the first replica's planner rank, on the background thread.
        submit: takes the microbatches that this replica is going to train, on the planner rank, on the background thread.
        timeout_s: after this long without a sign of another rank an exchange has failed.
    """

    def __init__(
        self, groups: PipelineGroups, estimate: Estimate, submit: Callable[[list[Microbatch]], None] | None, timeout_s: float
    ) -> None:
        assert groups.peers is not None, "one replica alone has nobody to share with"
        self._groups = groups
        self._peers = groups.peers
        self._estimate = estimate
        self._submit = submit
        self._timeout_s = timeout_s
        self._replica = dist.get_rank(groups.peers)
        self._num_replicas = dist.get_world_size(groups.peers)
        self._is_planner = dist.get_rank() == groups.control_ranks[0]
        self._jobs: deque[_Job] = deque()
        """Batches ahead that are not trained yet, the next first."""
        self._queue: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._unfinished: deque[_Job] = deque()
        """In the queue or under way."""
        self._place: dist.ProcessGroup | None = None
        self._place_ranks: list[int] = []
        self._own: dist.ProcessGroup | None = None
        self._own_source = 0
        self._has_data = False
        self._started = False
        self._failure: Exception | None = None
        self._is_off = False
        self._is_paused = False
        self._bandwidth = self._agreed_bandwidth = 0.0
        """Bytes per second, measured here and the least of all ranks'; 0: not measured."""
        self._iteration_ns = 0
        """Pipeline time of the slowest replica."""
        self._asked = 0
        self._left: Counter[str] = Counter()
        self._dealt = self._moves = self._bytes = 0
        self._seconds = self._waited_s = 0.0
        self._imbalance_before = self._imbalance = self._measured_imbalance = 1.0

    @property
    def is_on(self) -> bool:
        return not self._is_off

    def start(self, lookahead: LookaheadIterator | None, has_data: bool) -> None:
        """Makes the groups of the exchange at the first training iteration; all ranks of the job must call it together.

        Exchanges take place where every replica has data, in the same places, and can look ahead.
        """
        if self._started:
            return
        self._started = True
        mine = (tuple(self._groups.control_ranks), tuple(sorted(self._groups.replica_of)), has_data, lookahead is not None)
        every: list[Any] = [mine] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        planners = {ranks[0] for ranks, _, _, _ in every}
        can = all(sees for _, _, data, sees in every if data) and all(every[rank][2] for rank in planners)
        alike = all(len({every[rank][2] for rank in place}) == 1 for _, place, _, _ in every)
        if not (can and alike):
            self._turn_off("the replicas do not read data in the same places, or some cannot look ahead")
            return
        self._has_data = has_data
        timeout = datetime.timedelta(seconds=self._timeout_s)
        me = dist.get_rank()
        for place in dict.fromkeys(place for _, place, data, _ in every if data):
            group = dist.new_group(list(place), timeout=timeout, backend="gloo")
            if me in place:
                self._place, self._place_ranks = group, list(place)
        for ranks in dict.fromkeys(ranks for ranks, _, _, _ in every):
            reading = [rank for rank in ranks if every[rank][2]]
            if len(reading) > 1:
                group = dist.new_group(reading, timeout=timeout, backend="gloo")
                if me in reading:
                    self._own, self._own_source = group, ranks[0]
        if has_data:
            threading.Thread(target=self._work, name="dip-balance", daemon=True).start()

    # ---- on the thread that trains ---------------------------------------------------------------------------------------------

    def offer(
        self, lookahead: LookaheadIterator | None, sizes: Sequence[int], describe: Callable[[Any], Microbatch | Exception]
    ) -> Exception | None:
        """Hands in the batches ahead that were not yet: ``sizes`` are the microbatches of the next ones, alike on all ranks.

        Returns:
            What kept an item of these from being read, on the planner rank.
        """
        if self._is_off or not self._has_data or lookahead is None:
            return None
        ahead = lookahead.peek(sum(sizes))
        error: Exception | None = None
        first = sum(job.size for job in self._jobs)
        for size in sizes[len(self._jobs) :]:
            items: list[Any] | None = ahead[first : first + size]
            first += size
            if items is not None and len(items) < size:
                items = None
            job = _Job(lookahead, items, None, size)
            if self._is_planner and items is not None:
                said = [describe(item) for item in items]
                failed = [one for one in said if isinstance(one, Exception)]
                error = error or next(iter(failed), None)
                job.descriptions = None if failed else said  # type: ignore[assignment]
            self._jobs.append(job)
            if self._is_paused:
                job.reason = "paused"
                job.done.set()
                if job.descriptions is not None and self._submit is not None:
                    self._submit(job.descriptions)
            else:
                self._unfinished.append(job)
                self._queue.put(job)
        return error

    def settle(self, lookahead: LookaheadIterator | None, num_microbatches: int, is_replay: bool, pipeline_ns: int) -> None:
        """Before a training iteration: agrees with all ranks whether its batch is trained as dealt, and makes it so in ``lookahead``.

        Collective over all ranks of the job.

        Args:
            is_replay: the batch was trained before and comes again: nothing changes.
            pipeline_ns: what the last iteration's stages took on this rank, from the first to the last.

        Raises:
            PeerError: another rank is gone.
        """
        job = self._jobs.popleft() if self._jobs and not is_replay else None
        if job is not None:
            self._wait(job)
        while self._unfinished and self._unfinished[0].done.is_set():
            self._unfinished.popleft()
        ready, digest = self._readiness(job, lookahead, num_microbatches)
        row = [
            ready if self._has_data else _NEUTRAL, *((digest, -digest) if self._has_data else (_NEUTRAL, _NEUTRAL)),
            0 if self._failure is not None else 1, -len(self._unfinished), int(self._bandwidth) or _NEUTRAL, -pipeline_ns,
        ]
        row, total_ns = self._least(row)
        self._agreed_bandwidth = 0.0 if row[5] == _NEUTRAL else float(row[5])
        self._iteration_ns = -row[6]
        if total_ns > 0:
            self._measured_imbalance = self._iteration_ns * self._num_replicas / total_ns
        # What is late for its own iteration must not make all that follow late.
        self._is_paused = -row[4] > len(self._jobs)
        is_dealt = bool(row[0] == 1 and row[1] == -row[2] and row[3] == 1)
        if job is not None:
            self._apply(job, is_dealt, has_failed=row[3] == 0)
        if not row[3] and self._started and not self._is_off:
            self._turn_off("an exchange of microbatches between replicas failed" + (f": {self._failure}" if self._failure else " on another rank"))

    def figures(self) -> BalanceFigures:
        return BalanceFigures(
            dealt=self._dealt, left=dict(self._left), moves=self._moves, bytes_sent=self._bytes, seconds=self._seconds, waited_s=self._waited_s,
            imbalance_before=self._imbalance_before, imbalance=self._imbalance, measured_imbalance=self._measured_imbalance,
        )

    def _wait(self, job: _Job) -> None:
        if job.done.is_set():
            return
        began = time.perf_counter()
        verdict = job.verdict
        job.done.wait(0.01 if verdict is None else max(0.01, _PATIENCE * verdict.gain_ns / 1e9))
        self._waited_s += time.perf_counter() - began

    def _readiness(self, job: _Job | None, lookahead: LookaheadIterator | None, num_microbatches: int) -> tuple[int, int]:
        """(1: this rank can train the batch as dealt, digest of the deal)"""
        if job is None or not job.done.is_set() or job.verdict is None or job.reason or job.size != num_microbatches:
            return 0, 0
        if job.lookahead is not lookahead or (job.verdict.shares is not None and job.new_items is None):
            return 0, 0
        digest = hashlib.sha256(pickle.dumps(job.verdict.shares)).digest()
        return 1, int.from_bytes(digest[:7], "big")

    def _apply(self, job: _Job, is_dealt: bool, has_failed: bool) -> None:
        verdict = job.verdict
        if is_dealt and verdict is not None and verdict.shares is not None:
            assert job.lookahead is not None
            assert job.new_items is not None
            job.lookahead.replace(job.new_items)
            self._dealt += 1
            self._moves += verdict.moves
            self._imbalance_before, self._imbalance = verdict.imbalance_before, verdict.imbalance
        elif is_dealt and verdict is not None:
            self._left[verdict.reason] += 1
            self._imbalance_before = self._imbalance = verdict.imbalance_before
        else:
            self._left["failed" if has_failed else job.reason or "late"] += 1

    def _least(self, row: list[int]) -> tuple[list[int], int]:
        """The least of all ranks in each place of ``row``, and the sum over replicas of the slowest rank's pipeline time (row[6])."""
        values = torch.tensor(row, dtype=torch.int64)
        total = torch.zeros(1, dtype=torch.int64)
        try:
            if len(self._groups.control_ranks) > 1:
                dist.all_reduce(values, dist.ReduceOp.MIN, group=self._groups.control)
            total[0] = -values[6]
            dist.all_reduce(values, dist.ReduceOp.MIN, group=self._peers)
            dist.all_reduce(total, dist.ReduceOp.SUM, group=self._peers)
        except RuntimeError as failure:
            raise PeerError(
                f"global rank {dist.get_rank()} lost another rank while agreeing how a global batch is dealt, time limit "
                f"{self._groups.timeout_s:g} s: {next(iter(str(failure).strip().splitlines()), type(failure).__name__)}"
            ) from failure
        return values.tolist(), int(total)

    def _turn_off(self, cause: str) -> None:
        self._is_off = True
        self._jobs.clear()
        logger.warning("replicas train what they read from now on: %s", cause)

    # ---- on the thread of exchanges --------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            job = self._queue.get()
            if self._failure is None:
                try:
                    self._exchange(job)
                except Exception as error:
                    self._failure = error
                    job.reason = "failed"
            else:
                job.reason = "failed"
            job.done.set()

    def _exchange(self, job: _Job) -> None:
        packed, sizes = self._pack(job)
        verdict = self._verdict(job, sizes)
        job.verdict = verdict
        if verdict.shares is None or job.items is None:
            return
        began, sent = time.perf_counter(), 0
        mine = verdict.shares[self._replica]
        waiting: list[tuple[dist.Work, torch.Tensor]] = []
        for replica, share in enumerate(verdict.shares):
            for number in share if replica != self._replica else ():
                if number % self._num_replicas == self._replica:
                    item = packed[number // self._num_replicas]
                    assert item is not None, "an item that cannot travel was dealt away"
                    for message in (torch.tensor([item.num_bytes], dtype=torch.int64), item.join()):
                        waiting.append((_sent(message, self._place_ranks[replica], self._place), message))
                    sent += item.num_bytes
        received: dict[int, torch.Tensor] = {}
        # In the sender's order: by its replica's share, which is the order of numbers among those that come.
        for source in range(self._num_replicas):
            for number in mine:
                if source != self._replica and number % self._num_replicas == source:
                    size = torch.zeros(1, dtype=torch.int64)
                    dist.recv(size, self._place_ranks[source], group=self._place)
                    whole = torch.empty(int(size), dtype=torch.uint8)
                    dist.recv(whole, self._place_ranks[source], group=self._place)
                    received[number] = whole
        for work, _ in waiting:
            work.wait()
        taken = time.perf_counter() - began
        moved = sent + sum(whole.numel() for whole in received.values())
        if moved:
            self._bandwidth = max(1.0, moved / max(taken, 1e-6))
        self._bytes += sent
        self._seconds += taken
        job.new_items = [
            job.items[number // self._num_replicas] if number % self._num_replicas == self._replica else unpack(received[number])
            for number in mine
        ]

    def _pack(self, job: _Job) -> tuple[list[PackedItem | None], list[int]]:
        """Of each item what could travel, and its size; None and -1 for one that cannot."""
        packed: list[PackedItem | None] = []
        for item in job.items or ():
            try:
                packed.append(pack(item))
            except Exception as error:
                if not self._left["unknown"]:
                    logger.warning("items of type %s cannot travel between replicas: %s", type(item).__qualname__, error)
                packed.append(None)
        return packed, [-1 if one is None else one.num_bytes for one in packed]

    def _verdict(self, job: _Job, sizes: list[int]) -> _Verdict:
        """The deal of the batch, alike on all ranks that read data."""
        # Places other than the planner's see items of their own, which must be able to travel too.
        able = torch.tensor([1 if all(size >= 0 for size in sizes) else 0])
        if self._own is not None:
            dist.all_reduce(able, dist.ReduceOp.MIN, group=self._own)
        message: list[Any] = [None]
        if self._is_planner:
            known = job.descriptions if int(able) else None
            rows: list[Any] = [None] * self._num_replicas
            dist.all_gather_object(rows, (job.items is not None, known, sizes), group=self._place)
            message = [self._deal(rows) if self._replica == 0 else None]
            dist.broadcast_object_list(message, self._place_ranks[0], group=self._place)
            self._plan_ahead(message[0], rows)
        if self._own is not None:
            dist.broadcast_object_list(message, self._own_source, group=self._own)
        return message[0]

    def _deal(self, rows: Sequence[tuple[bool, list[Microbatch] | None, list[int]]]) -> _Verdict:
        counts = {len(known) for _, known, _ in rows if known is not None}
        if not all(is_there for is_there, _, _ in rows) or len(counts) > 1:
            return _Verdict(shares=None, reason="short")
        if any(known is None for _, known, _ in rows):
            return _Verdict(shares=None, reason="unknown")
        (count,) = counts
        batch = [known[place] for place in range(count) for _, known, _ in rows if known is not None]
        try:
            dealt = deal(self._estimate(batch), self._num_replicas)
        except Exception as error:
            logger.warning("a global batch could not be dealt: %s: %s", type(error).__name__, error)
            return _Verdict(shares=None, reason="unknown")
        before, after = int(dealt.load_before_ns.max()), int(dealt.load_ns.max())
        as_read = _Verdict(shares=None, reason="even", imbalance_before=dealt.imbalance_before, imbalance=dealt.imbalance_before)
        if before - after < WORTH * before:
            return as_read
        shares = dealt.shares()
        self._asked += 1
        if self._agreed_bandwidth > 0 and self._iteration_ns > 0 and self._asked % _PROBED_EVERY:
            traffic = [0] * self._num_replicas
            for replica, share in enumerate(shares):
                for number in share:
                    source, place = number % self._num_replicas, number // self._num_replicas
                    if source != replica:
                        traffic[source] += rows[source][2][place]
                        traffic[replica] += rows[source][2][place]
            if max(traffic) / self._agreed_bandwidth > self._iteration_ns / 1e9:
                return _Verdict(shares=None, reason="slow", imbalance_before=dealt.imbalance_before, imbalance=dealt.imbalance_before)
        return _Verdict(
            shares=shares, reason="", imbalance_before=dealt.imbalance_before, imbalance=dealt.imbalance, gain_ns=before - after,
            moves=dealt.moves,
        )

    def _plan_ahead(self, verdict: _Verdict, rows: Sequence[tuple[bool, list[Microbatch] | None, list[int]]]) -> None:
        if self._submit is None:
            return
        numbers = range(self._replica, self._num_replicas * len(rows[self._replica][1] or ()), self._num_replicas)
        batch: list[Microbatch] = []
        for number in numbers if verdict.shares is None else verdict.shares[self._replica]:
            known = rows[number % self._num_replicas][1]
            assert known is not None
            batch.append(known[number // self._num_replicas])
        if batch:
            self._submit(batch)


def _sent(message: torch.Tensor, to: int, group: dist.ProcessGroup | None) -> dist.Work:
    work = dist.isend(message, to, group=group)
    assert work is not None
    return work
