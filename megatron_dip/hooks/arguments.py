"""The ``--dip-*`` flags of Megatron-LM's scripts, what DIP refuses beside them, and their frozen form.

What comes in: Megatron's argument parser, later its namespace. What goes out: :class:`DipOptions`, the only form in which the rest of
the package sees the flags, or an :class:`InputError` that names the flag and the remedy.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_dip.hooks.observe import ObserveAction
from megatron_dip.iteration.cut_cache import default_cache_folder
from megatron_dip.iteration.shared_search import SearchRanks, cores_of_rank
from megatron_dip.schedule.backward import SplitBackward
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.orders import OrderName

_GIB = 1 << 30

_SPLITS: Mapping[str, SplitBackward] = {"auto": "auto", "on": True, "off": False}

MAX_LOOK_AHEAD = 16

CostSource = Literal["auto", "learned", "given"]

BalanceMode = Literal["auto", "off", "indices", "exchange"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DipOptions:
    """How DIP plans and runs, from the flags."""

    profile: Path | None
    """Measured costs (``megatron-dip/profile/1``); None = analytic costs of ``device``."""
    device: str | None
    """Named device of the analytic costs; None = the one training runs on."""
    learns_costs: bool
    """Whether costs follow measured times; without it plans of equal batches stay equal."""
    partition: Path | None
    """A whole cut (``megatron-dip/partition/1``); replaces ``chunks`` and ``sub_microbatch_size``."""
    auto_partition: bool
    """Whether the cut is found for the run (:mod:`megatron_dip.hooks.cut`), since nothing says it."""
    cache: Path
    """Folder of kept cuts."""
    chunks: Mapping[str, int]
    """Module -> chunks on each rank (K)."""
    sub_microbatch_size: Mapping[str, int]
    """Module -> instances in a full sub-microbatch (B)."""
    schedule: OrderName
    """Whose order of stages runs."""
    planner_threads: int
    search_ranks: SearchRanks
    """Which ranks of a replica search."""
    time_budget_s: float | None
    """Most search time for one iteration's plan; None = as long as iterations are."""
    evaluations: int | None
    """Schedules to try for each plan instead of a time; equal seeds then give equal plans."""
    look_ahead: int
    """How many of the next iterations' batches are read and planned while this one trains; 0: each is planned when it is there."""
    balance: BalanceMode
    """Whether replicas deal the microbatches of a global batch among them: ``exchange`` moves their data; ``auto`` does where it can."""
    memory_limit_bytes: int | None
    follows_device_memory: bool
    """The limit is what the device has; ``memory_limit_bytes`` is None until a run asks for it."""
    host_memory_bytes: int
    """For offloaded activations of one rank; 0: plans offload nothing."""
    split_backward: SplitBackward
    """``auto``: where all layers can do both and no limit on memory is given, as is faster for the batch; else whole."""
    rehearse: Path | None
    """Measure the run's data and layers, choose its cut, write it here and end; None: train."""
    rehearse_ranks: int | None
    """Pipeline ranks of the run that a rehearsal on one of them chooses for; None: as many as it has."""
    trace_dir: Path | None
    seed: int
    log_interval: int
    """Iterations between two log lines about plans; 0 = none."""


def _gib_or_auto(text: str) -> float | str:
    return text if text == "auto" else float(text)


