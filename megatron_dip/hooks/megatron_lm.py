"""What the patched Megatron-LM calls: chunks instead of one model, one look-ahead iterator, DIP's schedule.

The order of calls is Megatron's: :func:`install_schedule` while arguments are validated, :func:`build_model_chunks` instead of the
stock model building (Megatron then wraps every chunk), :func:`build_data_iterators`, and for every iteration the function that
``get_forward_backward_func`` gives. Models that were not built here run under the stock schedule.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.module import MegatronModule
from numpy.typing import NDArray

from megatron_dip.cost.interface import CostModel
from megatron_dip.hooks.build import BuiltModel, build_chunks, built_model
from megatron_dip.hooks.costs import costs_file, kept_costs, run_costs
from megatron_dip.hooks.cut import fixed_choices, run_key
from megatron_dip.hooks.data import build_data_iterators, upcoming_microbatches
from megatron_dip.hooks.rehearsal import Rehearsal
from megatron_dip.hooks.report import report, running_iteration
from megatron_dip.iteration.built_model import describe_built_model
from megatron_dip.iteration.cut_review import CutReview
from megatron_dip.iteration.feedback import CostFeedback, measure_p2p
from megatron_dip.iteration.forward_backward import DipForwardBackward, IterationSettings
from megatron_dip.iteration.memory_in_use import least_device_memory, stage_bytes
from megatron_dip.models.capture import CapturedCall
from megatron_dip.models.deferral import can_split, check_split
from megatron_dip.models.description import LANGUAGE
from megatron_dip.models.staged import DescribedStagedModel
from megatron_dip.partition.work import WorkEstimate
from megatron_dip.planner.budget import FIRST_S, SearchBudget
from megatron_dip.planner.iteration import LOWER_PEAKS_COST, PlanOptions, plan_columns
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.startup import hardware_queues
from megatron_dip.schedule.backward import SplitBackward
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.plan_columns import PlanColumns
from megatron_dip.spec.workload import Microbatch

__all__ = ["build_data_iterators", "build_model_chunks", "dip_schedule", "install_schedule"]

_QUICK_EVALUATIONS = 1


def install_schedule() -> None:
    """Makes ``get_forward_backward_func`` give DIP's schedule, in front of the stock one."""
    schedules._forward_backward_func_override = dip_schedule  # type: ignore[attr-defined]


def build_model_chunks(
    model_provider: Callable[..., MegatronModule], model_type: Any, config: Any, pg_collection: Any
) -> list[torch.nn.Module]:
    """What Megatron's ``get_model`` builds instead of one model; see :func:`megatron_dip.hooks.build.build_chunks`."""
    from megatron.training import get_args

    return build_chunks(get_args(), model_provider, model_type, config, pg_collection)


def dip_schedule(stock: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """What ``get_forward_backward_func`` gives: DIP for a model that was cut here, else the stock function."""

    def forward_backward(**arguments: Any) -> list[Any]:
        model = arguments["model"]
        chunks = list(model) if isinstance(model, list) else [model]
        built = built_model(chunks)
        if built is None:
            return stock(**arguments)
        if arguments.get("collect_non_loss_data") and parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise InputError(
                "process_non_loss_data_func", True, "Megatron's evaluation asks the last rank alone for it, and a pipeline needs all of its ranks",
                "leave it out of the script's call of pretrain(), or use one pipeline rank; the stock schedules would wait without end",
            )
        if built.forward_backward is None:
            built.forward_backward = _start(built, chunks)
        if built.rehearsal is not None:
            built.rehearsal.before_iteration(arguments["forward_step_func"], arguments["data_iterator"], arguments["num_microbatches"])
        losses = built.forward_backward(**arguments)
        if not arguments["forward_only"]:
            built.iterations += 1
            if built.feedback is not None:
                plan = built.forward_backward.plan
                assert plan is not None, "an iteration ran without a plan"
                built.feedback.after_iteration(plan, built.forward_backward.records)
            if built.rehearsal is not None:
                built.rehearsal.after_iteration()
            if built.review is not None:
                _review_cut(built, built.review, built.forward_backward)
            report(built, built.forward_backward)
        return losses

    return forward_backward


def _review_cut(built: BuiltModel, review: CutReview, forward_backward: DipForwardBackward) -> None:
    batch = forward_backward.last_batch()
    assert batch is not None, "an iteration ran without a plan"
    review.after_iteration(batch)
    iteration, train_iters = running_iteration(built), getattr(built.args, "train_iters", None)
    interval = getattr(built.args, "exit_interval", None)
    if (train_iters is not None and iteration >= train_iters) or (interval and iteration % interval == 0):
        review.begin_last()


def _timeout_s() -> float:
    """Megatron's ``--distributed-timeout-minutes``, or its default in another training loop."""
    try:
        from megatron.training import get_args

        return 60.0 * get_args().distributed_timeout_minutes
    except (ImportError, AssertionError, AttributeError):  # not installed; no arguments parsed
        return 600.0


def _deals_indices(built: BuiltModel) -> bool:
    """Whether ranks that read data deal indices; collective over all ranks.

    Raises InputError, on all ranks, where they would not all compute the same deals: samples would be lost.
    """
    deals = built.index_deals
    mine = (built.options.balance, None if deals is None else deals.fingerprint([module.name for module in built.description.model_spec.modules]))
    every = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, mine)
    remedy = "give all ranks the same flags, files and data"
    if len({mode for mode, _ in every}) > 1:
        raise InputError("--dip-balance", [mode for mode, _ in every], "differs between ranks, in their order", remedy)
    estimates = {estimate for _, estimate in every if estimate is not None}
    if len(estimates) > 1:
        raise InputError("--dip-balance", "indices", f"the ranks estimate the work of samples in {len(estimates)} ways and would deal differently", remedy)
    return bool(estimates)


