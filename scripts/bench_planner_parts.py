"""Sections of bench_planner.py about single parts of the planner: kernels, the interpreter's lock, memory choice, exact cases, partition.

kernels    ns a stage of graph, interleaver, lowering, dry run, checker, packing at 1 000, 10 000 and 100 000 stages
gil        how long other threads wait for the interpreter's lock while a thread plans: gaps of a heartbeat, by phase
choice     memory choice of a rank with at least 350 stage pairs: ms, and gap to HiGHS and to its own bound
exact      planner against CP-SAT on small cases
partition  seconds of the joint choice of a partition, all nine named setups
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.online import split
from megatron_dip.planner import iteration, message
from megatron_dip.planner.courtesy import switch_often
from megatron_dip.planner.iteration import PlanOptions
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.program.dry_run import check_program, dry_run
from megatron_dip.program.lower import lower
from megatron_dip.report.tables import markdown_table
from megatron_dip.schedule import backward
from megatron_dip.schedule.bounds import problem_bound_ns
from megatron_dip.schedule.checker import check_columns, inspect_plan
from megatron_dip.schedule.exact_memory import choose_exactly
from megatron_dip.schedule.graph import StageProblem, build_problem
from megatron_dip.schedule.interleave import UNLIMITED, Policy, interleave, make_costs, make_kernel_graph, make_workspace
from megatron_dip.schedule.memory import ITERATIONS, choose_kernel, make_tables, rank_problem
from megatron_dip.schedule.result import time_order
from megatron_dip.schedule.search import SearchOptions, search
from megatron_dip.spec.named import NAMED_SETUPS, named_setup
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import Microbatch, Parallel
from megatron_dip.workloads.generators import default_parallel, make_workload

Row = dict[str, Any]
Emit = Callable[[Row], None]

_SIZES = {"vit": 8, "lm": 8, "dit": 4}
"""Instances in a sub-microbatch of the fixed partitions that single parts are measured on."""
_WHOLE = {"vit": 48, "lm": 8, "dit": 8}
"""Every microbatch is one sub-microbatch: what exact solvers can still prove."""
UNLIMITED_BYTES = 10**15
KERNEL_STAGES = (1_000, 10_000, 100_000)
GIL_STAGES = (10_000, 30_000)
_GIL_REPEATS = 10
_BEAT_S = 0.0002
_CHOICE_PAIRS = 350
_CHOICE_SHARES = (0.9, 0.7, 0.5)
_SOLVER_S = 6.0
_EXACT_S = 20.0


class Fixed(NamedTuple):
    """A setup with an even partition of a few chunks."""

    name: str
    partition: Partition
    costs: AnalyticCost
    batch: list[Microbatch]

    def problem(self, *, split_backward: bool = False) -> StageProblem:
        model = named_setup(self.name).model
        return build_problem(model, self.partition, split(self.batch, model, self.partition, self.costs), self.costs, split_backward=split_backward)


def fixed(
    name: str, num_microbatches: int, chunks: int, *, parallel: Parallel | None = None, sizes: Mapping[str, int] = MappingProxyType(_SIZES)
) -> Fixed:
    setup = named_setup(name)
    workload = make_workload(name, num_microbatches=num_microbatches, parallel=parallel)
    names = [module.name for module in setup.model.modules]
    costs = AnalyticCost(
        setup.model, workload.parallel, workload.training, setup.device, microbatches=workload.microbatches, memory_capacity_bytes=UNLIMITED_BYTES
    )
    partition = even_partition(
        setup.model, workload.parallel.pipeline, dict.fromkeys(names, chunks), {module: sizes[module] for module in names}
    )
    return Fixed(name, partition, costs, workload.microbatches)


def of_size(name: str, stages: int, chunks: int = 2) -> Fixed:
    """About so many stages, whole backward."""
    for_64 = fixed(name, 64, chunks).problem().fastest.num_tasks
    return fixed(name, max(1, round(64 * stages / for_64)), chunks)


def fifo(problem: StageProblem) -> tuple[np.ndarray, np.ndarray]:
    kernel = make_kernel_graph(problem.fastest)
    return np.arange(kernel.num_forward_groups, dtype=np.int32), np.arange(len(kernel.group_unit) - kernel.num_forward_groups, dtype=np.int32)


# --- kernels ---------------------------------------------------------------------------------------------------------------------


def _kernel_calls(given: Fixed) -> tuple[int, dict[str, Callable[[], object]]]:
    """(stages, what to time by name)"""
    model = named_setup(given.name).model
    subs = split(given.batch, model, given.partition, given.costs)
    problem = given.problem()
    graph = problem.fastest
    kernel = make_kernel_graph(graph)
    costs, work = make_costs(graph, kernel), make_workspace(kernel)
    free, bounded = np.full(graph.num_ranks, UNLIMITED), costs.worst * 2
    forward, backward = fifo(problem)
    interleave(kernel, costs, free, forward, backward, Policy(), work)
    orders = work.orders()
    program = lower(graph, orders)
    plan = iteration.plan_columns(model, given.partition, given.batch, given.costs, PlanOptions(evaluations=1))
    packed = message.pack_plan(plan)

    def checked_run() -> None:
        check_program(program)
        dry_run(program)

    return graph.num_tasks, {
        "sub-microbatches": lambda: split(given.batch, model, given.partition, given.costs),
        "task graph": lambda: build_problem(model, given.partition, subs, given.costs),
        "bound": lambda: problem_bound_ns(problem, free),
        "search set up": lambda: (make_costs(graph, make_kernel_graph(graph)), make_workspace(kernel)),
        "interleave, memory unlimited": lambda: interleave(kernel, costs, free, forward, backward, Policy(), work),
        "interleave, memory limited": lambda: interleave(kernel, costs, bounded, forward, backward, Policy(), work),
        "times of an order": lambda: time_order(graph, orders),
        "lowering": lambda: lower(graph, orders),
        "program check and dry run": checked_run,
        "plan check": lambda: check_columns(plan, given.batch),
        "plan check (plain Python)": lambda: inspect_plan(packed.plan, given.batch),
        "packing": lambda: message.pack_plan(plan),
        "unpacking": lambda: message.unpack_plan(packed.data),
    }


def kernels(args: argparse.Namespace, emit: Emit) -> None:
    for wanted in KERNEL_STAGES:
        stages, calls = _kernel_calls(of_size("vlm-s", wanted))
        for part, call in calls.items():
            call()  # compiles, or loads what was compiled
            took: list[int] = []
            until = time.perf_counter() + 0.4
            while len(took) < 3 or (time.perf_counter() < until and len(took) < 200):
                began = time.perf_counter_ns()
                call()
                took.append(time.perf_counter_ns() - began)
                if took[-1] > 1e9:
                    break
            emit({"section": "kernels", "setup": "vlm-s", "part": part, "wanted": wanted, "stages": stages,
                  "best_ns": min(took), "median_ns": statistics.median(took)})


def kernels_report(rows: list[Row]) -> str:
    parts = list(dict.fromkeys(row["part"] for row in rows))
    last = {(row["part"], row["wanted"]): row for row in rows}
    lines = []
    for part in parts:
        cells = [last[part, stages] for stages in KERNEL_STAGES if (part, stages) in last]
        lines.append([part, *(f"{row['best_ns'] / row['stages']:.0f}" for row in cells), *(f"{row['median_ns'] / 1e6:.2f}" for row in cells)])
    sizes = [f"{last[parts[0], stages]['stages']}" for stages in KERNEL_STAGES if (parts[0], stages) in last]
    header = ["part", *(f"ns a stage, {size} stages" for size in sizes), *(f"ms, {size} stages" for size in sizes)]
    return "ns of the fastest, ms of the median repeat. Asked for: interleaver <= 50 ns a stage at 1 000 stages, about linear growth.\n\n" + markdown_table(header, lines)


# --- the interpreter's lock ------------------------------------------------------------------------------------------------------

_PHASES: tuple[tuple[Any, str, str], ...] = (
    (iteration, "split", "sub-microbatches"), (iteration, "build_problem", "task graph"), (backward, "problem_bound_ns", "bound"),
    (iteration, "lower", "lowering"), (iteration, "check_program", "program check"),
    (iteration, "dry_run", "dry run"), (iteration, "_make_columns", "the plan's arrays"), (iteration, "check_columns", "plan check"),
    (message, "plan_of", "the plan's objects"), (message, "lower_columns", "lowering"), (message, "check_columns", "plan check"), (message, "pack_plan", "packing"), (message, "unpack_plan", "unpacking"),
)


class Spans:
    """(name, begin, end) of every call of the named phases and of every garbage collection, from the moment it is made."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, int, int]] = []
        for owner, function, name in _PHASES:
            setattr(owner, function, self.timed(getattr(owner, function), name))
        self._collection_began = 0
        gc.callbacks.append(self._collected)

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans.append((name, began, time.perf_counter_ns()))

        return timed

    def _collected(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collection_began = time.perf_counter_ns()
        else:
            self.spans.append((f"garbage collection, generation {info['generation']}", self._collection_began, time.perf_counter_ns()))

    def blame(self, began: int, ended: int) -> str:
        """What most of a gap fell into."""
        shares = [(min(ended, end) - max(began, begin), name) for name, begin, end in self.spans if begin < ended and end > began]
        return max(shares, default=(0, "between"))[1]


def heartbeat(keep_on: Callable[[], bool]) -> list[tuple[int, int]]:
    """(previous beat, beat) of a thread that wants the lock every 0.2 ms."""
    beats = []
    last = time.perf_counter_ns()
    while keep_on():
        time.sleep(_BEAT_S)
        now = time.perf_counter_ns()
        beats.append((last, now))
        last = now
    return beats


def gil(args: argparse.Namespace, emit: Emit) -> None:
    switch_often()
    spans = Spans()
    for stages in GIL_STAGES:
        _watch(of_size("vlm-s", stages, chunks=4), spans, emit)


def _watch(given: Fixed, spans: Spans, emit: Emit) -> None:
    """Plans several times in another thread while this one beats."""
    model = named_setup(given.name).model

    def once(budget_s: float) -> int:
        plan = message.pack_plan(
            iteration.plan_columns(
                model, given.partition, given.batch, given.costs, PlanOptions(time_budget_s=budget_s), search=spans.timed(search, "search")
            )
        )
        received = message.unpack_plan(plan.data)
        size = len(received.stages)
        began = time.perf_counter_ns()
        del plan, received
        spans.spans.append(("letting two plans go", began, time.perf_counter_ns()))
        return size

    size = once(0.05)
    until = time.monotonic() + 2.0
    idle = [end - begin for begin, end in heartbeat(lambda: time.monotonic() < until)]
    emit({"section": "gil", "setup": given.name, "stages": size, "phase": "nobody plans", "gaps_ms": [max(idle) / 1e6], "took_ms": 0.0})
    worst: dict[str, list[float]] = {}
    took: dict[str, list[float]] = {}
    for _ in range(_GIL_REPEATS):
        spans.spans.clear()
        thread = threading.Thread(target=once, args=(0.3,))
        thread.start()
        of_phase: dict[str, float] = {}
        for begin, end in heartbeat(thread.is_alive):
            name = spans.blame(begin, end)
            of_phase[name] = max(of_phase.get(name, 0.0), (end - begin) / 1e6)
        for name, gap in of_phase.items():
            worst.setdefault(name, []).append(gap)
        for name, begin, end in spans.spans:
            took.setdefault(name, []).append((end - begin) / 1e6)
    for name, found in worst.items():
        emit({"section": "gil", "setup": given.name, "stages": size, "phase": name, "gaps_ms": found,
              "took_ms": statistics.median(took.get(name, [0.0]))})


def gil_report(rows: list[Row]) -> str:
    lines = []
    sizes = list(dict.fromkeys(row["stages"] for row in rows))
    for phase in dict.fromkeys(row["phase"] for row in rows):
        cells = []
        for size in sizes:
            own = next((row for row in rows if row["phase"] == phase and row["stages"] == size), None)
            cells += [f"{own['took_ms']:.1f}", f"{statistics.median(own['gaps_ms']):.2f}", f"{max(own['gaps_ms']):.2f}"] if own else ["-"] * 3
        lines.append([phase, *cells])
    header = ["phase", *(f"{what}, {size} stages" for size in sizes for what in ("takes ms", "longest gap ms: median plan", "worst plan"))]
    return (
        f"Gaps of a thread that beats every {_BEAT_S * 1e3:g} ms while another plans ({_GIL_REPEATS} plans; wakening included; the machine's own "
        "pauses stand in the first row). Asked for: nothing holds the lock longer than 5 ms.\n\n" + markdown_table(header, lines)
    )


# --- memory choice ---------------------------------------------------------------------------------------------------------------


def choice(args: argparse.Namespace, emit: Emit) -> None:
    for name in args.setups:
        given = fixed(name, 32, 2)
        per_rank = given.problem().num_pairs / given.partition.num_ranks
        given = fixed(name, int(np.ceil(32 * _CHOICE_PAIRS / per_rank)), 2)
        problem = given.problem()
        graph, tables = problem.fastest, make_tables(problem)
        kernel = make_kernel_graph(graph)
        work = make_workspace(kernel)
        interleave(kernel, make_costs(graph, kernel), np.full(graph.num_ranks, UNLIMITED), *fifo(problem), Policy(), work)
        orders = work.orders()
        fastest = time_order(graph, orders)
        leanest = time_order(problem.graph(problem.leanest()), orders)
        assert fastest is not None
        assert leanest is not None
        high, low = fastest.peak_memory([0] * graph.num_ranks), leanest.peak_memory([0] * graph.num_ranks)
        picked = np.zeros(problem.num_pairs, dtype=np.int32)
        for rank in (0, graph.num_ranks - 1):
            for share in _CHOICE_SHARES:
                limit = np.int64(low[rank] + share * (high[rank] - low[rank]))
                took = []
                for _ in range(6):
                    began = time.perf_counter_ns()
                    total, bound = choose_kernel(tables, orders[rank], limit, picked, ITERATIONS)
                    took.append(time.perf_counter_ns() - began)
                began = time.perf_counter_ns()
                exact = choose_exactly(tables, orders[rank], int(limit), picked, _SOLVER_S, 1e-5)
                solver_ns = time.perf_counter_ns() - began
                least = sum(int(tables.forward_ns[kind, 0] + tables.backward_ns[kind, 0]) for kind in problem.pair_class[graph.rank[: problem.num_pairs] == rank])
                emit({
                    "section": "choice", "setup": name, "rank": rank, "share": share, "pairs": len(rank_problem(tables, orders[rank], limit).pair),
                    "ms": statistics.median(took[1:]) / 1e6, "total_ns": int(total), "bound_ns": int(bound), "highs_ns": int(exact),
                    "highs_s": solver_ns / 1e9, "least_ns": least,
                })


def choice_report(rows: list[Row]) -> str:
    lines = [
        [row["setup"], row["rank"], row["share"], row["pairs"], f"{row['ms']:.2f}", f"{row['total_ns'] / row['highs_ns'] - 1:.4%}",
         f"{row['total_ns'] / row['bound_ns'] - 1:.4%}", f"{row['highs_s']:.2f}", f"{row['highs_ns'] / row['least_ns'] - 1:.2%}"]
        for row in rows
    ]
    worst = max(row["ms"] for row in rows), max(row["total_ns"] / row["highs_ns"] - 1 for row in rows)
    return (
        f"Worst: {worst[0]:.2f} ms, {worst[1]:.4%} above HiGHS (gap 1e-5, {_SOLVER_S:g} s at most; negative: HiGHS ran out of time). Asked for: "
        "<= 5 ms a rank at 350 stage pairs, gap <= 0.1 %. Room: share of the way from the leanest to the fastest candidates' peak.\n\n"
        + markdown_table(["setup", "rank", "room", "pairs", "ms", "above HiGHS", "above its own bound", "HiGHS s", "recompute time, HiGHS"], lines)
    )


# --- exact cases -----------------------------------------------------------------------------------------------------------------

EXACT_CASES = (
    ("vlm-s", 3, 2, False), ("vlm-s", 6, 2, False), ("vlm-m", 4, 2, False), ("vlm-m", 3, 3, False), ("vlm-l", 3, 4, False),
    ("t2v-s", 3, 2, False), ("t2v-s", 5, 2, False), ("t2v-l", 3, 3, False), ("vlm-s", 3, 2, True), ("vlm-l", 3, 2, True), ("t2v-s", 3, 2, True),
)
"""setup, microbatches, ranks, split backward"""


def exact(args: argparse.Namespace, emit: Emit) -> None:
    for name, count, ranks, split_backward in EXACT_CASES:
        given = fixed(name, count, 1, parallel=Parallel(tensor=named_setup(name).tensor, pipeline=ranks), sizes=_WHOLE)
        problem = given.problem(split_backward=split_backward)
        graph = problem.fastest
        limit = np.full(ranks, UNLIMITED)
        bound = problem_bound_ns(problem, limit)
        found = search(problem, limit, SearchOptions(time_budget_s=1.0), bound)
        case = {
            "horizon": found.schedule.makespan_ns, "seconds": _EXACT_S,
            "tasks": [[int(rank), int(duration)] for rank, duration in zip(graph.rank, graph.duration_ns, strict=True)],
            "edges": [
                [task, int(graph.dep_task[edge]), int(graph.dep_lag_ns[edge])]
                for task in range(graph.num_tasks) for edge in range(graph.dep_offset[task], graph.dep_offset[task + 1])
            ],
        }
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("cp_sat.py"))], input=json.dumps(case), capture_output=True, text=True, check=True
        )
        emit({"section": "exact", "setup": name, "microbatches": count, "ranks": ranks, "split_backward": split_backward,
              "tasks": graph.num_tasks, "makespan_ns": found.schedule.makespan_ns, "bound_ns": bound,
              "solver_s": time.perf_counter() - began, **json.loads(done.stdout)})


