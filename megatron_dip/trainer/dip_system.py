"""A model under DIP: plans made one iteration ahead from costs that are measured while it trains.

The first iterations are planned from a rough analytic cost of the device. Every rank's stage times are gathered behind each of them and
the profile fitted to these replaces the analytic cost; later iterations refresh it now and then. All ranks are busy while they are
measured, which is what the plans are for. With a profile that was measured before (``SchedulePlan.profile``) every plan is made with it.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.coverage import outside_profile
from megatron_dip.cost.device import device_names
from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.measured import PartBytes, SlowedCost, StageSample, fit_profile, message_excess_ns, slowdown, waiting
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.iteration.built_model import describe_built_model
from megatron_dip.iteration.forward_backward import DipForwardBackward, IterationSettings
from megatron_dip.iteration.lookahead import LookaheadIterator
from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.work import WorkEstimate
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.startup import hardware_queues
from megatron_dip.runtime.timing import StageRecord, clock_offset, gather_records
from megatron_dip.spec.codec import load_profile, save
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan, PlanStage
from megatron_dip.spec.profile import PointToPoint, Profile
from megatron_dip.spec.timeline import Bar, Timeline, plan_timeline
from megatron_dip.spec.training import BalanceRecord, RunSettings, SchedulePlan
from megatron_dip.spec.workload import Microbatch, Training, check_measured
from megatron_dip.trainer.build import build_dip_model
from megatron_dip.trainer.systems import Example, System, measured_timeline, whole_model

PROFILED_FIRST = 8
"""Iterations at the start after each of which the profile is fitted anew."""
PROFILED_EVERY = 10
"""Later: iterations from one fit to the next."""
SKIPPED = 1
"""Iterations at the very start that are not measured: allocators and caches warm up."""
_LOOKED_THROUGH = 8
"""Iterations whose batches are held against the range of a given profile."""
KEPT_ITERATIONS = 24
"""Measured iterations that a fit looks back on."""
SPEED_ITERATIONS = 5
"""Last iterations whose median says how fast the machine is now against its profile."""
WAITING_ITERATIONS = 15
"""Last iterations whose median says how much longer ranks wait for each other than planned."""


class DipSystem(System):
    """DIP on the example's model, with weights, optimizer and data of its own."""

    def __init__(
        self, schedule: SchedulePlan, example: Example, settings: RunSettings, warmed_by: DipSystem | None = None
    ) -> None:
        """Args:
        warmed_by: an earlier system of the same cut, whose measurements this one starts from.
        """
        spec = example.config.model.modules
        ranks = settings.parallel.pipeline
        self.partition = schedule.partition or example.config.given_partition(ranks) or even_partition(
            spec, ranks, example.config.virtual_pipeline, example.config.sub_microbatch_size
        )
        model = build_dip_model(
            whole_model(example, settings), self.partition, overlap_grad_reduce=settings.overlap_grad_reduce,
            distributed_optimizer=settings.distributed_optimizer,
        )
        assert model.staged is not None
        self._schedule = schedule
        self._model_spec = spec
        device = torch.device("cpu") if settings.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
        analytic = AnalyticCost(
            spec, settings.parallel, Training(dtype="fp32", distributed_optimizer=settings.distributed_optimizer),
            _rough_device(settings.device),
        )
        self._bytes = {module.name: _bytes_per_token(analytic, module.name) for module in spec.modules}
        self._costs: CostModel = analytic
        self.profile: Profile | None = None
        """What the planner rank measured so far."""
        self._measured: deque[list[StageSample]] = deque(maxlen=KEPT_ITERATIONS)
        self._slowdowns: deque[float] = deque(maxlen=SPEED_ITERATIONS)
        """Of the planner rank's stages against ``_costs``."""
        self._waitings: deque[float] = deque(maxlen=WAITING_ITERATIONS)
        self._iterations = 0
        if warmed_by is not None:
            assert warmed_by.partition == self.partition, "measured on another cut"
            self._costs, self.profile, self._iterations = warmed_by._costs, warmed_by.profile, warmed_by._iterations
            self._measured.extend(warmed_by._measured)
            self._slowdowns.extend(warmed_by._slowdowns)
            self._waitings.extend(warmed_by._waitings)
        if schedule.profile is not None:
            self.profile = load_profile(schedule.profile)
            check_measured(spec, self.profile, "--profile")
            self._costs = ProfileCost(self.profile, field="--profile")
        self.forward_backward = DipForwardBackward(
            staged_model=model.staged, chunks=model.chunks, partition=self.partition,
            settings=IterationSettings(
                metadata=model.staged.description.item_metadata, plan_function=self._plan, quick_plan_function=self._quick_plan,
                device=device, backend="gloo" if settings.device == "cpu" else "nccl", timeout_s=settings.timeout_s,
                balance=self._work if settings.parallel.data > 1 and settings.balance != "off" else None,
            ),
        )
        self._model_spec = describe_built_model(
            spec, self.partition, model.staged.chunk_keys, model.chunks, self.forward_backward.groups
        ).spec
        self._p2p: PointToPoint
        if warmed_by is not None:
            self._p2p = warmed_by._p2p
        elif settings.device == "cpu":
            self._p2p = measure_p2p(self.forward_backward.groups)
        else:  # What gloo takes on the host says nothing about NCCL.
            self._p2p = PointToPoint(latency_ns=analytic.p2p_latency_ns, bytes_per_second=analytic.p2p_bytes_per_second)
        self._training_plan: Plan | None = None
        self._own_records: list[StageRecord] = []
        self._records: list[list[StageRecord]] | None = None
        self._is_gathered = False
        self._clock_offset_ns: int | None = None
        super().__init__(schedule.label, model, example, settings)

    def _plan(self, microbatches: Sequence[Microbatch], forward_only: bool) -> Plan:
        options = PlanOptions(
            time_budget_s=self._schedule.plan_s, seed=self.settings.seed, strategy="none", forward_only=forward_only,
            split_backward=self._schedule.split_backward and not forward_only,
            hardware_queues=hardware_queues() if self.settings.device == "cuda" else None,
        )
        return plan_iteration(self._model_spec, self.partition, microbatches, self.current_costs(), options)

    def _quick_plan(self, microbatches: Sequence[Microbatch], forward_only: bool) -> Plan:
        options = PlanOptions(
            evaluations=1, search="fifo", strategy="none", forward_only=forward_only,
            split_backward=self._schedule.split_backward and not forward_only,
            hardware_queues=hardware_queues() if self.settings.device == "cuda" else None,
        )
        return plan_iteration(self._model_spec, self.partition, microbatches, self.current_costs(), options)

    def _work(self, microbatches: Sequence[Microbatch]) -> NDArray[np.int64]:
        return WorkEstimate(self._model_spec, self.partition, self.current_costs()).of(microbatches)

    def start_data(self, iteration: int) -> None:
        self.data = LookaheadIterator(self._stream(iteration))

    def run(self, step: Any, *, forward_only: bool, items: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        length = self.example.config.model.sequence_length
        reports = self.forward_backward(
            forward_step_func=step, data_iterator=self.data if items is None else iter(items), model=self.model.chunks,
            num_microbatches=self.microbatches_of_replica if items is None else len(items), seq_length=length, micro_batch_size=1,
            forward_only=forward_only,
        )
        if not forward_only:
            self._iterations += 1
            self._training_plan = self.forward_backward.plan
            self._own_records = self.forward_backward.records()
            self._is_gathered = False
        return reports

    def after_step(self) -> None:
        measured = self._iterations - SKIPPED
        if self._schedule.profile is not None or measured < 1:
            return
        if measured <= PROFILED_FIRST or measured % PROFILED_EVERY == 0:
            self._refresh_profile()
        if self.forward_backward.is_planner and self.profile is not None:
            assert self._training_plan is not None
            self._slowdowns.append(slowdown(stage_samples(self._training_plan, [self._own_records], self.partition), self._costs))
            spans = {record.stage: (record.start_ns, record.end_ns) for record in self._own_records}
            self._waitings.append(waiting(self._training_plan, self.forward_backward.groups.rank, spans))

    def _refresh_profile(self) -> None:
        """Fits the profile to the last measured iterations; all ranks of the replica must call it together."""
        records = self._gather()
        if records is None or not self.forward_backward.is_planner:
            return
        assert self._training_plan is not None
        self._measured.append(stage_samples(self._training_plan, records, self.partition))
        spans = {record.stage: (record.start_ns, record.end_ns) for of_rank in records for record in of_rank}
        excess = message_excess_ns(self._training_plan, spans)
        if excess is not None and self.profile is not None:
            # Half of it: the plan at hand may have been made before the last correction.
            latency_ns = max(0.0, self._p2p.latency_ns + excess / 2)
            self._p2p = PointToPoint(latency_ns=latency_ns, bytes_per_second=self._p2p.bytes_per_second)
        self.profile = fit_profile(
            [sample for iteration in self._measured for sample in iteration],
            {module.name: module.num_layers for module in self._model_spec.modules}, self._bytes, self._p2p,
        )
        if all(module.name in self.profile.modules for module in self._model_spec.modules):
            self.use_profile(self.profile)

    def _gather(self) -> list[list[StageRecord]] | None:
        """The last training iteration's records; pipeline rank 0 of each replica gets them. All ranks must call it together."""
        if not self._is_gathered:
            if self._clock_offset_ns is None:
                self._clock_offset_ns = clock_offset(self.forward_backward.groups)
            self._records = gather_records(self._own_records, self.forward_backward.groups, self._clock_offset_ns)
            self._is_gathered = True
        return self._records

    def use_profile(self, profile: Profile) -> None:
        """Plans with these costs from now on, until more is measured."""
        self.profile, self._costs = profile, ProfileCost(profile)
        self._slowdowns.clear()
        self.forward_backward.forget_plans()

    def current_costs(self) -> CostModel:
        """What the next plan will be made with (of this rank: the planner rank's is the measured one)."""
        slower, waits = list(self._slowdowns), list(self._waitings)
        return SlowedCost(self._costs, statistics.median(slower) * max(1.0, statistics.median(waits))) if slower else self._costs

    def warnings(self) -> list[str]:
        """How far the first iterations' batches lie outside of what a given profile measured."""
        if self._schedule.profile is None or self.profile is None:
            return []
        assert self.model.staged is not None
        describe = self.model.staged.description.item_metadata
        microbatches = [
            describe(item)
            for i in range(_LOOKED_THROUGH) for item in self.example.dataset.microbatches(i, self.settings.num_microbatches)
        ]
        return outside_profile(self.profile, microbatches, self.partition.sub_microbatch_size)

    def last_plan(self) -> Plan | None:
        return self._training_plan

    def late_plans(self) -> int:
        counts = self.forward_backward.counts()
        return 0 if counts is None else sum(counts.fallbacks.values())

    def balance(self) -> BalanceRecord | None:
        figures = self.forward_backward.balance_figures()
        return None if figures is None else BalanceRecord(**dataclasses.asdict(figures))

    def timeline(self, title: str) -> Timeline | None:
        plan, records = self._training_plan, self._gather()
        if plan is None or records is None:
            return None
        bars = [
            _bar(plan.stages[record.stage], record.start_ns, record.end_ns) for of_rank in records for record in of_rank
        ]
        return measured_timeline(bars, title, plan.ranks)

    def write_timelines(self, folder: Path) -> None:
        super().write_timelines(folder)
        if dist.get_rank() == 0 and self._training_plan is not None:
            save(folder / "plan.json", self._training_plan)
            save(folder / "planned.json", plan_timeline(self._training_plan, f"{self.label}, planned"))
            if self.profile is not None:
                save(folder / "profile.json", self.profile)


def _rough_device(device: str) -> str:
    """The named device whose costs the first iterations are planned with; for a GPU without figures the nearest there is."""
    if device == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return max((known for known in device_names() if known.lower() in name), key=len, default="a100")


def _bytes_per_token(costs: AnalyticCost, module: str) -> PartBytes:
    lengths = [64]
    layer, last = costs.part(module, "layer", lengths), costs.part(module, "last", lengths)
    return PartBytes(activation=layer.activation_bytes / 64, boundary=layer.boundary_bytes / 64, output=last.boundary_bytes / 64)


def stage_samples(plan: Plan, records: Sequence[Sequence[StageRecord]], partition: Partition) -> list[StageSample]:
    split = any(stage.kind == "w" for stage in plan.stages)
    samples = []
    for of_rank in records:
        for record in of_rank:
            stage = plan.stages[record.stage]
            samples.append(
                StageSample(
                    module=stage.module, kind=stage.kind, num_layers=stage.layers[1], has_first=stage.vp_stage == 0 and stage.rank == 0,
                    has_last=stage.vp_stage == partition.num_chunks(stage.module) - 1 and stage.rank == plan.ranks - 1,
                    instances=stage.instances, tokens=stage.tokens, split=split, duration_ns=record.end_ns - record.start_ns,
                )
            )
    return samples


def _bar(stage: PlanStage, start: int, end: int) -> Bar:
    return Bar(
        rank=stage.rank, kind=stage.kind, module=stage.module, vp_stage=stage.vp_stage, microbatch=stage.microbatch,
        sub_microbatch=stage.sub_microbatch, start=start, end=end,
    )


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
