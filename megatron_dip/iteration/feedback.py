"""Measured stages -> costs of the plans to come: one loop, for the trainer and for Megatron's scripts alike.

In: after each training iteration its plan and when this rank's stages ran. Out: :meth:`CostFeedback.current_costs`, which the planner's
threads ask for. The first iterations, and every few later on, all ranks' stages are gathered and a profile is fitted to the last
of them (:mod:`megatron_dip.cost.measured`: by module, part and batch shape, interruptions capped). In between, the planner rank's own
stages say how fast the machine is now against that profile, and how much longer ranks wait for each other than planned. Bytes and
memory strategies stay those of the costs that the run began with; a strategy's share of time is a share of the measured time.

Threads: the training thread publishes finished costs with one assignment; the planner's threads only read them.

Not modelled: ranks of unequal speed (they are told apart and named, plans take all ranks as equally fast).
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.measured import (
    MeasuredCost,
    PartBytes,
    SlowedCost,
    StageSample,
    fit_profile,
    message_excess_ns,
    slowdown,
    stage_ns,
    strategy_share,
    waiting,
)
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.timing import StageRecord, clock_offset, gather_records
from megatron_dip.spec.codec import save
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.profile import PointToPoint, Profile

logger = logging.getLogger(__name__)

PROFILED_FIRST = 8
"""Iterations at the start after each of which the profile is fitted anew."""
PROFILED_EVERY = 10
"""Later: iterations from one fit to the next."""
SKIPPED = 1
"""Iterations at the very start that are not measured: allocators and caches warm up."""
KEPT_ITERATIONS = 24
"""Measured iterations that a fit looks back on."""
SPEED_ITERATIONS = 5
"""Last iterations whose median says how fast the machine is now against its profile."""
WAITING_ITERATIONS = 15
"""Last iterations whose median says how much longer ranks wait for each other than planned."""
DRIFT = 1.25
"""Times the speed, either way, that stages must have moved from the first profile to be called adrift."""
SLOW_RANK = 1.15
"""Times the median rank's stage times, at which a rank is called slow."""


