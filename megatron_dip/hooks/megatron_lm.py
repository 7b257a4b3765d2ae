"""What the patched Megatron-LM calls: chunks instead of one model, one look-ahead iterator, DIP's schedule.

The order of calls is Megatron's: :func:`install_schedule` while arguments are validated, :func:`build_model_chunks` instead of the
stock model building (Megatron then wraps every chunk), :func:`build_data_iterators`, and for every iteration the function that
``get_forward_backward_func`` gives. Models that were not built here run under the stock schedule.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import num_microbatches_calculator, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.pipeline_parallel import schedules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.checkouts.checkpoint_files import CUT_ATTRIBUTE, check_loadable
from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.device import device_names, load_device
from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.cost.wrapped import WrappedCost
from megatron_dip.hooks.arguments import DipOptions, options_from_args
from megatron_dip.iteration.built_model import describe_built_model
from megatron_dip.iteration.forward_backward import DipForwardBackward, IterationSettings
from megatron_dip.iteration.lookahead import LookaheadIterator
from megatron_dip.models.capture import CapturedCall
from megatron_dip.models.description import ModelDescription, unwrap
from megatron_dip.models.gpt import GptDescription
from megatron_dip.models.layout import check_enough_layers, chunk_order
from megatron_dip.models.llava import LlavaDescription
from megatron_dip.models.mimo import MimoDescription
from megatron_dip.models.parts import LANGUAGE
from megatron_dip.models.provided import MimoModel, sketch_model
from megatron_dip.models.staged import DescribedStagedModel
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.runtime.interface import ChunkKey
from megatron_dip.runtime.timing import StageRecord
from megatron_dip.spec.codec import load_partition, load_profile, save
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.profile import Strategy
from megatron_dip.spec.timeline import Bar, Timeline
from megatron_dip.spec.workload import Microbatch, Parallel, Training

logger = logging.getLogger(__name__)

_WHOLE = 1 << 20
"""Sub-microbatch size of a module that is not divided."""

_QUICK_EVALUATIONS = 1


@dataclass(slots=True)
class _BuiltModel:
    """A model that was cut here, from its building to its first iteration and on."""

    first_chunk: torch.nn.Module
    """Kept, so that no other model can come to have its identity."""
    description: ModelDescription
    partition: Partition
    options: DipOptions
    costs_of: Callable[[ModelSpec], CostModel]
    """Once it is known which parts are trained."""
    keys: tuple[ChunkKey, ...]
    forward_backward: DipForwardBackward | None = None
    iterations: int = 0
    """Trained since the start of this process."""


_built: dict[int, _BuiltModel] = {}
"""By the identity of a rank's first chunk, inside Megatron's wrappers."""


def install_schedule() -> None:
    """Makes ``get_forward_backward_func`` give DIP's schedule, in front of the stock one."""
    schedules._forward_backward_func_override = dip_schedule  # type: ignore[attr-defined]


def build_model_chunks(
    model_provider: Callable[..., MegatronModule], model_type: Any, config: Any, pg_collection: Any
) -> list[torch.nn.Module]:
    """What Megatron's ``get_model`` builds instead of one model; see :func:`build_chunks`."""
    from megatron.training import get_args

    return build_chunks(get_args(), model_provider, model_type, config, pg_collection)


def build_chunks(
    args: Any, model_provider: Callable[..., MegatronModule], model_type: Any = None, config: Any = None, pg_collection: Any = None
) -> list[torch.nn.Module]:
    """This rank's chunks of the model that a script's provider describes, in the order that Megatron's functions need.

    Args:
        args: Megatron's namespace.

    Raises:
        InputError: for models that cannot be cut, and for cuts that do not fit the model.
    """
    options = options_from_args(args)
    arguments = {"config": config, "pg_collection": pg_collection}
    sketch = sketch_model(model_provider, **arguments)
    description: ModelDescription
    if isinstance(sketch, LLaVAModel):
        description = LlavaDescription(sketch)
    elif isinstance(sketch, MimoModel):
        description = MimoDescription(sketch)
    else:
        assert isinstance(sketch, GPTModel)
        description = GptDescription(sketch, model_provider, arguments)
    spec = description.model_spec
    ranks = parallel_state.get_pipeline_model_parallel_world_size()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    partition = make_partition(spec, ranks, options)
    setattr(args, CUT_ATTRIBUTE, str(partition.chunks))
    check_loadable(args, str(partition.chunks))
    if ranks == 1 and partition.num_chunks(LANGUAGE) > 1 and spec.module(LANGUAGE).tied_embeddings:
        raise InputError(
            "--dip-chunks", f"{LANGUAGE}={partition.num_chunks(LANGUAGE)}", "embedding and head share a weight and would lie in two chunks of one rank",
            f"use {LANGUAGE}=1, more pipeline ranks, or --untie-embeddings-and-output-weights",
        )
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        _check_expert_parallel(spec, sketch.config)
    keys = chunk_order(partition, rank, LANGUAGE)
    chunks = []
    for module, vp_stage in keys:
        chunk = description.build_chunk(partition, module, vp_stage, rank)
        chunk.model_type = model_type
        if pg_collection is not None and not hasattr(chunk, "pg_collection"):
            chunk.pg_collection = pg_collection  # the training loop asks for it, and a MimoModel has none
        chunks.append(chunk)
    make_costs(spec, args, options)  # what is wrong with the flags is said before training starts
    _built[id(chunks[0])] = _BuiltModel(
        chunks[0], description, partition, options, lambda trained: make_costs(trained, args, options), keys
    )
    if torch.distributed.get_rank() == 0:
        logger.warning("DIP cuts %s into layers %s", ", ".join(m.name for m in spec.modules), partition.chunks)
    return chunks


