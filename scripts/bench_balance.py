"""Simulates how much longer the slowest data-parallel replica takes than the mean, as read and as dealt, and writes a record.

    python scripts/bench_balance.py --output docs/results/balance

Sections:

work      estimated work (sum over ranks) of every setup, DP 2 to 128, 8, 32 and 128 microbatches a replica, packed documents or clips and,
          for VLM setups, 0 to 48 images drawn evenly: slowest over mean as read and as dealt, microbatches moved, gap to the bound, ms
times     iteration times of the same cells: makespans of the replica with the most work, of DIP's plan and of baselines, as read and as dealt
planned   makespans of every replica's plan (memory of the device, --evaluations schedules each, K 4 and one sub-microbatch size for all of
          a module): as read, as dealt by work, and after the second pass by planned times
repacked  packed documents: dealt as they were packed, against documents packed anew over the global batch and then dealt

Global batches of more than --most microbatches are left out of ``work`` and ``times``. What OUTPUT.json holds already is kept: a run
goes on where the last one ended, and --sections and --setups divide the work.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.deal import Deal, deal, undealt
from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.online import split
from megatron_dip.partition.second_pass import deal_by_plans
from megatron_dip.partition.work import WorkEstimate
from megatron_dip.report.records import write_record
from megatron_dip.schedule.bounds import problem_bound_ns
from megatron_dip.schedule.graph import build_problem, static_bytes
from megatron_dip.schedule.search import SearchOptions, search
from megatron_dip.simulator.baselines import run_baseline
from megatron_dip.simulator.step import SimulateOptions, make_costs
from megatron_dip.spec.codec import resolve_workload
from megatron_dip.spec.named import named_setup
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import Microbatch, Workload
from megatron_dip.workloads.generators import default_parallel, draw_packed, make_workload, pack_documents, repack_documents

SETUPS = ("vlm-s", "vlm-m", "vlm-l", "t2v-s", "t2v-l")
REPLICAS = (2, 4, 8, 16, 32, 64, 128)
MICROBATCHES = (8, 32, 128)
REPACKED = (("vlm-s", 8, 4), ("vlm-s", 8, 16), ("vlm-s", 32, 4), ("vlm-s", 32, 16), ("vlm-m", 8, 16))
BASELINES = ("interleaved", "optimus")
PLANNED = (
    ("vlm-s", 8, 4), ("vlm-s", 8, 16), ("vlm-s", 8, 64), ("vlm-s", 32, 4), ("vlm-s", 32, 16), ("vlm-s", 32, 64), ("vlm-m", 8, 64), ("vlm-m", 32, 16), ("vlm-m", 32, 64),
    ("vlm-l", 8, 64), ("vlm-l", 32, 16), ("vlm-l", 32, 64), ("t2v-s", 8, 16), ("t2v-s", 8, 64), ("t2v-s", 32, 4), ("t2v-s", 32, 64), ("t2v-l", 8, 64), ("t2v-l", 32, 16),
    ("t2v-l", 32, 64),
)
"""(setup, microbatches a replica, replicas)"""
_WHOLE = 1 << 20


def make(name: str, replicas: int, size: int, data: str, seed: int) -> Workload:
    parallel = msgspec.structs.replace(default_parallel(named_setup(name)), data=replicas)
    return resolve_workload(
        make_workload(name, seed=seed, num_microbatches=replicas * size, data=data, parallel=parallel), Path("the command line")
    )


def work_row(name: str, data: str, size: int, replicas: int, seeds: int) -> dict[str, Any]:
    before, after, gaps, moves, times = [], [], [], [], []
    for seed in range(seeds):
        workload = make(name, replicas, size, data, seed)
        model = workload.model_spec
        whole = even_partition(model, 1, {}, {module.name: _WHOLE for module in model.modules})
        work = WorkEstimate(model, whole, make_costs(workload, SimulateOptions())).of(workload.microbatches)
        began = time.perf_counter()
        dealt = deal(work, replicas)
        times.append(1e3 * (time.perf_counter() - began))
        before.append(dealt.imbalance_before)
        after.append(dealt.imbalance)
        gaps.append(dealt.gap)
        moves.append(dealt.moves / len(work))
    mean = {key: float(np.mean(values)) for key, values in (("before", before), ("after", after), ("gap", gaps), ("moved", moves), ("ms", times))}
    return {"setup": name, "data": data, "microbatches": size, "replicas": replicas, "seeds": seeds, **mean, "worst_after": max(after)}


@dataclass(frozen=True, slots=True)
class _Planner:
    workload: Workload
    partition: Partition
    costs: CostModel
    evaluations: int

    def time_ns(self, numbers: Sequence[int]) -> int:
        model, microbatches = self.workload.model_spec, self.batch(numbers)
        problem = build_problem(model, self.partition, split(microbatches, model, self.partition, self.costs), self.costs)
        capacity = self.costs.memory_capacity_bytes()
        assert capacity is not None
        limit = capacity - np.array(static_bytes(model, self.partition, self.costs), dtype=np.int64)
        return search(problem, limit, SearchOptions(evaluations=self.evaluations), problem_bound_ns(problem, limit)).schedule.makespan_ns

    def batch(self, numbers: Sequence[int]) -> list[Microbatch]:
        return [self.workload.microbatches[number] for number in numbers]

    def baseline_s(self, name: str, dealt: Deal) -> float:
        """Of the replica with the most work."""
        share = dealt.shares()[int(np.argmax(dealt.load_ns))]
        found = run_baseline(name, self.workload.model_spec, self.partition.num_ranks, self.batch(share), self.costs)
        assert found is not None
        return found.makespan_ns / 1e9


def _planner(name: str, workload: Workload, evaluations: int) -> _Planner:
    model = workload.model_spec
    sizes = {module.name: {"vit": 6, "lm": 1, "dit": 8}[module.name] if name.startswith("vlm") else 8 for module in model.modules}
    partition = even_partition(model, workload.parallel.pipeline, {module.name: 4 for module in model.modules}, sizes)
    return _Planner(workload, partition, make_costs(workload, SimulateOptions()), evaluations)


def times_row(name: str, data: str, size: int, replicas: int, evaluations: int) -> dict[str, Any]:
    """Seconds as read and as dealt, of the replica with the most work."""
    workload = make(name, replicas, size, data, 0)
    planner = _planner(name, workload, evaluations)
    model, costs = workload.model_spec, planner.costs
    work = WorkEstimate(model, planner.partition, costs).of(workload.microbatches)
    row: dict[str, Any] = {"setup": name, "data": data, "microbatches": size, "replicas": replicas, "evaluations": evaluations}
    row["dip"] = [planner.time_ns(one.shares()[int(np.argmax(one.load_ns))]) / 1e9 for one in (undealt(work, replicas), deal(work, replicas))]
    whole = even_partition(model, 1, {}, {module.name: _WHOLE for module in model.modules})
    total = WorkEstimate(model, whole, costs).of(workload.microbatches)
    for baseline in BASELINES:
        row[baseline] = [planner.baseline_s(baseline, one) for one in (undealt(total, replicas), deal(total, replicas))]
    return row


def repacked_row(name: str, size: int, replicas: int, evaluations: int, seed: int) -> dict[str, Any]:
    """Slowest replica's plan, dealt by work: documents as packed, and packed anew over the global batch."""
    workload = make(name, replicas, size, "packed", seed)
    rng = np.random.default_rng([seed, 1])
    documents = [draw_packed(rng) for _ in workload.microbatches]
    again = repack_documents(documents)
    check = np.random.default_rng([seed, 1])
    assert workload.microbatches == [pack_documents(check) for _ in documents]
    row: dict[str, Any] = {"setup": name, "microbatches": size, "replicas": replicas, "evaluations": evaluations}
    row["images"] = sum(document.num_images for one in documents for document in one)
    row["images_left_out"] = row["images"] - sum(len(microbatch.get("vit", [])) for microbatch in again)
    for label, microbatches in (("as_packed", workload.microbatches), ("repacked", again)):
        planner = _planner(name, msgspec.structs.replace(workload, microbatches=microbatches), evaluations)
        work = WorkEstimate(workload.model_spec, planner.partition, planner.costs).of(microbatches)
        planned = deal_by_plans(work, deal(work, replicas), planner.time_ns, passes=0)
        row[label] = {"slowest_s": max(planned.planned_ns) / 1e9, "over_mean": planned.imbalance, "mean_s": float(np.mean(planned.planned_ns)) / 1e9}
    return row


