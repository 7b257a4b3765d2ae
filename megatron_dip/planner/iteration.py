"""Plans one iteration: from the microbatches' metadata to a checked plan that the ranks can run.

In: the model, its partition, one replica's microbatches, costs, a budget. Out: a plan, as arrays
(:class:`~megatron_dip.spec.plan_columns.PlanColumns`) or as a :class:`~megatron_dip.spec.plan.Plan`. Every plan that leaves here was
lowered, dry-run on all ranks under rendezvous sends, and held against a checker that shares no code with the scheduler. Threads that plan
beside training hold the interpreter's lock only for moments: graph, search, lowering, dry run and check are compiled without it, and the
rest is Python in small steps (:mod:`megatron_dip.planner.courtesy`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.fixed import WithoutOffload
from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.online import split
from megatron_dip.planner.all_memory import CapturedInputs, captured_inputs, recomputing_room, with_all_memory
from megatron_dip.planner.courtesy import no_collections
from megatron_dip.program.columns import no_actions, with_program
from megatron_dip.program.dry_run import check_program, dry_run
from megatron_dip.program.lower import lower
from megatron_dip.program.posting import one_queue_ns
from megatron_dip.program.program import Program
from megatron_dip.schedule.backward import Solved, SplitBackward, search_forms
from megatron_dip.schedule.checker import check_columns
from megatron_dip.schedule.exact_memory import load_solver, with_exact_memory
from megatron_dip.schedule.graph import StageProblem, build_problem, static_bytes
from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.result import Schedule, time_order
from megatron_dip.schedule.rules import by_rule
from megatron_dip.schedule.search import DoesNotFit, SearchFunction, SearchMethod, SearchOptions, Seed, search
from megatron_dip.schedule.warm import load_kernels
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.orders import OrderName
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.plan_columns import PlanColumns, plan_of
from megatron_dip.spec.tasks import WEIGHT, TaskGraph
from megatron_dip.spec.workload import Microbatch

logger = logging.getLogger(__name__)

MOST_HARDWARE_QUEUES = 32
"""CUDA takes no more connections than that."""

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
    schedule: OrderName = "dip"
    """The rule whose order is taken; ``dip``: the order is searched."""
    search: SearchMethod = "anneal"
    split_backward: SplitBackward = False
    """Plan the backward's input and weight parts apart; ``auto``: where that is faster for these microbatches."""
    forward_only: bool = False
    """Evaluation: forwards alone."""
    strategy: str | None = None
    """Memory strategy of every layer; None = chosen per layer."""
    memory: MemoryChoice = "relaxation"
    """``exact``: the found orders' memory strategies are chosen once more by HiGHS, up to 10 s a rank beyond the budget."""
    hardware_queues: int | None = None
    """Of the device (``CUDA_DEVICE_MAX_CONNECTIONS``). With one, of the best few schedules found that one is taken which ends first on
    such a device, posts and their waiting counted; ``claimed_makespan`` leaves them out as ever. None = as many as there are streams."""

    is_needed: Callable[[], bool] | None = None
    """Asked while searching: True ends the search with what it has found, since training waits for the plan. None: nobody waits."""

    may_exceed_memory: bool = False
    """Where not even the leanest plan fits: make that one, with a warning, since costs are estimates. False: an InputError."""
    lower_peaks: bool = False
    """Of equally fast schedules take one that keeps fewer activations; costs up to 0.45 of the budget more."""
    reserved_bytes: tuple[int, ...] = ()
    """Held on each rank all the time besides what costs know: what ranks were measured to hold above their plans. () = nothing."""
    memory_field: str = "memory_capacity_bytes"
    """How messages name the limit on memory."""

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
        if self.hardware_queues is not None and not 1 <= self.hardware_queues <= MOST_HARDWARE_QUEUES:
            raise InputError(
                "--hardware-queues", self.hardware_queues, f"outside [1, {MOST_HARDWARE_QUEUES}]", "give CUDA_DEVICE_MAX_CONNECTIONS of the run"
            )
        if self.memory == "exact":
            load_solver()


