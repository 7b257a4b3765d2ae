"""Messages, inputs and the layer that is recomputed are part of what a plan promises of memory; a batch over an estimate still runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron_dip.cost.fixed import WithoutOffload
from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.cost.wrapped import WrappedCost
from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.online import split
from megatron_dip.planner.all_memory import CapturedInputs, captured_inputs, recomputing_room, with_all_memory
from megatron_dip.planner.iteration import PlanOptions, _fit, _with_lower_peaks, plan_iteration
from megatron_dip.program.lower import lower
from megatron_dip.program.program import IRECV, WAIT_SEND, Program
from megatron_dip.schedule.checker import check_plan
from megatron_dip.schedule.graph import StageProblem, build_problem
from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.result import Schedule
from megatron_dip.schedule.rooms import offloaded_places
from megatron_dip.schedule.search import SearchOptions, search
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.profile import ModuleProfile, Offload, Strategy
from megatron_dip.spec.tasks import BACKWARD, FORWARD, WEIGHT
from megatron_dip.spec.workload import Microbatch
from tests.strategies import Case, cases, grid, module, profile, vlm_case


class AllMemory(WrappedCost):
    """Costs under which all memory counts; an instance's inputs take 5 bytes a token, on rank 0 another 7."""

    def counts_all_memory(self) -> bool:
        return True

    def input_bytes(self, module: str, lengths: Sequence[int], *, at_first: bool) -> int:
        return (12 if at_first else 5) * sum(lengths)


def peaks(problem: StageProblem, schedule: Schedule, tasks: np.ndarray, choice: np.ndarray, program: Program, inputs: CapturedInputs) -> list[int]:
    """Twin of :func:`with_all_memory`: every buffer is added to all instants, two for each stage, at which it is there."""
    graph, found = schedule.graph, []
    pair = problem.pair_of_task[tasks]
    has_backward = {int(pair[task]) for task in range(graph.num_tasks) if graph.kind[task] == BACKWARD}
    for rank, row in enumerate(schedule.order):
        at = {int(task): index for index, task in enumerate(row)}
        use = np.zeros(2 * len(row) + 1, dtype=np.int64)  # at each start, at each end

        def live(first: int, behind: int, size: int, use: np.ndarray = use) -> None:
            use[first:behind] += size

        held = 0
        for index, task in enumerate(row):
            held += int(graph.mem_start_bytes[task])
            use[2 * index] += held
            held += int(graph.mem_end_bytes[task])
            use[2 * index + 1] += held
            cell = (problem.pair_class[pair[task]], choice[pair[task]])
            stages_of_pair = {int(graph.kind[other]): at[int(other)] for other in row if pair[other] == pair[task]}
            if graph.kind[task] == FORWARD and BACKWARD in stages_of_pair:
                live(2 * index, 2 * index + 1, int(problem.rooms.forward[cell]))
                live(2 * index, 2 * stages_of_pair[BACKWARD] + 1, int(problem.rooms.between[cell]))
            if graph.kind[task] == BACKWARD:
                live(2 * index, 2 * index + 1, int(problem.rooms.backward[cell]))
                since = index - 1 if index - 1 in at.values() and index - 1 != stages_of_pair[FORWARD] else index
                live(2 * since, 2 * index + 1, int(problem.rooms.ahead[cell]))
                if WEIGHT in stages_of_pair:
                    live(2 * index, 2 * stages_of_pair[WEIGHT] + 1, int(problem.rooms.weight[cell]))
        before = -1
        posted: dict[int, int] = {}
        waited: dict[int, int] = {}
        for action in range(program.action_offset[rank], program.action_offset[rank + 1]):
            if program.op[action] <= 2:
                before = at[int(program.stage[action])]
            elif program.op[action] == IRECV:
                posted[int(program.message[action])] = before + 1
            elif program.op[action] == WAIT_SEND:
                waited[int(program.message[action])] = before
        for message, (giver, taker) in enumerate(zip(program.producer.tolist(), program.consumer.tolist(), strict=True)):
            forward = graph.kind[giver] == FORWARD
            size = int(problem.message_bytes[pair[giver] if forward else pair[taker]])
            if message in waited:
                live(2 * at[giver], 2 * waited[message] + 1, size)
            if message in posted and not (forward and graph.module[giver] != graph.module[taker]):
                until = 2 * at[taker] if forward and int(pair[taker]) in has_backward else 2 * at[taker] + 1
                live(2 * posted[message], until, size)
        for microbatch in range(len(inputs.held)):
            of_it = [at[task] for task in at if graph.kind[task] == FORWARD and graph.microbatch[task] == microbatch]
            if of_it:
                live(0, 2 * max(of_it) + 1, int(inputs.held[microbatch, rank]))
            stems = [
                at[task] for task in at if graph.kind[task] == FORWARD and graph.microbatch[task] == microbatch
                and graph.vp_stage[task] == rank == 0 and graph.module_names[graph.module[task]] in inputs.stem_modules
            ]
            if stems:
                live(2 * min(stems) if inputs.is_late[microbatch] else 0, 2 * max(stems) + 1, int(inputs.stem[microbatch]))
        found.append(max(0, int(use.max(initial=0))))
    return found


