"""What is said of an iteration that ran: the log line about planning, scalars in Megatron's TensorBoard and W&B, and traces for
``megatron-dip trace``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core import parallel_state

from megatron_dip.hooks.build import BuiltModel
from megatron_dip.iteration.balance import BalanceFigures
from megatron_dip.iteration.forward_backward import DipForwardBackward
from megatron_dip.iteration.memory_in_use import memory_words
from megatron_dip.iteration.planning_figures import PlanningFigures, planning_figures, tell_last_rank
from megatron_dip.program.one_queue import one_queue_makespan
from megatron_dip.runtime.startup import hardware_queues
from megatron_dip.runtime.timing import StageRecord
from megatron_dip.spec.codec import save
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.timeline import Bar, Timeline


def report(built: BuiltModel, forward_backward: DipForwardBackward) -> None:
    """Writes the iteration's traces, scalars and log line, as the flags ask for; to be called on all ranks. The first replica speaks."""
    options, plan, iteration = built.options, forward_backward.plan, running_iteration(built)
    planning_ns = 0 if plan is None or plan is built.last_plan else plan.planning_ns  # the plan of an equal batch is taken again
    built.last_plan = plan
    if plan is None:
        return
    if options.trace_dir is not None:
        records = forward_backward.gather_records()
        if records is not None and forward_backward.is_planner and not parallel_state.get_data_parallel_rank():
            options.trace_dir.mkdir(parents=True, exist_ok=True)
            save(options.trace_dir / f"iteration_{iteration:06d}_plan.json", plan)
            save(options.trace_dir / f"iteration_{iteration:06d}_measured.json", _measured(plan, records, f"iteration {iteration}, measured"))
    says_line = options.log_interval > 0 and iteration % options.log_interval == 0
    writes = writes_scalars(built.args, iteration)
    if not (says_line or writes):
        return
    measured = forward_backward.measured()
    imbalance = forward_backward.measured_imbalance() if says_line else 1.0
    figures: PlanningFigures | None = None
    if forward_backward.is_planner:
        counts = forward_backward.counts()
        assert counts is not None, "a planner rank counts its plans"
        drift = 1.0 if built.feedback is None else built.feedback.drift
        shared = forward_backward.shared_search
        figures = planning_figures(plan, planning_ns, measured, counts, 0 if shared is None else shared.figures().won_elsewhere, drift)
        if says_line and not parallel_state.get_data_parallel_rank():
            balance = forward_backward.balance_figures() if built.index_deals is None else built.index_deals.figures(imbalance)
            memory = "" if forward_backward.memory is None else memory_words(forward_backward.memory)
            print(_line(iteration, plan, figures) + _balance_words(balance) + memory, flush=True)
    if writes:
        told = tell_last_rank(figures, forward_backward.groups)
        if told is not None:
            write_scalars(told, iteration)


def writes_scalars(args: Any, iteration: int) -> bool:
    """Whether Megatron's last rank writes scalars of this iteration to TensorBoard or W&B; the same on all ranks."""
    wanted = getattr(args, "tensorboard_dir", None) or getattr(args, "wandb_project", None)
    return bool(wanted) and iteration % int(getattr(args, "tensorboard_log_interval", 1)) == 0


def write_scalars(figures: PlanningFigures, iteration: int) -> None:
    """Through the writers that Megatron has made on this rank, beside its own scalars."""
    from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

    scalars = figures.scalars()
    if (tensorboard := get_tensorboard_writer()) is not None:
        for name, value in scalars.items():
            tensorboard.add_scalar(name, value, iteration)
    if (wandb := get_wandb_writer()) is not None:
        wandb.log(scalars, iteration)


def _line(iteration: int, plan: Plan, figures: PlanningFigures) -> str:
    on_one_queue = f" (on one hardware queue: {one_queue_makespan(plan) / 1e6:.1f})" if hardware_queues() == 1 else ""
    return (
        f" [DIP] iteration {iteration:8d} | planned (ms): {1e3 * figures.planned_time:.1f}{on_one_queue} | measured (ms): "
        f"{1e3 * figures.measured_time:.1f} | bubbles planned: {figures.planned_bubbles:.1%} measured: {figures.measured_bubbles:.1%} | "
        f"planning (ms): {1e3 * figures.planning_time:.1f} | evaluations: {figures.evaluations:.0f} | "
        f"searches won by other ranks so far: {figures.searches_won_elsewhere:.0f} | "
        f"waited for plans so far (ms): {1e3 * figures.waited_time:.1f} | plans late so far: {figures.late_plans:.0f} | "
        f"plans replaced so far: {figures.replaced_plans:.0f} | drift: {figures.drift:.2f} | "
        f"batches not seen ahead: {figures.unseen_batches:.0f} | batches foreseen otherwise: {figures.batches_foreseen_otherwise:.0f}"
    )


def _balance_words(figures: BalanceFigures | None) -> str:
    if figures is None:
        return ""
    left = ", ".join(f"{reason} {count}" for reason, count in sorted(figures.left.items()))
    planned = "" if figures.planned_imbalance is None else f" planned: {figures.planned_imbalance:.3f}"
    return (
        f" | slowest replica over mean as read: {figures.imbalance_before:.3f} dealt: {figures.imbalance:.3f}{planned} measured: "
        f"{figures.measured_imbalance:.3f} | so far batches dealt: {figures.dealt} left as read: {left or 'none'} moves: {figures.moves} "
        f"sent (MB): {figures.bytes_sent / 1e6:.1f} in (s): {figures.seconds:.2f}"
    )


def running_iteration(built: BuiltModel) -> int:
    """As Megatron's training loop counts it, from 1; in another loop, as counted here."""
    try:
        from megatron.training import get_args

        return int(get_args().curr_iteration) + 1
    except (ImportError, AssertionError):  # not installed; no arguments parsed
        return built.iterations


def _measured(plan: Plan, records: Sequence[Sequence[StageRecord]], title: str) -> Timeline:
    stages = [(plan.stages[record.stage], record) for of_rank in records for record in of_rank]
    origin = min(record.start_ns for _, record in stages)
    return Timeline(title=title, ranks=plan.ranks, bars=[
        Bar(
            rank=stage.rank, kind=stage.kind, module=stage.module, vp_stage=stage.vp_stage, microbatch=stage.microbatch,
            sub_microbatch=stage.sub_microbatch, start=record.start_ns - origin, end=record.end_ns - origin,
        )
        for stage, record in stages
    ])
