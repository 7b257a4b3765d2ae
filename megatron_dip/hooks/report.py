"""What is said of an iteration that ran: the log line about planning, and traces for ``megatron-dip trace``."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core import parallel_state

from megatron_dip.hooks.build import BuiltModel
from megatron_dip.iteration.balance import BalanceFigures
from megatron_dip.iteration.forward_backward import DipForwardBackward
from megatron_dip.iteration.memory_in_use import memory_words
from megatron_dip.program.one_queue import one_queue_makespan
from megatron_dip.runtime.startup import hardware_queues
from megatron_dip.runtime.timing import StageRecord
from megatron_dip.spec.codec import save
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.timeline import Bar, Timeline


def report(built: BuiltModel, forward_backward: DipForwardBackward) -> None:
    """Writes the iteration's traces and its log line, as the flags ask for. The first replica speaks."""
    options, plan, iteration = built.options, forward_backward.plan, running_iteration(built)
    planning_ns = 0 if plan is None or plan is built.last_plan else plan.planning_ns  # the plan of an equal batch is taken again
    built.last_plan = plan
    due = options.log_interval > 0 and iteration % options.log_interval == 0
    if plan is None or not (due or options.trace_dir is not None):
        return
    records, imbalance = forward_backward.gather_records(), forward_backward.measured_imbalance()
    if records is None or not forward_backward.is_planner or parallel_state.get_data_parallel_rank():
        return
    measured = _measured(plan, records, f"iteration {iteration}, measured")
    if options.trace_dir is not None:
        options.trace_dir.mkdir(parents=True, exist_ok=True)
        save(options.trace_dir / f"iteration_{iteration:06d}_plan.json", plan)
        save(options.trace_dir / f"iteration_{iteration:06d}_measured.json", measured)
    if due:
        counts = forward_backward.counts()
        assert counts is not None, "the rank that gathers records is the one that plans"
        figures = forward_backward.balance_figures() if built.index_deals is None else built.index_deals.figures(imbalance)
        on_one_queue = f" (on one hardware queue: {one_queue_makespan(plan) / 1e6:.1f})" if hardware_queues() == 1 else ""
        print(
            f" [DIP] iteration {iteration:8d} | planned (ms): {plan.claimed_makespan / 1e6:.1f}{on_one_queue} | measured (ms): "
            f"{measured.makespan / 1e6:.1f} | bubbles planned: {plan.bubble_fraction:.1%} measured: {measured.bubble_fraction:.1%} | "
            f"planning (ms): {planning_ns / 1e6:.1f} | waited for plans so far (ms): {counts.waited_ns / 1e6:.1f} | "
            f"plans replaced so far: {sum(counts.fallbacks.values())} | "
            f"batches not seen ahead: {counts.unseen} | batches foreseen otherwise: {counts.foreseen_otherwise}"
            + _balance_words(figures)
            + ("" if forward_backward.memory is None else memory_words(forward_backward.memory)),
            flush=True,
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