def add_dip_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the ``--dip-*`` group; called from Megatron's ``_add_distributed_args``."""
    group = parser.add_argument_group(title="dip", description="dynamic interleaved pipeline, used with --pipeline-schedule dip")
    group.add_argument("--dip-profile", type=Path, default=None, metavar="FILE",
                       help="Measured stage costs (megatron-dip/profile/1, see `megatron-dip profile`). Default: analytic costs of --dip-device.")
    group.add_argument("--dip-device", type=str, default=None, metavar="NAME",
                       help="Device of the analytic costs, such as h100, or a JSON file. Default: the device that training runs on.")
    group.add_argument("--dip-costs", choices=get_args(CostSource), default="auto",
                       help="Whether plans' costs follow the measured times of stages (learned; kept beside the checkpoints and taken up on "
                       "resuming) or stay as they are given. auto: learned, but given with --dip-profile, with --dip-evaluations, whose plans "
                       "repeat, and where replicas share experts.")
    group.add_argument("--dip-partition", type=str, default="auto", metavar="auto|even|FILE",
                       help="How every module is cut: FILE (megatron-dip/partition/1) says it; even: evenly, with one chunk a rank and whole microbatches; "
                       "auto: as --dip-chunks and --dip-sub-microbatch-size say, without them as the checkpoint needs it, as kept in --dip-cache for such "
                       "a run, or by analytic costs.")
    group.add_argument("--dip-cache", type=Path, default=None, metavar="DIR",
                       help="Folder of kept cuts, one for each kind of run. Default: $MEGATRON_DIP_CACHE, or megatron-dip in the user's cache folder.")
    group.add_argument("--dip-chunks", nargs="+", default=None, metavar="MODULE=K",
                       help="Chunks of each module on a pipeline rank, such as vit=2 lm=2; 1 for those left out.")
    group.add_argument("--dip-sub-microbatch-size", nargs="+", default=None, metavar="MODULE=B",
                       help="Instances (images, sequences) in a sub-microbatch of each module, such as vit=8; of those left out a microbatch's whole batch.")
    group.add_argument("--dip-schedule", choices=get_args(OrderName), default="dip",
                       help="Run the cut's stages in another schedule's order, for comparisons: everything else stays. dip: the order is searched.")
    group.add_argument("--dip-planner-threads", type=int, default=None, metavar="N",
                       help="Threads that search plans beside training. Default: half of a rank's share of the cores.")
    group.add_argument("--dip-search-ranks", choices=get_args(SearchRanks), default="auto",
                       help="Which ranks of a replica search its plans, each with other random numbers; the best order wins. auto: all, where each "
                       "rank has two cores or more, else the first one alone.")
    group.add_argument("--dip-time-budget", type=float, default=None, metavar="SECONDS",
                       help="Most search time for one iteration's plan. Default: until it is needed, which the length of iterations foretells.")
    group.add_argument("--dip-evaluations", type=int, default=None, metavar="N",
                       help="Schedules tried for a plan instead of a time: equal seeds then give equal plans.")
    group.add_argument("--dip-look-ahead", type=int, default=1, metavar="N",
                       help="Read the batches of the next N iterations and plan them while this one trains. 0: plan when the batch is there. "
                       "More than 1 where planning takes longer than training: as many plans are then made side by side.")
    group.add_argument("--dip-balance", choices=get_args(BalanceMode), default="auto",
                       help="Deal the microbatches of a global batch to the data-parallel replicas by work, so that none waits for another's "
                       "images. indices: replicas read what they are dealt, where the data set tells lengths ahead (instance_lengths). exchange: whole "
                       "microbatches travel between replicas while the batch before trains. auto (default): indices where lengths are known, else "
                       "exchange with --dip-look-ahead, unless experts are spread over replicas. off: every replica trains what it reads.")
    group.add_argument("--dip-memory-limit", type=_gib_or_auto, default=None, metavar="GIB|auto",
                       help="Memory that plans may use on a rank. auto: what the device has free, less what the run is measured to hold beside "
                       "its plans. Default: the device's memory by its description; none under --dip-profile.")
    group.add_argument("--dip-host-memory", type=float, default=0.0, metavar="GIB",
                       help="Host memory that a rank may take for offloaded activations. Default: 0, plans offload nothing. Offloading has never run on "
                       "a GPU; on CPUs, with a second pool of memory as host, what ranks held kept to every limit that was tried.")
    group.add_argument("--dip-split-backward", nargs="?", choices=("auto", "on", "off"), const="on", default="auto",
                       help="Plan the input and the weight part of backwards apart: on (also without a word), off, or auto: in each iteration where it "
                       "is faster, if the layers can do it and no --dip-memory-limit is given.")
    group.add_argument("--dip-observe", type=Path, action=ObserveAction, default=None, metavar="DIR",
                       help="Under the stock schedule: change nothing, write batches (megatron-dip/workload/1) and stage times of the first iterations to "
                       "DIR, and say at the end what DIP would have taken.")
    group.add_argument("--dip-rehearse", type=Path, default=None, metavar="DIR",
                       help="What `megatron-dip tune` starts a run with: a few iterations that measure data and layers; then the best cut for the run is "
                       "written to DIR and kept for --dip-partition auto, and the run ends.")
    group.add_argument("--dip-rehearse-ranks", type=int, default=None, metavar="P",
                       help="What `megatron-dip tune --one-rank` adds: the rehearsal runs with --pipeline-model-parallel-size 1 and chooses for P.")
    group.add_argument("--dip-trace-dir", type=Path, default=None, metavar="DIR",
                       help="Write each iteration's plan and measured times here (see `megatron-dip trace`).")
    group.add_argument("--dip-seed", type=int, default=1234, help="Seed of the search.")
    group.add_argument("--dip-log-interval", type=int, default=100, metavar="N",
                       help="Iterations between log lines about planning (predicted and measured time, bubbles); 0 = none.")
    return parser