def plan_iteration(
    model: ModelSpec, partition: Partition, microbatches: Sequence[Microbatch], costs: CostModel, options: PlanOptions
) -> Plan:
    """Plans one replica's iteration; see :func:`plan_columns`."""
    with no_collections():
        return plan_of(plan_columns(model, partition, microbatches, costs, options))


def plan_columns(
    model: ModelSpec, partition: Partition, microbatches: Sequence[Microbatch], costs: CostModel, options: PlanOptions, *,
    search: SearchFunction = search,
) -> PlanColumns:
    """Plans one replica's iteration. The plan is made and checked as arrays, without the interpreter's lock.

    Long since its steps share budget, limits and inputs; each is a function of its own.

    Args:
        search: what searches each problem, here or on several ranks.

    Raises:
        InputError: no microbatch has any work, an impossible budget, or memory that cannot suffice (with what would help).
    """
    options.validate()
    load_kernels()
    began = time.perf_counter_ns()
    with no_collections():
        sub_microbatches = split(microbatches, model, partition, costs)
        if not sub_microbatches:
            raise InputError("microbatches", list(microbatches), "no microbatch has an instance", "give at least one instance")
        capacity = costs.memory_capacity_bytes()
        initial = static_bytes(model, partition, costs)
        if options.reserved_bytes:
            initial = [held + reserved for held, reserved in zip(initial, options.reserved_bytes, strict=True)]
        limit = np.full(partition.num_ranks, UNLIMITED, dtype=np.int64)
        if capacity is not None:
            limit = np.array([capacity - held for held in initial], dtype=np.int64)
        budget = options.time_budget_s
        if budget is None and options.evaluations is None:
            budget = 0.3

    def builder(costs: CostModel) -> Callable[[bool], StageProblem]:
        def build(split_backward: bool) -> StageProblem:
            with no_collections():
                return build_problem(
                    model, partition, sub_microbatches, costs, split_backward=split_backward, forward_only=options.forward_only,
                    only_strategy=options.strategy,
                )

        return build

    build = builder(costs)
    # Where memory binds, what keeps all on the device is searched first: with offloading to choose as well no plan is worse.
    on_device = builder(WithoutOffload(costs)) if capacity is not None and (build(False).rooms.ahead > 0).any() else None

    search_options = SearchOptions(
        method=options.search, time_budget_s=budget, evaluations=options.evaluations, threads=options.threads, seed=options.seed,
        is_needed=options.is_needed,
    )
    inputs = None
    if costs.counts_all_memory():
        inputs = captured_inputs(model, microbatches, costs, partition.num_ranks)

    def fits(lowered: _Lowered) -> bool:
        return capacity is None or max(lowered.schedule.peak_memory(initial)) <= capacity

    split_backward = False if options.forward_only else options.split_backward
    if options.schedule != "dip":
        search, split_backward = by_rule(options.schedule, model.topological()), split_backward is True

    def searching(build: Callable[[bool], StageProblem], part: float, known: _Lowered | None = None) -> _Solve:
        """Searches with so much of the budget, from what is known on."""

        def solve(limit: NDArray[np.int64], share: float = 1.0) -> _Lowered:
            start = None
            if known is not None and (known.solved.problem.pair_weight < 0).all():
                holds = known.solved.result.schedule.peak_memory([0] * len(limit))
                start = partial(_seed, known.solved) if (np.array(holds) <= limit).all() else None
            spent = replace(
                search_options, time_budget_s=None if budget is None else part * share * budget,
                evaluations=None if options.evaluations is None else max(1, round(part * share * options.evaluations)),
            )
            solved = search_forms(build, limit, spent, split_backward, start=start, search=search)
            if options.memory == "exact":
                solved = replace(solved, result=with_exact_memory(solved.problem, limit, solved.result))
            with no_collections():
                lowered = _lower(solved, inputs)
                if options.hardware_queues == 1:
                    lowered = _best_on_one_queue(lowered, lambda other: _lower(other, inputs), fits)
            return lowered

        return solve

    room = np.zeros(partition.num_ranks, dtype=np.int64)
    if inputs is not None and capacity is not None:
        room = recomputing_room((on_device or build)(False)) + inputs.room()
    solve, kept = searching(build, 1.0), None
    if on_device is not None:
        with contextlib.suppress(InputError):
            kept = _fit(searching(on_device, ON_DEVICE_SHARE), limit, room, initial, capacity, replace(options, may_exceed_memory=False))
        binds = kept is None or bool(kept.solved.result.choice.any())
        solve = searching(build if binds else on_device, 1.0 if kept is None else 1.0 - ON_DEVICE_SHARE, kept)
    strict = replace(options, may_exceed_memory=False)
    tries = [(solve, options)]
    if on_device is not None:
        # With all of the budget the smaller choice has what it would have had alone.
        tries = [(solve, strict)] if kept is not None else [(solve, strict), (searching(on_device, 1.0), strict), (solve, options)]
    lowered = _first_that_fits(lambda one, under: _fit(one, limit, room, initial, capacity, under), tries, kept)
    if kept is not None and kept.schedule.makespan_ns < lowered.schedule.makespan_ns:
        lowered = kept
    if options.lower_peaks and options.schedule == "dip" and not (options.is_needed is not None and options.is_needed()):
        lowered = _with_lower_peaks(solve, lowered, limit - room, fits)
    with no_collections():
        columns = _make_columns(lowered, partition, capacity, initial, options.seed)
        check_columns(columns, microbatches)
    return replace(columns, head=msgspec.structs.replace(columns.head, planning_ns=time.perf_counter_ns() - began))


