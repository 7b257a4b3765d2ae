"""Whether to choose among a search's best schedules by replays under scattered stage times. Simulated; the figures repeat exactly.

    python scripts/bench_scatter.py --setups vlm-s --cases cases.jsonl     # runs, appends to the file
    python scripts/bench_scatter.py --cases cases.jsonl --output docs/results/scatter

Each case: a named setup, even cuts with two chunks a rank, a batch of 32 microbatches, no memory limit or 1.3 times the least. Stage times
are the planned ones times lognormal factors of the given standard deviation, drawn for every stage by itself, or one stage in a hundred
takes five times as long. An order's worth is the mean makespan of its replays. Among the candidates the one of the best mean over 12
replays is taken, and judged by 48 others:

* *kept*: the schedules that the search keeps (the best and up to four others), which cost nothing more;
* *seeds*: the best of five searches with other random numbers, of which a fifth of the evaluations goes to each.

The plan that is shipped is the first of *kept*.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.online import split
from megatron_dip.report.records import write_record
from megatron_dip.report.tables import markdown_table
from megatron_dip.schedule.graph import StageProblem, build_problem
from megatron_dip.schedule.interleave import UNLIMITED, make_costs, make_kernel_graph
from megatron_dip.schedule.result import time_order
from megatron_dip.schedule.search import SearchOptions, search
from megatron_dip.spec.named import FIVE_SETUPS, named_setup
from megatron_dip.workloads.generators import make_workload

SIZES = {"vit": 8, "lm": 1, "dit": 2}
NOISES = ("5 %", "10 %", "20 %", "1 % take 5x")
BATCHES, CHOOSING, JUDGING = 2, 12, 48


class Candidate(NamedTuple):
    orders: list[NDArray[np.int32]]
    choice: NDArray[np.int32]


def factors(noise: str, count: int, draw: np.random.Generator) -> NDArray[np.float64]:
    if noise == "1 % take 5x":
        return np.where(draw.random(count) < 0.01, 5.0, 1.0)
    return np.exp(draw.normal(0.0, float(noise.split()[0]) / 100, count))


def means(problem: StageProblem, candidates: list[Candidate], noise: str, draws: int, seed: int) -> list[float]:
    """Mean makespan of each candidate, all under the same draws."""
    found = []
    for candidate in candidates:
        graph, draw, ends = problem.graph(candidate.choice), np.random.default_rng(seed), []
        for _ in range(draws):
            scattered = np.rint(graph.duration_ns * factors(noise, graph.num_tasks, draw)).astype(np.int64)
            schedule = time_order(replace(graph, duration_ns=scattered), candidate.orders)
            assert schedule is not None
            ends.append(schedule.makespan_ns)
        found.append(statistics.mean(ends))
    return found


def run(setup: str, evaluations: int, cases: Path) -> None:
    found = named_setup(setup)
    for seed in range(BATCHES):
        workload = make_workload(setup, seed=seed, num_microbatches=32)
        costs = AnalyticCost(
            found.model, workload.parallel, workload.training, found.device, microbatches=workload.microbatches, memory_capacity_bytes=10**15
        )
        names = [module.name for module in found.model.modules]
        partition = even_partition(found.model, workload.parallel.pipeline, dict.fromkeys(names, 2), {name: SIZES[name] for name in names})
        problem = build_problem(found.model, partition, split(workload.microbatches, found.model, partition, costs), costs)
        least = make_costs(problem.graph(problem.leanest()), make_kernel_graph(problem.fastest)).worst
        for memory in ("no limit", "1.3 x least"):
            limit = np.full(partition.num_ranks, UNLIMITED) if memory == "no limit" else np.ceil(1.3 * least).astype(np.int64)
            result = search(problem, limit, SearchOptions(evaluations=evaluations, seed=seed))
            shipped = Candidate(list(result.schedule.order), result.choice)
            groups = {"kept": [shipped, *(Candidate(other.orders, other.choice) for other in result.others)], "seeds": [shipped]}
            for number in range(5):
                other = search(problem, limit, SearchOptions(evaluations=evaluations // 5, seed=1000 + number))
                groups["seeds"].append(Candidate(list(other.schedule.order), other.choice))
            for noise in NOISES:
                row: dict[str, object] = {"setup": setup, "seed": seed, "memory": memory, "noise": noise, "planned_ns": result.schedule.makespan_ns}
                for name, candidates in groups.items():
                    chosen = int(np.argmin(means(problem, candidates, noise, CHOOSING, 1)))
                    judged = means(problem, [candidates[0], candidates[chosen]], noise, JUDGING, 2)
                    row |= {"shipped": judged[0] / result.schedule.makespan_ns, name: judged[1] / judged[0] - 1}
                with cases.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def report(cases: Path, output: Path) -> None:
    rows = [json.loads(line) for line in cases.read_text().splitlines()]
    lines = []
    for memory in dict.fromkeys(row["memory"] for row in rows):
        for noise in NOISES:
            own = [row for row in rows if row["memory"] == memory and row["noise"] == noise]
            cells = [
                f"{statistics.mean(row[name] for row in own):+.2%} ({min(row[name] for row in own):+.2%} to {max(row[name] for row in own):+.2%})"
                for name in ("kept", "seeds")
            ]
            lines.append([memory, noise, f"{statistics.mean(row['shipped'] for row in own):.4f}", *cells])
    table = markdown_table(["memory", "scatter", "shipped / planned", "kept", "seeds"], lines)
    assert __doc__ is not None
    write_record(output, "Choosing a schedule under scattered stage times", ["\n\n".join(__doc__.split("\n\n")[2:]), table], {"cases": rows})


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