@dataclass(frozen=True, slots=True)
class _Refusal:
    """One thing that DIP cannot do together with its schedule."""

    attribute: str
    """In Megatron's namespace; releases that lack it pass."""
    flag: str
    unwanted: Callable[[Any], bool]
    problem: str
    remedy: str


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _above(limit: int) -> Callable[[Any], bool]:
    return lambda value: value is not None and value > limit


_STATIC_ORDER = "assumes one static order of microbatches, DIP plans a new one for every iteration"
_OWN_CUT = "DIP cuts the modules itself"
_USE_CHUNKS = "leave it out and say the cut with --dip-chunks or --dip-partition"
_LEAVE_OUT = "leave it out, or use --pipeline-schedule default"

REFUSALS: Sequence[_Refusal] = (
    _Refusal("dip_observe", "--dip-observe", _is_set, "looks on while the stock schedule trains", _LEAVE_OUT),
    _Refusal("enable_cuda_graph", "--enable-cuda-graph", _is_set, f"CUDA graphs: a capture {_STATIC_ORDER}", _LEAVE_OUT),
    _Refusal("external_cuda_graph", "--external-cuda-graph", _is_set, f"CUDA graphs: a capture {_STATIC_ORDER}", _LEAVE_OUT),
    _Refusal("cuda_graph_impl", "--cuda-graph-impl", lambda value: value not in (None, "none"),
             f"CUDA graphs (local, Transformer Engine or full iteration): a capture {_STATIC_ORDER}", "use --cuda-graph-impl none"),
    _Refusal("overlap_moe_expert_parallel_comm", "--overlap-moe-expert-parallel-comm", _is_set, f"combined 1F1B {_STATIC_ORDER}", _LEAVE_OUT),
    _Refusal("delay_wgrad_compute", "--delay-wgrad-compute", _is_set, "belongs to combined 1F1B", "leave it out and use --dip-split-backward"),
    _Refusal("moe_paged_stash", "--moe-paged-stash", _is_set, f"the paged stash {_STATIC_ORDER}", _LEAVE_OUT),
    _Refusal("moe_expert_rank_capacity_factor", "--moe-expert-rank-capacity-factor", _is_set, f"the paged stash {_STATIC_ORDER}", _LEAVE_OUT),
    _Refusal("hybrid_context_parallel", "--hybrid-context-parallel", _is_set,
             "hybrid context parallelism moves sequences between ranks inside its own schedule", _LEAVE_OUT),
    _Refusal("dynamic_context_parallel", "--dynamic-context-parallel", _is_set,
             "dynamic context parallelism regroups ranks inside its own schedule", _LEAVE_OUT),
    _Refusal("fine_grained_activation_offloading", "--fine-grained-activation-offloading", _is_set,
             f"it replays the first iteration's chunk order and {_STATIC_ORDER}", _LEAVE_OUT),
    _Refusal("cpu_offloading", "--cpu-offloading", _is_set, "Megatron's layer offloading excludes pipeline parallelism", _LEAVE_OUT),
    _Refusal("mtp_num_layers", "--mtp-num-layers", _above(0), "multi-token prediction layers are not supported yet", _LEAVE_OUT),
    _Refusal("defer_embedding_wgrad_compute", "--defer-embedding-wgrad-compute", _is_set, "it follows the stock schedules' cool-down", _LEAVE_OUT),
    _Refusal("use_torch_fsdp2", "--use-torch-fsdp2", _is_set, "FSDP shards what pipeline chunks hold", "use --use-distributed-optimizer"),
    _Refusal("use_megatron_fsdp", "--use-megatron-fsdp", _is_set, "FSDP shards what pipeline chunks hold", "use --use-distributed-optimizer"),
    _Refusal("overlap_param_gather_with_optimizer_step", "--overlap-param-gather-with-optimizer-step", _is_set,
             "it follows the stock order of virtual stages", "use --overlap-param-gather alone"),
    _Refusal("tp_comm_overlap", "--tp-comm-overlap", _is_set, "its buffers have one fixed shape, sub-microbatches vary", _LEAVE_OUT),
    _Refusal("hybrid_layer_pattern", "--hybrid-layer-pattern", _is_set, "state-space and hybrid layers are not supported yet", _LEAVE_OUT),
    _Refusal("experimental_attention_variant", "--experimental-attention-variant", _is_set,
             "its layers differ, or bring losses that the stock schedules scale", _LEAVE_OUT),
    _Refusal("heterogeneous_layers_config_path", "--heterogeneous-layers-config-path", _is_set, "layers of one module must be alike", _LEAVE_OUT),
    _Refusal("num_layers_per_virtual_pipeline_stage", "--num-layers-per-virtual-pipeline-stage", _is_set, _OWN_CUT, _USE_CHUNKS),
    _Refusal("num_virtual_stages_per_pipeline_rank", "--num-virtual-stages-per-pipeline-rank", _is_set, _OWN_CUT, _USE_CHUNKS),
    _Refusal("pipeline_model_parallel_layout", "--pipeline-model-parallel-layout", _is_set, _OWN_CUT, _USE_CHUNKS),
    _Refusal("decoder_first_pipeline_num_layers", "--decoder-first-pipeline-num-layers", _is_set, _OWN_CUT, _USE_CHUNKS),
    _Refusal("decoder_last_pipeline_num_layers", "--decoder-last-pipeline-num-layers", _is_set, _OWN_CUT, _USE_CHUNKS),
    _Refusal("account_for_embedding_in_pipeline_split", "--account-for-embedding-in-pipeline-split", _is_set, _OWN_CUT, _USE_CHUNKS),
    _Refusal("account_for_loss_in_pipeline_split", "--account-for-loss-in-pipeline-split", _is_set, _OWN_CUT, _USE_CHUNKS),
    _Refusal("iterations_to_skip", "--iterations-to-skip", bool, "skipped iterations read data by the stock schedules' rule", _LEAVE_OUT),
    _Refusal("perform_rl_step", "--perform-rl-step", _is_set, "reinforcement learning is not supported", _LEAVE_OUT),
    _Refusal("init_model_with_meta_device", "--init-model-with-meta-device", _is_set, "chunks are built where they stay", _LEAVE_OUT),
)


