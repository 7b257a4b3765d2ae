"""Profile -> plan -> train: how far measured iterations lie from what was predicted before training began.

    python scripts/bench_prediction.py --output docs/results/prediction

First ``megatron-dip profile`` rehearses the example's stages on data of another seed and writes a profile. Then the example trains as
``megatron-dip train --profile`` does: every iteration is planned with that profile, which nothing corrects while training. Held against
each plan's makespan is the wall-clock time of forward and backward of all microbatches on the slowest rank, gradients finalized. Writes
OUTPUT.json with every iteration and OUTPUT.md for people.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dip.report.records import write_record
from megatron_dip.report.tables import Spread, markdown_table, spread
from megatron_dip.trainer.ranks import is_rank, run_rank, run_ranks

if TYPE_CHECKING:
    from megatron_dip.runtime.timing import StageRecord
    from megatron_dip.spec.plan import Plan

EXAMPLE = Path(__file__).parents[1] / "examples" / "vlm" / "digits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--pipeline", type=int, default=2, metavar="P", help="pipeline ranks (default 2)")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="of profiling (default 60)")
    parser.add_argument("--iterations", type=int, default=30, metavar="N", help="measured ones (default 30)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="iterations before, in which caches and kernels warm up (default 3)")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="made before; default: made now")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="record without suffix")
    args = parser.parse_args()
    if not is_rank():
        return _start(args)
    run_rank(lambda: _train(args))


def _start(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as folder:
        profile = args.profile
        if profile is None:
            profile = Path(folder) / "profile.json"
            subprocess.run(
                [sys.executable, "-m", "megatron_dip.cli.main", "profile", str(EXAMPLE), "--device", "cpu", "--pipeline", str(args.pipeline),
                 "--seconds", str(args.seconds), "--seed", str(args.seed), "--output", str(profile)], check=True,
            )
        os.environ["PREDICTION_PROFILE"] = str(profile)
        return run_ranks([sys.executable, *sys.argv], args.pipeline, threads=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """One measured iteration; the shares multiply up to measured over planned time."""

    images: int
    planned_s: float
    measured_s: float
    """Forward and backward on the slowest rank."""
    stages: float
    """Plan with all stage times stretched alike, to the measured sum, over the plan."""
    scatter: float
    """Plan's order with the measured stage times over that: times that differ from stage to stage, hence waiting."""
    messages: float
    """Measured makespan over that: messages and executor that took longer than predicted."""
    around: float
    """Measured time over the makespan: data, agreement on the plan, gradients finalized."""


