"""Plans beside training: batches are handed in one iteration ahead, plans are taken when the iteration starts.

Background threads run the plan function, whose kernels release the GIL. :meth:`PlanService.take` never waits longer than its deadline: a
plan that is late, or a plan function that fails, is replaced by the quick function's plan for that batch, counted and logged once for
each cause. A user's mistake (InputError) is not covered up: it is raised where the plan is taken. The service knows batches and plans,
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
from dataclasses import dataclass

import msgspec

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.workload import Microbatch

PlanFunction = Callable[[Sequence[Microbatch], bool], Plan]
"""(microbatches of this replica, forward only) -> plan"""

LATE = "late"
FAILED = "failed"
KEPT_PLANS = 4

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Request:
    microbatches: Sequence[Microbatch]
    forward_only: bool
    done: threading.Event
    plan: Plan | None = None
    error: Exception | None = None
    handed_out: Plan | None = None
    """What was taken for this batch: a replay of the iteration gets the same, also where it was a quick plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCounts:
    taken: int
    """Plans handed out."""
    ahead: int
    """Of these: finished before they were asked for."""
    waited_ns: int
    """Time that training waited for plans, in all."""
    fallbacks: dict[str, int]
    """Cause (``late``, ``failed``) -> quick plans used instead."""


class PlanService:
    """
    Args:
        plan_function: makes a plan; runs on the background threads.
        quick_function: makes a plan at once, on the caller's thread, when the other is late or fails; None: the plan function alone,
            waited for as long as it takes.
        num_threads: batches planned side by side; one suffices to plan one iteration ahead.
    """

    def __init__(self, plan_function: PlanFunction, quick_function: PlanFunction | None = None, *, num_threads: int = 1) -> None:
        self._plan_function = plan_function
        self._quick_function = quick_function
        self._lock = threading.Lock()
        self._requests: OrderedDict[bytes, _Request] = OrderedDict()
        """By batch; those done are kept for a replay of the iteration, the oldest dropped first."""
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._fallbacks: Counter[str] = Counter()
        self._logged: set[str] = set()
        self._taken = self._ahead = self._waited_ns = 0
        self._closed = False
        # Daemons: a plan under way must not keep a finished or failed training process alive.
        self._threads = [threading.Thread(target=self._work, name=f"dip-planner-{i}", daemon=True) for i in range(num_threads)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def submit(self, microbatches: Sequence[Microbatch], *, forward_only: bool = False) -> None:
        """Starts planning a batch in the background, unless it is being planned already."""
        self._request(microbatches, forward_only)

    def take(self, microbatches: Sequence[Microbatch], *, forward_only: bool = False, deadline_s: float = 1.0) -> Plan:
        """The batch's plan, after at most ``deadline_s`` seconds (a batch that was not submitted is planned now, to the same deadline).

        Raises InputError where the batch or its setting cannot be planned, and the plan function's error where there is no quick one.
        """
        request = self._request(microbatches, forward_only)
        ahead = request.done.is_set()
        start = time.perf_counter_ns()
        if request.handed_out is None:
            request.done.wait(None if self._quick_function is None else deadline_s)
        plan, error = request.handed_out or request.plan, request.error
        if plan is None:
            if isinstance(error, InputError) or (error is not None and self._quick_function is None):
                raise error
            assert self._quick_function is not None
            self._count_fallback(FAILED if error is not None else LATE, error, deadline_s)
            plan = self._quick_function(microbatches, forward_only)
        request.handed_out = plan
        self._waited_ns += time.perf_counter_ns() - start
        self._taken += 1
        self._ahead += ahead
        return plan

    def counts(self) -> PlanCounts:
        return PlanCounts(taken=self._taken, ahead=self._ahead, waited_ns=self._waited_ns, fallbacks=dict(self._fallbacks))

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends the threads once they are through with the batch in hand, and waits for them up to ``timeout_s``: a thread that still
        plans while the interpreter is taken down can keep the process from ending. Called at the interpreter's exit, if not before."""
        self._closed = True
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        atexit.unregister(self.close)

    def _request(self, microbatches: Sequence[Microbatch], forward_only: bool) -> _Request:
        key = msgspec.json.encode((microbatches, forward_only), order="sorted")
        with self._lock:
            request = self._requests.get(key)
            if request is None:
                request = _Request(microbatches, forward_only, threading.Event())
                self._requests[key] = request
                self._queue.put(request)
                finished = [old for old, entry in self._requests.items() if entry.done.is_set()]
                for old in finished[: max(0, len(self._requests) - KEPT_PLANS)]:
                    del self._requests[old]
            else:
                self._requests.move_to_end(key)
            return request

    def _work(self) -> None:
        while (request := self._queue.get()) is not None and not self._closed:
            try:
                request.plan = self._plan_function(request.microbatches, request.forward_only)
            except Exception as error:
                request.error = error
            request.done.set()

    def _count_fallback(self, kind: str, error: Exception | None, deadline_s: float) -> None:
        cause = kind if error is None else f"{kind}: {type(error).__name__}: {error}"
        self._fallbacks[kind] += 1
        if cause in self._logged:
            return
        self._logged.add(cause)
        if error is None:
            logger.warning("a plan was not ready within %.3g s; a quick plan is used for that batch (counted, not said again)", deadline_s)
        else:
            logger.warning("planning failed; a quick plan is used for that batch (counted, not said again)", exc_info=error)