def _first_that_fits(
    fit: Callable[[_Solve, PlanOptions], _Lowered], tries: Sequence[tuple[_Solve, PlanOptions]], otherwise: _Lowered | None
) -> _Lowered:
    """Raises InputError where none does and there is nothing else."""
    for number, (solve, options) in enumerate(tries):
        try:
            return fit(solve, options)
        except InputError:
            if otherwise is None and number == len(tries) - 1:
                raise
    assert otherwise is not None
    return otherwise


_Solve = Callable[..., "_Lowered"]
"""(bytes on each rank, share of the budget) -> the best schedule found."""


@dataclass(frozen=True, slots=True)
class _Lowered:
    """A searched problem and the programs of its schedule."""

    solved: Solved
    schedule: Schedule
    """Without absent tasks; where all memory counts with what the programs hold"""
    tasks: NDArray[np.int64]
    """[its tasks] their numbers in the problem"""
    program: Program


ON_DEVICE_SHARE = 0.5
"""Of a budget, for plans that offload nothing, where others may."""


def _seed(known: Solved, problem: StageProblem) -> Seed:
    """The schedule of a problem in another one, which has more memory strategies to choose from."""
    result = known.result
    return Seed(orders=list(result.schedule.order), choice=problem.nearest_choice(known.problem, result.choice), priorities=result.priorities)


def _best_on_one_queue(lowered: _Lowered, lower_too: Callable[[Solved], _Lowered], fits: Callable[[_Lowered], bool]) -> _Lowered:
    """Of the schedules that the search found and that fit, the one that ends first on a device with one hardware queue."""
    solved = lowered.solved
    best, best_ns = lowered, one_queue_ns(lowered.schedule.graph, lowered.schedule.order)
    for other in solved.result.others if fits(lowered) else ():
        if other.makespan_ns >= best_ns:
            continue  # no device is faster than one without limits
        schedule = time_order(solved.problem.graph(other.choice), other.orders)
        assert schedule is not None
        candidate = lower_too(replace(solved, result=replace(solved.result, schedule=schedule, choice=other.choice)))
        ends_ns = one_queue_ns(candidate.schedule.graph, candidate.schedule.order)
        if ends_ns < best_ns and fits(candidate):
            best, best_ns = candidate, ends_ns
    return best


def _lower(solved: Solved, inputs: CapturedInputs | None) -> _Lowered:
    """Args:
    inputs: what microbatches bring, where all memory counts.
    """
    schedule, tasks = solved.problem.present(solved.result.schedule)
    program = lower(schedule.graph, schedule.order)
    check_program(program)
    dry_run(program)
    if inputs is not None:
        schedule = with_all_memory(solved.problem, schedule, tasks, solved.result.choice, program, inputs)
    return _Lowered(solved, schedule, tasks, program)


