"""Plans one iteration of a workload: which stage runs when on which rank, and each rank's actions.

The partition (chunks of layers, sub-microbatch sizes) is chosen first, unless it is given; its time is reported apart from the
search's. Of parallel.data replicas one is planned (--replica), the summary says how much work the others have. The plan is checked,
dry-run for all ranks and then written; nothing is written on an error (exit code 2).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_dip.cli.output import messages, print_json, progress, tables
from megatron_dip.cli.simulate_command import deal_words
from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.coverage import outside_profile
from megatron_dip.cost.fixed import FixedStrategyCost
from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.partition.deal import Deal
from megatron_dip.partition.offline import cheapest_work_ns, paper_partition
from megatron_dip.partition.work import deal_batch
from megatron_dip.planner.iteration import MemoryChoice, PlanOptions, plan_iteration
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.program.one_queue import one_queue_makespan
from megatron_dip.runtime.startup import hardware_queues
from megatron_dip.schedule.backward import SplitBackward
from megatron_dip.schedule.grid import format_grid, plan_cells
from megatron_dip.schedule.search import SearchMethod
from megatron_dip.simulator.baselines import BASELINES, BaselineResult, run_baseline
from megatron_dip.spec.codec import check_outputs, encode, load_partition, load_workload, write_all
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.profile import Profile
from megatron_dip.spec.workload import Microbatch, Workload

SUMMARY = "plan one iteration of a workload"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", type=Path, metavar="WORKLOAD.json", help="what to plan (format megatron-dip/workload/1)")
    parser.add_argument("--output", type=Path, required=True, metavar="PLAN.json", help="where the plan goes (format megatron-dip/plan/1)")
    search = parser.add_argument_group("search")
    search.add_argument("--time-budget", type=float, metavar="S", help="seconds of search (default 1, or none with --evaluations)")
    search.add_argument("--evaluations", type=int, metavar="N", help="schedules to try; alone it makes the plan the same on every machine")
    search.add_argument("--threads", type=int, default=1, metavar="N", help="threads that share the search (default 1)")
    search.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default 0)")
    search.add_argument("--search", choices=get_args(SearchMethod), default="anneal",
                        help="anneal ships; mcts, dfs and random are the paper's, fifo tries no orders (default anneal)")
    search.add_argument("--split-backward", action=argparse.BooleanOptionalAction, default=None,
                        help="plan the backward's input and weight parts apart (default: as the workload says); starts from the best plan "
                        "with whole backwards, so it tries up to N schedules of either form")
    search.add_argument("--auto-split-backward", action="store_const", const="auto", dest="split_backward",
                        help="split backwards where that is faster for this batch, else whole ones")
    search.add_argument("--memory", choices=get_args(MemoryChoice), default="relaxation",
                        help="how layers' memory strategies are chosen: relaxation, or exact, which solves the found orders' choice once more "
                        "with HiGHS, up to 10 s a rank beyond the budget (default relaxation)")
    search.add_argument("--hardware-queues", type=int, default=None, metavar="N",
                        help="CUDA_DEVICE_MAX_CONNECTIONS of the training run; with 1 the schedule is taken that ends first on such a device "
                        "(default: this variable, or no limit where it is not set)")
    partition = parser.add_argument_group("partition")
    partition.add_argument("--partition", type=Path, metavar="FILE", help="a partition to use (format megatron-dip/partition/1)")
    partition.add_argument("--chunks", metavar="vit=2,lm=3", help="chunks a rank of these modules; the rest is chosen")
    partition.add_argument("--sub-microbatch", metavar="vit=6", help="instances in a sub-microbatch of these modules; the rest is chosen")
    partition.add_argument("--partitioner", choices=("joint", "paper"), default="joint",
                           help="joint: least expected time over the sample; paper: the 95 %% and floor rules (default joint)")
    partition.add_argument("--sample", type=Path, nargs="+", metavar="PATH", default=(),
                           help="workloads of the same model, or directories of them, to choose the partition on (default: the workload "
                           "itself); 256 or more for a real run")
    partition.add_argument("--save-partition", type=Path, metavar="FILE", help="write the partition too, for --partition")
    parser.add_argument("--replica", type=int, default=0, metavar="N", help="which data-parallel replica to plan (default 0)")
    parser.add_argument("--balance", choices=("auto", "off"), default="auto",
                        help="deal the microbatches to the replicas by work, as training does (default auto: with several replicas); off: "
                        "replica N trains microbatches N, N + data, ...")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="write the schedule as a text grid too")
    parser.add_argument("--no-baselines", action="store_true", help="leave the comparison with other schedules out")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What is to be planned, in one place."""

    model: ModelSpec
    num_ranks: int
    microbatches: list[Microbatch]
    costs: CostModel
    split_backward: SplitBackward
    strategy: str | None
    """Memory strategy of every layer; None = chosen per layer."""