def _train(args: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from megatron_dip.spec.codec import load_example, load_profile
    from megatron_dip.spec.training import RunSettings, SchedulePlan
    from megatron_dip.spec.workload import Parallel
    from megatron_dip.trainer.dip_system import DipSystem
    from megatron_dip.trainer.loop import load_example_module, start_rank

    config = load_example(EXAMPLE / "config.json")
    path = os.environ["PREDICTION_PROFILE"]
    settings = RunSettings(
        schedule=SchedulePlan(name="dip", profile=path), parallel=Parallel(pipeline=args.pipeline), device="cpu", seed=args.seed,
        iterations=args.warmup + args.iterations, num_microbatches=config.num_microbatches, data=config.data, timeout_s=120.0,
    )
    settings.validate()
    example = load_example_module(EXAMPLE, config, settings)
    start_rank(settings)
    system = DipSystem(settings.schedule, example, settings)
    found = []
    for index in range(settings.iterations):
        step = system.train_step()
        slowest = torch.tensor([step.pipeline_s], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        records, plan = system.forward_backward.gather_records(), system.last_plan()
        if records is None or index < args.warmup:
            continue
        assert plan is not None
        images = sum(len(item["images"]) for item in example.dataset.microbatches(index, settings.num_microbatches))
        found.append(_compare(plan, records, float(slowest), images))
        print(f"iteration {index + 1}: predicted {found[-1].planned_s:.3f} s, measured {found[-1].measured_s:.3f} s", flush=True)
    if dist.get_rank() == 0:
        _report(args, found, system.partition.chunks, system.partition.sub_microbatch_size, load_profile(path).p2p.latency_ns)


def _compare(plan: Plan, records: Sequence[Sequence[StageRecord]], measured_s: float, images: int) -> Iteration:
    measured = _stage_times(plan, records)
    makespan = max(r.end_ns for of_rank in records for r in of_rank) - min(r.start_ns for of_rank in records for r in of_rank)
    stretch = sum(measured.values()) / sum(stage.duration for stage in plan.stages)
    stretched = _makespan(plan, {stage.id: stage.duration * stretch for stage in plan.stages})
    replayed = _makespan(plan, measured)
    return Iteration(
        images=images, planned_s=plan.claimed_makespan / 1e9, measured_s=measured_s, stages=stretched / plan.claimed_makespan,
        scatter=replayed / stretched, messages=makespan / replayed, around=measured_s * 1e9 / makespan,
    )


def _stage_times(plan: Plan, records: Sequence[Sequence[StageRecord]]) -> dict[int, float]:
    """Measured ns of each stage, from the end of the one before where the rank did not wait: what a profile of an example counts."""
    spans = {record.stage: (record.start_ns, record.end_ns) for of_rank in records for record in of_rank}
    times: dict[int, float] = {}
    for rank, order in enumerate(plan.order):
        free: int | None = None
        for stage_id in order:
            start, end = spans[stage_id]
            arrivals = [spans[dep.stage][1] + dep.lag for dep in plan.stages[stage_id].deps if plan.stages[dep.stage].rank != rank]
            times[stage_id] = end - (start if free is None or max(arrivals, default=0) > free else free)
            free = end
    return times


def _makespan(plan: Plan, duration_ns: Mapping[int, float]) -> float:
    """Of the plan's order and message times with these durations."""
    end: dict[int, float] = {}
    position = [0] * plan.ranks
    free = [0.0] * plan.ranks
    while len(end) < len(plan.stages):
        before = len(end)
        for rank, order in enumerate(plan.order):
            while position[rank] < len(order):
                stage = plan.stages[order[position[rank]]]
                if any(dep.stage not in end for dep in stage.deps):
                    break
                free[rank] = max([free[rank], *(end[dep.stage] + dep.lag for dep in stage.deps)]) + duration_ns[stage.id]
                end[stage.id] = free[rank]
                position[rank] += 1
        assert len(end) > before, "the plan's order cannot be executed"
    return max(end.values())


def _report(
    args: argparse.Namespace, found: Sequence[Iteration], chunks: Mapping[str, Any], sizes: Mapping[str, int], latency_ns: float
) -> None:
    ratios = [iteration.measured_s / iteration.planned_s for iteration in found]
    errors = [abs(ratio - 1) for ratio in ratios]
    parts = {
        "stage times (sum of all stages)": [iteration.stages for iteration in found],
        "scatter of stage times": [iteration.scatter for iteration in found],
        "messages and executor": [iteration.messages for iteration in found],
        "around the pipeline (data, agreement, gradients)": [iteration.around for iteration in found],
        "all together": ratios,
    }
    sections = [
        f"Example digits, {args.pipeline} pipeline ranks of one thread each. `megatron-dip profile` measured for {args.seconds:g} s on data of another "
        f"seed; then {args.iterations} iterations were trained, behind {args.warmup} that warm up, each planned with that profile. *Predicted*: the "
        "plan's makespan, known before the iteration. *Measured*: wall-clock time of forward and backward of all microbatches on the slowest rank, "
        "gradients finalized.",
        f"Measured over predicted, median (quartiles): **{_percent(spread(ratios))}**. Distance of an iteration from its prediction: "
        f"**{100 * spread(errors).median:.1f} %** in the median, {100 * max(errors):.1f} % at most. Over all iterations together: "
        f"{100 * (sum(i.measured_s for i in found) / sum(i.planned_s for i in found) - 1):+.1f} %.",
        "What the difference consists of (each as a factor on the predicted time, median and quartiles):",
        markdown_table(["part", "difference"], [[name, _percent(spread(values))] for name, values in parts.items()]),
        f"Chunks {dict(chunks)}, sub-microbatches {dict(sizes)}; a message takes {latency_ns / 1e6:.2f} ms and its bytes' time.",
        markdown_table(
            ["iteration", "images", "predicted s", "measured s", "difference %"],
            [[args.warmup + 1 + index, i.images, f"{i.planned_s:.3f}", f"{i.measured_s:.3f}", f"{100 * (i.measured_s / i.planned_s - 1):+.1f}"]
             for index, i in enumerate(found)],
        ),
    ]
    figures = {
        "iterations": [{name: getattr(i, name) for name in Iteration.__slots__} for i in found],
        "ratio_median": spread(ratios).median, "deviation_median": spread(errors).median, "deviation_max": max(errors),
    }
    write_record(args.output, f"Prediction and measurement, P = {args.pipeline}", sections, figures)
    print("\n" + "\n\n".join(sections[1:4]))


def _percent(figures: Spread) -> str:
    return f"{100 * (figures.median - 1):+.1f} % ({100 * (figures.low_quartile - 1):+.1f} to {100 * (figures.high_quartile - 1):+.1f})"


if __name__ == "__main__":
    sys.exit(main())