_PEAK_SHARES = (0.4, 0.6, 0.8)
"""Of the activations' peaks, as limits under which a schedule is looked for that is as fast."""
_PEAK_SEARCH_SHARE = 0.15
"""Of the budget, for each of these; on top of it."""
LOWER_PEAKS_COST = 1 + len(_PEAK_SHARES) * _PEAK_SEARCH_SHARE
"""Times the budget that a plan with ``lower_peaks`` may take."""
_AS_FAST = 1.002
"""Makespans that differ by less than this count as equal."""


def _with_lower_peaks(
    solve: Callable[[NDArray[np.int64], float], _Lowered], found: _Lowered, limit: NDArray[np.int64], fits: Callable[[_Lowered], bool]
) -> _Lowered:
    """The schedule, or one that is as fast and keeps fewer activations: the search admits microbatches as long as memory lasts, which
    without a limit holds more of them in flight than a fast schedule needs.

    Args:
        limit: [P] as the schedule was searched under.
    """
    peaks = np.array(found.solved.result.schedule.peak_memory([0] * len(limit)), dtype=np.int64)
    for share in _PEAK_SHARES:
        lower = np.minimum(limit, (share * peaks).astype(np.int64))
        try:
            leaner = solve(lower, _PEAK_SEARCH_SHARE)
        except DoesNotFit as error:  # at least one microbatch at a time, on every rank
            leaner = solve(lower + np.maximum(error.missing, 0), _PEAK_SEARCH_SHARE)
        # What searches do not see, messages and layers on their way, may be more than in the schedule that was found.
        if leaner.schedule.makespan_ns <= _AS_FAST * found.schedule.makespan_ns and fits(leaner):
            return leaner
    return found


_FITTING_PART = 200
"""From the second try on at least one part in so many of a rank's bytes is kept free more, times the try."""
_FITTINGS = 6
"""Searches at most until what a schedule's programs hold fits beside its activations."""