@settings(max_examples=60)
@given(cases(), st.booleans(), st.integers(0, 3), st.integers(-1, 3))
def test_buffers_are_counted_where_programs_hold_them(case: Case, split_backward: bool, level: int, late_from: int) -> None:
    costs: CostModel = AllMemory(case.costs())
    subs = split(case.microbatches, case.model, case.partition, costs)
    problem = build_problem(case.model, case.partition, subs, costs, split_backward=split_backward)
    result = search(problem, np.full(case.partition.num_ranks, UNLIMITED), SearchOptions(evaluations=3, seed=level))
    choice = np.minimum(level, problem.leanest()).astype(np.int32)
    schedule, tasks = problem.present(replace(result.schedule, graph=problem.graph(choice)))
    program = lower(schedule.graph, schedule.order)
    inputs = captured_inputs(case.model, case.microbatches, costs, case.partition.num_ranks)
    inputs = replace(inputs, is_late=np.array([late_from >= 0 and index >= late_from for index in range(len(inputs.stem))]))
    counted = with_all_memory(problem, schedule, tasks, choice, program, inputs)
    assert counted.peak_memory([0] * case.partition.num_ranks) == peaks(problem, schedule, tasks, choice, program, inputs)
    left = np.zeros(case.partition.num_ranks, dtype=np.int64)
    np.add.at(left, counted.graph.rank, counted.graph.mem_start_bytes + counted.graph.mem_end_bytes)
    assert not left.any()
    again = np.where(problem.rooms.ahead > 0, 0, problem.rooms.backward)[problem.pair_class, choice]
    assert (again <= recomputing_room(problem)[problem.fastest.rank[problem.pair_forward]]).all()