def planned_row(name: str, size: int, replicas: int, evaluations: int, seed: int) -> dict[str, Any]:
    workload = make(name, replicas, size, "packed", seed)
    planner = _planner(name, workload, evaluations)
    work = WorkEstimate(workload.model_spec, planner.partition, planner.costs).of(workload.microbatches)
    read = deal_by_plans(work, undealt(work, replicas), planner.time_ns, passes=0)
    dealt = deal(work, replicas)
    by_work = deal_by_plans(work, dealt, planner.time_ns, passes=0)
    by_plans = deal_by_plans(work, dealt, planner.time_ns)
    row: dict[str, Any] = {"setup": name, "microbatches": size, "replicas": replicas, "evaluations": evaluations}
    for label, result in (("as_read", read), ("by_work", by_work), ("by_plans", by_plans)):
        row[label] = {"slowest_s": max(result.planned_ns) / 1e9, "over_mean": result.imbalance, "moves": result.dealt.moves}
    return row


def work_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["## Work: slowest over mean, as read -> as dealt (share of microbatches moved)", "",
             "| setup | data | M | " + " | ".join(f"DP {replicas}" for replicas in REPLICAS) + " |", "|" + "---|" * (3 + len(REPLICAS))]
    cells = {(row["setup"], row["data"], row["microbatches"], row["replicas"]): row for row in rows}
    for setup, data, size in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((setup, data, size, replicas)) for replicas in REPLICAS]
        words = ["" if row is None else f"{row['before']:.3f} -> {row['after']:.3f} ({row['moved']:.0%})" for row in found]
        lines.append(f"| {setup} | {data} | {size} | " + " | ".join(words) + " |")
    slowest = max(rows, key=lambda row: row["ms"])
    lines += ["", f"Largest mean gap to the bound: {max(row['gap'] for row in rows):.2%}. Longest deal: {slowest['ms']:.1f} ms (DP "
              f"{slowest['replicas']}, M {slowest['microbatches']}; wall time on a shared machine)."]
    return "\n".join(lines)


