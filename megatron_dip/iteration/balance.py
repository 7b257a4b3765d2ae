"""Balance across data-parallel replicas: the microbatches of the next global batches change replicas while an iteration trains.

Replicas tell each other the metadata of batches that they have read ahead, the first one deals them (:mod:`megatron_dip.iteration.dealing`),
and whole microbatches travel to the replicas that train them (:mod:`megatron_dip.iteration.exchange`), on a thread of their own. When the
batch's iteration comes, all ranks of all replicas agree (:meth:`ReplicaBalance.settle`) whether it is trained as dealt. It is not where
the exchange is late or failed on any of them: then every replica trains what it read, counted. So a microbatch is trained once, by its
reader or by the one replica that it was dealt to, and a data loader's state stands for the same global batches as without.

Memory: the items of the batches ahead, those that come for them, and copies of those under way. One exchange runs at a time; while one
that was late still runs, batches are left as read.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_dip.iteration.dealing import BatchRead, Dealer, Estimate, Link, Verdict, microbatches_of
from megatron_dip.iteration.exchange import ExchangeGroups, exchange_items, make_exchange_groups
from megatron_dip.iteration.lookahead import LookaheadIterator
from megatron_dip.iteration.travel import PackedItem, pack
from megatron_dip.partition.second_pass import PASSES
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.p2p import PeerError
from megatron_dip.spec.workload import Microbatch

logger = logging.getLogger(__name__)

_PATIENCE = 0.5
"""Share of what a deal gains that an iteration waits for it."""
_PLANNING_SHARE = 0.5
"""Of an iteration: how long replicas plan deals of one batch to deal it better."""
_FORGOTTEN = 0.95
"""Where planning takes too long it is tried again later: with each batch it counts for so much of what it took."""
_NEUTRAL = (1 << 62) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BalanceFigures:
    """What balancing came to so far, as this rank knows it. Imbalance: largest over mean, of all replicas."""

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
    """Of the last batch that was dealt or found even, as read, estimated."""
    imbalance: float
    """Of the same, as trained."""
    planned_imbalance: float | None
    """Of the last batch that was dealt by planned times as well."""
    measured_imbalance: float
    """Of the last iteration: pipeline time of the slowest replica over the mean."""

    def scalars(self) -> dict[str, float]:
        """The same as named numbers, for writers of scalars; bytes are this rank's."""
        planned = {} if self.planned_imbalance is None else {"planned": self.planned_imbalance}
        imbalances = {"as read": self.imbalance_before, "dealt": self.imbalance, **planned, "measured": self.measured_imbalance}
        return {
            **{f"slowest replica over mean, {name}": value for name, value in imbalances.items()},
            "batches dealt": self.dealt, "batches left as read": sum(self.left.values()), "late exchanges": self.left.get("late", 0),
            "moved microbatches": self.moves, "exchanged MB": self.bytes_sent / 1e6, "exchange seconds": self.seconds,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlans:
    """The planner of this replica, as the balance asks it."""

    submit: Callable[[list[Microbatch]], None]
    """Takes the microbatches that this replica is going to train, to be planned ahead."""
    planned_ns: Callable[[list[Microbatch]], int] | None = None
    """What a plan of these takes, planned at once; None: deals go by estimated work alone."""


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
    verdict: Verdict | None = None
    """None: left as read without asking, or not known yet."""
    reason: str = ""
    new_items: list[Any] | None = None


class ReplicaBalance:
    """One for each rank and run.

    Long since it is the state of one protocol between the training thread and the background's; dealing, moving and planning are elsewhere.

    Args:
        groups: of this rank; there are several replicas.
        estimate: work of microbatches; asked on the first replica's planner rank, on the background thread.
        plans: on the planner rank; called on the background thread.
        timeout_s: after this long without a sign of another rank an exchange has failed.
    """

    def __init__(self, groups: PipelineGroups, estimate: Estimate, plans: ReplicaPlans | None, timeout_s: float) -> None:
        assert groups.peers is not None, "one replica alone has nobody to share with"
        self._groups = groups
        self._peers = groups.peers
        self._plans = plans
        self._timeout_s = timeout_s
        self._replica = dist.get_rank(groups.peers)
        self._num_replicas = dist.get_world_size(groups.peers)
        self._is_planner = dist.get_rank() == groups.control_ranks[0]
        self._dealer = Dealer(estimate)
        self._jobs: deque[_Job] = deque()
        """Batches ahead that are not trained yet, the next first."""
        self._queue: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._unfinished: deque[_Job] = deque()
        """In the queue or under way."""
        self._exchange_groups: ExchangeGroups | None = None
        self._started = False
        self._failure: Exception | None = None
        self._is_off = False
        self._is_paused = False
        self._bandwidth = 0.0
        """Bytes per second, measured here; 0: not measured."""
        self._link = Link(bytes_per_second=0.0, iteration_s=0.0)
        """The slowest rank's, and pipeline time of the slowest replica."""
        self._planning_s = 0.0
        """What planning a deal took last, on the slowest replica; 0: never tried."""
        self._can_plan = True
        """No deal was met that could not be planned."""
        self._left: Counter[str] = Counter()
        self._dealt = self._moves = self._bytes = 0
        self._seconds = self._waited_s = 0.0
        self._last = Verdict(shares=None, reason="")
        """Of the last batch that was dealt or found even."""
        self._planned_imbalance: float | None = None
        self._measured_imbalance = 1.0

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
        self._exchange_groups = make_exchange_groups(
            self._groups, self._timeout_s, has_data=has_data, can_look_ahead=lookahead is not None
        )
        if self._exchange_groups is None:
            self._turn_off("the replicas do not read data in the same places, or some cannot look ahead")
        elif has_data:
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
                if job.descriptions is not None and self._plans is not None:
                    self._plans.submit(job.descriptions)
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
        iteration_ns = -row[6]
        self._link = Link(bytes_per_second=0.0 if row[5] == _NEUTRAL else float(row[5]), iteration_s=iteration_ns / 1e9)
        if total_ns > 0:
            self._measured_imbalance = iteration_ns * self._num_replicas / total_ns
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
            imbalance_before=self._last.imbalance_before, imbalance=self._last.imbalance, planned_imbalance=self._planned_imbalance,
            measured_imbalance=self._measured_imbalance,
        )

    @property
    def _has_data(self) -> bool:
        return self._exchange_groups is not None and self._exchange_groups.has_data

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
        if not is_dealt or verdict is None:
            self._left["failed" if has_failed else job.reason or "late"] += 1
            return
        if verdict.shares is None:
            self._left[verdict.reason] += 1
        else:
            assert job.lookahead is not None
            assert job.new_items is not None
            job.lookahead.replace(job.new_items)
            self._dealt += 1
            self._moves += verdict.moves
            if verdict.planned_imbalance is not None:
                self._planned_imbalance = verdict.planned_imbalance
        self._last = verdict

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
        assert self._exchange_groups is not None
        packed, sizes = self._pack(job)
        verdict = self._agree(job, sizes, self._exchange_groups)
        job.verdict = verdict
        if verdict.shares is None or job.items is None:
            return
        exchanged = exchange_items(job.items, packed, verdict.shares, self._replica, self._exchange_groups)
        moved = exchanged.bytes_sent + exchanged.bytes_received
        if moved:
            self._bandwidth = max(1.0, moved / max(exchanged.seconds, 1e-6))
        self._bytes += exchanged.bytes_sent
        self._seconds += exchanged.seconds
        job.new_items = exchanged.items

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

    def _agree(self, job: _Job, sizes: list[int], groups: ExchangeGroups) -> Verdict:
        """The deal of the batch, alike on all ranks that read data."""
        # Places other than the planner's see items of their own, which must be able to travel too.
        able = torch.tensor([1 if all(size >= 0 for size in sizes) else 0])
        if groups.own is not None:
            dist.all_reduce(able, dist.ReduceOp.MIN, group=groups.own)
        message: list[Any] = [None]
        if self._is_planner:
            mine = BatchRead(is_there=job.items is not None, descriptions=job.descriptions if int(able) else None, sizes=sizes)
            read: list[BatchRead] = [mine] * self._num_replicas
            dist.all_gather_object(read, mine, group=groups.place)
            message = [self._deal(read, groups)]
        if groups.own is not None:
            dist.broadcast_object_list(message, groups.own_source, group=groups.own)
        return message[0]

    def _deal(self, read: Sequence[BatchRead], groups: ExchangeGroups) -> Verdict:
        """Among planner ranks: the deal, by planned times too where there is time for plans; hands in what this replica then trains."""
        began, num_planned = time.perf_counter(), 0
        verdict, is_to_plan = self._told(lambda: self._first_pass(read), groups)
        while is_to_plan:
            planned_ns = self._planned_ns(self._of_replica(verdict, read))
            every: list[int] = [planned_ns] * self._num_replicas
            dist.all_gather_object(every, planned_ns, group=groups.place)
            num_planned += 1
            verdict, is_to_plan = self._told(partial(self._next_pass, every, time.perf_counter() - began, num_planned), groups)
        batch = self._of_replica(verdict, read)
        if batch and self._plans is not None:
            self._plans.submit(batch)
        return verdict

    def _first_pass(self, read: Sequence[BatchRead]) -> tuple[Verdict, bool]:
        """On the first replica: the deal by work, and whether it is to be planned."""
        verdict = self._dealer.first_pass(read, self._link)
        can_plan = self._plans is not None and self._plans.planned_ns is not None
        has_time = self._link.iteration_s > 0 and self._planning_s < _PLANNING_SHARE * self._link.iteration_s
        if not has_time:
            self._planning_s *= _FORGOTTEN
        return verdict, verdict.shares is not None and can_plan and has_time

    def _next_pass(self, planned_ns: Sequence[int], taken_s: float, num_planned: int) -> tuple[Verdict, bool]:
        """On the first replica, once replicas have planned a deal: the next one to plan, or the best."""
        self._planning_s = taken_s / num_planned
        has_time = taken_s + self._planning_s < _PLANNING_SHARE * self._link.iteration_s
        return self._dealer.next_pass(planned_ns, is_last=num_planned > PASSES or not has_time)

    def _told(self, decide: Callable[[], tuple[Verdict, bool]], groups: ExchangeGroups) -> tuple[Verdict, bool]:
        """What the first replica decides, on the planner ranks of all."""
        message: list[Any] = [decide() if self._replica == 0 else None]
        dist.broadcast_object_list(message, groups.place_ranks[0], group=groups.place)
        return message[0]

    def _of_replica(self, verdict: Verdict, read: Sequence[BatchRead]) -> list[Microbatch]:
        """Instance lengths of what this replica trains; empty where it could not tell."""
        if verdict.shares is None:
            return read[self._replica].descriptions or []
        return microbatches_of(verdict.shares[self._replica], read)

    def _planned_ns(self, batch: list[Microbatch]) -> int:
        """What the plan of these takes; 0: it cannot be planned, which will be said when its iteration comes."""
        assert self._plans is not None
        assert self._plans.planned_ns is not None
        try:
            return self._plans.planned_ns(batch)
        except Exception as error:
            if self._can_plan:
                logger.warning("a deal could not be planned ahead (not said again): %s: %s", type(error).__name__, error)
            self._can_plan = False
            return 0
