"""Baselines against their closed forms, and as valid schedules of any case."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_dip.simulator.baselines import BASELINES, BaselineResult, run_baseline
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.profile import ModuleProfile, Strategy
from megatron_dip.spec.workload import Microbatch
from tests.strategies import Case, cases, grid, module, profile, vlm_case


def run(name: str, case: Case, **options: object) -> BaselineResult:
    result = run_baseline(name, case.model, case.partition.num_ranks, case.microbatches, case.costs(), **options)  # type: ignore[arg-type]
    assert result is not None
    return result


def lm_case(num_layers: int, num_ranks: int, num_microbatches: int, activation: float = 10.0) -> Case:
    """A backbone alone: 10 ns forward and 20 ns backward a layer, free messages."""
    base = vlm_case(num_microbatches, num_ranks)
    model = ModelSpec(modules=[module("lm", num_layers, role="backbone")])
    costs = profile({"lm": ModuleProfile(num_layers=num_layers, layer=grid(10, 12, 8, activation), strategies={
        "none": Strategy(), "full": Strategy(extra_forward=1.0, activation=0.1),
    })})
    microbatches: list[Microbatch] = [{"lm": [1]}] * num_microbatches
    return Case(model=model, profile=costs, partition=base.partition, microbatches=microbatches)


@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 3), (2, 2), (4, 4), (4, 13)])
def test_1f1b_takes_its_closed_form(num_ranks: int, num_microbatches: int) -> None:
    result = run("1f1b", lm_case(num_ranks * 2, num_ranks, num_microbatches))
    stage = 2 * 30
    assert result.makespan_ns == (num_microbatches + num_ranks - 1) * stage
    # 1F1B holds at most P - r microbatches on rank r.
    assert result.peak_bytes == tuple(min(num_ranks - rank, num_microbatches) * 20 for rank in range(num_ranks))


@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaving_divides_the_ramp(chunks: int) -> None:
    num_ranks, num_microbatches = 4, 8
    result = run("interleaved", lm_case(16, num_ranks, num_microbatches), virtual_pipeline=chunks)
    stage = 16 // num_ranks * 30
    assert result.makespan_ns == num_microbatches * stage + (num_ranks - 1) * stage // chunks
    assert result.chunks == {"lm": [[16 // num_ranks // chunks] * num_ranks] * chunks}


def test_memory_makes_a_baseline_recompute_and_says_if_that_is_not_enough() -> None:
    case = lm_case(8, 4, 8)
    plain = run("1f1b", case)
    bounded = run_baseline("1f1b", case.model, 4, case.microbatches, case.costs(plain.peak_bytes[0] - 1))
    assert bounded is not None
    assert bounded.fits
    assert bounded.strategies == ("full", "none", "none", "none")
    assert bounded.makespan_ns > plain.makespan_ns
    hopeless = run_baseline("1f1b", case.model, 4, case.microbatches, case.costs(1))
    assert hopeless is not None
    assert not hopeless.fits
    blind = run_baseline("1f1b", case.model, 4, case.microbatches, case.costs(1), with_memory=False)
    assert blind is not None
    assert blind.makespan_ns == plain.makespan_ns


def test_optimus_runs_encoders_around_the_backbone() -> None:
    case = vlm_case(num_microbatches=6)
    result = run("optimus", case, virtual_pipeline=1)
    graph = result.schedule.graph
    for row in result.schedule.order:
        labels = "".join("VL"[graph.module[task]] for task in row)
        # Four of six microbatches have images; forwards and backwards of six pass the backbone.
        assert labels == "V" * 4 + "L" * 12 + "V" * 4


def test_three_phase_holds_whole_encoders_on_every_rank() -> None:
    assert run("three-phase", vlm_case(num_microbatches=6)).chunks["vit"] == [[4, 4]]


def test_nnscaler_levels_by_cost_where_megatron_levels_by_parameters() -> None:
    case = vlm_case(num_microbatches=8)
    assert run("nnscaler", case).makespan_ns < run("1f1b", case).makespan_ns


@settings(max_examples=40)
@given(case=cases())
def test_every_baseline_runs_each_task_once_in_a_possible_order(case: Case) -> None:
    work: dict[str, int] = {}
    num_tasks = 0
    for name in BASELINES:
        result = run_baseline(name, case.model, case.partition.num_ranks, case.microbatches, case.costs())
        if result is None:
            continue
        graph, schedule = result.schedule.graph, result.schedule
        assert sorted(int(task) for row in schedule.order for task in row) == list(range(graph.num_tasks))
        for rank, row in enumerate(schedule.order):
            assert (graph.rank[row] == rank).all()
            assert (np.diff(schedule.start_ns[row]) >= graph.duration_ns[row][:-1]).all()
        waiting = np.repeat(np.arange(graph.num_tasks), np.diff(graph.dep_offset))
        assert (schedule.start_ns[waiting] >= schedule.end_ns[graph.dep_task] + graph.dep_lag_ns).all()
        work[name] = int(graph.duration_ns.sum())
        num_tasks = max(num_tasks, graph.num_tasks)
    assert work
    # The same work everywhere, but for the rounding of stages: half a ns a task.
    assert max(work.values()) - min(work.values()) <= num_tasks


def test_unknown_baselines_are_refused() -> None:
    with pytest.raises(InputError, match="no such baseline"):
        run_baseline("gpipe", vlm_case().model, 2, [], vlm_case().costs())