def planned_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["## Planned: makespan of the slowest replica of all, over mean", "",
             "| setup | M | DP | as read s, over mean | by work | by planned times |", "|---|---|---|---|---|---|"]
    for row in rows:
        read = row["as_read"]
        words = [f"{read['slowest_s']:.3f}, {read['over_mean']:.3f}"]
        for label in ("by_work", "by_plans"):
            words.append(f"{row[label]['slowest_s'] / read['slowest_s'] - 1:+.1%}, {row[label]['over_mean']:.4f}")
        lines.append(f"| {row['setup']} | {row['microbatches']} | {row['replicas']} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def times_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["## Iteration times: replica with the most work, as read -> as dealt, s", "",
             "| setup | data | M | DP | DIP | " + " | ".join(BASELINES) + " |", "|" + "---|" * (5 + len(BASELINES))]
    for row in rows:
        words = [f"{row[name][0]:.3f} -> {row[name][1]:.3f} ({row[name][1] / row[name][0] - 1:+.1%})" for name in ("dip", *BASELINES)]
        lines.append(f"| {row['setup']} | {row['data']} | {row['microbatches']} | {row['replicas']} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def repacked_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["## Documents packed anew over the global batch, then dealt: slowest replica's plan s, over mean", "",
             "| setup | M | DP | as packed | packed anew | slowest | mean | images left out |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        packed, again = row["as_packed"], row["repacked"]
        lines.append(
            f"| {row['setup']} | {row['microbatches']} | {row['replicas']} | {packed['slowest_s']:.3f}, {packed['over_mean']:.4f} | "
            f"{again['slowest_s']:.3f}, {again['over_mean']:.4f} | {again['slowest_s'] / packed['slowest_s'] - 1:+.1%} | "
            f"{again['mean_s'] / packed['mean_s'] - 1:+.1%} | {row['images_left_out']} of {row['images']} |"
        )
    return "\n".join(lines)


TABLES = {"work": work_table, "times": times_table, "planned": planned_table, "repacked": repacked_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/balance"))
    parser.add_argument("--sections", nargs="+", choices=tuple(TABLES), default=tuple(TABLES))
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=SETUPS)
    parser.add_argument("--seeds", type=int, default=2, help="batches of each row of work (default 2)")
    parser.add_argument("--most", type=int, default=4096, help="microbatches of a global batch at most, a quarter of it for clips (default 4096)")
    parser.add_argument("--evaluations", type=int, default=300, help="schedules tried for each plan (default 300)")
    parser.add_argument("--seed", type=int, default=7, help="of the planned batches (default 7)")
    args = parser.parse_args()
    found = msgspec.json.decode(args.output.with_suffix(".json").read_bytes()) if args.output.with_suffix(".json").is_file() else {}
    rows: dict[str, list[dict[str, Any]]] = {section: found.get(section, []) for section in TABLES}
    cells = [
        (name, data, size, replicas)
        for name in args.setups for data in (("packed", "uniform") if name.startswith("vlm") else ("packed",))
        for size in MICROBATCHES for replicas in REPLICAS
        if size * replicas <= (args.most if name.startswith("vlm") else args.most // 4)
    ]
    todo: dict[str, list[tuple[tuple[Any, ...], Callable[[], dict[str, Any]]]]] = {
        "planned": [(key, partial(planned_row, *key, args.evaluations, args.seed)) for key in PLANNED if key[0] in args.setups],
        "repacked": [(key, partial(repacked_row, *key, args.evaluations, args.seed)) for key in REPACKED if key[0] in args.setups],
        "work": [(key, partial(work_row, *key, args.seeds)) for key in cells],
        "times": [(key, partial(times_row, *key, args.evaluations)) for key in cells],
    }
    for section in args.sections:
        have = {_cell(row) for row in rows[section]}
        for key, make_row in todo[section]:
            if key not in have:
                rows[section].append(make_row())
                print(section, rows[section][-1], flush=True)
                sections = [TABLES[name](given) for name, given in rows.items() if given]
                note = "All times are simulated: estimated work and plans on the device of the setup, nothing measured but the milliseconds of a deal."
                write_record(args.output, "Balance across data-parallel replicas", [note, *sections], rows)


def _cell(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple([row[field] for field in ("setup", "data", "microbatches", "replicas") if field in row])


if __name__ == "__main__":
    main()
