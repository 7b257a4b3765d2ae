"""Plans one iteration: from the microbatches' metadata to a checked plan that the ranks can run.

In: the model, its partition, one replica's microbatches, costs, a budget. Out: a :class:`~megatron_dip.spec.plan.Plan`. Every plan
that leaves here was lowered, dry-run on all ranks under rendezvous sends, and held against a checker that shares no code with the
scheduler. Threads that plan beside training hold the interpreter's lock only for moments: graph, search, lowering and dry run are
compiled without it, and the rest is Python in small steps (:mod:`megatron_dip.planner.courtesy`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np

from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.online import split
from megatron_dip.planner.courtesy import no_collections
from megatron_dip.program.dry_run import check_program, dry_run
from megatron_dip.program.lower import lower
from megatron_dip.schedule.backward import Solved, SplitBackward, search_forms
from megatron_dip.schedule.checker import check_plan
from megatron_dip.schedule.exact_memory import load_solver, with_exact_memory
from megatron_dip.schedule.graph import StageProblem, build_problem, static_bytes
from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.search import DoesNotFit, SearchMethod, SearchOptions
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.long import LongList
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Dep, Plan, PlanStage
from megatron_dip.spec.tasks import KIND_NAMES, WEIGHT, TaskGraph
from megatron_dip.spec.workload import Microbatch

MemoryChoice = Literal["relaxation", "exact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """What to plan, and what it may cost. Without a budget the search takes 0.3 s."""

    time_budget_s: float | None = None
    """Seconds of search; building, checking and lowering come on top."""
    evaluations: int | None = None
    """Schedules that the search may try; with it alone the plan is the same on every machine. Where whole and split backwards are
    searched, so many of each."""
    threads: int = 1
    seed: int = 0
    search: SearchMethod = "anneal"
    split_backward: SplitBackward = False
    """Plan the backward's input and weight parts apart; ``auto``: where that is faster for these microbatches."""
    forward_only: bool = False
    """Evaluation: forwards alone."""
    strategy: str | None = None
    """Memory strategy of every layer; None = chosen per layer."""
    memory: MemoryChoice = "relaxation"
    """``exact``: the found orders' memory strategies are chosen once more by HiGHS, up to 10 s a rank beyond the budget."""

    def validate(self) -> None:
        """Raises InputError for budgets that never end or never begin, and for a solver that is not installed."""
        if self.time_budget_s is not None and not 0 <= self.time_budget_s <= 3600:
            raise InputError("--time-budget", self.time_budget_s, "outside [0, 3600] seconds", "give a number of seconds")
        if self.evaluations is not None and not 1 <= self.evaluations <= 10**9:
            raise InputError("--evaluations", self.evaluations, "outside [1, 10^9]", "give the schedules to try")
        if not 1 <= self.threads <= 1024:
            raise InputError("--threads", self.threads, "outside [1, 1024]", "give at most the machine's cores")
        if not 0 <= self.seed < 1 << 32:
            raise InputError("--seed", self.seed, "outside [0, 2^32)", "give a whole number from 0")
        if self.memory == "exact":
            load_solver()


def plan_iteration(
    model: ModelSpec, partition: Partition, microbatches: Sequence[Microbatch], costs: CostModel, options: PlanOptions
) -> Plan:
    """Plans one replica's iteration.

    Raises:
        InputError: no microbatch has any work, an impossible budget, or memory that cannot suffice (with what would help).
    """
    options.validate()
    began = time.perf_counter_ns()
    with no_collections():
        sub_microbatches = split(microbatches, model, partition, costs)
        if not sub_microbatches:
            raise InputError("microbatches", list(microbatches), "no microbatch has an instance", "give at least one instance")
        capacity = costs.memory_capacity_bytes()
        initial = static_bytes(model, partition, costs)
        limit = np.full(partition.num_ranks, UNLIMITED, dtype=np.int64)
        if capacity is not None:
            limit = np.array([capacity - held for held in initial], dtype=np.int64)
        budget = options.time_budget_s
        if budget is None and options.evaluations is None:
            budget = 0.3

    def build(split_backward: bool) -> StageProblem:
        with no_collections():
            return build_problem(
                model, partition, sub_microbatches, costs, split_backward=split_backward, forward_only=options.forward_only,
                only_strategy=options.strategy,
            )

    try:
        solved = search_forms(build, limit, SearchOptions(
            method=options.search, time_budget_s=budget, evaluations=options.evaluations, threads=options.threads, seed=options.seed,
        ), False if options.forward_only else options.split_backward)
    except DoesNotFit as error:
        assert capacity is not None
        raise _memory_error(error, capacity, initial) from error
    if options.memory == "exact":
        solved = replace(solved, result=with_exact_memory(solved.problem, limit, solved.result))
    with no_collections():
        plan = _make_plan(solved, partition, capacity, initial, options.seed)
        check_plan(plan, microbatches)
    return msgspec.structs.replace(plan, planning_ns=time.perf_counter_ns() - began)


