"""Simulates a training step of a workload: time, MFU and HFU, bubbles, time by cause, peak memory of each rank.

Any schedule that the planner knows can be asked for (--schedule), or all of them beside each other (--compare); fsdp2 is ZeRO-3 on the
same GPUs without a pipeline. --grid tries every way to share a number of GPUs between data, tensor and pipeline parallelism, with
chunks and sub-microbatch sizes chosen for each, on all cores, and ranks what fits. Results go to standard output, progress and
warnings to standard error. Exit code 2 on bad input, and where nothing fits into memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import runpy
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_dip.cli.output import messages, print_json, tables
from megatron_dip.cost.analytic import DEFAULT_RULES
from megatron_dip.cost.coverage import outside_profile
from megatron_dip.cost.device import load_device
from megatron_dip.cost.modules import Kernels
from megatron_dip.partition.deal import Deal
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.simulator.grid import grid_parallels
from megatron_dip.simulator.step import SCHEDULES, Balance, SimulateOptions, Simulation, make_costs, simulate_whole
from megatron_dip.spec.codec import check_outputs, load_partition, load_workload, write_atomically
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import Profile
from megatron_dip.spec.simulation import SimulationResult
from megatron_dip.spec.workload import Parallel, ScheduleName, Workload

SUMMARY = "simulate a training step: time, utilisation, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", type=Path, metavar="WORKLOAD.json", help="what to simulate (format megatron-dip/workload/1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--schedule", choices=SCHEDULES, help="schedule (default: the workload's)")
    which.add_argument("--compare", action="store_true", help="every schedule, side by side")
    which.add_argument("--grid", action="store_true", help="search data, tensor and pipeline sizes, chunks and sub-microbatch sizes")
    parser.add_argument("--device", metavar="NAME|FILE.json", help="device instead of the workload's")
    parser.add_argument("--partition", type=Path, metavar="FILE", help="how 'dip' cuts the modules (default: chosen by search)")
    parser.add_argument("--memory-timeline", type=Path, metavar="FILE.csv", help="write what each rank holds over time (rank, seconds, bytes)")
    parser.add_argument("--rules", type=Path, metavar="FILE.py",
                        help="Python that registers latency rules of operators (megatron_dip.cost.analytic.DEFAULT_RULES); it is executed")
    parser.add_argument("--attention", choices=("fused", "unfused"), default="fused", help="attention kernels (default fused)")
    parser.add_argument("--tp-comm-overlap", action="store_true", help="tensor-parallel collectives travel in pieces beside their products, as under Megatron's flag")
    parser.add_argument("--no-data-parallel-overlap", action="store_true", help="gradient and parameter collectives do not run beside the pipeline")
    parser.add_argument("--balance", choices=get_args(Balance), default="auto",
                        help="whose replicas deal the microbatches of the global batch among them by work: auto (default) those of dip and "
                        "entrain, all, or off: number i is trained by replica i mod data")
    parser.add_argument("--evaluations", type=int, default=500, metavar="N", help="schedules that 'dip' tries (default 500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the search (default 0)")
    grid = parser.add_argument_group("grid")
    grid.add_argument("--gpus", type=int, metavar="N", help="GPUs to share out (default: the workload's)")
    grid.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores)")
    grid.add_argument("--top", type=int, default=10, metavar="N", help="plans to print (default 10)")


@dataclass(frozen=True, slots=True, kw_only=True)
class GridPoint:
    """One way to share the GPUs: its result, or why it cannot be."""

    parallel: Parallel
    result: SimulationResult | None
    problem: str = ""


def run(args: argparse.Namespace) -> int:
    for field, value in (("--evaluations", args.evaluations), ("--top", args.top), ("--gpus", args.gpus), ("--workers", args.workers)):
        if value is not None and value < 1:
            raise InputError(field, value, "must be at least 1", "give a positive whole number")
    if not 0 <= args.seed < 1 << 32:
        raise InputError("--seed", args.seed, "outside [0, 2^32)", "give a whole number from 0")
    if args.memory_timeline is not None:
        if args.grid or args.compare:
            raise InputError("--memory-timeline", str(args.memory_timeline), "is for one schedule", "leave --grid and --compare out")
        check_outputs({"--memory-timeline": args.memory_timeline}, [args.workload, args.partition, args.rules])
    workload = load_workload(args.workload)
    if args.device is not None:
        # A profile stands for measured costs on its own device: figures given by hand would silently not be used.
        if isinstance(workload.profile, Profile):
            raise InputError("--device", args.device, "given for a workload with a profile", "remove one of them")
        load_device(args.device, "--device")
        workload = msgspec.structs.replace(workload, device=args.device)
    if args.rules is not None:
        load_rules(args.rules)
    options = SimulateOptions(
        evaluations=args.evaluations, seed=args.seed, overlap_data_parallel=not args.no_data_parallel_overlap,
        kernels=Kernels(attention=args.attention, split_tensor_parallel=args.tp_comm_overlap), balance=args.balance,
    )
    if args.grid:
        return _run_grid(args, workload, options)
    partition = load_partition(args.partition) if args.partition is not None else None
    layers = sum(module.num_layers for module in workload.model_spec.modules)
    if partition is None and workload.parallel.pipeline > layers:
        raise InputError("parallel.pipeline", workload.parallel.pipeline, f"the model has only {layers} layers", "use at most one rank a layer")
    if args.compare:
        return _run_compare(args, workload, partition, options)
    chosen: ScheduleName = args.schedule or workload.training.schedule
    simulation = simulate_one(workload, chosen, partition, options)
    result = simulation.result
    if args.memory_timeline is not None:
        _write_timeline(args.memory_timeline, simulation)
    if args.json:
        print_json(result)
        return 0
    _print_result(tables(), result, simulation.dealt)
    return 0


def load_rules(path: Path) -> None:
    """Executes a user's file, which registers rules. Raises InputError where it cannot be, or registers none."""
    before = DEFAULT_RULES.version
    try:
        runpy.run_path(str(path))
    except Exception as error:
        raise InputError("--rules", str(path), f"cannot be executed ({type(error).__name__}: {error})", "mend the file") from error
    if DEFAULT_RULES.version == before:
        raise InputError("--rules", str(path), "registers no rule", "call DEFAULT_RULES.register(name_or_kind, function)")


