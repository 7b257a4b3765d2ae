"""What different ways to start gradient reductions leave exposed behind the last backward (simulated; docs/results/gradient_sync.md).

In: workload files with ``parallel.data`` > 1. Each replica's plan is made for its own batch; a chunk's reduction begins when all replicas
have its gradients and the reductions before it, on that rank, are over. Times of reductions: :mod:`megatron_dip.cost.step`. Not modelled:
what reductions take from computing beside them, and launches that hold each other up in a shared hardware queue.

    python scripts/simulate_gradient_sync.py vlm-s.json [...] --chunks 2 --evaluations 100
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dip.cli.plan_command import workload_costs
from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.step import gradient_seconds
from megatron_dip.models.layout import backward_order, chunk_order
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.runtime.interface import ChunkKey
from megatron_dip.spec.codec import load_workload
from megatron_dip.spec.partition import PARTITION_FORMAT, Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.workload import Workload

BUCKET_PARAMETERS = 40_000_000
"""Megatron's default least size of a bucket."""

WAYS = ("all at the end", "chunk list", "backward order", "backward order, buckets", "as they come, buckets")


@dataclass(frozen=True, slots=True)
class _Last:
    """A chunk's last backward on one rank of one replica, in s."""

    start: float
    end: float


def last_backwards(plan: Plan, rank: int) -> dict[ChunkKey, _Last]:
    """When each chunk's last backward (its weight part, when split) runs, as claimed by the plan."""
    end: dict[int, int] = {}
    free = [0] * plan.ranks
    place = [0] * plan.ranks
    found: dict[ChunkKey, _Last] = {}
    left = sum(map(len, plan.order))
    while left:
        before = left
        for r, row in enumerate(plan.order):
            while place[r] < len(row):
                stage = plan.stages[row[place[r]]]
                if any(dep.stage not in end for dep in stage.deps):
                    break
                start = max([free[r], *(end[dep.stage] + dep.lag for dep in stage.deps)])
                end[stage.id] = free[r] = start + stage.duration
                place[r] += 1
                left -= 1
                if r == rank and stage.kind != "fw":
                    found[stage.module, stage.vp_stage] = _Last(start / 1e9, end[stage.id] / 1e9)
        assert left < before, "the plan's order contradicts its dependencies"
    return found


def exposed_seconds(workload: Workload, plans: Sequence[Plan], costs: AnalyticCost, way: str, outermost: str) -> float:
    """s from the end of the slowest replica's pipeline to the end of the last reduction of any rank."""
    partition_chunks = plans[0].chunks
    makespan = max(plan.claimed_makespan for plan in plans) / 1e9
    sizes: dict[tuple[str, int, int], float] = {}
    for module in workload.model_spec.modules:
        rows = partition_chunks[module.name]
        for vp_stage, row in enumerate(rows):
            for rank, layers in enumerate(row):
                first, last = (vp_stage, rank) == (0, 0), (vp_stage, rank) == (len(rows) - 1, len(row) - 1)
                sizes[module.name, vp_stage, rank] = costs.chunk_parameters(module.name, layers, first=first, last=last) if module.trainable else 0
    worst = 0.0
    for rank in range(plans[0].ranks):
        lasts = [last_backwards(plan, rank) for plan in plans]
        keys = chunk_order_of(partition_chunks, rank, plans[0].ranks, outermost)
        order = backward_order(keys, [module.name for module in workload.model_spec.modules]) if way.startswith("backward") else keys
        jobs: list[tuple[float, float]] = []
        for key in order:
            parameters = sizes[*key, rank]
            if not parameters:
                continue
            buckets = max(1, math.ceil(parameters / BUCKET_PARAMETERS)) if "buckets" in way else 1
            seconds = gradient_seconds(parameters / buckets, workload.training, costs.groups.data, costs.device)
            for bucket in range(1, buckets + 1):
                ready = 0.0
                for backward in (one[key] for one in lasts if key in one):
                    ready = max(ready, backward.start + (backward.end - backward.start) * bucket / buckets)
                jobs.append((makespan if way == "all at the end" else ready, seconds))
        if way.startswith("as they come"):
            jobs.sort()
        clock = 0.0
        for ready, seconds in jobs:
            clock = max(clock, ready) + seconds
        worst = max(worst, clock - makespan)
    return worst


def chunk_order_of(chunks: dict[str, list[list[int]]], rank: int, ranks: int, outermost: str) -> tuple[ChunkKey, ...]:

    partition = Partition(format=PARTITION_FORMAT, chunks=chunks, sub_microbatch_size=dict.fromkeys(chunks, 1))
    assert partition.num_ranks == ranks
    return chunk_order(partition, rank, outermost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", type=Path)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--replicas", type=int, default=4, help="how many replicas' batches are planned")
    args = parser.parse_args()
    print(f"{'workload':24s} K  makespan s  " + "  ".join(f"{way:>24s}" for way in WAYS))
    for path in args.workloads:
        workload = load_workload(path)
        costs = workload_costs(workload)
        assert isinstance(costs, AnalyticCost), "parameters are not known under a profile"
        model = workload.model_spec
        outermost = next(module.name for module in model.modules if module.kind == "lm") if path.stem.startswith("vlm") else model.modules[-1].name
        for count in args.chunks:
            partition = even_partition(
                model, workload.parallel.pipeline, {module.name: count for module in model.modules}, {module.name: 8 for module in model.modules}
            )
            options = PlanOptions(evaluations=args.evaluations)
            replicas = min(args.replicas, workload.parallel.data)
            plans = [plan_iteration(model, partition, workload.replica_microbatches(r), costs, options) for r in range(replicas)]
            makespan = max(plan.claimed_makespan for plan in plans) / 1e9
            exposed = [exposed_seconds(workload, plans, costs, way, outermost) for way in WAYS]
            print(
                f"{path.stem:24s} {count}  {makespan:10.3f}  "
                + "  ".join(f"{1e3 * seconds:12.1f} ms ({100 * seconds / makespan:5.2f} %)" for seconds in exposed)
            )


if __name__ == "__main__":
    main()