@settings(max_examples=40)
@given(cases(), st.integers(1, 9), st.booleans())
def test_plans_keep_a_limit_with_all_that_they_hold_or_say_so(case: Case, tenths: int, split_backward: bool) -> None:
    options = PlanOptions(evaluations=10, split_backward=split_backward, may_exceed_memory=True)
    free = plan_iteration(case.model, case.partition, case.microbatches, AllMemory(case.costs()), options)
    limit = max(1, max(free.peak_memory) * tenths // 10)
    plan = plan_iteration(case.model, case.partition, case.microbatches, AllMemory(case.costs(limit)), options)
    check_plan(plan, case.microbatches)
    assert plan.memory_capacity is not None
    for peak, capacity in zip(plan.peak_memory, plan.memory_capacity, strict=True):
        assert peak <= capacity
        assert capacity == limit or capacity == peak > limit


class Offloading(AllMemory):
    """Layers may be offloaded, at the rate of the case; recomputed they may be as the case has it."""

    def __init__(self, costs: CostModel, nanoseconds: float) -> None:
        super().__init__(costs)
        self._nanoseconds = nanoseconds

    def strategies(self, module: str, lengths: Sequence[int]) -> dict[str, Strategy]:
        moved = self.part(module, "layer", lengths).activation_bytes
        rate = max(1.0, moved * 1e9 / self._nanoseconds)
        return {**super().strategies(module, lengths), "offload": Strategy(offload=Offload(bytes_per_second=rate, activation=0.0))}


@settings(max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(cases(max_ranks=2), st.integers(2, 9), st.booleans(), st.booleans(), st.sampled_from([1.0, 30.0, 300.0]))
def test_offloading_gives_no_worse_plan_and_keeps_the_limit(
    case: Case, tenths: int, split_backward: bool, lower_peaks: bool, nanoseconds: float
) -> None:
    """``lower_peaks`` gives up to 0.2 % of time for memory, never memory that is not there."""
    free = plan_iteration(case.model, case.partition, case.microbatches, AllMemory(case.costs()), PlanOptions(evaluations=10))
    costs = Offloading(case.costs(max(1, max(free.peak_memory) * tenths // 10)), nanoseconds)
    found = []
    for of, evaluations in ((WithoutOffload(costs), 10), (costs, 20)):
        options = PlanOptions(evaluations=evaluations, split_backward=split_backward, lower_peaks=lower_peaks)
        try:
            found.append(plan_iteration(case.model, case.partition, case.microbatches, of, options))
        except InputError as error:
            assert error.field == "memory_capacity_bytes"  # noqa: PT017
            found.append(None)
    without, with_offload = found
    if without is not None:
        assert with_offload is not None
        assert with_offload.claimed_makespan <= (1.002 if lower_peaks else 1) * without.claimed_makespan
    if with_offload is not None:
        check_plan(with_offload, case.microbatches)
        assert with_offload.memory_capacity is not None
        assert all(peak <= limit for peak, limit in zip(with_offload.peak_memory, with_offload.memory_capacity, strict=True))


@settings(max_examples=30, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(cases(max_ranks=2), st.integers(2, 6), st.sampled_from([30.0, 300.0]))
def test_what_fits_without_offloading_fits_where_layers_may_be_offloaded(case: Case, tenths: int, nanoseconds: float) -> None:
    """With as many evaluations, where the search over both forms of memory has found nothing in its half of them."""
    free = plan_iteration(case.model, case.partition, case.microbatches, AllMemory(case.costs()), PlanOptions(evaluations=10))
    costs = Offloading(case.costs(max(1, max(free.peak_memory) * tenths // 10)), nanoseconds)
    options = PlanOptions(evaluations=10)
    try:
        plan_iteration(case.model, case.partition, case.microbatches, WithoutOffload(costs), options)
    except InputError:
        return
    plan_iteration(case.model, case.partition, case.microbatches, costs, options)


def test_where_memory_binds_layers_are_offloaded_beside_those_that_keep_all() -> None:
    case = vlm_case()
    free = plan_iteration(case.model, case.partition, case.microbatches, AllMemory(case.costs()), PlanOptions(evaluations=50))
    limit = max(free.peak_memory) * 8 // 10
    plan = plan_iteration(
        case.model, case.partition, case.microbatches, Offloading(case.costs(limit), 1.0), PlanOptions(evaluations=200)
    )
    offloading = [stage.strategy for stage in plan.stages if "offload" in stage.strategy]
    assert offloading
    for strategies in offloading:
        recomputed = [label not in ("offload", "none") for label in strategies]
        assert recomputed == sorted(recomputed, reverse=True)
        turn = strategies[sum(recomputed) :]
        assert [place for place, label in enumerate(turn) if label == "offload"] == offloaded_places(turn.count("offload"), len(turn))


@pytest.mark.parametrize("beside", [(1_000, 1_040, 1_060, 1_070), (3_000, 3_600, 4_200, 5_000, 5_500)])
def test_what_programs_hold_is_fitted_beside_other_schedules_too(beside: tuple[int, ...]) -> None:
    """A smaller limit gives another schedule, whose messages take more: one more try with as much room as was missing is not enough."""
    capacity, tried = 100_000, []

    def solve(limit: np.ndarray) -> Any:
        peak = int(limit[0]) + beside[len(tried)]
        tried.append(peak)
        return SimpleNamespace(schedule=SimpleNamespace(peak_memory=lambda initial: [peak]))

    nothing = np.zeros(1, dtype=np.int64)
    _fit(solve, np.array([capacity]), nothing, [0], capacity, PlanOptions())
    assert tried[0] > capacity
    assert tried[1] > capacity
    assert tried[-1] <= capacity


def test_a_leaner_schedule_is_taken_only_if_it_fits_with_all_that_it_holds() -> None:
    """Searched under less activations it may hold more of what searches do not see: layers on their way to the host and back."""

    def lowered(peak: int) -> Any:
        schedule = SimpleNamespace(peak_memory=lambda initial: [peak], makespan_ns=1000)
        return SimpleNamespace(schedule=schedule, solved=SimpleNamespace(result=SimpleNamespace(schedule=schedule)))

    found, capacity = lowered(90), 100
    for peak, taken in ((120, 90), (80, 80)):
        best = _with_lower_peaks(lambda *_, peak=peak: lowered(peak), found, np.array([capacity]), lambda one: one.schedule.peak_memory([0])[0] <= capacity)
        assert best.schedule.peak_memory([0]) == [taken]


def test_a_batch_over_the_estimate_runs_the_leanest_plan_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    case = vlm_case()
    costs = AllMemory(case.costs(100))
    with caplog.at_level(logging.WARNING):
        plan = plan_iteration(
            case.model, case.partition, case.microbatches, costs, PlanOptions(evaluations=5, may_exceed_memory=True, memory_field="--dip-memory-limit")
        )
    assert {strategy for stage in plan.stages for strategy in stage.strategy} == {"full"}
    (message,) = {record.getMessage() for record in caplog.records}
    assert message.startswith("--dip-memory-limit = 100: ")
    assert "bytes are missing on pipeline rank" in message
    assert "microbatch 3, the largest there, needs" in message
    with pytest.raises(InputError, match=r"--dip-memory-limit = 100: .* microbatch 3, .* Remedy: raise --dip-memory-limit"):
        plan_iteration(case.model, case.partition, case.microbatches, costs, PlanOptions(evaluations=5, memory_field="--dip-memory-limit"))


@pytest.mark.parametrize(("chunks", "share"), [(1, 0.5), (2, 1.0)])
def test_of_equally_fast_plans_the_one_with_lower_peaks_is_taken(chunks: int, share: float) -> None:
    """A uniform language model, for which with one chunk a rank 1F1B's microbatches in flight are enough."""
    model = ModelSpec(modules=[module("lm", 8, role="backbone")])
    layer = grid(1000.0, 1000.0, 1000.0, activation_bytes=100.0, boundary_bytes=1.0)
    costs = ProfileCost(profile({"lm": ModuleProfile(num_layers=8, layer=layer, strategies={"none": Strategy()})}))
    partition = even_partition(model, 2, {"lm": chunks}, {})
    batch: list[Microbatch] = [{"lm": [1]} for _ in range(16)]
    free, lower = (
        plan_iteration(model, partition, batch, costs, PlanOptions(evaluations=100, lower_peaks=wanted)) for wanted in (False, True)
    )
    assert lower.claimed_makespan <= 1.002 * free.claimed_makespan
    assert max(lower.peak_memory) <= share * max(free.peak_memory)