def run(args: argparse.Namespace) -> int:
    options = _options(args)
    check_outputs({"--output": args.output, "--save-partition": args.save_partition, "--grid": args.grid}, [args.workload, args.partition])
    workload = load_workload(args.workload)
    if not 0 <= args.replica < workload.parallel.data:
        raise InputError("--replica", args.replica, f"there are {workload.parallel.data} replicas", "give a number from 0 to parallel.data - 1")
    task = _Task(
        model=workload.model_spec,
        num_ranks=workload.parallel.pipeline,
        microbatches=workload.replica_microbatches(args.replica),
        costs=workload_costs(workload),
        split_backward=workload.training.split_backward if args.split_backward is None else args.split_backward,
        strategy=None if workload.training.recompute == "auto" else workload.training.recompute,
    )
    began = time.perf_counter()

    def warn(sentence: str) -> None:
        messages().print(f"warning: {sentence}", soft_wrap=True)

    with progress("choosing the partition") as show:
        partition, origin = _partition(args, task, workload, show, warn)
        partition_s = time.perf_counter() - began
        dealt = None
        if workload.parallel.data > 1:
            dealt = deal_batch(
                workload.microbatches, workload.parallel.data, task.model, partition, task.costs, as_read=args.balance == "off"
            )
        if dealt is not None:
            task = replace(task, microbatches=[workload.microbatches[number] for number in dealt.shares()[args.replica]])
        show(f"searching ({_budget(options)})")
        plan = plan_iteration(
            task.model, partition, task.microbatches, task.costs, replace(options, split_backward=task.split_backward, strategy=task.strategy)
        )
    if isinstance(workload.profile, Profile):
        for sentence in outside_profile(workload.profile, task.microbatches, partition.sub_microbatch_size):
            warn(sentence)
    outputs = {args.output: encode(plan)}
    if args.save_partition is not None:
        outputs[args.save_partition] = encode(partition)
    if args.grid is not None:
        outputs[args.grid] = format_grid(plan_cells(plan)).encode()
    write_all(outputs)
    baselines: list[_Row] = []
    if not args.no_baselines:
        with progress("running the baselines") as show:
            baselines = _baselines(plan, task, show)
    if args.json:
        print_json(_figures(args, plan, task, origin, partition_s, dealt, baselines))
        return 0
    out = tables()
    _print_summary(out, plan, task, origin, partition_s)
    _print_ranks(out, plan)
    if dealt is not None:
        out.print(
            f"planned replica {args.replica} of {dealt.num_replicas}; most work over mean of the replicas: {deal_words(dealt)}, "
            f"{dealt.gap:.2%} above the bound of any deal", soft_wrap=True,
        )
    if baselines:
        out.print(_baseline_table(plan, task, baselines))
    out.print(f"wrote {args.output}", soft_wrap=True)
    return 0


def workload_costs(workload: Workload) -> CostModel:
    """The profile's costs where the workload has one, else the device's."""
    if isinstance(workload.profile, Profile):
        return ProfileCost(workload.profile, workload.memory_capacity_bytes)
    return AnalyticCost(
        workload.model_spec, workload.parallel, workload.training, workload.device,
        memory_capacity_bytes=workload.memory_capacity_bytes, microbatches=workload.microbatches,
    )


def _options(args: argparse.Namespace) -> PlanOptions:
    time_budget = args.time_budget
    if time_budget is None and args.evaluations is None:
        time_budget = 1.0
    options = PlanOptions(
        time_budget_s=time_budget, evaluations=args.evaluations, threads=args.threads, seed=args.seed, search=args.search, memory=args.memory,
        hardware_queues=hardware_queues() if args.hardware_queues is None else args.hardware_queues,
    )
    options.validate()
    return options


def parse_counts(field: str, text: str | None) -> dict[str, int]:
    """``vit=2,lm=3`` as numbers by module."""
    counts: dict[str, int] = {}
    for entry in text.split(",") if text is not None else ():
        module, equals, number = entry.partition("=")
        if not equals or not module.strip() or not number.strip().isdecimal() or int(number) < 1 or int(number) > 10**6:
            raise InputError(field, entry, "not of the form module=number with a number from 1", f"write {field} vit=2,lm=3")
        if module.strip() in counts:
            raise InputError(field, text, f"names {module.strip()!r} twice", "name each module once")
        counts[module.strip()] = int(number)
    return counts