def simulate_one(workload: Workload, name: ScheduleName, partition: Partition | None, options: SimulateOptions) -> Simulation:
    """Simulates under one schedule; ``dip`` without a partition gets the joint choice. Warns about what the profile did not measure."""
    if name == "fsdp2":
        return simulate_whole(workload, name, options=options)
    costs = make_costs(workload, options)
    if name == "dip" and partition is None:
        partition = joint_partition(
            workload.model_spec, workload.parallel.pipeline, [workload.replica_microbatches(0)], costs,
            split_backward=workload.training.split_backward,
        ).partition
    if isinstance(workload.profile, Profile):
        sizes = partition.sub_microbatch_size if partition is not None and name == "dip" else None
        for sentence in outside_profile(workload.profile, workload.microbatches, sizes):
            messages().print(f"warning: {sentence}", soft_wrap=True)
    return simulate_whole(workload, name, partition=partition, options=options, costs=costs)


def _run_compare(args: argparse.Namespace, workload: Workload, partition: Partition | None, options: SimulateOptions) -> int:
    results: list[SimulationResult] = []
    problems: dict[str, str] = {}
    for name in SCHEDULES:
        try:
            results.append(simulate_one(workload, name, partition, options).result)
        except InputError as error:
            problems[name] = str(error)
    if not results:
        raise InputError("schedule", list(SCHEDULES), f"none can run: {next(iter(problems.values()))}", "use more GPUs or less work a microbatch")
    if args.json:
        print_json({"results": results, "problems": problems})
        return 0
    console = tables()
    table = Table("schedule", "s", "MFU", "HFU", "bubbles", "peak GB", "compute", "TP", "DP", "P2P", "bubble", "optimizer")
    for result in sorted(results, key=lambda result: result.iteration_time_s):
        table.add_row(result.schedule, *_cells(result))
    console.print(table)
    for failed, problem in problems.items():
        console.print(f"{failed}: {problem}", soft_wrap=True)
    return 0


def _write_timeline(path: Path, simulation: Simulation) -> None:
    if simulation.schedule is None:
        raise InputError("--memory-timeline", str(path), "schedule 'fsdp2' has no pipeline, hence no timeline", "choose another schedule")
    lines = ["rank,seconds,bytes"]
    for rank in range(simulation.schedule.graph.num_ranks):
        lines += [f"{rank},{instant / 1e9:.9f},{held}" for instant, held in simulation.memory_timeline(rank)]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def _cells(result: SimulationResult) -> list[str]:
    parts = result.breakdown_s
    times = (parts.compute, parts.tensor_parallel, parts.data_parallel, parts.p2p, parts.bubble, parts.optimizer)
    share = ["-" if value is None else f"{value:.3f}" for value in (result.mfu, result.hfu)]
    return [f"{result.iteration_time_s:.4f}", *share, f"{result.bubble_fraction:.1%}", f"{max(result.peak_memory_bytes) / 1e9:.2f}",
            *(f"{value:.3f}" for value in times)]