class CostFeedback:
    """One for each rank and run; on other ranks than a replica's planner it only takes part in gathering.

    Args:
        partition: what runs.
        costs: what plans cost before anything was measured; afterwards still the bytes and the memory strategies.
        p2p: messages between neighbouring ranks, before they were measured in training; None: as ``costs`` has them.
        profile: measured by an earlier run of the same layers on the same device, to begin with.
        forget: called when costs have changed (plans made before are worth less).
        is_planner: whether this rank is the replica's planner.
        read_every_iteration: whether reading a rank's own times costs it nothing (on a GPU reading waits for the device).
        state_file: where the profile is kept for a run that resumes; None: nowhere.
        measures_all: gather every iteration from all ranks, not only some.
    """

    def __init__(
        self, *, groups: PipelineGroups | None, partition: Partition, model: ModelSpec, costs: CostModel, p2p: PointToPoint | None = None,
        profile: Profile | None = None, forget: Callable[[], None] = lambda: None, is_planner: bool = True, read_every_iteration: bool = True,
        state_file: Path | None = None, measures_all: bool = False,
    ) -> None:
        self._groups = groups
        self._partition = partition
        self._model = model
        self._given = costs
        self._bytes = {module.name: _bytes_per_token(costs, module.name) for module in model.modules}
        self._p2p = p2p or PointToPoint(latency_ns=costs.p2p_latency_ns, bytes_per_second=costs.p2p_bytes_per_second)
        self._forget = forget
        self._is_planner = is_planner
        self._read_every_iteration = read_every_iteration
        self._state_file = state_file
        self._measures_all = measures_all
        self._clock_offset_ns: int | None = None
        self._iterations = 0
        self._measured: deque[list[StageSample]] = deque(maxlen=KEPT_ITERATIONS)
        self._slowdowns: deque[float] = deque(maxlen=SPEED_ITERATIONS)
        """Of the planner rank's stages against ``_base``."""
        self._waitings: deque[float] = deque(maxlen=WAITING_ITERATIONS)
        self._of_ranks: deque[list[float]] = deque(maxlen=SPEED_ITERATIONS)
        """Every rank's slowdown in the last gathered iterations."""
        self._reference: CostModel | None = None
        """The first profile that rests on enough iterations: what drift is measured against."""
        self._drifts: deque[float] = deque(maxlen=3)
        self._flagged: set[str] = set()
        self.profile: Profile | None = None
        """What was measured so far; on planner ranks."""
        self._is_resumed = profile is not None
        self._base = costs
        """Costs by the last fit."""
        self._current = costs
        """What is planned with: replaced whole, read by other threads."""
        if profile is not None:
            self.use_profile(profile)
            self._reference = self._base

    def current_costs(self) -> CostModel:
        """What the next plan is made with; may be called on any thread."""
        return self._current

    @property
    def factor(self) -> float:
        """How much longer stages take now than the profile says, waiting for other ranks included."""
        if not self._slowdowns:
            return 1.0
        return statistics.median(self._slowdowns) * max(1.0, statistics.median(self._waitings))

    @property
    def drift(self) -> float:
        """How much longer stages take now than when the run began (or the run that it resumes ended)."""
        return statistics.median(self._drifts) if self._drifts else 1.0

    def take_over(self, other: CostFeedback) -> None:
        """Starts from what ``other`` measured of the same cut."""
        assert other._partition == self._partition, "measured on another cut"
        self._p2p, self.profile, self._iterations = other._p2p, other.profile, other._iterations
        self._base, self._reference, self._is_resumed = other._base, other._reference, other._is_resumed
        for mine, theirs in ((self._measured, other._measured), (self._slowdowns, other._slowdowns), (self._waitings, other._waitings)):
            mine.extend(theirs)  # type: ignore[arg-type]
        self._publish()

    def use_profile(self, profile: Profile) -> None:
        """Plans with these times from now on, until more is measured."""
        self.profile = profile
        samples = [sample for iteration in self._measured for sample in iteration]
        self._base = MeasuredCost(self._given, profile, samples)
        self._slowdowns.clear()
        self._publish()
        self._forget()

    def is_due(self) -> bool:
        """Whether the iteration that ran last is gathered from all ranks; the same on all of them."""
        measured = self._iterations - SKIPPED
        return 1 <= measured <= PROFILED_FIRST or (measured > 0 and (self._measures_all or measured % PROFILED_EVERY == 0))

    def after_iteration(self, plan: Plan, own_records: Callable[[], list[StageRecord]]) -> None:
        """To be called on all ranks of the replica, behind each training iteration.

        Args:
            plan: what ran.
            own_records: when this rank's stages did, on its own clock.
        """
        self._iterations += 1
        due = self.is_due()
        if self._iterations <= SKIPPED or not (due or (self._is_planner and self._read_every_iteration)):
            return
        own = own_records()
        if due:
            records = self._gather(own)
            if records is not None and self._is_planner:
                self.learn(plan, records)
        if self._is_planner:
            self.follow(plan, 0 if self._groups is None else self._groups.rank, own)

    def learn(self, plan: Plan, records: Sequence[Sequence[StageRecord]]) -> None:
        """Fits the profile to the last gathered iterations.

        Args:
            records: of each pipeline rank, on one clock.
        """
        by_rank = [stage_samples(plan, [of_rank], self._partition, self._base) for of_rank in records]
        samples = [sample for of_rank in by_rank for sample in of_rank]
        self._measured.append(samples)
        spans = {record.stage: (record.start_ns, record.end_ns) for of_rank in records for record in of_rank}
        excess = message_excess_ns(plan, spans)
        if excess is not None and self.profile is not None:
            # Half of it: the plan at hand may have been made before the last correction.
            latency_ns = max(0.0, self._p2p.latency_ns + excess / 2)
            self._p2p = PointToPoint(latency_ns=latency_ns, bytes_per_second=self._p2p.bytes_per_second)
        if self.profile is not None:
            self._look_at_ranks(by_rank)
        if self._is_resumed and len(self._measured) < PROFILED_FIRST:
            return  # what the earlier run measured rests on more
        profile = fit_profile(
            [sample for iteration in self._measured for sample in iteration],
            {module.name: module.num_layers for module in self._model.modules}, self._bytes, self._p2p,
        )
        self.use_profile(profile)
        if self._reference is None and len(self._measured) >= PROFILED_FIRST:
            self._reference = self._base
        self._look_at_drift(samples)
        if self._state_file is not None:
            save_whole(self._state_file, profile)

    def follow(self, plan: Plan, rank: int, own: Sequence[StageRecord]) -> None:
        """Takes the last iteration's speed and waiting of one rank into the costs."""
        if self.profile is None:
            return
        spans = {record.stage: (record.start_ns, record.end_ns) for record in own}
        self._slowdowns.append(slowdown(stage_samples(plan, [own], self._partition, self._base), self._base))
        self._waitings.append(waiting(plan, rank, spans))
        self._publish()

    def slow_ranks(self) -> Mapping[int, float]:
        """Pipeline ranks whose stages took at least :data:`SLOW_RANK` times as long as the median rank's -> how many times as long."""
        if len(self._of_ranks) < SPEED_ITERATIONS:
            return {}
        times = [statistics.median(of_rank) for of_rank in zip(*self._of_ranks, strict=True)]
        middle = statistics.median_low(times)
        return {rank: took / middle for rank, took in enumerate(times) if took >= SLOW_RANK * middle}

    def _publish(self) -> None:
        self._current = SlowedCost(self._base, self.factor) if self._slowdowns else self._base

    def _gather(self, own: list[StageRecord]) -> list[list[StageRecord]] | None:
        if self._groups is None:
            return [own]
        if self._clock_offset_ns is None:
            self._clock_offset_ns = clock_offset(self._groups)
        return gather_records(own, self._groups, self._clock_offset_ns)

    def _look_at_ranks(self, by_rank: Sequence[Sequence[StageSample]]) -> None:
        self._of_ranks.append([slowdown(samples, self._base) for samples in by_rank])
        for rank, times in self.slow_ranks().items():
            self._say_once(
                f"rank {rank}", "pipeline rank %d takes %.2f times as long for its stages as the median rank; plans take all ranks as equally fast",
                rank, times,
            )

    def _look_at_drift(self, samples: Sequence[StageSample]) -> None:
        if self._reference is None:
            return
        planned = sum(stage_ns(sample, self._reference) for sample in samples)
        if planned > 0:
            self._drifts.append(sum(sample.duration_ns for sample in samples) / planned)
        if len(self._drifts) == self._drifts.maxlen and not 1 / DRIFT < self.drift < DRIFT:
            self._say_once(
                "drift", "stages take %.2f times as long as when their costs were first measured; plans follow, but the partition may "
                "no longer be the best one", self.drift,
            )

    def _say_once(self, what: str, message: str, *values: Any) -> None:
        if what not in self._flagged:
            self._flagged.add(what)
            logger.warning(message, *values)


