"""Measures the planner on the paper's five setups and writes a record: how near to the bounds, how fast, against whom.

    python scripts/bench_planner.py all --jobs 2 --output docs/results/planner

writes ``planner.json`` (every single run) and ``planner.md`` (the tables): all sections, 5 seeds of the five setups, in some 20 minutes.
Sections:

gaps         makespan / bound after --time-budget seconds, whole and split backward, memory unlimited: the same durations for all
memory       3 s under the device's memory, against the bound without any recomputation
speedup      against every baseline, same durations for all (memory unlimited); the first column is interleaved with 2 chunks a rank
uniform      as speedup, VLM setups, in batches whose microbatches hold 0 to 48 images, each number as often (packed documents have 16 in the mean)
baselines    against every baseline under the device's memory, each at its best setting
convergence  makespan after 0.1 s to 10 s of search, relative to the best of them
searches     every search method for --time-budget seconds: the shipped one and the paper's
rules        the paper's rules for B and K beside the joint choice, planned alike
threads      schedules tried in 2 s with 1 and 2 threads, and by two processes at once, which is what the machine has
startup      seconds from the command's start to a plan of a small batch, kernels cached

and those of bench_planner_parts.py: kernels, gil, choice, exact, partition.

--jobs runs that many setups at once, each in a process of its own, in the sections that measure schedules; a core for each is needed, or
budgets in seconds buy less. Sections that measure times run alone.

--merge keeps what the record already holds of other sections and setups, so that a record can be made in pieces. Plans that several
sections show are made once.

Two bounds: the plan's own (its partition's work, heads and tails) and one free of the partition (the batch's cheapest work / ranks),
so that an uneven or inefficient cut cannot hide; neither counts recomputation. The partition is chosen once, on other seeds than those
measured and batches of the first number of --microbatches.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from bench_planner_parts import PARTS, UNLIMITED_BYTES, Row, parts_of

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.partition.joint import PartitionChoice
from megatron_dip.partition.offline import cheapest_work_ns, paper_partition
from megatron_dip.partition.online import split
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.schedule.bounds import lower_bound_ns
from megatron_dip.schedule.graph import build_task_graph
from megatron_dip.schedule.search import SearchMethod
from megatron_dip.simulator.baselines import BASELINES, run_baseline
from megatron_dip.spec.codec import save, write_atomically
from megatron_dip.spec.named import FIVE_SETUPS, named_setup
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.workload import Microbatch, Workload
from megatron_dip.workloads.generators import DataKind, make_workload

SAMPLE_SEED = 1_000_000
"""Batches that the partition is chosen on start here; measured seeds start at 0."""
NUM_SAMPLE = 8
IDEAL_BASELINE = "interleaved, V = 2"
CONVERGENCE_S = (0.1, 0.3, 1.0, 3.0, 10.0)
ASKED = {
    ("gaps", False): (1.01, 1.02, 1.04, 1.03, 1.05), ("gaps", True): (1.003, 1.005, 1.01, 1.005, 1.015),
    ("memory", False): (1.03, 1.03, 1.06, 1.03, 1.05), ("speedup", False): (1.9, 2.1, 2.35, 1.5, 1.55),
}
"""(section, split backward) -> what was asked for on each of the five setups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One setup, ready to plan batches of one size."""

    name: str
    workload: Workload
    costs: AnalyticCost
    choice: PartitionChoice
    partition_s: float
    split_backward: bool
    data: DataKind
    rows: dict[tuple[str, int, int, float], Row] = field(default_factory=dict)
    """(partition, seed, microbatches, budget) -> what was found"""

    def batch(self, seed: int, num_microbatches: int) -> list[Microbatch]:
        return make_workload(self.name, seed=seed, num_microbatches=num_microbatches, data=self.data).microbatches

    def plan(self, batch: list[Microbatch], time_budget_s: float, threads: int = 1, search: SearchMethod = "anneal") -> Plan:
        setup = named_setup(self.name)
        options = PlanOptions(time_budget_s=time_budget_s, threads=threads, split_backward=self.split_backward, search=search)
        return plan_iteration(setup.model, self.choice.partition, batch, self.costs, options)

    def own_bound_ns(self, batch: list[Microbatch]) -> int:
        """Of the partition, without any recomputation: chains, and each rank's work between heads and tails."""
        model = named_setup(self.name).model
        parts = split(batch, model, self.choice.partition, self.costs)
        return lower_bound_ns(build_task_graph(model, self.choice.partition, parts, self.costs, split_backward=self.split_backward))

    def free_bound_ns(self, batch: list[Microbatch]) -> float:
        setup = named_setup(self.name)
        return cheapest_work_ns(setup.model, batch, self.costs) / setup.pipeline