def validate_dip_args(args: argparse.Namespace) -> None:
    """Checks the flags and everything DIP cannot do beside them; called from Megatron's ``validate_args``. Then installs the schedule.

    Raises InputError with the flag, the reason and the remedy.
    """
    for refusal in REFUSALS:
        value = getattr(args, refusal.attribute, None)
        if refusal.unwanted(value):
            raise InputError(refusal.flag, value, refusal.problem, refusal.remedy)
    modules = set(getattr(args, "recompute_modules", None) or ["core_attn"])
    if getattr(args, "recompute_granularity", None) == "selective" and modules != {"core_attn"}:
        raise InputError(
            "--recompute-modules", sorted(modules), "of selective recomputation DIP runs, and plans for, that of core attention alone",
            "leave it out or give core_attn; --dip-memory-limit makes plans recompute whole layers",
        )
    if getattr(args, "recompute_granularity", None) == "full":
        raise InputError(
            "--recompute-granularity", "full", "DIP chooses for every stage how much to recompute",
            "leave it out; --dip-memory-limit makes plans recompute more",
        )
    if getattr(args, "fp8", None) and getattr(args, "fp8_recipe", "delayed") == "delayed" and args.data_parallel_size > 1:
        raise InputError(
            "--fp8-recipe", "delayed", "after every pass through a chunk its scales are reduced over replicas, which run different plans",
            "use a recipe whose scales are not kept: tensorwise, blockwise or mxfp8",
        )
    options = options_from_args(args)
    if _above(1)(getattr(args, "expert_model_parallel_size", None)) and options.evaluations is None:
        raise InputError(
            "--expert-model-parallel-size", args.expert_model_parallel_size,
            "experts are spread over replicas, which must then plan alike, and plans that are searched by the clock differ",
            "give --dip-evaluations N, such as 200: equal numbers give equal plans; or use --expert-model-parallel-size 1",
        )
    if options.balance == "exchange" and _above(1)(getattr(args, "expert_model_parallel_size", None)):
        raise InputError(
            "--dip-balance", "exchange", "replicas that share experts run one joint plan, place by place", "use --dip-balance off"
        )
    from megatron_dip.hooks.megatron_lm import install_schedule

    install_schedule()