def exact_report(rows: list[Row]) -> str:
    lines = [
        [row["setup"], row["microbatches"], row["ranks"], "split" if row["split_backward"] else "whole", row["tasks"],
         f"{row['makespan_ns'] / row['value'] - 1:.3%}", "proven optimum" if row["optimal"] else f"best of {_EXACT_S:g} s, proven to {row['value'] / row['bound'] - 1:.2%}",
         f"{row['solver_s']:.1f}", f"{row['value'] / row['bound_ns'] - 1:.2%}"]
        for row in rows
    ]
    equal = sum(row["makespan_ns"] <= row["value"] for row in rows if row["optimal"])
    return (
        f"Equal to the proven optimum in {equal} of {sum(row['optimal'] for row in rows)} cases that CP-SAT (two workers) proves; the planner "
        "searches 1 s on one thread.\n\n"
        + markdown_table(["setup", "microbatches", "ranks", "backward", "stages", "planner above CP-SAT", "CP-SAT", "CP-SAT s", "CP-SAT above our bound"], lines)
    )


# --- partition time --------------------------------------------------------------------------------------------------------------


def partition(args: argparse.Namespace, emit: Emit) -> None:
    for name in NAMED_SETUPS:
        setup = named_setup(name)
        batches = [make_workload(name, seed=seed, num_microbatches=32).microbatches for seed in range(8)]
        parallel = default_parallel(setup)
        workload = make_workload(name, num_microbatches=32)
        costs = AnalyticCost(setup.model, parallel, workload.training, setup.device, microbatches=[m for batch in batches for m in batch])
        began, cpu = time.perf_counter(), time.process_time()
        found = joint_partition(setup.model, setup.pipeline, batches, costs)
        emit({"section": "partition", "setup": name, "ranks": setup.pipeline, "seconds": time.perf_counter() - began,
              "cpu_s": time.process_time() - cpu, "candidates": found.candidates,
              "chunks": {module: len(rows) for module, rows in found.partition.chunks.items()}, "sub_microbatch": found.partition.sub_microbatch_size})


