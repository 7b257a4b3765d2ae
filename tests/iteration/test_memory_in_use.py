"""What ranks hold above their plans is said once and kept free in later ones; a limit that follows the device falls with it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_dip.iteration import memory_in_use
from megatron_dip.iteration.memory_in_use import (
    COMPARED_EVERY,
    COMPARED_FIRST,
    LEARNED_BEHIND,
    MemoryFigures,
    MemoryInUse,
    device_memory,
    memory_words,
    stage_bytes,
)
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from tests.strategies import vlm_case

CPU = torch.device("cpu")


@pytest.fixture
def groups() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(rank=0, num_ranks=1, control_ranks=(0,), control=dist.group.WORLD)
    dist.destroy_process_group()


def iterate(memory: MemoryInUse, held: int, *, peak: int, initial: int = 100) -> list[torch.Tensor]:
    """An iteration whose stages keep ``held`` bytes under a plan of ``peak``."""
    assert memory.meter is not None
    memory.begin([])
    kept = [torch.zeros(held, dtype=torch.uint8)]
    memory.meter.add(kept[0])
    plan: Any = SimpleNamespace(peak_memory=[peak], memory_initial=[initial])
    memory.end(plan)
    memory.after_iteration()
    return kept


def test_what_is_above_the_plan_is_kept_free_from_then_on(groups: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    forgotten: list[int] = []
    memory = MemoryInUse(groups, CPU, lambda: forgotten.append(1))
    iterate(memory, 400, peak=600)
    assert memory.figures == MemoryFigures(planned=600, measured=500)
    assert memory.reserved == (0,)
    assert not forgotten
    iterate(memory, 550, peak=600)
    assert memory.reserved == (50,)
    assert len(forgotten) == 1
    # The next plan keeps that free, which is no figure of the costs'.
    iterate(memory, 540, peak=640, initial=150)
    assert memory.figures == MemoryFigures(planned=590, measured=640)
    assert memory.reserved == (50,)
    iterate(memory, 600, peak=640, initial=150)
    assert memory.reserved == (110,)
    assert len([record for record in caplog.records if "later plans keep" in record.message]) == 1
    assert "(rank 0)" in memory_words(memory)


def test_ranks_tell_each_other_now_and_then(groups: Any) -> None:
    memory = MemoryInUse(groups, CPU, lambda: None)
    for number in range(1, COMPARED_EVERY + 1):
        iterate(memory, 10, peak=200 + number)
        seen = number if number <= COMPARED_FIRST else COMPARED_FIRST if number < COMPARED_EVERY else number
        assert memory.of_ranks == [MemoryFigures(200 + seen, 110)]


def test_a_limit_that_follows_the_device_falls_with_it(groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    has = iter([1000, 1000, 700, 800])
    monkeypatch.setattr(memory_in_use, "device_memory", lambda device: next(has))
    memory = MemoryInUse(groups, CPU, lambda: None, follows_device=True)
    reserved = []
    for _ in range(3):
        iterate(memory, 10, peak=200)
        reserved.append(memory.reserved[0])
    assert reserved == [0, 300, 300]


def test_the_device_has_what_others_and_unused_blocks_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"memory_reserved": 300, "max_memory_reserved": 500, "max_memory_allocated": 400}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device=None, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (600, 1000))
    assert device_memory(torch.device("cuda", 0)) == 600 + 300 - 100
    assert device_memory(CPU) > 0


def test_activations_are_scaled_by_what_stages_keep(groups: Any) -> None:
    case = vlm_case()
    costs = case.costs()
    memory = MemoryInUse(groups, CPU, lambda: None)
    expected = memory.expected = stage_bytes(costs, case.model, case.partition)
    plan = plan_iteration(case.model, case.partition, case.microbatches, costs, PlanOptions(evaluations=5))
    forwards = [stage for stage in plan.stages if stage.kind == "fw" and set(stage.strategy) == {"none"}]
    # Under a profile a forward takes what it keeps, and no more.
    assert [expected(stage) for stage in forwards] == [pytest.approx(stage.mem_delta_start, abs=1) for stage in forwards]
    kept = {stage.id: round({"vit": 1.5, "lm": 0.75}[stage.module] * stage.mem_delta_start) for stage in forwards}
    for _ in range(LEARNED_BEHIND):
        assert memory.costs(costs) is costs
        memory.begin([])
        memory.end(plan, kept)
        memory.after_iteration()
    assert memory.scales == {"vit": pytest.approx(1.5, rel=0.02), "lm": pytest.approx(0.75, rel=0.02)}
    scaled = memory.costs(costs)
    given, found = costs.part("vit", "layer", [10]), scaled.part("vit", "layer", [10])
    assert found.activation_bytes == pytest.approx(memory.scales["vit"] * given.activation_bytes)
    assert found.forward_ns == given.forward_ns
    # A recomputed layer keeps its input, as before.
    for label, strategy in costs.strategies("vit", [10]).items():
        if strategy.activation < 1:
            again = scaled.strategies("vit", [10])[label].activation * found.activation_bytes
            assert again == pytest.approx(strategy.activation * given.activation_bytes)