def options_from_args(args: argparse.Namespace) -> DipOptions:
    """The flags in their frozen form. Raises InputError for values that cannot be."""
    partition = None if args.dip_partition in ("auto", "even") else Path(args.dip_partition)
    by_hand = args.dip_chunks is not None or args.dip_sub_microbatch_size is not None
    if partition is not None and by_hand:
        other = "--dip-chunks" if args.dip_chunks is not None else "--dip-sub-microbatch-size"
        raise InputError(other, args.dip_chunks or args.dip_sub_microbatch_size, "is said by --dip-partition too", f"leave out {other} or --dip-partition")
    for flag, path in (("--dip-profile", args.dip_profile), ("--dip-partition", partition)):
        if path is not None and not path.is_file():
            raise InputError(flag, str(path), "no such file", "give the path of a file")
    threads = default_planner_threads() if args.dip_planner_threads is None else args.dip_planner_threads
    _at_least("--dip-planner-threads", threads, 1)
    _at_least("--dip-log-interval", args.dip_log_interval, 0)
    _at_least("--dip-seed", args.dip_seed, 0)
    if not 0 <= args.dip_look_ahead <= MAX_LOOK_AHEAD:
        raise InputError(
            "--dip-look-ahead", args.dip_look_ahead, f"outside [0, {MAX_LOOK_AHEAD}]: every batch that is read ahead stays in memory", "give 1 or 2"
        )
    if args.dip_balance == "exchange" and args.dip_look_ahead == 0:
        raise InputError("--dip-balance", "exchange", "deals batches that are read ahead", "give --dip-look-ahead 1 or more")
    if args.dip_time_budget is not None and not 0 < args.dip_time_budget <= 3600:
        raise InputError("--dip-time-budget", args.dip_time_budget, "outside (0, 3600]", "give seconds such as 1.0")
    if args.dip_evaluations is not None:
        _at_least("--dip-evaluations", args.dip_evaluations, 1)
    limit = args.dip_memory_limit
    if limit not in (None, "auto") and not 0 < limit < 1e6:
        raise InputError("--dip-memory-limit", limit, "outside (0, 1e6)", "give GiB such as 70, or auto")
    if not 0 <= args.dip_host_memory < 1e6:
        raise InputError("--dip-host-memory", args.dip_host_memory, "outside [0, 1e6)", "give GiB such as 100, 0 for no offloading")
    return DipOptions(
        profile=args.dip_profile,
        device=args.dip_device,
        learns_costs=_learns_costs(args),
        partition=partition,
        auto_partition=args.dip_partition == "auto" and not by_hand,
        cache=default_cache_folder() if args.dip_cache is None else args.dip_cache,
        chunks=_by_module("--dip-chunks", args.dip_chunks),
        sub_microbatch_size=_by_module("--dip-sub-microbatch-size", args.dip_sub_microbatch_size),
        schedule=args.dip_schedule,
        planner_threads=threads,
        search_ranks=args.dip_search_ranks,
        time_budget_s=args.dip_time_budget,
        evaluations=args.dip_evaluations,
        look_ahead=args.dip_look_ahead,
        balance=args.dip_balance,
        memory_limit_bytes=None if limit in (None, "auto") else int(limit * _GIB),
        follows_device_memory=limit == "auto",
        host_memory_bytes=int(args.dip_host_memory * _GIB),
        split_backward=_SPLITS[args.dip_split_backward],
        rehearse=args.dip_rehearse,
        rehearse_ranks=_rehearse_ranks(args),
        trace_dir=args.dip_trace_dir,
        seed=args.dip_seed,
        log_interval=args.dip_log_interval,
    )