def _partition(args: argparse.Namespace, task: _Task, workload: Workload, show: Callable[[str], None], warn: Callable[[str], None]) -> tuple[Partition, str]:
    """The partition to plan on, and where it is from."""
    chunks, sizes = parse_counts("--chunks", args.chunks), parse_counts("--sub-microbatch", args.sub_microbatch)
    names = [module.name for module in task.model.modules]
    for field, given in (("--chunks", chunks), ("--sub-microbatch", sizes)):
        for name in given:
            if name not in names:
                raise InputError(field, name, "the model has no such module", f"use {', '.join(names)}")
    for module in task.model.modules:
        count = chunks.get(module.name, 1)
        if count > 1 and count * task.num_ranks > module.num_layers:
            raise InputError(
                "--chunks", f"{module.name}={count}", f"{module.num_layers} layers cannot fill {count * task.num_ranks} chunks "
                f"({task.num_ranks} pipeline ranks x {count})", f"use at most {max(1, module.num_layers // task.num_ranks)} chunks a rank",
            )
    if args.partition is not None:
        if chunks or sizes:
            raise InputError("--partition", str(args.partition), "given together with --chunks or --sub-microbatch", "give one of them")
        partition = load_partition(args.partition)
        partition.validate({module.name: module.num_layers for module in task.model.modules}, task.num_ranks, args.partition.name)
        return partition, str(args.partition)
    batches = _sample(args, workload) or [task.microbatches]
    if args.partitioner == "paper":
        if chunks or sizes:
            raise InputError("--partitioner", "paper", "given together with --chunks or --sub-microbatch", "leave one of them out")
        return paper_partition(task.model, task.num_ranks, batches, task.costs), "the paper's rules"
    choice = joint_partition(
        task.model, task.num_ranks, batches, task.costs, split_backward=task.split_backward, strategy=task.strategy, chunks=chunks,
        sizes=sizes, progress=lambda tried, best: show(f"choosing the partition: {tried} tried, best {best:.3f} of the free bound"),
    )
    for sentence in choice.warnings:
        warn(sentence)
    origin = f"joint choice, {choice.candidates} candidates on {len(batches)} batch{'es' if len(batches) > 1 else ''}"
    return choice.partition, f"{origin}, judged on {choice.judged} with drift"


def _sample(args: argparse.Namespace, workload: Workload) -> list[list[Microbatch]]:
    """The first replica's batch of each sample; the model must be the workload's."""
    paths: list[Path] = []
    for path in args.sample:
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            raise InputError("--sample", str(path), "holds no .json file", "name workloads or a directory of them")
        paths.extend(inside)
    batches = []
    for path in paths:
        other = load_workload(path)
        if [module.name for module in other.model_spec.modules] != [module.name for module in workload.model_spec.modules]:
            raise InputError("--sample", str(path), "is of another model", "give workloads of the model that is planned")
        batches.append(other.microbatches[:: workload.parallel.data])
    return batches


def _budget(options: PlanOptions) -> str:
    parts = [f"{options.time_budget_s:g} s" if options.time_budget_s is not None else "",
             f"{options.evaluations} evaluations" if options.evaluations is not None else ""]
    return ", ".join(part for part in parts if part)


