"""Measures training with and without the balance across data-parallel replicas.

    python scripts/bench_balance_training.py train --pipeline 2 --data 2 --output docs/results/balance_train_p2_dp2
    python scripts/bench_balance_training.py sleep --pipeline 2 --data 4 --output docs/results/balance_sleep_vlm_s
    python scripts/bench_balance_training.py sleep --profile docs/results/measured/cpu_small_profile.json --seconds 2 --num-microbatches 4 \
        --pipeline 2 --data 2 --output docs/results/balance_sleep_digits_p2_dp2

``train``: the digits example, two systems of equal weights in one run, one of which deals its batches: their losses, iteration by
iteration, and wall-clock times. Where ranks are more than cores, times say little.
``sleep``: more ranks than cores. The real look-ahead, exchange of items, planner, executor and messages; stages sleep for their planned
time. Batches of a named setup, or of the digits example under a measured profile, scaled to ``--seconds`` an iteration. Dealt and undealt
iterations of the same batch take turns, all replicas start together, and the slowest one ends the iteration.

Each writes OUTPUT.json with every iteration and OUTPUT.md for people.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from megatron_dip.report.records import write_record
from megatron_dip.report.tables import markdown_table, spread
from megatron_dip.trainer.ranks import is_rank, run_rank, run_ranks

if TYPE_CHECKING:
    from megatron_dip.cost.interface import CostModel
    from megatron_dip.iteration.balance import BalanceFigures, ReplicaBalance
    from megatron_dip.spec.model import ModelSpec
    from megatron_dip.spec.partition import Partition
    from megatron_dip.spec.plan import Plan
    from megatron_dip.spec.workload import Microbatch

DIGITS = Path(__file__).parents[1] / "examples" / "vlm" / "digits"
ARMS = ("undealt", "dealt")
_CROWDED = (
    "There were more ranks than cores here: a replica that waits leaves its core to the others, so measured times show the work of all ranks "
    "together, which dealing does not change. What replicas wait for each other is measured with sleeping stages."
)
_PATCH_BYTES = 14 * 14 * 3
"""Of raw pixels, which travel with the images of a named setup."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    modes = parser.add_subparsers(dest="mode", required=True)
    train = modes.add_parser("train", allow_abbrev=False)
    sleep = modes.add_parser("sleep", allow_abbrev=False)
    sleep.add_argument("--setup", default="vlm-s", help="a named setup (default vlm-s)")
    sleep.add_argument("--profile", type=Path, help="measured profile of the digits example, whose batches are then taken")
    sleep.add_argument("--seconds", type=float, default=6.0, help="the first undealt iteration as planned, to which times are scaled (default 6)")
    sleep.add_argument("--real-time", action="store_true", help="threads that run stages and carry messages get real-time priority: a busy machine does not delay their waking")
    sleep.add_argument("--evaluations", type=int, default=30, help="schedules tried for each plan (default 30)")
    for mode, iterations, size in ((train, 30, 4), (sleep, 10, 16)):
        mode.add_argument("--pipeline", type=int, default=2)
        mode.add_argument("--data", type=int, default=2)
        mode.add_argument("--num-microbatches", type=int, default=size, help=f"of a replica (default {size})")
        mode.add_argument("--iterations", type=int, default=iterations, help=f"of each arm (default {iterations})")
        mode.add_argument("--seed", type=int, default=1)
        mode.add_argument("--output", type=Path, required=True, help="record without suffix")
    args = parser.parse_args()
    if not is_rank():
        return run_ranks([sys.executable, *sys.argv], args.pipeline * args.data, threads=1)
    run_rank(lambda: {"train": bench_train, "sleep": bench_sleep}[args.mode](args))


@dataclass
class Arm:
    """What one of the two did, iteration by iteration."""

    losses: list[float] = field(default_factory=list)
    slowest_s: list[float] = field(default_factory=list)
    """Measured: the slowest rank."""
    planned_s: list[float] = field(default_factory=list)
    """The slowest replica's plan."""
    planned_over_mean: list[float] = field(default_factory=list)
    measured_over_mean: list[float] = field(default_factory=list)
    """Pipeline time of the slowest replica over the mean."""
    figures: BalanceFigures | None = None