def _check_expert_parallel(spec: ModelSpec, config: TransformerConfig) -> None:
    """Raises InputError for models whose replicas would not exchange tokens alike."""
    size = parallel_state.get_expert_model_parallel_world_size()
    if not spec.module(LANGUAGE).trainable:
        raise InputError(
            "--expert-model-parallel-size", size, "with a frozen language model only replicas with images run its backward, in which all of "
            "them exchange tokens", "use --expert-model-parallel-size 1",
        )
    dispatcher = config.moe_token_dispatcher_type
    if len(spec.modules) > 1 and dispatcher == "allgather":
        raise InputError(
            "--moe-token-dispatcher-type", dispatcher, "takes equal numbers of tokens on all replicas, and sequences are as long as their images "
            "make them", "use --moe-token-dispatcher-type alltoall",
        )


def make_partition(spec: ModelSpec, num_ranks: int, options: DipOptions) -> Partition:
    """The cut that the flags ask for. Raises InputError where it does not fit the model."""
    if options.partition is not None:
        partition = load_partition(options.partition)
    else:
        sizes = {module.name: options.sub_microbatch_size.get(module.name, _WHOLE) for module in spec.modules}
        unknown = [name for name in options.sub_microbatch_size if name not in sizes]
        if unknown:
            raise InputError("--dip-sub-microbatch-size", unknown, "the model has no such module", f"use some of {list(sizes)}")
        partition = even_partition(spec, num_ranks, options.chunks, sizes)
    partition.validate({module.name: module.num_layers for module in spec.modules}, num_ranks, where="--dip-partition")
    check_enough_layers(partition)
    return partition


def make_costs(spec: ModelSpec, args: Any, options: DipOptions) -> CostModel:
    """What plans cost: the profile of the flags, or the analytic costs of a device."""
    if options.profile is not None:
        costs: CostModel = ProfileCost(load_profile(options.profile), options.memory_limit_bytes, field="--dip-profile")
    else:
        parallel = Parallel(
            tensor=args.tensor_model_parallel_size, pipeline=args.pipeline_model_parallel_size, data=args.data_parallel_size,
            context=args.context_parallel_size, sequence=bool(args.sequence_parallel),
        )
        training = Training(
            dtype="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32", distributed_optimizer=bool(args.use_distributed_optimizer),
            split_backward=options.split_backward,
        )
        device = load_device(options.device or detect_device(), "--dip-device")
        costs = AnalyticCost(
            spec, parallel, training, device, memory_capacity_bytes=options.memory_limit_bytes,
            undivided=[module.name for module in spec.modules if module.role == "encoder"],
        )
    return _RunnableCosts(costs)


def detect_device() -> str:
    """The named device that this process trains on. Raises InputError for one without figures."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    known = [device for device in device_names() if device.lower() in name.lower()]
    if not known:
        raise InputError(
            "--dip-device", None, f"there are no figures for {name!r}", f"give one of {list(device_names())}, a device file, or --dip-profile"
        )
    return max(known, key=len)


class _RunnableCosts(WrappedCost):
    """Costs of another model without the memory strategies that chunks cannot carry out (offloading)."""

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        return {name: strategy for name, strategy in self.costs.strategies(module, lengths).items() if strategy.offload is None}


def build_data_iterators(build: Callable[..., tuple[Any, Any, Any]], dataset_provider: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Megatron's data iterators, with the next batches in view.

    The look-ahead stands below the iterator that the rerun state machine rewinds, so that a replay is served above it.
    """
    from megatron.training import get_args

    args, iterators = get_args(), build(dataset_provider)
    keep_state = bool(getattr(args, "dataloader_save", None))
    if options_from_args(args).look_ahead:
        for of_one_use in iterators:
            for iterator in of_one_use if isinstance(of_one_use, list) else [of_one_use]:
                if iterator is not None:
                    iterator.iterable = LookaheadIterator(iterator.iterable, keep_state=keep_state)
    return iterators