def _print_result(console: Console, result: SimulationResult, dealt: Deal | None) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    names = ("iteration time, s", "MFU", "HFU", "bubbles", "peak memory, GB", "compute, s", "tensor parallel, s", "data parallel, s",
             "P2P, s", "bubble, s", "optimizer, s")
    table.add_row("schedule", result.schedule)
    for name, value in zip(names, _cells(result), strict=True):
        table.add_row(name, value)
    table.add_row("peak of each rank, GB", " ".join(f"{peak / 1e9:.1f}" for peak in result.peak_memory_bytes))
    table.add_row("layers of each rank", "; ".join(f"{name} {rows}" for name, rows in result.chunks.items()))
    table.add_row("sub-microbatch", ", ".join(f"{name} {size}" for name, size in result.sub_microbatch_size.items()))
    if dealt is not None:
        table.add_row("replicas, most work over mean", deal_words(dealt))
    console.print(table)


def deal_words(dealt: Deal) -> str:
    if not dealt.moves:
        return f"{dealt.imbalance_before:.3f} as read"
    return f"{dealt.imbalance:.3f} as dealt ({dealt.moves} of {len(dealt.replica_of)} microbatches change replicas), {dealt.imbalance_before:.3f} as read"


# --- the grid ----------------------------------------------------------------------------------------------------------------------


def _grid_point(workload: Workload, parallel: Parallel, options: SimulateOptions) -> GridPoint:
    try:
        result = simulate_one(msgspec.structs.replace(workload, parallel=parallel), "dip", None, options).result
    except InputError as error:
        return GridPoint(parallel=parallel, result=None, problem=error.problem)
    return GridPoint(parallel=parallel, result=result)


def search_grid(
    workload: Workload, gpus: int, options: SimulateOptions, *, workers: int, console: Console, rules: Path | None = None
) -> list[GridPoint]:
    """All points of the grid, the fastest first, those that cannot be last; every process executes ``rules``."""
    parallels = grid_parallels(workload, gpus)
    if not parallels:
        raise InputError("--gpus", gpus, f"cannot be shared out for this model and {len(workload.microbatches)} microbatches",
                         "use a number with small factors, or more microbatches")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    points: list[GridPoint] = []
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(f"{gpus} GPUs", total=len(parallels))
        # Numba's threads and locks do not survive a plain fork.
        context = multiprocessing.get_context("spawn")
        prepare = (None, ()) if rules is None else (load_rules, (rules,))
        with ProcessPoolExecutor(min(workers, len(parallels)), context, *prepare) as pool:
            for future in as_completed([pool.submit(_grid_point, workload, parallel, options) for parallel in parallels]):
                points.append(future.result())
                progress.advance(bar)
    size = {id(point): (point.parallel.tensor, point.parallel.pipeline) for point in points}
    return sorted(points, key=lambda p: (p.result is None, p.result.iteration_time_s if p.result else 0.0, size[id(p)]))


def _run_grid(args: argparse.Namespace, workload: Workload, options: SimulateOptions) -> int:
    if isinstance(workload.profile, Profile):
        raise InputError("--grid", "...", "a profile holds for one tensor-parallel size only", "give a device instead of the profile")
    began = time.perf_counter()
    gpus = workload.parallel.num_gpus if args.gpus is None else args.gpus
    console = messages()
    points = search_grid(workload, gpus, options, workers=args.workers or os.cpu_count() or 1, console=console, rules=args.rules)
    feasible = [point for point in points if point.result is not None]
    if not feasible:
        raise InputError("--gpus", gpus, f"no way to share them out fits: {points[0].problem}", "use more GPUs or smaller microbatches")
    if args.json:
        rows = [{"parallel": _sizes(point.parallel), "result": point.result} for point in feasible[: args.top]]
        skipped = [{"parallel": _sizes(point.parallel), "problem": point.problem} for point in points if point.result is None]
        print(msgspec.json.encode({"gpus": gpus, "plans": rows, "infeasible": skipped}).decode())
        return 0
    _print_grid(tables(), feasible[: args.top])
    console.print(f"{len(points)} ways to share {gpus} GPUs, {len(points) - len(feasible)} do not fit; {time.perf_counter() - began:.1f} s")
    return 0


def _sizes(parallel: Parallel) -> dict[str, int]:
    return {"data": parallel.data, "tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}


def _print_grid(console: Console, points: Sequence[GridPoint]) -> None:
    table = Table("DP", "TP", "PP", "K", "B", "s", "MFU", "HFU", "bubbles", "peak GB")
    for point in points:
        result, parallel = point.result, point.parallel
        assert result is not None
        chunks = ", ".join(f"{name} {len(rows)}" for name, rows in result.chunks.items())
        sizes = ", ".join(f"{name} {size}" for name, size in result.sub_microbatch_size.items())
        table.add_row(str(parallel.data), str(parallel.tensor), str(parallel.pipeline), chunks, sizes, *_cells(result)[:5])
    console.print(table)
