"""Holds what ranks keep against what plans say, under limits from none to the least that plans, and shows what memory costs in time.

    python scripts/bench_memory.py measured [--output docs/results/memory]     a small LLaVA on two ranks of this machine, in seconds
    python scripts/bench_memory.py simulated [--output ...]                    the five setups under their device's memory

measured    each limit is a share of what a plan without a limit holds beside weights; per rank: the plan's peak, the measured one (saved
            tensors, messages, inputs), the strategies that were chosen, the planned makespan, the time of an iteration
simulated   makespan over the bound free of cut and recomputation, with each set of strategies: full, + selective, + offload
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.wrapped import WrappedCost
from megatron_dip.partition.offline import cheapest_work_ns
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.spec.named import FIVE_SETUPS, named_setup
from megatron_dip.spec.profile import Strategy
from megatron_dip.workloads.generators import make_workload

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench_frozen import IMAGES, TEXT, batch, forward_step, provide

SHARES = (1.0, 0.8, 0.6, 0.45, 0.35, 0.3, 0.25, 0.2)
"""Of what a plan without a limit takes beside what is held all the time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One rank under one limit; bytes."""

    share: float | None
    limit: int | None
    static: int
    planned: int
    measured: int
    makespan_ns: int
    seconds: float
    loss: float
    strategies: dict[str, int] = field(default_factory=dict)
    """Layers of all stages under each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    rows: list[Measured]
    refusal: str
    """Of the first limit below the least that plans."""


def sweep(rank: int, ranks: int, shares: tuple[float, ...], flags: tuple[str, ...], iterations: int) -> Outcome:
    """Trains a few iterations under each limit on one rank of a launch."""
    from tests.hooks.test_adapters import prepare

    prepare(1, ranks, 1)
    from megatron_dip.without_cuda.core import CpuDeviceMode

    torch.set_num_threads(1)
    with CpuDeviceMode():
        rows = [_run(rank, ranks, None, None, flags, iterations)]
        most = max(_of_all(rows[0].planned - rows[0].static))
        static = max(_of_all(rows[0].static))
        refusal = ""
        for share in shares:
            limit = static + int(share * most)
            row = _run(rank, ranks, share, limit, flags, iterations)
            if max(_of_all(row.planned)) > limit:
                refusal = f"{share:g}: no plan fits"
                break
            rows.append(row)
    return Outcome(rows=rows, refusal=refusal)


def _of_all(value: int) -> list[int]:
    import torch.distributed as dist

    every = [value] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return every


def _run(rank: int, ranks: int, share: float | None, limit: int | None, flags: tuple[str, ...], iterations: int) -> Measured:
    from megatron.core import tensor_parallel

    from megatron_dip.hooks import build
    from megatron_dip.hooks.arguments import add_dip_args
    from megatron_dip.hooks.megatron_lm import dip_schedule

    given = 1e5 if limit is None else limit / 2**30
    args = add_dip_args(argparse.ArgumentParser()).parse_args([
        "--dip-evaluations", "100", "--dip-device", "cpu", "--dip-chunks", "vit=2", "lm=2", "--dip-sub-microbatch-size", "vit=2",
        "--dip-memory-limit", str(given), *flags,
    ])
    for name, value in {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": ranks, "data_parallel_size": 1, "context_parallel_size": 1,
        "sequence_parallel": False, "bf16": False, "fp16": False, "use_distributed_optimizer": False,
    }.items():
        setattr(args, name, value)
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    chunks = build.build_chunks(args, partial(provide, (), ranks))
    seconds, reports = [], []
    for _ in range(iterations):
        for chunk in chunks:
            chunk.zero_grad()
        began = time.perf_counter()
        reports = dip_schedule(lambda **_: [])(
            forward_step_func=forward_step, data_iterator=iter(batch()), model=chunks, num_microbatches=len(IMAGES), seq_length=TEXT,
            micro_batch_size=1, forward_only=False,
        )
        seconds.append(time.perf_counter() - began)
    built = build.built_model(chunks)
    assert built is not None
    assert built.forward_backward is not None
    plan, memory = built.forward_backward.plan, built.forward_backward.memory
    assert plan is not None
    assert memory is not None
    assert memory.figures is not None
    chosen = Counter(label for stage in plan.stages if stage.kind == "fw" and stage.rank == rank for label in stage.strategy)
    return Measured(
        share=share, limit=limit, static=plan.memory_initial[rank] - memory.reserved[rank], planned=memory.figures.planned,
        measured=memory.figures.measured, makespan_ns=plan.claimed_makespan, seconds=statistics.median(seconds[1:] or seconds),
        loss=sum(report["loss"] for report in reports), strategies=dict(chosen),
    )


