"""Split backwards beside whole ones on the same cut: never slower, with memory limits and without. Simulated; the figures repeat exactly.

    python scripts/bench_split.py --setups vlm-s --cases cases.jsonl       # runs, appends to the file; one setup at a time if you like
    python scripts/bench_split.py --cases cases.jsonl --output docs/results/split_cases

Each case: a named setup, a seed of its 32 microbatches and of the search, the device's memory or none; the joint cut of whole backwards
(8 sample batches). Whole backwards are searched with ``--evaluations`` schedules, split ones with as many, from what the whole search
found.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.partition.online import split
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.report.records import write_record
from megatron_dip.report.tables import markdown_table
from megatron_dip.schedule.backward import search_forms
from megatron_dip.schedule.graph import StageProblem, build_problem, static_bytes
from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.search import DoesNotFit, SearchOptions
from megatron_dip.spec.named import FIVE_SETUPS, named_setup
from megatron_dip.workloads.generators import default_parallel, make_workload

SEEDS = 5
SAMPLE = 8


def run(setup: str, evaluations: int, cases: Path) -> None:
    found = named_setup(setup)
    ranks = default_parallel(found).pipeline
    sample = [make_workload(setup, seed=100 + seed, num_microbatches=32) for seed in range(SAMPLE)]
    costs = AnalyticCost(
        found.model, sample[0].parallel, sample[0].training, found.device, microbatches=[m for batch in sample for m in batch.microbatches]
    )
    partition = joint_partition(found.model, ranks, [batch.microbatches for batch in sample], costs).partition
    for seed in range(SEEDS):
        batch = make_workload(setup, seed=seed, num_microbatches=32).microbatches
        subs = split(batch, found.model, partition, costs)

        def build(split_backward: bool, subs=subs) -> StageProblem:  # type: ignore[no-untyped-def]
            return build_problem(found.model, partition, subs, costs, split_backward=split_backward)

        for limited in (True, False):
            limit = np.full(ranks, UNLIMITED)
            if limited:
                limit = costs.memory_capacity_bytes() - np.array(static_bytes(found.model, partition, costs))
            options = SearchOptions(evaluations=evaluations, seed=seed)
            row: dict[str, object] = {"setup": setup, "seed": seed, "memory": "of the device" if limited else "no limit"}
            try:
                both = [search_forms(build, limit, options, form).result.schedule.makespan_ns for form in (False, True)]
                row |= {"whole_ns": both[0], "split_ns": both[1], "evaluations": evaluations}
            except DoesNotFit as error:
                row["failed"] = str(error)
            with cases.open("a") as file:
                file.write(json.dumps(row) + "\n")


def report(cases: Path, output: Path) -> None:
    rows = [json.loads(line) for line in cases.read_text().splitlines()]
    gains = [row["split_ns"] / row["whole_ns"] - 1 for row in rows if "failed" not in row]
    lines = []
    for setup in dict.fromkeys(row["setup"] for row in rows):
        for memory in ("of the device", "no limit"):
            own = [row for row in rows if row["setup"] == setup and row["memory"] == memory]
            cells = [f"{row['split_ns'] / row['whole_ns'] - 1:+.2%}" if "failed" not in row else "-" for row in sorted(own, key=lambda row: row["seed"])]
            lines.append([setup, memory, *cells])
    text = (
        f"{len(gains)} cases, {len(rows) - len(gains)} without a schedule that fits. Split over whole: median {statistics.median(gains):+.2%}, "
        f"from {min(gains):+.2%} to {max(gains):+.2%}; slower in {sum(gain > 0 for gain in gains)}."
    )
    table = markdown_table(["setup", "memory", *(f"seed {seed}" for seed in range(SEEDS))], lines)
    write_record(output, "Split backwards beside whole ones: five setups, five seeds", [__doc__.split("\n\n")[2], text, table], {"cases": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setups", nargs="*", choices=FIVE_SETUPS, default=[])
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    for setup in args.setups:
        run(setup, args.evaluations, args.cases)
    if args.output is not None:
        report(args.cases, args.output)


if __name__ == "__main__":
    main()