# ---- training the digits ---------------------------------------------------------------------------------------------------------------


def bench_train(args: argparse.Namespace) -> None:
    import torch.distributed as dist

    from megatron_dip.spec.codec import load_example
    from megatron_dip.spec.training import RunSettings, SchedulePlan
    from megatron_dip.spec.workload import Parallel
    from megatron_dip.trainer.dip_system import DipSystem
    from megatron_dip.trainer.loop import load_example_module, start_rank

    config = load_example(DIGITS / "config.json")
    settings = RunSettings(
        schedule=SchedulePlan(name="dip"), parallel=Parallel(pipeline=args.pipeline, data=args.data), device="cpu", seed=args.seed,
        iterations=args.iterations, num_microbatches=args.num_microbatches * args.data, data=config.data, timeout_s=240.0,
        distributed_optimizer=True, overlap_grad_reduce=True,
    )
    settings.validate()
    example = load_example_module(DIGITS, config, settings)
    start_rank(settings)
    systems = {
        name: DipSystem(settings.schedule, example, msgspec.structs.replace(settings, balance=balance))
        for name, balance in zip(ARMS, ("off", "exchange"), strict=True)
    }
    arms = {name: Arm() for name in ARMS}
    for iteration in range(args.iterations):
        for name in ARMS if iteration % 2 else ARMS[::-1]:
            dist.barrier()
            step, records = systems[name].train_step(), systems[name].forward_backward.records()
            span = max(record.end_ns for record in records) - min(record.start_ns for record in records)
            arms[name].losses.append(step.loss)
            _add(arms[name], step.pipeline_s, span / 1e9, systems[name].last_plan(), args.pipeline)
        if dist.get_rank() == 0:
            print(f"iteration {iteration + 1}: " + ", ".join(f"{name} loss {arms[name].losses[-1]:.7f}" for name in ARMS), flush=True)
    arms["dealt"].figures = systems["dealt"].forward_backward.balance_figures()
    if dist.get_rank() == 0:
        _report(args, arms, f"Example digits, {args.pipeline} pipeline ranks x {args.data} replicas of one thread each on {os.cpu_count()} cores, "
                f"{args.num_microbatches} microbatches a replica, distributed optimizer, gradients reduced beside the pipeline")


# ---- stages that sleep -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batches:
    """Global batches, the same on all ranks, and what they are planned with."""

    model: ModelSpec
    partition: Partition
    costs: CostModel
    metadata: list[list[Microbatch]]
    """By iteration; microbatch i is read by replica i mod their number."""

    def items(self, iteration: int, replica: int, num_replicas: int) -> list[dict[str, Any]]:
        """What the replica's data iterator gives: metadata, and as many raw bytes as its images have."""
        import torch

        return [
            {"metadata": microbatch, "pixels": torch.zeros(sum(microbatch.get("vit", ())) * _PATCH_BYTES, dtype=torch.uint8)}
            for microbatch in self.metadata[iteration][replica::num_replicas]
        ]


