"""Plans beside training: ahead of time, within a deadline, errors told, fallbacks counted and logged once for each cause."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_dip.planner.service import PlanService
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Microbatch

BATCHES: list[list[Microbatch]] = [[{"vit": [4] * n, "lm": [16]}] for n in range(8)]


class Planner:
    """Stands for a planner: its plans are labels. ``gate`` holds it up, ``error`` makes it fail."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.calls: list[tuple[Any, bool, str]] = []

    def __call__(self, microbatches: Sequence[Microbatch], forward_only: bool) -> Any:
        self.gate.wait(30)
        self.calls.append((microbatches, forward_only, threading.current_thread().name))
        if self.error is not None:
            raise self.error
        return (self.label, len(microbatches[0]["vit"]), forward_only)


def test_a_submitted_batch_is_planned_in_the_background_once() -> None:
    planner = Planner("slow")
    service = PlanService(planner)
    service.submit(BATCHES[1])
    service.submit(BATCHES[1])
    assert service.take(BATCHES[1]) == ("slow", 1, False)
    # The same iteration again, as the rerun state machine does it: no new planning.
    assert service.take([dict(microbatch) for microbatch in BATCHES[1]]) == ("slow", 1, False)
    assert len(planner.calls) == 1
    assert planner.calls[0][2] == "dip-planner-0"
    assert service.counts().taken == 2
    assert service.counts().ahead >= 1


def test_evaluation_of_the_same_batch_is_another_plan() -> None:
    service = PlanService(Planner("slow"))
    assert service.take(BATCHES[2]) == ("slow", 2, False)
    assert service.take(BATCHES[2], forward_only=True) == ("slow", 2, True)


def test_a_late_plan_is_replaced_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    slow, quick = Planner("slow"), Planner("quick")
    slow.gate.clear()
    service = PlanService(slow, quick)
    with caplog.at_level(logging.WARNING):
        for batch in BATCHES[:3]:
            service.submit(batch)
            assert service.take(batch, deadline_s=0.01)[0] == "quick"  # type: ignore[index]
    assert service.counts().fallbacks == {"late": 3}
    assert len(caplog.records) == 1
    assert "not ready within 0.01 s" in caplog.text
    slow.gate.set()


def test_a_replayed_iteration_gets_the_quick_plan_that_it_ran_with() -> None:
    slow, quick = Planner("slow"), Planner("quick")
    slow.gate.clear()
    service = PlanService(slow, quick)
    assert service.take(BATCHES[0], deadline_s=0.01)[0] == "quick"  # type: ignore[index]
    slow.gate.set()
    assert service.take(BATCHES[1], deadline_s=30.0)[0] == "slow"  # type: ignore[index]
    assert service.take(BATCHES[0], deadline_s=30.0)[0] == "quick"  # type: ignore[index]
    assert len(quick.calls) == 1


def test_a_failing_planner_is_replaced_and_its_error_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    slow, quick = Planner("slow"), Planner("quick")
    slow.error = RuntimeError("no schedule today")
    service = PlanService(slow, quick)
    with caplog.at_level(logging.WARNING):
        for batch in BATCHES[:3]:
            assert service.take(batch)[0] == "quick"  # type: ignore[index]
    assert service.counts().fallbacks == {"failed": 3}
    assert len(caplog.records) == 1
    assert "no schedule today" in caplog.text
    slow.error = None
    assert service.take(BATCHES[5])[0] == "slow"  # type: ignore[index]


def test_a_users_mistake_is_raised_and_not_covered_up() -> None:
    slow, quick = Planner("slow"), Planner("quick")
    slow.error = InputError("memory_capacity_bytes", 5, "does not hold one microbatch", "use more ranks")
    service = PlanService(slow, quick)
    service.submit(BATCHES[0])
    with pytest.raises(InputError, match="memory_capacity_bytes"):
        service.take(BATCHES[0])
    assert quick.calls == []


def test_without_a_quick_planner_take_waits_and_raises_what_planning_raised() -> None:
    slow = Planner("slow")
    slow.gate.clear()
    service = PlanService(slow)
    service.submit(BATCHES[0])
    threading.Timer(0.1, slow.gate.set).start()
    assert service.take(BATCHES[0], deadline_s=0.0)[0] == "slow"  # type: ignore[index]
    slow.error = RuntimeError("no schedule today")
    with pytest.raises(RuntimeError, match="no schedule today"):
        service.take(BATCHES[1])


def test_old_plans_are_dropped() -> None:
    planner = Planner("slow")
    service = PlanService(planner)
    for batch in BATCHES:
        service.take(batch)
    service.take(BATCHES[0])
    assert len(planner.calls) == len(BATCHES) + 1


def test_closing_ends_the_threads_and_leaves_what_waits_unplanned() -> None:
    planner = Planner("slow")
    planner.gate.clear()
    service = PlanService(planner, num_threads=1)
    for batch in BATCHES:
        service.submit(batch)
    threading.Timer(0.1, planner.gate.set).start()
    service.close()
    assert not any(thread.is_alive() for thread in service._threads)
    assert len(planner.calls) <= 1