def stage_samples(
    plan: Plan, records: Sequence[Sequence[StageRecord]], partition: Partition, costs: CostModel | None = None
) -> list[StageSample]:
    """The measured stages of a plan.

    Args:
        records: of one or more ranks.
        costs: where backwards recompute, the time that this takes is left out by these costs' shares; None: nothing is recomputed.
    """
    split = any(stage.kind == "w" for stage in plan.stages)
    samples = []
    for of_rank in records:
        for record in of_rank:
            stage = plan.stages[record.stage]
            sample = StageSample(
                module=stage.module, kind=stage.kind, num_layers=stage.layers[1], has_first=stage.vp_stage == 0 and stage.rank == 0,
                has_last=stage.vp_stage == partition.num_chunks(stage.module) - 1 and stage.rank == plan.ranks - 1,
                instances=stage.instances, tokens=stage.tokens, split=split, duration_ns=record.end_ns - record.start_ns,
            )
            samples.append(sample if costs is None else strategy_share(sample, stage.strategy, costs))
    return samples


def measure_p2p(groups: PipelineGroups, rounds: int = 12) -> PointToPoint:
    """Latency and bandwidth between pipeline ranks 0 and 1, by messages to and fro; all ranks of the replica must call it together."""
    if groups.num_ranks == 1:
        return PointToPoint(latency_ns=0.0, bytes_per_second=1e12)
    one_way: dict[int, float] = {}
    for size in (1 << 10, 1 << 21):
        message = torch.zeros(size, dtype=torch.uint8)
        times = []
        for _ in range(rounds):
            if groups.rank == 0:
                began = time.perf_counter_ns()
                dist.send(message, groups.ranks[1], group=groups.control)
                dist.recv(message, groups.ranks[1], group=groups.control)
                times.append((time.perf_counter_ns() - began) / 2)
            elif groups.rank == 1:
                dist.recv(message, groups.ranks[0], group=groups.control)
                dist.send(message, groups.ranks[0], group=groups.control)
        one_way[size] = statistics.median(times) if times else 0.0
    small, large = sorted(one_way)
    shared: list[Any] = [None] * len(groups.control_ranks)
    slope = max((one_way[large] - one_way[small]) / (large - small), 1e-4)
    dist.all_gather_object(shared, (one_way[small], 1e9 / slope), group=groups.control)
    latency_ns, bytes_per_second = shared[0]
    return PointToPoint(latency_ns=latency_ns, bytes_per_second=bytes_per_second)


def save_whole(file: Path, value: Any) -> None:
    """Writes a file that readers see whole or not at all. What cannot be written is said and does not end training."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save(beside, value)
        beside.replace(file)
    except OSError as failure:
        logger.warning("%s could not be written: %s", file, failure)


def _bytes_per_token(costs: CostModel, module: str) -> PartBytes:
    lengths = [64]
    layer, last = costs.part(module, "layer", lengths), costs.part(module, "last", lengths)
    return PartBytes(activation=layer.activation_bytes / 64, boundary=layer.boundary_bytes / 64, output=last.boundary_bytes / 64)