def upcoming_microbatches(args: Any, calculator: Any, iterations: int) -> list[int]:
    """Number of microbatches in each of the iterations that follow the running one, as batch size ramp-up will have them.

    Args:
        args: Megatron's namespace, in which the running iteration is not counted yet.
        calculator: Megatron's calculator of microbatches.

    Returns:
        ``iterations`` numbers, or fewer where training ends before.
    """
    foreseen = copy.copy(calculator)
    samples = args.consumed_train_samples
    numbers = [foreseen.get()]
    for _ in range(min(iterations, args.train_iters - args.curr_iteration - 1)):
        samples += numbers[-1] * args.micro_batch_size * args.data_parallel_size
        foreseen.update(samples, consistency_check=False, verbose=False)
        numbers.append(foreseen.get())
    return numbers[1:]


def dip_schedule(stock: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """What ``get_forward_backward_func`` gives: DIP for a model that was cut here, else the stock function."""

    def forward_backward(**arguments: Any) -> list[Any]:
        model = arguments["model"]
        chunks = list(model) if isinstance(model, list) else [model]
        built = _built.get(id(unwrap(chunks[0], torch.nn.Module)))
        if built is None:
            return stock(**arguments)
        if arguments.get("collect_non_loss_data") and parallel_state.get_pipeline_model_parallel_world_size() > 1:
            raise InputError(
                "process_non_loss_data_func", True, "Megatron's evaluation asks the last rank alone for it, and a pipeline needs all of its ranks",
                "leave it out of the script's call of pretrain(), or use one pipeline rank; the stock schedules would wait without end",
            )
        if built.forward_backward is None:
            built.forward_backward = _start(built, chunks)
        losses = built.forward_backward(**arguments)
        if not arguments["forward_only"]:
            built.iterations += 1
            _report(built, built.forward_backward)
        return losses

    return forward_backward


def _report(built: _BuiltModel, forward_backward: DipForwardBackward) -> None:
    """Writes the iteration's traces and its log line, as the flags ask for. The first replica speaks."""
    options, plan, iteration = built.options, forward_backward.plan, _running_iteration(built)
    due = options.log_interval > 0 and iteration % options.log_interval == 0
    if plan is None or not (due or options.trace_dir is not None):
        return
    records = forward_backward.gather_records()
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
        print(
            f" [DIP] iteration {iteration:8d} | planned (ms): {plan.claimed_makespan / 1e6:.1f} | measured (ms): "
            f"{measured.makespan / 1e6:.1f} | bubbles planned: {plan.bubble_fraction:.1%} measured: {measured.bubble_fraction:.1%} | "
            f"planning (ms): {plan.planning_ns / 1e6:.1f} | waited for plans so far (ms): {counts.waited_ns / 1e6:.1f} | "
            f"plans replaced so far: {sum(counts.fallbacks.values())} | "
            f"batches not seen ahead: {counts.unseen}",
            flush=True,
        )


def _running_iteration(built: _BuiltModel) -> int:
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


def _start(built: _BuiltModel, chunks: list[torch.nn.Module]) -> DipForwardBackward:
    options, description = built.options, built.description
    side_by_side = max(1, min(options.look_ahead, options.planner_threads))
    """Plans being made at a time."""
    staged = DescribedStagedModel(description, dict(zip(built.keys, chunks, strict=True)))

    def plan(microbatches: Sequence[Microbatch], forward_only: bool) -> Plan:
        return plan_iteration(model, built.partition, microbatches, costs, PlanOptions(
            time_budget_s=None if options.evaluations is not None else options.time_budget_s, evaluations=options.evaluations,
            threads=options.planner_threads // side_by_side, seed=options.seed, split_backward=options.split_backward, forward_only=forward_only,
        ))

    def quick_plan(microbatches: Sequence[Microbatch], forward_only: bool) -> Plan:
        return plan_iteration(model, built.partition, microbatches, costs, PlanOptions(
            evaluations=_QUICK_EVALUATIONS, seed=options.seed, split_backward=options.split_backward, forward_only=forward_only,
        ))

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
    on_cpu = torch.cuda.current_device() == torch.device("cpu")
    settings = IterationSettings(
        metadata=description.item_metadata, call_metadata=call_metadata, call_conditions=call_conditions,
        plan_function=plan, quick_plan_function=None if options.evaluations is not None else quick_plan,
        device=torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()),
        backend="gloo" if on_cpu else "nccl", plan_deadline_s=2 * options.time_budget_s + 1, num_outputs=description.num_outputs,
        planner_threads=side_by_side, look_ahead=options.look_ahead, upcoming=upcoming, joined=joined,
    )
    forward_backward = DipForwardBackward(staged_model=staged, chunks=chunks, partition=built.partition, settings=settings)
    model = describe_built_model(description.model_spec, built.partition, built.keys, chunks, forward_backward.groups).spec
    costs = built.costs_of(model)
    return forward_backward