def _memory_error(error: DoesNotFit, capacity: int, initial: Sequence[int]) -> InputError:
    rank = int(np.argmax(error.missing))
    missing = int(error.missing[rank])
    return InputError(
        "memory_capacity_bytes", capacity,
        f"{missing} bytes are missing on pipeline rank {rank}: {initial[rank]} bytes are held all the time, and its largest microbatch "
        f"needs {capacity - initial[rank] + missing} more with the leanest memory strategy everywhere",
        "use more pipeline or tensor ranks, smaller microbatches, or a memory strategy that keeps less (full recompute, offload)",
    )


def _make_plan(solved: Solved, partition: Partition, capacity: int | None, initial: list[int], seed: int) -> Plan:
    """The plan but for ``planning_ns``."""
    schedule, tasks = solved.problem.present(solved.result.schedule)
    program = lower(schedule.graph, schedule.order)
    check_program(program)
    dry_run(program)
    return Plan(
        format="megatron-dip/plan/1",
        ranks=partition.num_ranks,
        memory_capacity=None if capacity is None else [capacity] * partition.num_ranks,
        memory_initial=initial,
        stages=_plan_stages(
            solved.problem, partition, schedule.graph, solved.problem.pair_of_task[tasks].tolist(), solved.result.choice.tolist()
        ),
        order=[row.tolist() for row in schedule.order],
        claimed_makespan=schedule.makespan_ns,
        lower_bound=solved.bound_ns,
        bubble_fraction=schedule.bubble_fraction,
        peak_memory=schedule.peak_memory(initial),
        planning_ns=0,
        evaluations=solved.evaluations,
        seed=seed,
        chunks=partition.chunks,
        sub_microbatch_size=partition.sub_microbatch_size,
        actions=program.actions(),
        inputs=program.inputs(),
        local_inputs=program.local_inputs(),
        outputs=program.outputs(),
    )


def _plan_stages(problem: StageProblem, partition: Partition, graph: TaskGraph, pairs: list[int], choice: list[int]) -> list[PlanStage]:
    """Args:
    graph: the chosen schedule's, without absent tasks.
    pairs: [tasks of ``graph``] each one's pair.
    choice: [pairs] each one's candidate.
    """
    rank, kind, vp_stage = graph.rank.tolist(), graph.kind.tolist(), graph.vp_stage.tolist()
    duration, start, end = graph.duration_ns.tolist(), graph.mem_start_bytes.tolist(), graph.mem_end_bytes.tolist()
    offset, dep_task, dep_lag = graph.dep_offset.tolist(), graph.dep_task.tolist(), graph.dep_lag_ns.tolist()
    sub_of_pair = problem.pair_sub_microbatch.tolist()
    strategies: dict[tuple[int, int], list[str]] = {}
    layers: dict[tuple[str, int, int], tuple[int, int]] = {}
    stages: LongList[PlanStage] = LongList()
    for task in range(graph.num_tasks):
        pair = pairs[task]
        sub = problem.sub_microbatches[sub_of_pair[pair]]
        key = (int(problem.pair_class[pair]), choice[pair])
        if key not in strategies:
            strategies[key] = problem.strategies(pair, choice[pair])
        place = (sub.module, vp_stage[task], rank[task])
        if place not in layers:
            layers[place] = partition.layer_range(*place)
        stages.append(PlanStage(
            id=task, rank=rank[task], kind=KIND_NAMES[kind[task]],  # type: ignore[arg-type]
            duration=duration[task], mem_delta_start=start[task], mem_delta_end=end[task],
            deps=tuple([Dep(dep_task[edge], dep_lag[edge]) for edge in range(offset[task], offset[task + 1])]),
            module=sub.module, vp_stage=vp_stage[task], layers=layers[place],
            microbatch=sub.microbatch, sub_microbatch=sub.sub_microbatch, tokens=sum(sub.lengths), instances=len(sub.lengths),
            strategy=[] if kind[task] == WEIGHT else strategies[key],
        ))
    return stages