def _rehearse_ranks(args: argparse.Namespace) -> int | None:
    ranks: int | None = args.dip_rehearse_ranks
    if ranks is not None:
        _at_least("--dip-rehearse-ranks", ranks, 1)
        if args.dip_rehearse is None or _above(1)(getattr(args, "pipeline_model_parallel_size", None)):
            raise InputError(
                "--dip-rehearse-ranks", ranks, "is for a rehearsal on one pipeline rank", "use it with --dip-rehearse and --pipeline-model-parallel-size 1"
            )
    return ranks


def _learns_costs(args: argparse.Namespace) -> bool:
    if args.dip_rehearse is not None:
        return True
    shares_experts = _above(1)(getattr(args, "expert_model_parallel_size", None))
    if args.dip_costs == "auto":
        return args.dip_profile is None and args.dip_evaluations is None and not shares_experts
    if args.dip_costs == "learned" and shares_experts:
        raise InputError(
            "--dip-costs", "learned", "replicas that share experts must plan alike, and each measures its own stages",
            "leave it out, or use --expert-model-parallel-size 1",
        )
    return bool(args.dip_costs == "learned")


def default_planner_threads() -> int:
    """Half of this process' share of the machine's cores, at least one: training keeps the other half."""
    return max(1, cores_of_rank() // 2)


def _at_least(flag: str, value: int, low: int) -> None:
    if value < low:
        raise InputError(flag, value, f"must be at least {low}", f"give {low} or more")


def _by_module(flag: str, words: Sequence[str] | None) -> dict[str, int]:
    """``["vit=2", "lm=1"]`` -> ``{"vit": 2, "lm": 1}``; commas between the pairs are fine too."""
    numbers: dict[str, int] = {}
    for pair in (pair for word in words or () for pair in word.split(",") if pair):
        module, sign, number = pair.partition("=")
        if not sign or not module or not number.isdecimal() or int(number) < 1:
            raise InputError(flag, pair, "is not of the form MODULE=NUMBER", "write it like vit=2")
        if module in numbers:
            raise InputError(flag, pair, f"gives {module!r} twice", "give each module once")
        numbers[module] = int(number)
    return numbers
