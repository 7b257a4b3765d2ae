"""A model under DIP: plans made one iteration ahead from costs that are measured while it trains.

The first iterations are planned from a rough analytic cost of the device. Every rank's stage times are gathered behind each of them and
the profile fitted to these replaces the analytic cost; later iterations refresh it now and then. All ranks are busy while they are
measured, which is what the plans are for. With a profile that was measured before (``SchedulePlan.profile``) every plan is made with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from numpy.typing import NDArray

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.coverage import outside_profile
from megatron_dip.cost.device import device_names
from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.iteration.built_model import describe_built_model
from megatron_dip.iteration.cut_review import CutReview
from megatron_dip.iteration.feedback import CostFeedback, measure_p2p
from megatron_dip.iteration.forward_backward import DipForwardBackward, IterationSettings
from megatron_dip.iteration.index_deals import IndexDeals
from megatron_dip.iteration.lookahead import LookaheadIterator
from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.work import WorkEstimate
from megatron_dip.planner.budget import SearchBudget
from megatron_dip.planner.iteration import PlanOptions, plan_columns
from megatron_dip.planner.service import PlanCounts
from megatron_dip.runtime.startup import hardware_queues
from megatron_dip.runtime.timing import StageRecord, clock_offset, gather_records
from megatron_dip.spec.codec import load_profile, save
from megatron_dip.spec.plan import Plan, PlanStage
from megatron_dip.spec.plan_columns import PlanColumns
from megatron_dip.spec.profile import Profile
from megatron_dip.spec.timeline import Bar, Timeline, plan_timeline
from megatron_dip.spec.training import BalanceRecord, RunSettings, SchedulePlan
from megatron_dip.spec.workload import Microbatch, Training, check_measured
from megatron_dip.trainer.build import build_dip_model
from megatron_dip.trainer.cut import auto_partition, cut_review
from megatron_dip.trainer.systems import Example, System, measured_timeline, whole_model

_LOOKED_THROUGH = 8
"""Iterations whose batches are held against the range of a given profile."""


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
        given: Profile | None = None
        if schedule.profile is not None:
            given = load_profile(schedule.profile)
            check_measured(spec, given, "--profile")
        analytic = AnalyticCost(
            spec, settings.parallel, Training(dtype="fp32", distributed_optimizer=settings.distributed_optimizer),
            _rough_device(settings.device),
        )
        costs: CostModel = analytic if given is None else ProfileCost(given, field="--profile")
        if schedule.partition is None and schedule.auto_partition:
            self.partition = auto_partition(example, settings, costs)
        else:
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
        self._budget = SearchBudget(schedule.plan_s)
        self._index_deals: IndexDeals | None = None
        """Where every replica takes what it is dealt from the data set."""
        if settings.parallel.data > 1 and settings.balance in ("auto", "indices"):
            self._index_deals = IndexDeals(self._given_work, settings.parallel.data)
        self._measured_imbalance = 1.0
        self.forward_backward = DipForwardBackward(
            staged_model=model.staged, chunks=model.chunks, partition=self.partition,
            settings=IterationSettings(
                metadata=model.staged.description.item_metadata, plan_function=self._plan,
                quick_plan_function=None if schedule.deterministic else self._quick_plan,
                device=device, backend="gloo" if settings.device == "cpu" else "nccl", timeout_s=settings.timeout_s,
                # A deal that comes late is left out, which is the clock's decision.
                balance=self._work if settings.parallel.data > 1 and settings.balance == "exchange" and not schedule.deterministic else None,
                budget=self._budget, search_ranks="one" if schedule.deterministic else "auto", seed=settings.seed, iteration=lambda: self.scheduler.num_steps,
            ),
        )
        self._model_spec = describe_built_model(
            spec, self.partition, model.staged.chunk_keys, model.chunks, self.forward_backward.groups
        ).spec
        self._given_costs = costs
        """The same on all ranks, whatever they measure."""
        self.feedback = CostFeedback(
            groups=self.forward_backward.groups, partition=self.partition, model=self._model_spec,
            costs=costs,
            # What gloo takes on the host says nothing about NCCL.
            p2p=measure_p2p(self.forward_backward.groups) if settings.device == "cpu" and warmed_by is None and given is None else None,
            profile=given, forget=self.forward_backward.forget_plans, is_planner=self.forward_backward.is_planner,
            read_every_iteration=settings.device == "cpu",
        )
        if warmed_by is not None and given is None:
            self.feedback.take_over(warmed_by.feedback)
        self._review: CutReview | None = None
        """Of the cut, on the rank that does it."""
        if schedule.auto_partition and schedule.profile is None and not schedule.deterministic and dist.get_rank() == 0:
            self._review = cut_review(example, settings, self.partition, self._model_spec, self.feedback)
        self._training_plan: Plan | None = None
        self._own_records: list[StageRecord] = []
        self._records: list[list[StageRecord]] | None = None
        self._is_gathered = False
        self._clock_offset_ns: int | None = None
        super().__init__(schedule.label, model, example, settings)

    def _plan(self, microbatches: Sequence[Microbatch], forward_only: bool) -> PlanColumns:
        options = PlanOptions(
            time_budget_s=None if self._schedule.evaluations is not None else self._budget.seconds(), evaluations=self._schedule.evaluations,
            seed=self.settings.seed, strategy="none", forward_only=forward_only, schedule=self._schedule.order,
            split_backward=self._schedule.split_backward and not forward_only,
            hardware_queues=hardware_queues() if self.settings.device == "cuda" else None,
            is_needed=None if self._schedule.evaluations is not None else self._budget.is_needed,
        )
        return plan_columns(
            self._model_spec, self.partition, microbatches, self.current_costs(), options, search=self.forward_backward.search
        )

    def _quick_plan(self, microbatches: Sequence[Microbatch], forward_only: bool) -> PlanColumns:
        options = PlanOptions(
            evaluations=1, search="fifo", strategy="none", forward_only=forward_only, schedule=self._schedule.order,
            split_backward=self._schedule.split_backward and not forward_only,
            hardware_queues=hardware_queues() if self.settings.device == "cuda" else None,
        )
        return plan_columns(self._model_spec, self.partition, microbatches, self.current_costs(), options)

    def _work(self, microbatches: Sequence[Microbatch]) -> NDArray[np.int64]:
        return WorkEstimate(self._model_spec, self.partition, self.current_costs()).of(microbatches)

    def _given_work(self, microbatches: Sequence[Microbatch]) -> NDArray[np.int64]:
        return WorkEstimate(self._model_spec, self.partition, self._given_costs).of(microbatches)

    def _own_share(self, items: list[Any]) -> list[Any]:
        if self._index_deals is None:
            return super()._own_share(items)
        assert self.model.staged is not None
        describe = self.model.staged.description.item_metadata
        return [items[number] for number in self._index_deals.shares([describe(item) for item in items])[parallel_state.get_data_parallel_rank()]]

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
            self._training_plan = self.forward_backward.plan
            self._own_records = self.forward_backward.records()
            self._is_gathered = False
        return reports

    def after_step(self) -> None:
        if self._index_deals is not None:
            self._measured_imbalance = self.forward_backward.measured_imbalance()
        if self._schedule.profile is None and not self._schedule.deterministic:
            assert self._training_plan is not None
            self.feedback.after_iteration(self._training_plan, lambda: self._own_records)
        if self._review is not None:
            batch = self.forward_backward.last_batch()
            assert batch is not None, "an iteration ran without a plan"
            self._review.after_iteration(batch)

    def end(self) -> None:
        if self._review is not None:
            self._review.begin_last()
            self._review.finish()

    @property
    def profile(self) -> Profile | None:
        """What the planner rank measured so far, or what it was given."""
        return self.feedback.profile

    def _gather(self) -> list[list[StageRecord]] | None:
        """The last training iteration's records; pipeline rank 0 of each replica gets them. All ranks must call it together."""
        if not self._is_gathered:
            if self._clock_offset_ns is None:
                self._clock_offset_ns = clock_offset(self.forward_backward.groups)
            self._records = gather_records(self._own_records, self.forward_backward.groups, self._clock_offset_ns)
            self._is_gathered = True
        return self._records

    def current_costs(self) -> CostModel:
        """What the next plan will be made with (of this rank: the planner rank's is the measured one)."""
        return self.feedback.current_costs()

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

    def plan_counts(self) -> PlanCounts | None:
        return self.forward_backward.counts()

    def balance(self) -> BalanceRecord | None:
        figures = self.forward_backward.balance_figures() if self._index_deals is None else self._index_deals.figures(self._measured_imbalance)
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


def _bar(stage: PlanStage, start: int, end: int) -> Bar:
    return Bar(
        rank=stage.rank, kind=stage.kind, module=stage.module, vp_stage=stage.vp_stage, microbatch=stage.microbatch,
        sub_microbatch=stage.sub_microbatch, start=start, end=end,
    )