@functools.cache
def scenario(name: str, num_microbatches: int, *, split_backward: bool, with_memory: bool, data: DataKind = "packed") -> Scenario:
    setup = named_setup(name)
    make = functools.partial(make_workload, name, num_microbatches=num_microbatches, data=data)
    workload = make(seed=SAMPLE_SEED)
    batches = [make(seed=SAMPLE_SEED + index).microbatches for index in range(NUM_SAMPLE)]
    costs = AnalyticCost(
        setup.model, workload.parallel, workload.training, setup.device, microbatches=[m for batch in batches for m in batch],
        memory_capacity_bytes=None if with_memory else UNLIMITED_BYTES,
    )
    began = time.perf_counter()
    choice = joint_partition(setup.model, setup.pipeline, batches, costs, split_backward=split_backward)
    return Scenario(
        name=name, workload=workload, costs=costs, choice=choice, partition_s=time.perf_counter() - began, split_backward=split_backward,
        data=data,
    )


def plan_row(section: str, given: Scenario, seed: int, num_microbatches: int, time_budget_s: float) -> Row:
    key = (repr(given.choice.partition), seed, num_microbatches, time_budget_s)
    if key not in given.rows:
        given.rows[key] = _planned(given, seed, num_microbatches, time_budget_s)
    return {"section": section, **given.rows[key]}


def _planned(given: Scenario, seed: int, num_microbatches: int, time_budget_s: float) -> Row:
    batch = given.batch(seed, num_microbatches)
    plan = given.plan(batch, time_budget_s)
    bound, free_bound = given.own_bound_ns(batch), given.free_bound_ns(batch)
    return {
        "setup": given.name, "split_backward": given.split_backward, "microbatches": num_microbatches, "seed": seed,
        "time_budget_s": time_budget_s, "stages": len(plan.stages), "makespan_ns": plan.claimed_makespan, "bound_ns": bound,
        "free_bound_ns": free_bound, "plan_bound_ns": plan.lower_bound, "gap": plan.claimed_makespan / bound,
        "free_gap": plan.claimed_makespan / free_bound, "bubbles": plan.bubble_fraction, "evaluations": plan.evaluations,
        "planning_s": plan.planning_ns / 1e9, "partition_s": given.partition_s, "partition_candidates": given.choice.candidates,
        "chunks": {module: len(rows) for module, rows in plan.chunks.items()}, "sub_microbatch": plan.sub_microbatch_size,
    }