class SleepingReplica:
    """One arm on one rank: look-ahead, balance, plans and executor as in training."""

    def __init__(self, args: argparse.Namespace, batches: Batches, is_dealt: bool) -> None:
        import torch
        import torch.distributed as dist

        from megatron_dip.iteration.agreement import Agreement
        from megatron_dip.iteration.balance import ReplicaBalance, ReplicaPlans
        from megatron_dip.iteration.lookahead import LookaheadIterator
        from megatron_dip.iteration.plan_source import PlanSource
        from megatron_dip.partition.work import WorkEstimate
        from megatron_dip.planner.message import pack_plan
        from megatron_dip.runtime.executor import Executor
        from megatron_dip.runtime.groups import new_process_groups
        from megatron_dip.runtime.p2p import PointToPoint

        self._batches = batches
        self._options = args
        replica = dist.get_rank() // args.pipeline
        self.groups = new_process_groups([replica * args.pipeline + rank for rank in range(args.pipeline)], replica, timeout_s=240.0)
        self._plans: PlanSource | None = None
        if dist.get_rank() == self.groups.control_ranks[0]:
            # Every iteration waits for its plan: what is measured is what replicas wait for each other.
            self._plans = PlanSource(self._plan, None, pack_plan, deadline_s=60.0, num_threads=1, look_ahead=1, link=None)
        self._agreement = Agreement(self.groups, batches.partition)
        self._executor = Executor(self.groups.rank, PointToPoint(self.groups, torch.device("cpu")) if args.pipeline > 1 else None, torch.device("cpu"))
        estimate = WorkEstimate(batches.model, batches.partition, batches.costs).of
        self.balance: ReplicaBalance | None = None
        if is_dealt:
            plans = None if self._plans is None else ReplicaPlans(submit=self._plans.submit_dealt, planned_ns=self._plans.planned_ns)
            self.balance = ReplicaBalance(self.groups, estimate, plans, 240.0)
        self._data = LookaheadIterator(
            item for iteration in range(len(batches.metadata)) for item in batches.items(iteration, replica, args.data)
        )
        self._span_ns = 0

    def _plan(self, microbatches: Sequence[Microbatch], forward_only: bool) -> Plan:
        from megatron_dip.planner.iteration import PlanOptions, plan_iteration

        if self._options.real_time:  # what plans, on a thread of its own, has no hurry
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        options = PlanOptions(evaluations=self._options.evaluations, strategy="none")
        return plan_iteration(self._batches.model, self._batches.partition, microbatches, self._batches.costs, options)

    def prepare(self, iteration: int) -> Plan:
        """As DIP's forward_backward: deals are settled, the plan is shared, the next batch is read."""
        import itertools

        from megatron_dip.iteration.capture_batch import CapturedBatch

        size = self._options.num_microbatches
        if self.balance is not None:
            self.balance.start(self._data, True)
            self.balance.settle(self._data, size, False, self._span_ns)
        metadata = [item["metadata"] for item in itertools.islice(self._data, size)]
        calls: list[Any] = []
        batch = CapturedBatch(
            calls=calls, inputs=[], recapture=calls.__getitem__, microbatches=metadata, conditions=b"", error=None, is_replay=False
        )
        shared = self._agreement.share(None if self._plans is None else self._plans.take(batch, False))
        self._agreement.compare(shared.digest, metadata, b"", shared.error, None)
        assert shared.plan is not None
        if iteration + 1 < len(self._batches.metadata):
            if self.balance is not None and self.balance.is_on:
                self.balance.offer(self._data, [size], lambda item: item["metadata"])
            else:
                ahead = self._data.look_ahead([size], lambda item: item["metadata"])
                if self._plans is not None:
                    self._plans.submit(ahead, self._data, False)
        return shared.plan

    def run(self, plan: Plan, scale: float) -> float:
        """Seconds from this rank's first stage to its last."""
        from megatron_dip.runtime.compute import SleepCompute
        from megatron_dip.runtime.executor import PlanLinks
        from megatron_dip.runtime.timing import HostTimer

        timer = HostTimer()
        self._executor.run(PlanLinks(plan), SleepCompute(time_scale=scale), timer)
        records = timer.records()
        self._span_ns = max(record.end_ns for record in records) - min(record.start_ns for record in records)
        return self._span_ns / 1e9