def measured(output: Path | None) -> None:
    from tests.distributed.launcher import launch

    rows = []
    for what, flags in (("recompute", ()), ("recompute and offload", ("--dip-host-memory", "0.5"))):
        of_ranks = launch(sweep, 2, SHARES, flags, 2, timeout_s=400)
        lines = [
            f"\nLayers may {what}:\n",
            "| limit | rank | planned MiB | measured MiB | measured / planned | limit MiB | full, selective, offload, none | plan ms | iteration s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for rank, outcome in enumerate(of_ranks):
            for row in outcome.rows:
                held, planned = row.measured - row.static, row.planned - row.static
                chosen = ", ".join(str(row.strategies.get(label, 0)) for label in ("full", "selective", "offload", "none"))
                share, limit = ("none", "none") if row.limit is None else (f"{row.share:.2f}", f"{(row.limit - row.static) / 2**20:.1f}")
                lines.append(
                    f"| {share} | {rank} | {planned / 2**20:.1f} | {held / 2**20:.1f} | {held / planned:.3f} | {limit} | {chosen} | "
                    f"{row.makespan_ns / 1e6:.0f} | {row.seconds:.2f} |"
                )
        lines.append(f"\nBelow: {of_ranks[0].refusal or 'all limits plan'}")
        print("\n".join(lines), flush=True)
        rows.append({"may": what, "ranks": [asdict(outcome) for outcome in of_ranks]})
    if output is not None:
        output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


class Restricted(WrappedCost):
    """Costs with some of the memory strategies."""

    def __init__(self, costs: CostModel, labels: tuple[str, ...]) -> None:
        super().__init__(costs)
        self._labels = labels

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        return {label: strategy for label, strategy in self.costs.strategies(module, lengths).items() if label in self._labels}


STRATEGY_SETS = {"full": ("none", "full"), "full, selective": ("none", "full", "selective"), "full, selective, offload": ("none", "full", "selective", "offload")}


def simulated(output: Path | None, setups: Sequence[str], evaluations: int, seeds: int, num_microbatches: int) -> None:
    """Each set of strategies has the same number of schedules to try, on the cut that is chosen without offloading."""
    lines = ["| setup | strategies | makespan / bound, median (range) | offloaded, recomputed share of layers |", "|---|---|---|---|"]
    rows = []
    for name in setups:
        setup = named_setup(name)
        workload = make_workload(name, seed=1_000_000, num_microbatches=num_microbatches)
        sample = [make_workload(name, seed=1_000_000 + number, num_microbatches=num_microbatches).microbatches for number in range(4)]
        costs = AnalyticCost(
            setup.model, workload.parallel, workload.training, setup.device, microbatches=[one for batch in sample for one in batch]
        )
        partition = joint_partition(setup.model, setup.pipeline, sample, Restricted(costs, ("none", "full", "selective"))).partition
        for label, allowed in STRATEGY_SETS.items():
            ratios, moved, again = [], [], []
            for seed in range(seeds):
                microbatches = make_workload(name, seed=seed, num_microbatches=num_microbatches).microbatches
                bound = cheapest_work_ns(setup.model, microbatches, costs) / setup.pipeline
                plan = plan_iteration(setup.model, partition, microbatches, Restricted(costs, allowed), PlanOptions(evaluations=evaluations))
                layers = Counter(one for stage in plan.stages if stage.kind == "fw" for one in stage.strategy)
                ratios.append(plan.claimed_makespan / bound)
                moved.append(layers["offload"] / layers.total())
                again.append((layers["full"] + layers["selective"]) / layers.total())
                rows.append({"setup": name, "strategies": label, "seed": seed, "ratio": ratios[-1], "layers": dict(layers), "peaks": plan.peak_memory})
            lines.append(
                f"| {name} | {label} | {statistics.median(ratios):.4f} ({min(ratios):.4f}-{max(ratios):.4f}) | {statistics.mean(moved):.1%}, "
                f"{statistics.mean(again):.1%} |"
            )
            print(lines[-1], flush=True)
    if output is not None:
        output.with_name(output.name + "_simulated.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["measured", "simulated"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--setups", nargs="+", default=list(FIVE_SETUPS))
    parser.add_argument("--evaluations", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--microbatches", type=int, default=32)
    given = parser.parse_args()
    if given.section == "measured":
        measured(given.output)
    else:
        simulated(given.output, given.setups, given.evaluations, given.seeds, given.microbatches)


if __name__ == "__main__":
    main()