def _fit(
    solve: Callable[[NDArray[np.int64]], _Lowered], limit: NDArray[np.int64], room: NDArray[np.int64], initial: Sequence[int],
    capacity: int | None, options: PlanOptions,
) -> _Lowered:
    """A schedule that fits with all that its programs hold; or, where estimates may be exceeded, the leanest one.

    Args:
        limit: [P] bytes beside what is held all the time.
        room: [P] bytes of these that are kept free for what the search does not see; what is missing is added.
    """
    if capacity is None:
        return solve(limit)
    for number in range(_FITTINGS):
        try:
            lowered = solve(limit - room)
        except DoesNotFit as error:
            if not options.may_exceed_memory:
                raise _memory_error(error, capacity, initial, options) from error
            logger.warning("%s", _memory_error(error, capacity, initial, options))
            return solve(limit - room + np.maximum(error.missing, 0))
        over = np.array(lowered.schedule.peak_memory(initial)) - capacity
        if (over <= 0).all():
            return lowered
        # Another room gives another schedule, which may hold somewhat more than this one: from try to try with more to spare.
        room = room + np.where(over > 0, np.maximum(over, number * limit // _FITTING_PART), 0)
    too_much = _memory_error(DoesNotFit(over, np.full(len(over), -1)), capacity, initial, options)
    if not options.may_exceed_memory:
        raise too_much
    logger.warning("%s", too_much)
    return lowered


def _memory_error(error: DoesNotFit, capacity: int, initial: Sequence[int], options: PlanOptions) -> InputError:
    rank = int(np.argmax(error.missing))
    missing, microbatch = int(error.missing[rank]), int(error.microbatches[rank])
    what = "its messages and inputs" if microbatch < 0 else f"microbatch {microbatch}, the largest there,"
    goes_on = "; the leanest plan runs" if options.may_exceed_memory else ""
    return InputError(
        options.memory_field, capacity,
        f"{missing} bytes are missing on pipeline rank {rank}: {initial[rank]} bytes are held all the time, and {what} "
        f"needs {capacity - initial[rank] + missing} more with the leanest memory strategy everywhere{goes_on}",
        f"raise {options.memory_field}, use more pipeline or tensor ranks, smaller microbatches, or a memory strategy that keeps less "
        "(full recompute, offload) where costs do not offer one",
    )


def _make_columns(lowered: _Lowered, partition: Partition, capacity: int | None, initial: list[int], seed: int) -> PlanColumns:
    """The plan but for ``planning_ns``."""
    solved, schedule = lowered.solved, lowered.schedule
    peaks = schedule.peak_memory(initial)
    head = Plan(
        format="megatron-dip/plan/1",
        ranks=partition.num_ranks,
        # Where an estimate is exceeded, the plan says what it takes.
        memory_capacity=None if capacity is None else [max(capacity, peak) for peak in peaks],
        memory_initial=initial,
        stages=[],
        order=[],
        claimed_makespan=schedule.makespan_ns,
        lower_bound=solved.bound_ns,
        bubble_fraction=schedule.bubble_fraction,
        peak_memory=peaks,
        planning_ns=0,
        evaluations=solved.evaluations,
        seed=seed,
        chunks=partition.chunks,
        sub_microbatch_size=partition.sub_microbatch_size,
        actions=[],
        inputs={},
        local_inputs={},
        outputs={},
    )
    columns = PlanColumns(
        head=head, **_stage_columns(solved.problem, partition, schedule.graph, lowered.tasks, solved.result.choice),
        order_offset=np.cumsum([0, *map(len, schedule.order)], dtype=np.int64), order=np.concatenate(schedule.order).astype(np.int64),
        **no_actions(),
    )
    return with_program(columns, lowered.program)


def _stage_columns(
    problem: StageProblem, partition: Partition, graph: TaskGraph, tasks: NDArray[np.int64], choice: NDArray[np.int32]
) -> dict[str, Any]:
    """Args:
    graph: the chosen schedule's, without absent tasks.
    tasks: [tasks of ``graph``] their numbers in the problem.
    choice: [pairs] each one's candidate.
    """
    pair = problem.pair_of_task[tasks]
    subs = problem.sub_microbatches
    sub = problem.pair_sub_microbatch[pair]
    # Pairs of one class with one candidate have the same strategies; a weight stage has none.
    kinds, strategy = np.unique(problem.pair_class.astype(np.int64) * (int(choice.max(initial=0)) + 1) + choice, return_inverse=True)
    some_pair = np.empty(len(kinds), np.int64)
    some_pair[strategy] = np.arange(len(strategy))
    strategies = [tuple(problem.strategies(one, int(choice[one]))) for one in some_pair.tolist()]
    first = np.zeros((len(graph.module_names), int(graph.vp_stage.max(initial=0)) + 1, graph.num_ranks), np.int64)
    count = np.zeros_like(first)
    for name in {one.module for one in subs}:
        index = graph.module_names.index(name)
        for vp_stage in range(partition.num_chunks(name)):
            for rank in range(graph.num_ranks):
                first[index, vp_stage, rank], count[index, vp_stage, rank] = partition.layer_range(name, vp_stage, rank)
    place = (graph.module, graph.vp_stage, graph.rank)

    def wide(array: NDArray[Any]) -> NDArray[np.int64]:
        return np.ascontiguousarray(array, np.int64)

    return {
        "module_names": graph.module_names, "strategies": (*strategies, ()), "id": np.arange(graph.num_tasks), "kind": graph.kind,
        "rank": wide(graph.rank), "duration": graph.duration_ns, "mem_delta_start": graph.mem_start_bytes, "mem_delta_end": graph.mem_end_bytes,
        "dep_offset": wide(graph.dep_offset), "dep_stage": wide(graph.dep_task), "dep_lag": graph.dep_lag_ns, "module": wide(graph.module),
        "vp_stage": wide(graph.vp_stage), "first_layer": first[place], "num_layers": count[place], "microbatch": wide(graph.microbatch),
        "sub_microbatch": wide(graph.sub_microbatch),
        "tokens": np.array([sum(one.lengths) for one in subs], np.int64)[sub],
        "instances": np.array([len(one.lengths) for one in subs], np.int64)[sub],
        "strategy": np.where(graph.kind == WEIGHT, len(strategies), strategy[pair]),
    }