def bench_sleep(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=args.pipeline * args.data)
    torch.set_num_threads(1)
    batches = _batches(args)
    if args.real_time:  # of this thread and of those that it starts from here on
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    replicas = {name: SleepingReplica(args, batches, is_dealt=name == "dealt") for name in ARMS}
    arms = {name: Arm() for name in ARMS}
    scale = 0.0
    for iteration in range(args.iterations + 1):
        for name in ARMS if iteration % 2 else ARMS[::-1]:
            plan = replicas[name].prepare(iteration)
            if not scale:
                longest = torch.tensor([plan.claimed_makespan])
                dist.all_reduce(longest, dist.ReduceOp.MAX)
                scale = args.seconds * 1e9 / int(longest)
            dist.barrier()
            began = time.perf_counter()
            span_s = replicas[name].run(plan, scale)
            took_s = time.perf_counter() - began
            if iteration:  # the first batch is never dealt
                _add(arms[name], took_s, span_s, plan, args.pipeline, scale)
        if iteration and dist.get_rank() == 0:
            print(f"iteration {iteration}: " + ", ".join(
                f"{name} planned {arm.planned_s[-1]:.3f} measured {arm.slowest_s[-1]:.3f}" for name, arm in arms.items()
            ), flush=True)
    assert replicas["dealt"].balance is not None
    arms["dealt"].figures = replicas["dealt"].balance.figures()
    if dist.get_rank() == 0:
        what = f"setup {args.setup}, analytic H800 costs without recompute, scaled so that the first iteration's plan takes {args.seconds:g} s; raw pixels travel"
        if args.profile is not None:
            what = f"metadata of the digits example, its stage times as measured on one core a rank ({args.profile.name}), scaled so that the first iteration's plan takes {args.seconds:g} s"
        _report(args, arms, f"{args.pipeline} pipeline ranks x {args.data} replicas on {os.cpu_count()} cores, {args.num_microbatches} microbatches a "
                f"replica. Stages sleep for their planned time; look-ahead, exchange, planner, executor and messages are real. {what[0].upper()}{what[1:]}")


def _batches(args: argparse.Namespace) -> Batches:
    import torch.distributed as dist
    from bench_train import unlimited

    from megatron_dip.cost.analytic import AnalyticCost
    from megatron_dip.cost.profile import ProfileCost
    from megatron_dip.partition.offline import even_partition
    from megatron_dip.planner.partitioning import joint_partition
    from megatron_dip.spec.codec import load_example, load_profile, resolve_workload
    from megatron_dip.workloads.generators import make_workload

    count, iterations = args.num_microbatches * args.data, args.iterations + 1
    if args.profile is not None:
        config = load_example(DIGITS / "config.json")
        model = config.model.modules
        bounds = config.data["image_counts"]
        random = np.random.default_rng(args.seed)
        metadata = [
            [_digits_metadata(config, int(random.integers(low, high + 1))) for _ in range(count)]
            for low, high in (bounds[iteration % len(bounds)] for iteration in range(iterations))
        ]
        partition = config.given_partition(args.pipeline) or even_partition(model, args.pipeline, config.virtual_pipeline, config.sub_microbatch_size)
        return Batches(model, partition, ProfileCost(load_profile(args.profile), field="--profile"), metadata)
    workloads = [
        resolve_workload(make_workload(args.setup, seed=args.seed + iteration, num_microbatches=count), Path(args.setup))
        for iteration in range(iterations)
    ]
    first = workloads[0]
    costs = unlimited(AnalyticCost(first.model_spec, first.parallel, first.training, first.device, microbatches=first.microbatches))
    chosen: list[Any] = [None]
    if dist.get_rank() == 0:
        batch = list(first.microbatches[: args.num_microbatches])
        chosen = [joint_partition(first.model_spec, args.pipeline, [batch], costs, strategy="none").partition]
    dist.broadcast_object_list(chosen)
    return Batches(first.model_spec, chosen[0], costs, [list(workload.microbatches) for workload in workloads])


def _digits_metadata(config: Any, num_images: int) -> Microbatch:
    image = config.model.image
    return {"vit": [image.patches] * num_images, "lm": [config.model.sequence_length]}


# ---- both ----------------------------------------------------------------------------------------------------------------------------------