def gaps(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    for name in args.setups:
        for split_backward in (False, True):
            given = scenario(name, args.microbatches[0], split_backward=split_backward, with_memory=False)
            for count in args.microbatches:
                for seed in range(args.seeds):
                    emit(plan_row("gaps", given, seed, count, args.time_budget))


def memory(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    for name in args.setups:
        given = scenario(name, args.microbatches[0], split_backward=False, with_memory=True)
        for count in args.microbatches:
            for seed in range(args.seeds):
                emit(plan_row("memory", given, seed, count, 3.0))


def _against_baselines(
    args: argparse.Namespace, emit: Callable[[Row], None], section: str, *, with_memory: bool, budget_s: float, data: DataKind = "packed"
) -> None:
    for name in args.setups:
        setup = named_setup(name)
        if data != "packed" and setup.family != "vlm":
            continue
        given = scenario(name, args.microbatches[0], split_backward=False, with_memory=with_memory, data=data)
        for count in args.microbatches:
            for seed in range(args.seeds):
                row = plan_row(section, given, seed, count, budget_s)
                batch = given.batch(seed, count)
                ideal = run_baseline("interleaved", setup.model, setup.pipeline, batch, given.costs, with_memory=with_memory, virtual_pipeline=2)
                row["over"] = {} if ideal is None else {IDEAL_BASELINE: ideal.makespan_ns / row["makespan_ns"]}
                if ideal is not None:
                    row["ideal_over_free_bound"] = ideal.makespan_ns / row["free_bound_ns"]
                for baseline in BASELINES:
                    result = run_baseline(baseline, setup.model, setup.pipeline, batch, given.costs, with_memory=with_memory)
                    if result is not None:
                        row["over"][baseline] = result.makespan_ns / row["makespan_ns"]
                        row.setdefault("fits", {})[baseline] = result.fits
                emit(row)


def speedup(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    _against_baselines(args, emit, "speedup", with_memory=False, budget_s=args.time_budget)


def uniform(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    _against_baselines(args, emit, "uniform", with_memory=False, budget_s=args.time_budget, data="uniform")


def baselines(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    _against_baselines(args, emit, "baselines", with_memory=True, budget_s=3.0)


def convergence(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    for name in args.setups:
        given = scenario(name, args.microbatches[0], split_backward=False, with_memory=False)
        for seed in range(args.seeds):
            for budget in CONVERGENCE_S:
                emit(plan_row("convergence", given, seed, args.microbatches[0], budget))


def searches(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    for name in args.setups:
        given = scenario(name, args.microbatches[0], split_backward=False, with_memory=False)
        for seed in range(args.seeds):
            batch = given.batch(seed, args.microbatches[0])
            shipped = plan_row("searches", given, seed, args.microbatches[0], args.time_budget)
            emit({**shipped, "method": "anneal"})
            for method in get_args(SearchMethod):
                if method != "anneal":
                    plan = given.plan(batch, args.time_budget, search=method)
                    emit({"section": "searches", "setup": name, "seed": seed, "method": method, "makespan_ns": plan.claimed_makespan,
                          "gap": plan.claimed_makespan / shipped["bound_ns"], "evaluations": plan.evaluations})


def rules(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    for name in args.setups:
        joint = scenario(name, args.microbatches[0], split_backward=False, with_memory=False)
        setup = named_setup(name)
        sample = [joint.batch(SAMPLE_SEED + index, args.microbatches[0]) for index in range(NUM_SAMPLE)]
        began = time.perf_counter()
        paper = replace(joint, choice=replace(joint.choice, partition=paper_partition(setup.model, setup.pipeline, sample, joint.costs)))
        paper = replace(paper, partition_s=time.perf_counter() - began)
        for seed in range(args.seeds):
            for chooser, given in (("paper", paper), ("joint", joint)):
                emit({**plan_row("rules", given, seed, args.microbatches[0], args.time_budget), "chooser": chooser})


def schedule_sections(args: argparse.Namespace, sections: Sequence[str], setup: str) -> list[Row]:
    """The rows of one setup; a process's whole work."""
    rows: list[Row] = []
    for section in sections:
        SECTIONS[section](argparse.Namespace(**{**vars(args), "setups": [setup]}), rows.append)
    return rows


def threads(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    for name in args.setups:
        given = scenario(name, args.microbatches[0], split_backward=False, with_memory=False)
        batch = given.batch(0, args.microbatches[0])
        one = functools.partial(_tried, given, batch, 1)
        one()
        alone, shared = [one()], _tried(given, batch, 2)
        # Forked, so that each has the kernels and the partition at hand.
        with multiprocessing.get_context("fork").Pool(2) as pool:
            both = [pool.apply_async(one) for _ in range(2)]
            apart = sum(result.get() for result in both)
        alone.append(one())
        emit({"section": "threads", "setup": name, "one_thread": statistics.fmean(alone), "two_threads": shared, "two_processes": apart})


def _tried(given: Scenario, batch: list[Microbatch], threads: int) -> int:
    return given.plan(batch, 2.0, threads).evaluations


_FIRST_PLAN = """
import json, sys, time
began = time.perf_counter()
import numba
numba_s = time.perf_counter() - began
from pathlib import Path
from megatron_dip.cli.plan_command import workload_costs
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.spec.codec import load_workload
imported = time.perf_counter()
workload = load_workload(Path(sys.argv[1]))
partition, costs = even_partition(workload.model_spec, 4, {}, {"vit": 8}), workload_costs(workload)
took = []
for _ in range(2):
    start = time.perf_counter()
    plan_iteration(workload.model_spec, partition, workload.microbatches, costs, PlanOptions(evaluations=200))
    took.append(time.perf_counter() - start)
print(json.dumps({"numba_s": numba_s, "imports_s": imported - began, "kernels_s": took[0] - took[1]}))
"""


def startup(args: argparse.Namespace, emit: Callable[[Row], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "workload.json"
        save(path, make_workload("vlm-s", num_microbatches=4))
        command = [sys.executable, "-m", "megatron_dip.cli.main", "plan", str(path), "--output", str(Path(folder) / "plan.json"),
                   "--evaluations", "1", "--chunks", "vit=1,lm=1", "--sub-microbatch", "vit=8,lm=1", "--no-baselines"]
        # As installed: with modules compiled to bytecode beforehand, which this variable would keep the first run from.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        for repeat in range(6):
            began = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment)
            seconds = time.perf_counter() - began
            parts = subprocess.run([sys.executable, "-c", _FIRST_PLAN, str(path)], check=True, capture_output=True, text=True, env=environment)
            emit({"section": "startup", "repeat": repeat, "seconds": seconds, **json.loads(parts.stdout)})


SECTIONS: dict[str, Callable[[argparse.Namespace, Callable[[Row], None]], None]] = {
    "gaps": gaps, "memory": memory, "speedup": speedup, "uniform": uniform, "baselines": baselines, "convergence": convergence, "searches": searches,
    "rules": rules, "threads": threads, "startup": startup, **{name: part.measure for name, part in PARTS.items()},
}
SCHEDULE_SECTIONS = ("gaps", "memory", "speedup", "uniform", "baselines", "convergence", "searches", "rules")
"""What is measured there are schedules, so that setups may run beside each other."""


# --- the record ------------------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)) + "\n"


def spread(values: list[float], digits: int = 4) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def asked(label: str, section: str, split_backward: bool, setups: list[str]) -> list[str]:
    figures = dict(zip(FIVE_SETUPS, ASKED[section, split_backward], strict=True))
    return [label, *(f"{figures[name]:g}" for name in setups)]


def gap_table(rows: list[Row], setups: list[str]) -> str:
    lines = []
    for split_backward in (False, True):
        for count in sorted({row["microbatches"] for row in rows}):
            for ratio, label in (("gap", "own bound"), ("free_gap", "free bound")):
                cells = []
                for name in setups:
                    own = [row[ratio] for row in rows if (row["setup"], row["split_backward"], row["microbatches"]) == (name, split_backward, count)]
                    cells.append(spread(own) if own else "-")
                if any(cell != "-" for cell in cells):
                    lines.append([f"{'split' if split_backward else 'whole'} backward, {count} microbatches, {label}", *cells])
        if any(row["split_backward"] == split_backward for row in rows):
            lines.append(asked(f"{'split' if split_backward else 'whole'} backward, asked for of the own bound", rows[0]["section"], split_backward, setups))
    return table(["makespan / bound: mean (least to most)", *setups], lines)


def partition_table(rows: list[Row], setups: list[str]) -> str:
    seen: dict[tuple[str, bool, int], Row] = {(row["setup"], row["split_backward"], row["microbatches"]): row for row in rows}
    lines = [
        [name, "split" if split else "whole", str(count), json.dumps(row["chunks"]), json.dumps(row["sub_microbatch"]), str(row["stages"]),
         f"{row['partition_s']:.1f}", str(row["partition_candidates"])]
        for (name, split, count), row in sorted(seen.items(), key=lambda item: (setups.index(item[0][0]), item[0][1:]))
    ]
    return table(["setup", "backward", "microbatches", "chunks a rank", "sub-microbatch", "stages", "chosen in s", "candidates"], lines)


def ratio_table(rows: list[Row], setups: list[str]) -> str:
    names = list(dict.fromkeys(baseline for row in rows for baseline in row["over"]))
    lines = []
    for baseline in names:
        cells = []
        for name in setups:
            own = [row for row in rows if row["setup"] == name and baseline in row["over"]]
            fits = all(row.get("fits", {}).get(baseline, True) for row in own)
            cells.append(spread([row["over"][baseline] for row in own], 2) + ("" if fits else ", does not fit") if own else "-")
        lines.append([baseline, *cells])
        if baseline == IDEAL_BASELINE and rows[0]["section"] != "baselines":
            limits = [[row["ideal_over_free_bound"] for row in rows if row["setup"] == name and "ideal_over_free_bound" in row] for name in setups]
            lines.append([f"{IDEAL_BASELINE}: no plan can reach more (its time / free bound)", *(spread(found, 2) if found else "-" for found in limits)])
            lines.append(asked(f"{IDEAL_BASELINE}: asked for", "speedup", False, setups))
    return table(["baseline's time / ours", *setups], lines)


def report(rows: list[Row], setups: list[str], head: str) -> str:
    def of(section: str) -> list[Row]:
        return [row for row in rows if row["section"] == section]

    text = [head]
    if own := of("gaps"):
        text += ["## Distance from the bounds, memory unlimited\n", gap_table(own, setups), partition_table(own, setups)]
    if own := of("memory"):
        text += ["## Under the device's memory, 3 s, against the bounds without any recomputation\n", gap_table(own, setups), partition_table(own, setups)]
    if own := of("speedup"):
        text += ["## Against baselines, same durations for all, memory unlimited\n", ratio_table(own, setups)]
    if own := of("uniform"):
        text += ["## The same in batches whose microbatches hold 0 to 48 images, each number as often\n",
                 "Packed documents, above, have 16 images in the mean. More vision work, and more varying, leaves fixed splits more bubbles.\n",
                 ratio_table(own, [name for name in setups if named_setup(name).family == "vlm"])]
    if own := of("baselines"):
        text += ["## Against baselines under the device's memory, each at its best setting, 3 s\n", ratio_table(own, setups)]
    if own := of("convergence"):
        lines = []
        for budget in CONVERGENCE_S:
            cells = []
            for name in setups:
                best = {row["seed"]: min(r["makespan_ns"] for r in own if (r["setup"], r["seed"]) == (name, row["seed"])) for row in own if row["setup"] == name}
                here = [row["makespan_ns"] / best[row["seed"]] for row in own if (row["setup"], row["time_budget_s"]) == (name, budget)]
                cells.append(spread(here) if here else "-")
            lines.append([f"{budget:g} s", *cells])
        text += ["## Makespan after a search budget, relative to the best of the row's seed\n", table(["budget", *setups], lines)]
    if own := of("searches"):
        lines = []
        for method in dict.fromkeys(row["method"] for row in own):
            gaps = [[row["gap"] for row in own if (row["setup"], row["method"]) == (name, method)] for name in setups]
            lines.append([method, *(spread(found) if found else "-" for found in gaps)])
        text += ["## Search methods at equal time, makespan / own bound\n",
                 "mcts, dfs and random are the paper's, fifo the given order, anneal what ships.\n", table(["method", *setups], lines)]
    if own := of("rules"):
        lines = []
        for name in setups:
            for chooser in ("paper", "joint"):
                found = [row for row in own if (row["setup"], row["chooser"]) == (name, chooser)]
                if found:
                    lines.append([
                        name, chooser, json.dumps(found[0]["chunks"]), json.dumps(found[0]["sub_microbatch"]),
                        spread([row["makespan_ns"] / 1e9 for row in found], 3), spread([row["gap"] for row in found], 3),
                        spread([row["free_gap"] for row in found], 3),
                    ])
        text += ["## The paper's rules (B: 95 %, K: floor) beside the joint choice, same search, memory unlimited\n",
                 table(["setup", "chosen by", "chunks a rank", "sub-microbatch", "makespan s", "/ own bound", "/ free bound"], lines)]
    if own := of("threads"):
        lines = []
        for name in setups:
            for row in own:
                if row["setup"] == name:
                    ratios = [f"{row[field] / row['one_thread']:.2f}" for field in ("two_threads", "two_processes")]
                    lines.append([name, f"{row['one_thread']:.0f}", str(row["two_threads"]), str(row["two_processes"]), *ratios])
        text += ["## Schedules tried in 2 s\n",
                 table(["setup", "1 thread", "2 threads", "two processes", "2 threads / 1 (asked for: 1.9)", "two processes / 1"], lines)]
    if own := of("startup"):
        seconds = [row["seconds"] for row in own[1:]]
        text += [
            "## Start-up\n",
            f"Whole command for one small batch, kernels cached: {spread(seconds, 2)} s. Of a process that plans: imports "
            f"{spread([row['imports_s'] for row in own[1:]], 2)} s, of it numba's own {spread([row['numba_s'] for row in own[1:]], 2)} s, and the first plan takes "
            f"{spread([row['kernels_s'] for row in own[1:]], 2)} s longer than the second, which is loading the kernels from their cache (asked for: < 0.5 s).\n",
        ]
    for name in parts_of(rows):
        text += [f"## {PARTS[name].title}\n", PARTS[name].report(of(name)), ""]
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=("all", *SECTIONS))
    parser.add_argument("--setups", nargs="+", choices=FIVE_SETUPS, default=list(FIVE_SETUPS))
    parser.add_argument("--microbatches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--time-budget", type=float, default=1.0)
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="setups at once, where schedules are measured")
    parser.add_argument("--output", type=Path, required=True, help="without suffix: .json and .md are added")
    parser.add_argument("--merge", action="store_true", help="keep the record's rows of other sections and setups")
    args = parser.parse_args()
    rows: list[Row] = []

    def emit(row: Row) -> None:
        rows.append(row)
        shown = {key: row[key] for key in ("section", "setup", "microbatches", "seed", "split_backward", "gap", "free_gap") if key in row}
        print(json.dumps(shown), file=sys.stderr, flush=True)

    began = time.time()
    sections = list(SECTIONS) if "all" in args.sections else args.sections
    if args.jobs > 1:
        beside = [section for section in sections if section in SCHEDULE_SECTIONS]
        sections = [section for section in sections if section not in SCHEDULE_SECTIONS]
        with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
            for found in pool.imap(functools.partial(schedule_sections, args, beside), args.setups, chunksize=1):
                for row in found:
                    emit(row)
                write_record(args, rows, began)
    for section in sections:
        SECTIONS[section](args, emit)
        write_record(args, rows, began)  # after each, so that an interrupted run leaves what it has
    return 0


def write_record(args: argparse.Namespace, rows: list[Row], began: float) -> None:
    """Writes both files; with --merge, with what they held of other sections and setups."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    measured = sorted({(row["section"], row.get("setup", "")) for row in rows})
    command = "python scripts/bench_planner.py " + " ".join(sys.argv[1:])
    runs: list[Row] = [{
        "command": command, "commit": commit, "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "load": round(os.getloadavg()[0], 1), "seconds": round(time.time() - began), "measured": measured,
    }]
    path = args.output.with_suffix(".json")
    if args.merge and path.exists():
        old = json.loads(path.read_text())
        rows = [row for row in old["rows"] if (row["section"], row.get("setup", "")) not in measured] + rows
        kept = {(row["section"], row.get("setup", "")) for row in rows} - set(measured)
        runs = [run for run in old["runs"] if run["command"] != command and any(tuple(item) in kept for item in run["measured"])] + runs
    head = (
        "# Planner record\n\n*Simulated* schedules on analytical H800 costs; *measured* planning times. "
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, one thread unless said.\n\n"
        + "".join(f"    {run['command']}    # {run['date']}, commit {run['commit']}, {run['seconds']} s, load {run['load']} at the end\n" for run in runs)
    )
    setups = [name for name in FIVE_SETUPS if any(row.get("setup") == name for row in rows)]
    write_atomically(path, (json.dumps({"runs": runs, "rows": rows}, indent=0) + "\n").encode())
    write_atomically(args.output.with_suffix(".md"), report(rows, setups, head).encode())


if __name__ == "__main__":
    sys.exit(main())
