"""Plans beside training: ahead of time, within a deadline, errors told, fallbacks counted and logged once for each cause."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from megatron_dip.planner.service import MAX_WAITING, PlanService
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Microbatch

BATCHES: list[list[Microbatch]] = [[{"vit": [4] * n, "lm": [16]}] for n in range(8)]


class Planner:
    """Stands for a planner: its plans are labels. ``gate`` holds it up, ``error`` makes it fail."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.gate = threading.Event()
        self.gate.set()
        self.has_begun = threading.Event()
        self.error: Exception | None = None
        self.calls: list[tuple[Any, bool, str]] = []

    def __call__(self, microbatches: Sequence[Microbatch], forward_only: bool) -> Any:
        self.has_begun.set()
        self.gate.wait(30)
        self.calls.append((microbatches, forward_only, threading.current_thread().name))
        if self.error is not None:
            raise self.error
        return (self.label, len(microbatches[0].get("vit", [])), forward_only)


def test_a_submitted_batch_is_planned_in_the_background_once() -> None:
    planner = Planner("slow")
    service = PlanService(planner)
    service.submit(BATCHES[1])
    service.submit(BATCHES[1])
    assert service.take(BATCHES[1]) == ("slow", 1, False)
    # The same metadata again: no new planning.
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
            assert service.take(batch, deadline_s=0.01)[0] == "quick"
    assert service.counts().fallbacks == {"late": 3}
    assert len(caplog.records) == 1
    assert "not ready within 0.01 s" in caplog.text
    slow.gate.set()


def test_one_late_plan_does_not_make_the_next_ones_late() -> None:
    slow, quick = Planner("slow"), Planner("quick")
    slow.gate.clear()
    service = PlanService(slow, quick)
    service.submit(BATCHES[0])
    assert slow.has_begun.wait(30)
    for batch in BATCHES[:4]:
        service.submit(batch)
        assert service.take(batch, deadline_s=0.01)[0] == "quick"
    service.submit(BATCHES[4])
    slow.gate.set()
    assert service.take(BATCHES[4], deadline_s=30.0)[0] == "slow"
    # What had begun was finished; what nobody waited for any more was not begun.
    assert [len(microbatches[0]["vit"]) for microbatches, _, _ in slow.calls] == [0, 4]


def test_a_batch_that_comes_again_gets_the_plan_that_was_late_the_first_time() -> None:
    slow, quick = Planner("slow"), Planner("quick")
    slow.gate.clear()
    service = PlanService(slow, quick)
    service.submit(BATCHES[0])
    assert slow.has_begun.wait(30)
    assert service.take(BATCHES[0], deadline_s=0.01)[0] == "quick"
    service.submit(BATCHES[0])
    slow.gate.set()
    assert service.take(BATCHES[0], deadline_s=30.0)[0] == "slow"
    assert service.take(BATCHES[0], deadline_s=30.0)[0] == "slow"
    assert (len(slow.calls), len(quick.calls)) == (1, 1)


def test_new_costs_leave_no_old_plan_for_batches_to_come() -> None:
    planner = Planner("old costs")
    planner.gate.clear()
    service = PlanService(planner)
    service.submit(BATCHES[0])
    assert planner.has_begun.wait(30)
    service.forget()
    planner.gate.set()
    assert service.take(BATCHES[0])[0] == "old costs"  # begun before: used once, not kept
    planner.label = "new costs"
    assert service.take(BATCHES[0])[0] == "new costs"
    service.forget()
    planner.label = "newest costs"
    assert service.take(BATCHES[0])[0] == "newest costs"


def test_batches_that_never_come_are_given_up() -> None:
    planner = Planner("slow")
    planner.gate.clear()
    service = PlanService(planner)
    service.submit([{"lm": [1]}], forward_only=True)
    assert planner.has_begun.wait(30)
    foreseen: list[list[Microbatch]] = [[{"vit": [n], "lm": [16]}] for n in range(MAX_WAITING + 3)]
    for batch in foreseen:
        service.submit(batch)
    planner.gate.set()
    planner.calls.clear()
    service.take(foreseen[-1])
    assert [microbatches for microbatches, forward_only, _ in planner.calls if not forward_only] == foreseen[3:]


def test_batches_that_cannot_be_seen_ahead_are_counted_and_their_type_told_once(caplog: pytest.LogCaptureFixture) -> None:
    service = PlanService(Planner("slow"))
    with caplog.at_level(logging.WARNING):
        for key in ("images", "tokens"):
            service.count_unseen({"text": ""}, KeyError(key))
    assert service.counts().unseen == 2
    assert len(caplog.records) == 1
    assert "items (dict) cannot be read ahead" in caplog.text


def test_a_failing_planner_is_replaced_and_its_error_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    slow, quick = Planner("slow"), Planner("quick")
    slow.error = RuntimeError("no schedule today")
    service = PlanService(slow, quick)
    with caplog.at_level(logging.WARNING):
        for batch in BATCHES[:3]:
            assert service.take(batch)[0] == "quick"
    assert service.counts().fallbacks == {"failed": 3}
    assert len(caplog.records) == 1
    assert "no schedule today" in caplog.text
    slow.error = None
    assert service.take(BATCHES[5])[0] == "slow"


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
    assert service.take(BATCHES[0], deadline_s=0.0)[0] == "slow"
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