def partition_report(rows: list[Row]) -> str:
    lines = [[row["setup"], row["ranks"], f"{row['seconds']:.1f}", f"{row['cpu_s']:.1f}", f"{row['candidates']}", json.dumps(row["chunks"]), json.dumps(row["sub_microbatch"])] for row in rows]
    return (
        "Under the device's memory, eight batches of 32 microbatches. Asked for: within 30 s for the largest setup.\n\n"
        + markdown_table(["setup", "ranks", "seconds", "CPU seconds", "candidates", "chunks a rank", "sub-microbatch"], lines)
    )


class Part(NamedTuple):
    title: str
    measure: Callable[[argparse.Namespace, Emit], None]
    report: Callable[[list[Row]], str]


PARTS = {
    "kernels": Part("Kernels", kernels, kernels_report),
    "gil": Part("The interpreter's lock", gil, gil_report),
    "choice": Part("Memory choice of one rank", choice, choice_report),
    "exact": Part("Against exact solutions of small cases", exact, exact_report),
    "partition": Part("Time of the joint choice of a partition", partition, partition_report),
}


def parts_of(rows: Iterable[Row]) -> list[str]:
    """Names of the parts that have rows, in order."""
    have = {row["section"] for row in rows}
    return [name for name in PARTS if name in have]
