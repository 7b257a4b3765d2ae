"""Plans beside training: ahead of time, within a deadline, errors told, fallbacks counted and logged once for each cause."""

from __future__ import annotations

import itertools
import logging
import threading
import time
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


def wait_until_idle(service: PlanService[Any]) -> None:
    deadline = time.monotonic() + 30
    while service._unfinished:
        assert time.monotonic() < deadline
        time.sleep(0.001)


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
    assert "not ready in time (an iteration waits 0.01 s at most)" in caplog.text
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
    slow.has_begun.clear()
    slow.gate.set()
    assert slow.has_begun.wait(30)
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
    wait_until_idle(service)
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


def test_nobody_waits_for_a_plan_that_no_thread_has_begun() -> None:
    """The thread is held up at one batch: those behind it get quick plans at once, however long the deadline is."""
    slow = Planner("slow")
    slow.gate.clear()
    service = PlanService(slow, Planner("quick"))
    service.submit(BATCHES[0])
    assert slow.has_begun.wait(30)
    for batch in BATCHES[1:4]:
        service.submit(batch)
        assert service.take(batch, deadline_s=10_000.0)[0] == "quick"
    assert service.counts().fallbacks == {"late": 3}
    service.submit(BATCHES[4])
    slow.has_begun.clear()
    slow.gate.set()
    assert slow.has_begun.wait(30)
    assert service.take(BATCHES[4], deadline_s=30.0)[0] == "slow"
    service.close()


def test_nobody_waits_for_a_plan_that_will_not_be_ready_by_the_deadline() -> None:
    """The last one took long, and this one has just begun."""
    slow = Planner("slow")
    service = PlanService(slow, Planner("quick"))
    slow.gate.clear()
    threading.Timer(1.0, slow.gate.set).start()
    service.submit(BATCHES[0])
    assert service.take(BATCHES[0], deadline_s=30.0)[0] == "slow"
    slow.gate.clear()
    slow.has_begun.clear()
    service.submit(BATCHES[1])
    assert slow.has_begun.wait(30)
    before = service.counts().waited_ns
    assert service.take(BATCHES[1], deadline_s=0.5)[0] == "quick"
    assert service.counts().waited_ns - before < 0.4e9  # it would be 0.5 s
    slow.gate.set()
    service.close()


@pytest.mark.parametrize("ending", [SystemExit(1), KeyboardInterrupt()])
def test_a_plan_function_that_ends_its_thread_does_not_end_planning(ending: BaseException) -> None:
    def plan(microbatches: Sequence[Microbatch], forward_only: bool) -> str:
        if microbatches == BATCHES[1]:
            raise ending
        return "slow"

    service = PlanService(plan, lambda microbatches, forward_only: "quick")
    assert [service.take(batch, deadline_s=30.0) for batch in BATCHES[:3]] == ["slow", "quick", "slow"]
    assert service.counts().fallbacks == {"failed": 1}
    alone = PlanService(plan)
    with pytest.raises(RuntimeError, match="ended its thread"):
        alone.take(BATCHES[1])


def test_batches_that_come_otherwise_than_foreseen_are_counted_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    planner = Planner("slow")
    service = PlanService(planner)
    with caplog.at_level(logging.WARNING):
        for n in range(3):
            service.submit([{"lm": [100 + n]}])
            service.submit([{"lm": [100 + n]}], forward_only=True)
            service.take([{"lm": [104 + n]}])
            service.take([{"lm": [100 + n]}], forward_only=True)
    assert service.counts().foreseen_otherwise == 3
    assert [record.getMessage() for record in caplog.records if "otherwise" in record.getMessage()] == [
        "a batch came otherwise than its items read ahead said, so it is planned anew and training may wait for it (counted, not said again): "
        "microbatch 0: instances of 'lm' [100] were foreseen, [104] came. Instance lengths that are read from an item must be those that "
        "forward_step gives the model."
    ]


def test_a_batch_that_was_foreseen_or_not_handed_in_counts_as_neither() -> None:
    service = PlanService(Planner("slow"))
    service.take(BATCHES[0])
    service.submit(BATCHES[1])
    service.submit(BATCHES[2])
    service.take(BATCHES[1])
    service.take(BATCHES[2])
    service.take(BATCHES[3])
    assert service.counts().foreseen_otherwise == 0
def test_a_batch_that_nobody_foresaw_is_not_waited_for() -> None:
    started = threading.Event()

    def searched(microbatches: Sequence[Microbatch], forward_only: bool) -> str:
        started.wait(60)
        return "searched"

    service: PlanService[str] = PlanService(searched, lambda microbatches, forward_only: "quick")
    assert service.take([{"lm": [1]}], deadline_s=30, unseen_deadline_s=0.0) == "quick"
    assert service.counts().fallbacks == {"unseen": 1}
    service.submit([{"lm": [2]}])
    started.set()
    assert service.take([{"lm": [2]}], deadline_s=30, unseen_deadline_s=0.0) == "searched"
    assert service.counts().fallbacks == {"unseen": 1}
    service.close()


def test_what_is_waited_for_ends_its_search_and_is_taken_at_once() -> None:
    searching = threading.Event()

    def improve(microbatches: Sequence[Microbatch], forward_only: bool) -> str:
        for rounds in itertools.count():
            searching.set()
            if service.is_needed():
                return f"{len(microbatches[0]['vit'])} images, after {'no' if rounds == 0 else 'some'} rounds"
            time.sleep(0.001)
        raise AssertionError

    service: PlanService[str] = PlanService(improve, lambda *_: "quick")
    service.submit(BATCHES[3])
    service.submit(BATCHES[4])
    assert searching.wait(30)
    time.sleep(0.01)
    assert service.take(BATCHES[3], deadline_s=30.0) == "3 images, after some rounds"
    # The second is another request: it goes on until its own turn comes.
    assert not service.counts().fallbacks
    assert service.take(BATCHES[4], deadline_s=30.0).startswith("4 images")
    assert not service.is_needed(), "no thread of the service's"
    assert service.counts().fallbacks == {}
