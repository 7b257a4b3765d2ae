"""Plans beside training: batches are handed in one iteration ahead, plans are taken when the iteration starts.

Background threads run the plan function, whose kernels release the GIL. :meth:`PlanService.take` never waits longer than its deadline, and
not at all for a plan that no thread has begun or that will not be ready by then: a plan that is late, or a plan function that fails, is
replaced by the quick function's plan for that batch, counted and logged once for each cause. A user's mistake (InputError) is not covered up: it is raised where the plan is taken. The service knows batches and plans,
no processes: who plans and how a plan reaches the other ranks is the caller's business.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from megatron_dip.planner.courtesy import switch_often
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Microbatch

P = TypeVar("P")
"""What the service hands out: plans, perhaps packed for sending."""

LATE = "late"
FAILED = "failed"
UNSEEN = "unseen"
KEPT_PLANS = 4
MAX_WAITING = 8
"""Batches handed in and not taken, unless more are foreseen; beyond these the oldest is given up: its iteration will not come as foreseen."""

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Request(Generic[P]):
    key: bytes
    microbatches: Sequence[Microbatch]
    forward_only: bool
    done: threading.Event = field(default_factory=threading.Event)
    is_given_up: bool = False
    """Nobody waits for it any more."""
    is_needed: bool = False
    """Training waits for it."""
    thread: int | None = None
    """That has it in hand."""
    begun_s: float | None = None
    """When a thread took it up, by ``time.perf_counter``."""
    plan: P | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCounts:
    taken: int
    """Plans handed out."""
    ahead: int
    """Of these: finished before they were asked for."""
    waited_ns: int
    """Time that training waited for plans, in all."""
    fallbacks: dict[str, int]
    """Cause (``late``, ``failed``, ``unseen``) -> quick plans used instead."""
    unseen: int
    """Batches whose metadata could not be read ahead, so that planning them began when they were needed."""
    foreseen_otherwise: int
    """Batches that came with other metadata than were read ahead, so that they were planned twice."""
    kept: int
    """Finished plans that are kept, for batches that come again."""
    waiting: int
    """Batches handed in and not taken yet."""


class PlanService(Generic[P]):
    """
    Args:
        plan_function: (microbatches of this replica, forward only) -> plan; runs on the background threads.
        quick_function: makes a plan at once, on the caller's thread, when the other is late or fails; None: the plan function alone,
            waited for as long as it takes.
        num_threads: batches planned side by side; one suffices to plan one iteration ahead.
        max_waiting: batches handed in and not taken before the oldest is given up.

    Shortens the interpreter's switch interval, so that training gets its lock back soon from threads that plan.

    Every plan is taken once: a caller that runs an iteration again must keep its plan. Batches of equal metadata share a finished plan,
    but never a quick one.
    """

    def __init__(
        self,
        plan_function: Callable[[Sequence[Microbatch], bool], P],
        quick_function: Callable[[Sequence[Microbatch], bool], P] | None = None,
        *,
        num_threads: int = 1,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._max_waiting = max_waiting
        self._plan_function = plan_function
        self._quick_function = quick_function
        self._lock = threading.Lock()
        self._waiting: OrderedDict[bytes, _Request[P]] = OrderedDict()
        """Handed in and not taken, oldest first."""
        self._unfinished: list[_Request[P]] = []
        """Waiting for a thread, or planned by one; in the order in which threads take them up."""
        self._planning_s: float | None = None
        """How long the last plan took."""
        self._plans: OrderedDict[bytes, P] = OrderedDict()
        """The last finished plans."""
        self._age = 0
        """How often costs have changed."""
        self._queue: queue.SimpleQueue[_Request[P] | None] = queue.SimpleQueue()
        self._fallbacks: Counter[str] = Counter()
        self._logged: set[str] = set()
        self._taken = self._ahead = self._waited_ns = self._unseen = self._foreseen_otherwise = 0
        self._closed = False
        switch_often()
        # Daemons: a plan under way must not keep a finished or failed training process alive.
        self._threads = [threading.Thread(target=self._work, name=f"dip-planner-{i}", daemon=True) for i in range(num_threads)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def submit(self, microbatches: Sequence[Microbatch], *, forward_only: bool = False) -> None:
        """Starts planning a batch in the background, unless it is being planned already."""
        with self._lock:
            self._request(microbatches, forward_only)

    def plan(self, microbatches: Sequence[Microbatch]) -> P:
        """Plans a training batch at once, on the caller's thread, and keeps the plan for when the batch is handed in. Raises what the plan
        function raises."""
        key = _key(microbatches, False)
        with self._lock:
            known, age = self._plans.get(key), self._age
        if known is not None:
            return known
        plan = self._plan_function(microbatches, False)
        self._keep(key, plan, age)
        return plan

    def take(
        self, microbatches: Sequence[Microbatch], *, forward_only: bool = False, deadline_s: float = 1.0, unseen_deadline_s: float | None = None
    ) -> P:
        """The batch's plan, after at most ``deadline_s`` seconds; a batch that was not submitted is planned now, to ``unseen_deadline_s``
        (None: to the same deadline). A quick plan then stands for it, which is no failure and no warning.

        Raises InputError where the batch or its setting cannot be planned, and the plan function's error where there is no quick one.
        """
        with self._lock:
            self._drop_other_foresight(microbatches, forward_only)
            waiting = len(self._waiting)
            request = self._request(microbatches, forward_only)
            was_submitted = len(self._waiting) == waiting or request.done.is_set()
            del self._waiting[request.key]
            if not was_submitted and unseen_deadline_s is not None:
                deadline_s = unseen_deadline_s
            is_worth_waiting = self._is_worth_waiting(request, deadline_s)
        ahead = request.done.is_set()
        request.is_needed = was_submitted  # one that nobody foresaw is searched for as long as it may
        start = time.perf_counter_ns()
        if self._quick_function is None:
            request.done.wait()
        elif is_worth_waiting:
            request.done.wait(deadline_s)
        # A thread that has not begun it goes on with the batches to come, else one late plan would make all that follow late.
        request.is_given_up = True
        plan, error = request.plan, request.error
        if plan is None:
            if isinstance(error, InputError):
                raise error
            if error is not None and self._quick_function is None:
                raise error if isinstance(error, Exception) else RuntimeError(f"the plan function ended its thread: {error!r}") from error
            assert self._quick_function is not None
            if error is None and not was_submitted and unseen_deadline_s is not None:
                self._fallbacks[UNSEEN] += 1
            else:
                self._count_fallback(FAILED if error is not None else LATE, error, deadline_s)
            plan = self._quick_function(microbatches, forward_only)
        self._waited_ns += time.perf_counter_ns() - start
        self._taken += 1
        self._ahead += ahead
        return plan

    def forget(self) -> None:
        """Keeps no plan made so far for batches to come: costs have changed. Batches already handed in still get theirs."""
        with self._lock:
            self._age += 1
            self._plans.clear()

    def count_unseen(self, item: object, error: Exception) -> None:
        """Counts a batch that could not be handed in ahead, since its items cannot be read; said once for each type of item."""
        self._unseen += 1
        cause = f"unseen: {type(item)}: {type(error)}"
        if cause not in self._logged:
            self._logged.add(cause)
            logger.warning(
                "the data iterator's items (%s) cannot be read ahead, so planning a batch begins when it is needed (counted, not said again): "
                "%s: %s", type(item).__qualname__, type(error).__name__, error,
            )

    def is_needed(self) -> bool:
        """For plan functions: whether training waits for the plan that the calling thread makes, or has given it up."""
        me = threading.get_ident()
        return any(request.thread == me and (request.is_needed or request.is_given_up) for request in tuple(self._unfinished))

    def counts(self) -> PlanCounts:
        return PlanCounts(
            taken=self._taken, ahead=self._ahead, waited_ns=self._waited_ns, fallbacks=dict(self._fallbacks), unseen=self._unseen,
            foreseen_otherwise=self._foreseen_otherwise, kept=len(self._plans), waiting=len(self._waiting),
        )

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the threads once they are through with the batch in hand, and waits for them up to ``timeout_s``: a thread that still
        plans while the interpreter is taken down can keep the process from ending. Called at the interpreter's exit, if not before."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        atexit.unregister(self.close)

    def _request(self, microbatches: Sequence[Microbatch], forward_only: bool) -> _Request[P]:
        key = _key(microbatches, forward_only)
        request = self._waiting.get(key)
        if request is None:
            request = self._waiting[key] = _Request(key, microbatches, forward_only)
            request.plan = self._plans.get(key)
            if request.plan is None:
                self._unfinished.append(request)
                self._queue.put(request)
            else:
                request.done.set()
            if len(self._waiting) > self._max_waiting:
                self._waiting.popitem(last=False)[1].is_given_up = True
        return request

    def _drop_other_foresight(self, microbatches: Sequence[Microbatch], forward_only: bool) -> None:
        """Counts a batch that was foreseen otherwise than it came, says so once, and gives up the plan of what will not come."""
        if _key(microbatches, forward_only) in self._waiting:
            return
        foreseen = next((request for request in self._waiting.values() if request.forward_only == forward_only), None)
        if foreseen is None:
            return
        del self._waiting[foreseen.key]
        foreseen.is_given_up = True
        self._foreseen_otherwise += 1
        if "foreseen otherwise" not in self._logged:
            self._logged.add("foreseen otherwise")
            logger.warning(
                "a batch came otherwise than its items read ahead said, so it is planned anew and training may wait for it (counted, not said "
                "again): %s. Instance lengths that are read from an item must be those that forward_step gives the model.",
                _difference(foreseen.microbatches, microbatches),
            )

    def _is_worth_waiting(self, request: _Request[P], deadline_s: float) -> bool:
        """Whether the plan can be there by the deadline: a thread will take it up at once, or has it in hand and needs no longer than for the last."""
        if request.begun_s is None:
            before = self._unfinished[: self._unfinished.index(request)] if request in self._unfinished else []
            ahead = sum(other.begun_s is not None or not other.is_given_up for other in before)
            return ahead < len(self._threads)
        return self._planning_s is None or self._planning_s - (time.perf_counter() - request.begun_s) <= deadline_s

    def _work(self) -> None:
        while (request := self._queue.get()) is not None and not self._closed:
            with self._lock:
                plan, age = self._plans.get(request.key), self._age
                if request.is_given_up:
                    self._unfinished.remove(request)
                    continue
                request.begun_s, request.thread = time.perf_counter(), threading.get_ident()
            try:
                request.plan = self._plan_function(request.microbatches, request.forward_only) if plan is None else plan
            except BaseException as error:  # a thread that ends would leave all batches to come without a plan
                request.error = error
            else:
                self._keep(request.key, request.plan, age)
            with self._lock:
                self._unfinished.remove(request)
                if plan is None:
                    self._planning_s = time.perf_counter() - request.begun_s
            request.done.set()

    def _keep(self, key: bytes, plan: P, age: int) -> None:
        with self._lock:
            if age == self._age:
                self._plans[key] = plan
                self._plans.move_to_end(key)
                if len(self._plans) > KEPT_PLANS:
                    self._plans.popitem(last=False)

    def _count_fallback(self, kind: str, error: BaseException | None, deadline_s: float) -> None:
        cause = kind if error is None else f"{kind}: {type(error).__name__}: {error}"
        self._fallbacks[kind] += 1
        if cause in self._logged:
            return
        self._logged.add(cause)
        if error is None:
            logger.warning("a plan was not ready in time (an iteration waits %.3g s at most); a quick plan is used for that batch (counted, not said again)", deadline_s)
        else:
            logger.warning("planning failed; a quick plan is used for that batch (counted, not said again)", exc_info=error)


def _key(microbatches: Sequence[Microbatch], forward_only: bool) -> bytes:
    return msgspec.json.encode((microbatches, forward_only), order="sorted")


def _difference(foreseen: Sequence[Microbatch], came: Sequence[Microbatch]) -> str:
    if len(foreseen) != len(came):
        return f"{len(foreseen)} microbatches were foreseen, {len(came)} came"
    index = next(i for i, (said, given) in enumerate(zip(foreseen, came, strict=True)) if dict(said) != dict(given))
    name = next(n for n in sorted({*foreseen[index], *came[index]}) if foreseen[index].get(n) != came[index].get(n))
    said, given = foreseen[index].get(name), came[index].get(name)
    return f"microbatch {index}: instances of {name!r} {str(said)[:100]} were foreseen, {str(given)[:100]} came"