def _add(arm: Arm, took_s: float, span_s: float, plan: Plan | None, pipeline: int, scale: float = 1.0) -> None:
    """Adds an iteration; all ranks must call it together."""
    import torch
    import torch.distributed as dist

    assert plan is not None
    mine = torch.tensor([took_s, span_s, plan.claimed_makespan * scale / 1e9], dtype=torch.float64)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    table = torch.stack(every).view(-1, pipeline, 3).amax(dim=1)  # [replicas, 3]
    arm.slowest_s.append(float(table[:, 0].max()))
    arm.measured_over_mean.append(float(table[:, 1].max() / table[:, 1].mean()))
    arm.planned_s.append(float(table[:, 2].max()))
    arm.planned_over_mean.append(float(table[:, 2].max() / table[:, 2].mean()))


def _report(args: argparse.Namespace, arms: dict[str, Arm], what: str) -> None:
    undealt, dealt = arms["undealt"], arms["dealt"]
    assert dealt.figures is not None
    planned = 1 - sum(dealt.planned_s) / sum(undealt.planned_s)
    measured = 1 - sum(dealt.slowest_s) / sum(undealt.slowest_s)
    medians = {
        key: spread([1 - mine / other for mine, other in zip(getattr(dealt, key), getattr(undealt, key), strict=True)]).median
        for key in ("planned_s", "slowest_s")
    }
    sections = [f"{what}. {len(dealt.slowest_s)} iterations of each, in turns on the same batches, all replicas starting together; medians (quartiles)."]
    titles = {"planned_s": "slowest replica's plan s", "planned_over_mean": "over mean, planned", "slowest_s": "measured s", "measured_over_mean": "over mean, measured"}
    for group in (("planned_s", "planned_over_mean"), ("slowest_s", "measured_over_mean")):
        rows = []
        for name, arm in arms.items():
            spreads = [spread(getattr(arm, key)) for key in group]
            rows.append([name, *[f"{one.median:.4f} ({one.low_quartile:.4f} to {one.high_quartile:.4f})" for one in spreads]])
        sections.append(("Simulated:" if group[0] == "planned_s" else "Measured:") + "\n\n" + markdown_table(["", *[titles[key] for key in group]], rows))
    figures: dict[str, Any] = {
        "arms": {name: {key: getattr(arm, key) for key in ("losses", *titles)} for name, arm in arms.items()},
        "balance": dataclasses.asdict(dealt.figures), "planned_gain": planned, "measured_gain": measured,
        "median_planned_gain": medians["planned_s"], "median_measured_gain": medians["slowest_s"],
    }
    if dealt.losses:
        off = [abs(mine / other - 1) for mine, other in zip(dealt.losses, undealt.losses, strict=True)]
        figures["largest_loss_difference"] = max(off)
        sections.append(f"Losses of {len(off)} iterations: relative difference at most {max(off):.1e}, in the first {off[0]:.1e}; "
                        f"{undealt.losses[0]:.6f} to {undealt.losses[-1]:.6f} undealt, {dealt.losses[-1]:.6f} dealt.")
    left = ", ".join(f"{reason} {count}" for reason, count in sorted(dealt.figures.left.items())) or "none"
    sections.append(
        f"Dealing saves {planned:.2%} as planned and {measured:.2%} as measured over all iterations; in the median of the iterations "
        f"{medians['planned_s']:.2%} and {medians['slowest_s']:.2%}. Batches dealt {dealt.figures.dealt}, left as read: {left}; "
        f"{dealt.figures.moves} microbatches moved; rank 0 sent {dealt.figures.bytes_sent / 1e6:.1f} MB, exchanges took {dealt.figures.seconds:.2f} s "
        f"in the background, iterations waited {dealt.figures.waited_s:.2f} s for them."
    )
    if args.mode == "train" and args.pipeline * args.data > (os.cpu_count() or 1):
        sections.append(_CROWDED)
    write_record(args.output, f"Balance across replicas, measured: P {args.pipeline}, DP {args.data}, {args.mode}", sections, figures)
    print("\n" + "\n\n".join(sections))


if __name__ == "__main__":
    sys.exit(main())