def _print_summary(out: Console, plan: Plan, task: _Task, origin: str, partition_s: float) -> None:
    free = cheapest_work_ns(task.model, task.microbatches, task.costs) / task.num_ranks
    one_queue = one_queue_makespan(plan)
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("iteration time", _time(plan.claimed_makespan)),
        ("on one hardware queue", f"{_time(one_queue)}, {_gap(one_queue, plan.claimed_makespan)} longer"),
        ("bound of the partition", f"{_time(plan.lower_bound)}, gap {_gap(plan.claimed_makespan, plan.lower_bound)}"),
        ("bound free of the partition", f"{_time(free)} (cheapest work / ranks), gap {_gap(plan.claimed_makespan, free)}"),
        ("bubbles", f"{plan.bubble_fraction:.2%}"),
        ("partition", f"{origin}, {partition_s:.2f} s"),
        ("chunks a rank", ", ".join(f"{module} {len(rows)}" for module, rows in plan.chunks.items())),
        ("sub-microbatch", ", ".join(f"{module} {size}" for module, size in plan.sub_microbatch_size.items())),
        ("stages, microbatches", f"{len(plan.stages)}, {len(task.microbatches)}"),
        ("planning", f"{plan.planning_ns / 1e9:.3f} s, {plan.evaluations} schedules tried, seed {plan.seed}"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    out.print(table)


def _time(ns: float) -> str:
    """With the unit in which it has at least one digit before the point."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size:
            return f"{ns / size:.4f} {unit}"
    return f"{ns:g} ns"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _gap(value: float, bound: float) -> str:
    return f"{value / bound - 1:.2%}" if bound > 0 else "-"


def _print_ranks(out: Console, plan: Plan) -> None:
    table = Table("rank", "busy", "peak memory", "capacity", "layers", box=SIMPLE)
    for rank in range(plan.ranks):
        busy = sum(plan.stages[stage].duration for stage in plan.order[rank])
        layers = ", ".join(f"{module} {'+'.join(str(row[rank]) for row in rows)}" for module, rows in plan.chunks.items())
        capacity = "unlimited" if plan.memory_capacity is None else _bytes(plan.memory_capacity[rank])
        table.add_row(str(rank), _time(busy), _bytes(plan.peak_memory[rank]), capacity, layers)
    out.print(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    name: str
    result: BaselineResult | None
    """None: does not run with these layers and ranks."""


def _baselines(plan: Plan, task: _Task, show: Callable[[str], None]) -> list[_Row]:
    # They obey a fixed memory strategy as the plan does.
    costs = task.costs if task.strategy is None else FixedStrategyCost(task.costs, task.strategy)
    rows = []
    for name in BASELINES:
        show(f"running the baselines: {name}")
        rows.append(_Row(name=name, result=run_baseline(name, task.model, task.num_ranks, task.microbatches, costs)))
    return rows


def _baseline_table(plan: Plan, task: _Task, rows: Sequence[_Row]) -> Table:
    table = Table("baseline", "time", "speed-up of the plan", "memory", "its best setting", box=SIMPLE)
    for row in rows:
        name, result = row.name, row.result
        if result is None:
            table.add_row(name, "-", "-", "-", "does not run with these layers and ranks")
            continue
        peak = _bytes(max(result.peak_bytes)) + ("" if result.fits else ", does not fit")
        ratio = result.makespan_ns / plan.claimed_makespan if plan.claimed_makespan else 1.0
        table.add_row(name, _time(result.makespan_ns), f"{ratio:.3f}", peak, f"{result.setting}; recompute {task.strategy or _levels(result.strategies)}")
    return table


def _figures(
    args: argparse.Namespace, plan: Plan, task: _Task, origin: str, partition_s: float, dealt: Deal | None, baselines: Sequence[_Row]
) -> dict[str, Any]:
    """What the tables say, for programs; ns and bytes."""
    found = [row.result for row in baselines]
    return {
        "output": str(args.output), "makespan_ns": plan.claimed_makespan, "one_hardware_queue_ns": one_queue_makespan(plan),
        "lower_bound_ns": plan.lower_bound, "free_bound_ns": cheapest_work_ns(task.model, task.microbatches, task.costs) / task.num_ranks,
        "bubble_fraction": plan.bubble_fraction, "partition": origin, "partition_s": partition_s,
        "chunks": {module: len(rows) for module, rows in plan.chunks.items()}, "sub_microbatch_size": plan.sub_microbatch_size,
        "stages": len(plan.stages), "microbatches": len(task.microbatches), "planning_ns": plan.planning_ns, "evaluations": plan.evaluations,
        "seed": plan.seed,
        "ranks": [
            {"busy_ns": sum(plan.stages[stage].duration for stage in plan.order[rank]), "peak_memory_bytes": plan.peak_memory[rank],
             "capacity_bytes": None if plan.memory_capacity is None else plan.memory_capacity[rank]} for rank in range(plan.ranks)
        ],
        "replica": None if dealt is None else {"number": args.replica, "of": dealt.num_replicas, "imbalance": dealt.imbalance, "gap": dealt.gap},
        "baselines": {
            row.name: None if result is None else {"makespan_ns": result.makespan_ns, "peak_memory_bytes": max(result.peak_bytes), "fits": result.fits,
                                                   "setting": result.setting}
            for row, result in zip(baselines, found, strict=True)
        },
    }


def _levels(strategies: Sequence[str]) -> str:
    return strategies[0] if len(set(strategies)) == 1 else "/".join(strategies)
