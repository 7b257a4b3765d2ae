"""Measures training: DIP beside Megatron's own schedules, the executor's overhead, and the executor on more ranks than cores.

    python scripts/bench_train.py schedules --images uniform --output docs/results/train_uniform
    python scripts/bench_train.py schedules --images heavy --output docs/results/train_heavy
    python scripts/bench_train.py schedules --example examples/t2v/digits --output docs/results/train_video
    python scripts/bench_train.py overhead --output docs/results/train_overhead
    python scripts/bench_train.py sleep --pipeline 4 --output docs/results/train_sleep_p4

``schedules``: all systems train the example in one run on the same weights and batches, one thread a rank, and take turns batch by batch
in an order that rotates; what is compared is the wall-clock time of forward and backward of all microbatches with gradients finalized.
``overhead``: one rank, the executor against a plain loop over the same chunks and sub-microbatches, in alternating pairs.
``sleep``: real executor and messages, stages that sleep for their planned time; workload and costs of one of the paper's setups.

Each writes OUTPUT.json with every run and OUTPUT.md for people.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dip.report.records import write_record
from megatron_dip.report.tables import Spread, markdown_table, spread
from megatron_dip.spec.errors import InputError
from megatron_dip.trainer.ranks import is_rank, run_rank, run_ranks

if TYPE_CHECKING:
    from megatron_dip.cost.interface import CostModel
    from megatron_dip.models.built_in import ChainCost
    from megatron_dip.spec.partition import Partition
    from megatron_dip.spec.plan import Plan
    from megatron_dip.spec.timeline import Timeline
    from megatron_dip.spec.training import RunSettings
    from megatron_dip.trainer.dip_system import DipSystem
    from megatron_dip.trainer.systems import Example, System

EXAMPLE = Path(__file__).parents[1] / "examples" / "vlm" / "digits"
IMAGE_COUNTS: dict[str, list[tuple[int, int]] | None] = {"uniform": [(0, 12)], "heavy": [(5, 12)], "light": [(0, 4)], "changing": None}
"""Bounds of the images in a microbatch; None = as config.json has them, changing from iteration to iteration."""
SYSTEMS = ("dip", "dip-split", "1f1b", "chain", "interleaved", "measured", "serial")
STOCK_LAYOUTS = ("1f1b", "chain", "interleaved")
"""Megatron's layouts that need no measurement."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    modes = parser.add_subparsers(dest="mode", required=True)
    schedules = modes.add_parser("schedules", allow_abbrev=False)
    schedules.add_argument("--example", type=Path, default=EXAMPLE, help="folder of the example (default examples/vlm/digits)")
    schedules.add_argument("--images", choices=tuple(IMAGE_COUNTS), default="uniform", help="of examples with images; others are as config.json has them")
    schedules.add_argument("--pipeline", type=int, default=2)
    schedules.add_argument("--turns", type=int, default=12, help="measured batches (default 16)")
    schedules.add_argument("--warmup", type=int, default=12, help="iterations before, in which stages are profiled (default 12)")
    schedules.add_argument("--systems", default=",".join(SYSTEMS), help=f"some of {','.join(SYSTEMS)} (default all)")
    schedules.add_argument("--partition", type=Path, help="of DIP (JSON); default: as config.json says")
    schedules.add_argument("--seed", type=int, default=1)
    schedules.add_argument("--picture", type=Path, help="draw the batch of median gain: DIP planned and measured, the others measured")
    overhead = modes.add_parser("overhead", allow_abbrev=False)
    overhead.add_argument("--pairs", type=int, default=20)
    overhead.add_argument("--seed", type=int, default=1)
    sleep = modes.add_parser("sleep", allow_abbrev=False, help="under chrt -r 1 a busy machine does not delay the sleepers' waking")
    sleep.add_argument("--pipeline", type=int, default=4)
    sleep.add_argument("--setup", default="vlm-s", help="one of the named setups (default vlm-s)")
    sleep.add_argument("--num-microbatches", type=int, default=16)
    sleep.add_argument("--seconds", type=float, default=6.0, help="length of DIP's iteration, to which all times are scaled (default 6)")
    sleep.add_argument("--turns", type=int, default=3)
    sleep.add_argument("--seed", type=int, default=1)
    for mode in (schedules, overhead, sleep):
        mode.add_argument("--output", type=Path, required=True, help="record without suffix")
    args = parser.parse_args()
    if not is_rank():
        ranks = 1 if args.mode == "overhead" else args.pipeline
        return run_ranks([sys.executable, *sys.argv], ranks, threads=1)
    run_rank(lambda: {"schedules": bench_schedules, "overhead": bench_overhead, "sleep": bench_sleep}[args.mode](args))


