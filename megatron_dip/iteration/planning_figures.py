"""What planning came to in one iteration: gathered from the replica, told to the rank that writes.

In: the plan that ran, when each rank's stages did, the planner rank's counters. Out: :class:`PlanningFigures`, on the planner rank of
each replica, and those of the first replica on the job's last rank, where Megatron keeps its TensorBoard and W&B writers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import torch
import torch.distributed as dist

from megatron_dip.planner.service import LATE, PlanCounts
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.timing import StageRecord
from megatron_dip.spec.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanningFigures:
    """Times in seconds; counts since the start of this process."""

    planned_time: float
    """The plan's makespan."""
    measured_time: float
    """From the first stage's start to the last one's end, on any rank."""
    planned_bubbles: float
    """Share of the makespan in which ranks are idle; likewise measured."""
    measured_bubbles: float
    planning_time: float
    """Of this iteration's plan; 0 where it was taken once more."""
    evaluations: float
    """Schedules that were tried for the plan."""
    waited_time: float
    """That training waited for plans, in all."""
    late_plans: float
    """Plans that were not ready in time."""
    replaced_plans: float
    """Quick plans that ran instead of others, late ones among them."""
    unseen_batches: float
    """Batches whose metadata were not read ahead."""
    batches_foreseen_otherwise: float
    """Batches that came with other metadata than were read ahead."""
    searches_won_elsewhere: float
    """Searches that another rank than the planner's won, of those that all ranks took part in."""
    drift: float
    """How many times as long stages take now as when the run began."""

    def scalars(self) -> dict[str, float]:
        """Name in TensorBoard and W&B -> value."""
        return {f"dip/{field.name.replace('_', '-')}": float(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, slots=True)
class MeasuredIteration:
    """The stages of all pipeline ranks, in sum."""

    makespan_ns: int
    bubble_fraction: float


def measure_iteration(records: Sequence[StageRecord], groups: PipelineGroups, clock_offset_ns: int) -> MeasuredIteration:
    """On all ranks of the replica, which must call it together; much less to send than the records themselves.

    Args:
        records: of this rank's stages.
        clock_offset_ns: to be added to this rank's clock.
    """
    start = min((record.start_ns for record in records), default=None)
    mine = torch.tensor([
        groups.rank, start is not None, 0 if start is None else start + clock_offset_ns,
        max((record.end_ns for record in records), default=0) + clock_offset_ns, sum(record.end_ns - record.start_ns for record in records),
    ])
    rows = [torch.empty_like(mine) for _ in groups.control_ranks]
    dist.all_gather(rows, mine, group=groups.control)
    # One tensor-parallel rank stands for each pipeline rank.
    of_rank = {row[0]: row[1:] for row in reversed([row.tolist() for row in rows])}
    spans = [row for row in of_rank.values() if row[0]]
    makespan = max((row[2] for row in spans), default=0) - min((row[1] for row in spans), default=0)
    busy = sum(row[3] for row in spans)
    return MeasuredIteration(makespan, 1.0 - busy / (groups.num_ranks * makespan) if makespan else 0.0)


def planning_figures(
    plan: Plan, planning_ns: int, measured: MeasuredIteration, counts: PlanCounts, won_elsewhere: int, drift: float
) -> PlanningFigures:
    """Of a planner rank."""
    return PlanningFigures(
        planned_time=plan.claimed_makespan / 1e9, measured_time=measured.makespan_ns / 1e9, planned_bubbles=plan.bubble_fraction,
        measured_bubbles=measured.bubble_fraction, planning_time=planning_ns / 1e9, evaluations=plan.evaluations,
        waited_time=counts.waited_ns / 1e9, late_plans=counts.fallbacks.get(LATE, 0), replaced_plans=sum(counts.fallbacks.values()),
        unseen_batches=counts.unseen, batches_foreseen_otherwise=counts.foreseen_otherwise,
        searches_won_elsewhere=won_elsewhere, drift=drift,
    )


def tell_last_rank(figures: PlanningFigures | None, groups: PipelineGroups) -> PlanningFigures | None:
    """The figures of the first replica's planner rank on the job's last rank; None on all others. All ranks must call it together.

    Args:
        figures: on planner ranks; None elsewhere.
    """
    last = dist.get_world_size() - 1
    values = torch.zeros(len(fields(PlanningFigures)), dtype=torch.float64)
    if figures is not None:
        values = torch.tensor(astuple(figures), dtype=torch.float64)
    if len(groups.control_ranks) > 1:
        dist.broadcast(values, groups.control_ranks[0], group=groups.control)
    if groups.peers is not None and last in groups.replica_of:
        dist.broadcast(values, min(groups.replica_of), group=groups.peers)  # the lowest global rank is the first replica's
    if dist.get_rank() != last:
        return None
    return PlanningFigures(**{field.name: value for field, value in zip(fields(PlanningFigures), values.tolist(), strict=True)})