def _start(built: BuiltModel, chunks: list[torch.nn.Module]) -> DipForwardBackward:
    """Makes the run's forward_backward function and costs.

    Long since the functions that it hands in refer to what is made behind them (costs, memory, feedback), and are all short.
    """
    options, description = built.options, built.description
    side_by_side = max(1, min(options.look_ahead, options.planner_threads))
    """Plans being made at a time."""
    queues = hardware_queues()
    staged = DescribedStagedModel(description, dict(zip(built.keys, chunks, strict=True)), host_memory_bytes=options.host_memory_bytes)

    budget = SearchBudget(options.time_budget_s, side_by_side)

    def plan(microbatches: Sequence[Microbatch], forward_only: bool) -> PlanColumns:
        partition, split = built.partition, splits
        if built.rehearsal is not None:
            form = built.rehearsal.next_form()
            partition = msgspec.structs.replace(partition, sub_microbatch_size=form.sub_microbatch_size)
            split = form.split_backward
        return plan_columns(model, partition, microbatches, current_costs(), PlanOptions(
            time_budget_s=None if options.evaluations is not None else budget.seconds() / (1 if forward_only else LOWER_PEAKS_COST),
            evaluations=options.evaluations,
            threads=options.planner_threads // side_by_side, seed=options.seed, schedule=options.schedule,
            split_backward=False if forward_only else split, forward_only=forward_only,
            may_exceed_memory=True, memory_field="--dip-memory-limit", hardware_queues=queues, reserved_bytes=reserved_bytes(),
            lower_peaks=not forward_only, is_needed=budget.is_needed if options.evaluations is None else None,
        ), search=forward_backward.search)

    def quick_plan(microbatches: Sequence[Microbatch], forward_only: bool) -> PlanColumns:
        return plan_columns(model, built.partition, microbatches, current_costs(), PlanOptions(
            evaluations=_QUICK_EVALUATIONS, seed=options.seed, schedule=options.schedule, split_backward=splits is True and not forward_only, forward_only=forward_only,
            may_exceed_memory=True, memory_field="--dip-memory-limit", hardware_queues=queues, reserved_bytes=reserved_bytes(),
        ))

    def reserved_bytes() -> tuple[int, ...]:
        return () if forward_backward.memory is None else forward_backward.memory.reserved

    def current_costs() -> CostModel:
        now = costs if built.feedback is None else built.feedback.current_costs()
        return now if forward_backward.memory is None else forward_backward.memory.costs(now)

    def call_metadata(call: CapturedCall) -> Microbatch:
        return description.metadata(description.bind(call.args, call.kwargs))

    def call_conditions(call: CapturedCall) -> list[str]:
        return description.conditions(description.bind(call.args, call.kwargs))

    def upcoming(iterations: int) -> list[int]:
        from megatron.training import get_args

        return upcoming_microbatches(get_args(), num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR, iterations)

    joined = None
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        joined = (LANGUAGE, torch.distributed.get_process_group_ranks(parallel_state.get_expert_tensor_and_model_parallel_group()))

    def work(microbatches: Sequence[Microbatch]) -> NDArray[np.int64]:
        return WorkEstimate(model, built.partition, current_costs()).of(microbatches)

    by_indices = _deals_indices(built)
    on_cpu = torch.cuda.current_device() == torch.device("cpu")
    settings = IterationSettings(
        metadata=description.item_metadata, call_metadata=call_metadata, call_conditions=call_conditions,
        plan_function=plan, quick_plan_function=None if options.evaluations is not None else quick_plan,
        device=torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()),
        backend="gloo" if on_cpu else "nccl", plan_deadline_s=2 * (options.time_budget_s or FIRST_S) + 1, budget=budget,
        unseen_deadline_s=0.0 if options.look_ahead else None,
        timeout_s=_timeout_s(), seed=int(getattr(built.args, "seed", 0)), iteration=lambda: running_iteration(built), num_outputs=description.num_outputs,
        planner_threads=side_by_side, search_ranks=options.search_ranks, search_threads=options.planner_threads,
        look_ahead=options.look_ahead, upcoming=upcoming, joined=joined,
        measures_memory=options.memory_limit_bytes is not None, follows_device_memory=options.follows_device_memory,
        # Replicas that share experts run one joint plan, place by place; where indices are dealt, of what they were dealt.
        balance=work if options.balance in ("auto", "exchange") and joined is None and not by_indices else None,
    )
    if options.split_backward is True:
        check_split(chunks)
    forward_backward = DipForwardBackward(staged_model=staged, chunks=chunks, partition=built.partition, settings=settings)
    if options.follows_device_memory:
        options = replace(options, memory_limit_bytes=least_device_memory(forward_backward.groups, settings.device))
    trained = describe_built_model(description.model_spec, built.partition, built.keys, chunks, forward_backward.groups)
    # Under a limit that was asked for backwards stay whole: what split ones keep is not held against measured memory yet.
    limited = options.memory_limit_bytes is not None or options.follows_device_memory
    can = can_split(chunks) and not limited and parallel_state.get_expert_model_parallel_world_size() == 1
    splits: SplitBackward = options.split_backward if options.split_backward != "auto" or _on_all(can, forward_backward.groups) else False
    model, costs = trained.spec, run_costs(trained, built.partition, built.args, options, chunks)
    if forward_backward.memory is not None:
        forward_backward.memory.expected = stage_bytes(costs, model, built.partition)
    if options.learns_costs:
        args, is_planner = built.args, forward_backward.is_planner
        built.feedback = CostFeedback(
            groups=forward_backward.groups, partition=built.partition, model=model, costs=costs,
            # What gloo takes on the host says nothing about NCCL, and one rank sends nothing.
            p2p=measure_p2p(forward_backward.groups) if on_cpu and options.rehearse_ranks is None else None,
            profile=(kept_costs(costs_file(getattr(args, "load", None), description.model_spec, args, options)) or built.cut.profile)
            if is_planner and options.rehearse is None else None,
            forget=forward_backward.forget_plans, is_planner=is_planner, read_every_iteration=on_cpu,
            state_file=costs_file(getattr(args, "save", None), description.model_spec, args, options)
            if is_planner and parallel_state.get_data_parallel_rank() == 0 else None,
            measures_all=options.rehearse is not None,
        )
        speaks = is_planner and parallel_state.get_data_parallel_rank() == 0
        if options.rehearse is not None:
            built.rehearsal = Rehearsal(
                args, options, description, forward_backward, built.feedback, built.partition, model,
                splits=_on_all(can, forward_backward.groups), speaks=speaks,
            )
        elif speaks:
            built.review = _make_review(built, built.feedback, model, splits)
    return forward_backward


def _on_all(holds: bool, groups: PipelineGroups) -> bool:
    """Whether it does on all ranks of the replica; collective over them."""
    if len(groups.control_ranks) == 1:
        return holds
    told = torch.tensor([int(holds)])
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MIN, group=groups.control)
    return bool(told)


def _make_review(built: BuiltModel, feedback: CostFeedback, model: ModelSpec, splits: SplitBackward) -> CutReview:
    options, description, ranks = built.options, built.description, built.partition.num_ranks
    fixed = fixed_choices(description, ranks)
    review = CutReview(
        model=model, partition=built.partition, costs=feedback.current_costs, profile=lambda: feedback.profile,
        split_backward=splits, chunks=fixed.chunks, sizes=fixed.sizes,
        key=run_key(built.args, options, description.model_spec, ranks), folder=options.cache,
    )
    atexit.register(review.finish)
    return review