# ---- all systems in turns ------------------------------------------------------------------------------------------------------------


@dataclass
class Runs:
    """What one system did in its turns."""

    pipeline_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    bubbles: list[float] = field(default_factory=list)
    makespan_s: list[float] = field(default_factory=list)
    planned_s: list[float] = field(default_factory=list)
    planning_s: list[float] = field(default_factory=list)
    timelines: list[Timeline | None] = field(default_factory=list)
    plans: list[Plan | None] = field(default_factory=list)


def bench_schedules(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from megatron_dip.spec.codec import load_partition
    from megatron_dip.trainer.loop import start_rank

    example, settings = _example(args.seed, args.pipeline, args.warmup + 2 * args.turns, args.images, args.example)
    start_rank(settings)
    say = print if dist.get_rank() == 0 else _silent
    wanted = [name.strip() for name in args.systems.split(",")]
    unknown = [name for name in wanted if name not in SYSTEMS]
    if unknown or "dip" not in wanted:
        raise InputError("--systems", args.systems, f"unknown {unknown}" if unknown else "DIP is missing", f"use some of {','.join(SYSTEMS)}")

    dip = _dip_system(example, settings, None if args.partition is None else load_partition(args.partition))
    say(f"warming up: {args.warmup} iterations of DIP, in which stages are profiled")
    for _ in range(args.warmup):
        dip.train_step()
    layer_times: list[Any] = [_layer_times(dip, example, settings) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(layer_times)
    # DIP starts again from the first weights and batch, as everyone does, knowing what it measured.
    dip = _dip_system(example, settings, dip.partition, warmed_by=dip)
    systems: dict[str, System] = {"dip": dip}
    if "dip-split" in wanted:
        say(f"warming up: {args.warmup} iterations of DIP with backwards split")
        split = _dip_system(example, settings, dip.partition, split_backward=True)
        for _ in range(args.warmup):
            split.train_step()
        systems["dip-split"] = _dip_system(example, settings, dip.partition, warmed_by=split, split_backward=True)
    systems |= {name: _stock_system(name, example, settings, layer_times[0]) for name in wanted if name not in systems}
    for system in systems.values():
        for _ in range(2):
            system.train_step()
    runs = {name: Runs() for name in systems}
    names = list(systems)
    for turn in range(args.turns):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            system = systems[name]
            # Training runs one system all the time; the iteration before warms the caches that the other systems' turns took.
            system.train_step()
            dist.barrier()
            step = system.train_step()
            slowest = torch.tensor([step.pipeline_s], dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            timeline, plan = system.timeline(f"{system.label}, measured"), system.last_plan()
            run = runs[name]
            run.pipeline_s.append(float(slowest))
            run.losses.append(step.loss)
            run.timelines.append(timeline)
            run.plans.append(plan)
            if timeline is not None:
                run.bubbles.append(timeline.bubble_fraction)
                run.makespan_s.append(timeline.makespan / 1e9)
            if plan is not None:
                run.planned_s.append(plan.claimed_makespan / 1e9)
                run.planning_s.append(plan.planning_ns / 1e9)
        say(f"turn {turn + 1}/{args.turns}: " + ", ".join(f"{name} {runs[name].pipeline_s[-1]:.3f} s" for name in names))
    if dist.get_rank() == 0:
        _report_schedules(args, systems, runs, dip)


def _report_schedules(args: argparse.Namespace, systems: dict[str, System], runs: dict[str, Runs], dip: DipSystem) -> None:
    ours = runs["dip"]
    rows, ratios = [], {}
    for name, run in runs.items():
        ratio = [theirs / mine for theirs, mine in zip(run.pipeline_s, ours.pipeline_s, strict=True)]
        ratios[name] = ratio
        rows.append(
            [systems[name].label, _seconds(spread(run.pipeline_s)), _ratio(spread(ratio)), f"{100 * spread(run.bubbles).median:.1f}"]
        )
    stock = [name for name in STOCK_LAYOUTS if name in runs]
    has_images = "image_counts" in dip.example.config.data
    data = f"{args.images} image counts ({IMAGE_COUNTS[args.images] or 'config.json'})" if has_images else "data as config.json has them"
    sections = [
        f"Example {'/'.join(args.example.parts[-2:])}, {args.pipeline} pipeline ranks of one thread each, {dip.settings.num_microbatches} "
        f"microbatches with {data}, {args.turns} batches, every system on every batch, behind an unmeasured one of its own. *Measured*: wall-clock "
        "time of forward and backward of all microbatches, slowest rank, gradients finalized; medians (quartiles).",
        markdown_table(["system", "s an iteration", "times DIP's, batch by batch", "bubbles %"], rows),
    ]
    figures: dict[str, Any] = {
        "runs": {name: {"pipeline_s": run.pipeline_s, "makespan_s": run.makespan_s, "bubble_fraction": run.bubbles} for name, run in runs.items()},
        "partition": {"chunks": dip.partition.chunks, "sub_microbatch_size": dip.partition.sub_microbatch_size},
    }
    if stock:
        better = min(stock, key=lambda name: spread(runs[name].pipeline_s).median)
        sections.append(f"Over the better stock layout ({systems[better].label}): {_ratio(spread(ratios[better]))} in the median of the batches.")
        figures["over_better_stock_layout"] = spread(ratios[better]).median
    if "measured" in runs:
        figures["over_measured_static"] = spread(ratios["measured"]).median
    deviations = [abs(made / planned - 1) for made, planned in zip(ours.makespan_s, ours.planned_s, strict=True)]
    counts = dip.forward_backward.counts()
    assert counts is not None
    sections.append(
        f"Plan against measurement: the makespan deviates by {100 * spread(deviations).median:.1f} % in the median, {100 * max(deviations):.1f} % at "
        f"most. Planning took {1e3 * spread(ours.planning_s).median:.0f} ms a batch on a thread beside training; {counts.ahead} of {counts.taken} plans "
        f"were ready before they were asked for, training waited {counts.waited_ns / 1e6:.0f} ms for plans in all, {sum(counts.fallbacks.values())} "
        f"quick plans stood in. Chunks {dip.partition.chunks}, sub-microbatches {dip.partition.sub_microbatch_size}."
    )
    figures |= {
        "planned_s": ours.planned_s, "planning_s": ours.planning_s, "plan_deviation_median": spread(deviations).median,
        "plan_deviation_max": max(deviations), "plan_waited_s": counts.waited_ns / 1e9, "late_plans": sum(counts.fallbacks.values()),
    }
    write_record(args.output, f"Training schedules in turns, {data}, P = {args.pipeline}", sections, figures)
    print("\n" + "\n\n".join(sections))
    if args.picture is not None:
        _draw(args.picture, systems, runs, ratios[better] if stock else ratios["dip"])
        print(f"wrote {args.picture}")


def _draw(path: Path, systems: dict[str, System], runs: dict[str, Runs], gains: Sequence[float]) -> None:
    """The batch whose gain is the median one."""
    from megatron_dip.report.gantt import draw_gantt
    from megatron_dip.spec.timeline import plan_timeline

    batch = sorted(range(len(gains)), key=lambda index: gains[index])[len(gains) // 2]
    plan = runs["dip"].plans[batch]
    assert plan is not None
    shown = [plan_timeline(plan, "DIP, planned")]
    shown += [timeline for name in systems if name != "serial" and (timeline := runs[name].timelines[batch]) is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_gantt(shown, path, title=f"One iteration of the example on {plan.ranks} pipeline ranks (numbers: microbatches)")


def _example(seed: int, pipeline: int, iterations: int, images: str, folder: Path = EXAMPLE) -> tuple[Example, RunSettings]:
    from megatron_dip.spec.codec import load_example
    from megatron_dip.spec.training import RunSettings, SchedulePlan
    from megatron_dip.spec.workload import Parallel
    from megatron_dip.trainer.loop import load_example_module

    config = load_example(folder / "config.json")
    counts = IMAGE_COUNTS[images] if "image_counts" in config.data else None
    settings = RunSettings(
        schedule=SchedulePlan(name="dip"), parallel=Parallel(pipeline=pipeline), device="cpu", seed=seed, iterations=iterations,
        num_microbatches=config.num_microbatches, data=config.data if counts is None else {**config.data, "image_counts": counts}, timeout_s=120.0,
    )
    settings.validate()
    return load_example_module(folder, config, settings), settings


def _dip_system(
    example: Example, settings: RunSettings, partition: Partition | None, warmed_by: DipSystem | None = None, split_backward: bool = False
) -> DipSystem:
    from megatron_dip.spec.training import SchedulePlan
    from megatron_dip.trainer.dip_system import DipSystem

    return DipSystem(SchedulePlan(name="dip", partition=partition, split_backward=split_backward), example, settings, warmed_by)


def _stock_system(name: str, example: Example, settings: RunSettings, layer_times: dict[str, ChainCost]) -> System:
    from megatron_dip.spec.training import SchedulePlan
    from megatron_dip.trainer.systems import StockSystem

    class SerialSystem(StockSystem):
        """One microbatch after the other through the pipeline: never two ranks at work."""

        def run(self, step: Any, *, forward_only: bool, items: Sequence[Any] | None = None) -> list[dict[str, Any]]:
            items = [next(self.data) for _ in range(self.microbatches_of_replica)] if items is None else items
            reports, bars = [], []
            for item in items:
                reports += super().run(step, forward_only=forward_only, items=[item])
                bars += self.bars
            self.bars = bars
            return reports

    schedule = {
        "1f1b": SchedulePlan(name="1f1b", layout="scripts"),
        "chain": SchedulePlan(name="1f1b", layout="parameters"),
        "interleaved": SchedulePlan(name="interleaved", layout="parameters", virtual=2),
        "measured": SchedulePlan(name="1f1b", layout="measured"),
        "serial": SchedulePlan(name="1f1b", layout="parameters"),
    }[name]
    kind = SerialSystem if name == "serial" else StockSystem
    system = kind(schedule, example, settings, layer_times)
    if name == "serial":
        system.label = "control: the chain, one microbatch at a time"
    return system


def _layer_times(dip: DipSystem, example: Example, settings: RunSettings) -> dict[str, ChainCost]:
    """Mean measured time of each module's layers and ends over microbatches of the run's distribution, for the tuned static split."""
    from megatron_dip.cost.profile import ProfileCost
    from megatron_dip.models.built_in import ChainCost

    assert dip.profile is not None
    assert dip.model.staged is not None
    costs = ProfileCost(dip.profile)
    batches = [dip.model.staged.description.item_metadata(item) for i in range(20) for item in example.dataset.microbatches(i, settings.num_microbatches)]

    def mean(module: str, part: Any) -> float:
        total = 0.0
        for microbatch in batches:
            cost = costs.part(module, part, microbatch.get(module, []))
            total += cost.forward_ns + cost.backward_input_ns + cost.backward_weight_ns
        return total / len(batches)

    return {name: ChainCost(layer=mean(name, "layer"), first=mean(name, "first"), last=mean(name, "last")) for name in dip.profile.modules}


# ---- the executor against a plain loop ------------------------------------------------------------------------------------------------


def bench_overhead(args: argparse.Namespace) -> None:
    from megatron_dip.trainer.loop import start_rank

    example, settings = _example(args.seed, 1, args.pairs + 4, "uniform")
    start_rank(settings)
    system = _dip_system(example, settings, None)
    executor_s, loop_s, losses = [], [], []
    for pair in range(args.pairs + 3):
        system.model.zero_grad()
        # The executor goes first in even pairs, the loop in odd ones.
        timed: dict[str, tuple[float, float]] = {}
        for name in ("executor", "loop") if pair % 2 == 0 else ("loop", "executor"):
            system.model.zero_grad()
            began = time.perf_counter()
            if name == "executor":
                loss = sum(float(report["lm loss"][0]) for report in system.run(example.module.forward_step, forward_only=False))
            else:
                # Like the executor, which reads the next batch ahead, the loop draws one batch in its time.
                loss = _plain_loop(system, example.dataset.microbatches(pair, settings.num_microbatches))
            timed[name] = (time.perf_counter() - began, loss)
        system.after_step()
        if pair >= 3:  # warmed up
            executor_s.append(timed["executor"][0])
            loop_s.append(timed["loop"][0])
            losses.append((timed["executor"][1], timed["loop"][1]))
    assert all(abs(a - b) <= 1e-5 * abs(b) for a, b in losses), losses
    overheads = [ours / theirs - 1 for ours, theirs in zip(executor_s, loop_s, strict=True)]
    sections = [
        f"Example digits on one rank of one thread, 8 microbatches with 0 to 12 images, {args.pairs} alternating pairs on the same weights and "
        "batches. *Measured*: wall-clock time of forward and backward of all microbatches, gradients finalized; medians (quartiles). The loop "
        "runs the same chunks on the same sub-microbatches, one microbatch after the other, without plan, executor or timing.",
        markdown_table(
            ["", "s an iteration"], [["plain loop", _seconds(spread(loop_s))], ["executor with plan", _seconds(spread(executor_s))]]
        ),
        f"Overhead: {100 * spread(overheads).median:.2f} % in the median of the pairs (quartiles {100 * spread(overheads).low_quartile:.2f} to "
        f"{100 * spread(overheads).high_quartile:.2f} %).",
    ]
    write_record(args.output, "Executor overhead on one rank", sections, {"executor_s": executor_s, "loop_s": loop_s, "overhead": spread(overheads).median})
    print("\n" + "\n\n".join(sections))


def _plain_loop(system: DipSystem, items: Sequence[Any]) -> float:
    """What the executor runs, without it: every microbatch through the same chunks in the same sub-microbatches; returns the sum of losses."""
    import contextlib

    from megatron_dip.partition.online import split
    from megatron_dip.spec.plan import PlanStage
    from megatron_dip.trainer.build import finalize_model_grads

    staged = system.model.staged
    assert staged is not None
    description, spec = staged.description, system.example.config.model.modules
    microbatches = [description.item_metadata(item) for item in items]
    parts = split(microbatches, spec, system.partition, system.current_costs())
    total = 0.0
    with contextlib.ExitStack() as stack:
        functions = system.model.config.no_sync_func
        for function in functions if isinstance(functions, list) else [functions]:
            stack.enter_context(function())
        for index, item in enumerate(items):
            batch = description.bind((), {name: item[name] for name in ("images", "tokens", "position_ids", "cu_lengths", "labels")})
            outputs: dict[str, list[Any]] = {}
            for module in spec.topological():
                for part in [part for part in parts if part.microbatch == index and part.module == module]:
                    inputs = {source: outputs.get(source, []) for source in spec.inputs_of(module)}
                    for vp_stage in range(system.partition.num_chunks(module)):
                        first, count = system.partition.layer_range(module, vp_stage, 0)
                        stage = PlanStage(
                            id=0, rank=0, kind="fw", duration=0, mem_delta_start=0, mem_delta_end=0, deps=(), module=module, vp_stage=vp_stage,
                            layers=(first, count), microbatch=index, sub_microbatch=part.sub_microbatch, tokens=sum(part.lengths),
                            instances=len(part.lengths), strategy=["none"] * count,
                        )
                        output = description.run_chunk(staged.chunks[module, vp_stage], stage, batch, part.first_instance, inputs)
                        inputs = {module: [output]}
                    outputs.setdefault(module, []).append(output)
            loss, tokens, _ = system.example.module.loss_func(item["loss_mask"], outputs[spec.topological()[-1]][0])
            total += float(loss.detach())
            (loss / tokens.clamp(min=1) / len(items)).backward()
    finalize_model_grads(list(system.model.chunks))
    return total


# ---- more ranks than cores: stages that sleep --------------------------------------------------------------------------------------------


def bench_sleep(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from megatron_dip.runtime.compute import SleepCompute
    from megatron_dip.runtime.executor import Executor, PlanLinks
    from megatron_dip.runtime.groups import new_process_groups
    from megatron_dip.runtime.p2p import PointToPoint
    from megatron_dip.runtime.timing import HostTimer, clock_offset, gather_records

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=args.pipeline)
    torch.set_num_threads(1)
    shared: list[Any] = [None]
    if rank == 0:
        shared = [_sleep_plans(args)]
    dist.broadcast_object_list(shared)
    plans: dict[str, Plan] = shared[0]
    scale = args.seconds * 1e9 / plans["dip"].claimed_makespan
    groups = new_process_groups(list(range(args.pipeline)), replica=0, timeout_s=300.0)
    executor = Executor(rank, PointToPoint(groups, torch.device("cpu")), torch.device("cpu"))
    offset = clock_offset(groups)
    measured: dict[str, list[float]] = {name: [] for name in plans}
    links = {name: PlanLinks(plan) for name, plan in plans.items()}
    for _ in range(args.turns):
        for name in plans:
            dist.barrier()
            timer = HostTimer()
            executor.run(links[name], SleepCompute(time_scale=scale), timer)
            records = gather_records(timer.records(), groups, offset)
            if records is not None:
                begin = min(record.start_ns for of_rank in records for record in of_rank)
                end = max(record.end_ns for of_rank in records for record in of_rank)
                measured[name].append((end - begin) / 1e9)
                print(f"{name}: planned {plans[name].claimed_makespan * scale / 1e9:.3f} s, measured {measured[name][-1]:.3f} s", flush=True)
    if rank == 0:
        _report_sleep(args, plans, measured, scale)


def _report_sleep(args: argparse.Namespace, plans: dict[str, Plan], measured: dict[str, list[float]], scale: float) -> None:
    rows, deviation = [], {}
    ours = spread(measured["dip"]).median
    for name, plan in plans.items():
        planned = plan.claimed_makespan * scale / 1e9
        times = spread(measured[name])
        deviation[name] = times.median / planned - 1
        rows.append([name, f"{planned:.3f}", _seconds(times), f"{100 * deviation[name]:+.2f}", f"{times.median / ours:.2f}", f"{100 * plan.bubble_fraction:.1f}"])
    sections = [
        f"Setup {args.setup}, {args.num_microbatches} microbatches on {args.pipeline} ranks: real executor and messages, stages sleep for their "
        f"planned time (analytic H800 costs without recompute, scaled so that DIP's plan takes {args.seconds:g} s). *Planned* is simulated, "
        f"*measured* is wall clock; {args.turns} turns, medians (quartiles).",
        markdown_table(["schedule", "planned s", "measured s", "off the plan %", "measured, times DIP's", "planned bubbles %"], rows),
        f"Planning DIP took {plans['dip'].planning_ns / 1e9:.2f} s; its plan stands {plans['dip'].claimed_makespan / plans['dip'].lower_bound:.3f} times "
        "above the lower bound.",
    ]
    write_record(
        args.output, f"Executor with sleeping stages, {args.setup}, P = {args.pipeline}", sections,
        {"measured_s": measured, "planned_s": {name: plan.claimed_makespan * scale / 1e9 for name, plan in plans.items()}, "deviation": deviation},
    )
    print("\n" + "\n\n".join(sections))


def _sleep_plans(args: argparse.Namespace) -> dict[str, Plan]:
    """Plans of DIP and of the baselines for one batch, memory left out: the order of stages alone is compared."""
    from megatron_dip.cost.analytic import AnalyticCost
    from megatron_dip.planner.iteration import PlanOptions, plan_iteration
    from megatron_dip.planner.partitioning import joint_partition
    from megatron_dip.simulator.baselines import run_baseline
    from megatron_dip.spec.codec import resolve_workload
    from megatron_dip.workloads.generators import make_workload

    workload = resolve_workload(make_workload(args.setup, seed=args.seed, num_microbatches=args.num_microbatches), Path(args.setup))
    model = workload.model_spec
    costs = unlimited(AnalyticCost(model, workload.parallel, workload.training, workload.device, microbatches=workload.microbatches))
    choice = joint_partition(model, args.pipeline, [workload.microbatches], costs, strategy="none")
    # Compiles the kernels where no cache has them, which is no part of planning's time.
    plan_iteration(model, choice.partition, workload.microbatches, costs, PlanOptions(evaluations=1, strategy="none"))
    plan = plan_iteration(model, choice.partition, workload.microbatches, costs, PlanOptions(time_budget_s=3.0, seed=args.seed, strategy="none"))
    plans = {"dip": plan}
    for name in ("1f1b", "interleaved", "nnscaler", "optimus", "bigmac"):
        result = run_baseline(name, model, args.pipeline, workload.microbatches, costs, with_memory=False)
        if result is not None:
            plans[name] = _plan_of_schedule(result.schedule)
    return plans


def unlimited(costs: Any) -> CostModel:
    """The cost model without a memory limit: every schedule is compared with the same durations."""

    class Unlimited:
        def __getattr__(self, name: str) -> Any:
            return getattr(costs, name)

        def memory_capacity_bytes(self) -> int | None:
            return None

    return Unlimited()  # type: ignore[return-value]


def _plan_of_schedule(schedule: Any) -> Plan:
    """A schedule's order as a plan that the executor runs."""
    from megatron_dip.program.lower import lower
    from megatron_dip.spec.plan import Dep, Plan, PlanStage
    from megatron_dip.spec.tasks import KIND_NAMES

    graph = schedule.graph
    program = lower(graph, schedule.order)
    stages = [
        PlanStage(
            id=task, rank=int(graph.rank[task]), kind=KIND_NAMES[graph.kind[task]],  # type: ignore[arg-type]
            duration=int(graph.duration_ns[task]), mem_delta_start=0,
            mem_delta_end=0,
            deps=tuple([Dep(int(graph.dep_task[edge]), int(graph.dep_lag_ns[edge])) for edge in range(graph.dep_offset[task], graph.dep_offset[task + 1])]),
            module=graph.module_names[graph.module[task]], vp_stage=int(graph.vp_stage[task]), layers=(0, 1),
            microbatch=int(graph.microbatch[task]), sub_microbatch=int(graph.sub_microbatch[task]), tokens=1, instances=1, strategy=["none"],
        )
        for task in range(graph.num_tasks)
    ]
    return Plan(
        format="megatron-dip/plan/1", ranks=graph.num_ranks, memory_capacity=None, memory_initial=[0] * graph.num_ranks, stages=stages,
        order=[tasks.tolist() for tasks in schedule.order], claimed_makespan=schedule.makespan_ns, lower_bound=1,
        bubble_fraction=schedule.bubble_fraction, peak_memory=[0] * graph.num_ranks, planning_ns=0, evaluations=0, seed=0, chunks={},
        sub_microbatch_size={}, actions=program.actions(), inputs=program.inputs(), local_inputs=program.local_inputs(), outputs=program.outputs(),
    )


def _seconds(figures: Spread) -> str:
    return f"{figures.median:.3f} ({figures.low_quartile:.3f} to {figures.high_quartile:.3f})"


def _ratio(figures: Spread) -> str:
    return f"{figures.median:.2f} ({figures.low_quartile:.2f} to {figures.high_quartile:.2f})"


def _silent(*_: object) -> None:
    return None


if __name__ == "__main__":
    sys.exit(main())
