"""One search on all ranks of a replica: every rank with spare cores searches with other random numbers, and the best order wins.

In: on the planner rank's background thread, a problem to search. Out: there, the best result of all ranks. The other ranks have a thread
of their own that waits for problems. All of it goes over a gloo group of its own, beside training, across hosts as well:

1. the planner rank broadcasts the problem's arrays;
2. all search: by the clock until the planner rank says that its own search has ended, or each as many evaluations as it was asked for
   (then equal seeds give equal results);
3. ranks gather their makespans; the one with the least, of equal ones the lowest, broadcasts its orders and choice, if it is not the
   planner rank, which then goes on to lower and check them as its own.

Where another rank fails or does not answer, the planner rank keeps what it found itself and searches alone from then on.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import msgspec
import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_dip.planner.courtesy import switch_often
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.interleave import NEVER
from megatron_dip.schedule.result import time_order
from megatron_dip.schedule.rooms import Rooms
from megatron_dip.schedule.search import SearchOptions, SearchResult, Seed, search
from megatron_dip.schedule.space import Priorities
from megatron_dip.schedule.warm import load_kernels
from megatron_dip.spec.tasks import TaskGraph

logger = logging.getLogger(__name__)

_NO_LIMIT = datetime.timedelta(days=365)
"""For the group: the other ranks wait for problems as long as training does something else. The planner rank has limits of its own."""
_ANSWER_S = 5.0
"""How much longer than its own search the planner rank waits for the others, where plans are searched by the clock."""
_POLL_S = 0.0005
_SEEDS_APART = 0x9E3779B1


SearchRanks = Literal["auto", "all", "one"]
"""Which ranks of a replica search: ``auto`` is all of them where each has two cores or more for itself, else the planner rank alone."""


class SearchEnded(Exception):
    """Another rank does not answer."""


@dataclass(frozen=True, slots=True)
class SharedSearchFigures:
    ranks: int
    """That search, the planner rank among them"""
    searches: int
    """Shared so far"""
    won_elsewhere: int
    """Of these: won by another rank's result"""


class _Header(msgspec.Struct):
    """What is told of a problem before its arrays; empty lists: there are none to come, the thread ends."""

    num_ranks: int
    graph: list[tuple[str, str, list[int]]]
    """Field of the task graph, dtype, shape"""
    problem: list[tuple[str, str, list[int]]]
    others: list[tuple[str, str, list[int]]]
    """limit, and of a seed: order, order_offset, choice, forward and backward priorities"""
    bound_ns: int
    method: str
    time_budget_s: float | None
    evaluations: int | None
    threads: int
    seed: int


_NO_PROBLEM = _Header(0, [], [], [], 0, "", None, None, 0, 0)


class SharedSearch:
    """One for each rank of a replica; making it is collective over all ranks of the job.

    Args:
        threads: that search on this rank, where it is not the planner rank.
        timeout_s: how long the planner rank waits for the others' results where evaluations are counted.
    """

    def __init__(self, groups: PipelineGroups, threads: int, timeout_s: float) -> None:
        every: list[tuple[int, ...]] = [groups.control_ranks] * dist.get_world_size()
        dist.all_gather_object(every, groups.control_ranks)
        for members in dict.fromkeys(every):
            group = dist.new_group(list(members), timeout=_NO_LIMIT, backend="gloo")
            if members == groups.control_ranks:
                self._group = group
        self._ranks = groups.control_ranks
        self._place = self._ranks.index(dist.get_rank())
        self._timeout_s = timeout_s
        self._threads = threads
        self._searches = self._won_elsewhere = 0
        self._is_alone = len(self._ranks) == 1
        self._lock = threading.Lock()
        """One search at a time on the group."""
        self._ready: dist.Work | None = None
        """On the planner rank: over when all others have loaded the kernels."""
        if self._place == 0:
            self._ready = dist.barrier(group=self._group, async_op=True)
            atexit.register(self.close)
        elif not self._is_alone:
            switch_often()
            threading.Thread(target=self._serve, name="dip-search", daemon=True).start()

    def figures(self) -> SharedSearchFigures:
        return SharedSearchFigures(len(self._ranks), self._searches, self._won_elsewhere)

    def __call__(
        self, problem: StageProblem, limit: NDArray[np.int64], options: SearchOptions, bound_ns: int = 0, seed: Seed | None = None
    ) -> SearchResult:
        """On the planner rank: as :func:`megatron_dip.schedule.search.search`, and never worse."""
        is_not_ready = options.evaluations is None and self._ready is not None and not self._ready.is_completed()
        if self._is_alone or is_not_ready or not self._lock.acquire(blocking=False):
            return search(problem, limit, options, bound_ns, seed)
        try:
            return self._share(problem, limit, options, bound_ns, seed)
        finally:
            self._lock.release()

    def close(self) -> None:
        """Ends the other ranks' threads; on the planner rank, which alone may call it."""
        if self._place == 0 and not self._is_alone:
            self._is_alone = True
            with contextlib.suppress(RuntimeError, SearchEnded):  # they may have gone before
                _tell(self._group, self._ranks[0], _NO_PROBLEM, [], self._finish(time.monotonic() + _ANSWER_S))

    def _share(
        self, problem: StageProblem, limit: NDArray[np.int64], options: SearchOptions, bound_ns: int, seed: Seed | None
    ) -> SearchResult:
        by_clock = options.evaluations is None
        finish = self._finish(time.monotonic() + self._timeout_s)
        own: SearchResult | Exception | None = None
        try:
            assert self._ready is not None, "only the planner rank hands out problems"
            finish(self._ready)
            header, arrays = _packed(problem, limit, options, bound_ns, seed)
            _tell(self._group, self._ranks[0], header, arrays, finish)
            own = _tried(problem, limit, options, bound_ns, seed)
            if by_clock:
                finish = self._finish(time.monotonic() + _ANSWER_S)
            finish(dist.broadcast(torch.zeros(1, dtype=torch.uint8), self._ranks[0], group=self._group, async_op=True))
            winner = self._contest(own, finish)
            self._searches += 1
            if winner and isinstance(own, SearchResult):
                self._won_elsewhere += 1
                own = _with(own, problem, self._result(None, winner, finish))
        except (RuntimeError, SearchEnded) as failure:
            self._is_alone = True
            logger.warning("ranks no longer search together, since one of them does not answer; the planner rank searches alone: %s", failure)
            if own is None:
                return search(problem, limit, options, bound_ns, seed)
        if isinstance(own, Exception):
            raise own
        return own

    def _serve(self) -> None:
        """The other ranks' thread: searches what the planner rank hands out, until it ends."""
        wait = _wait
        load_kernels()
        wait(dist.barrier(group=self._group, async_op=True))
        while True:
            try:
                header, arrays = _hear(self._group, self._ranks[0], wait)
                if not header.graph:
                    return
                problem, limit, seed = _unpacked(header, arrays)
                is_over = dist.broadcast(torch.zeros(1, dtype=torch.uint8), self._ranks[0], group=self._group, async_op=True)
                by_clock = header.evaluations is None
                options = SearchOptions(
                    method=header.method, time_budget_s=header.time_budget_s, evaluations=header.evaluations,  # type: ignore[arg-type]
                    # As many threads as the planner rank has where results must repeat.
                    threads=self._threads if by_clock else header.threads, seed=(header.seed + self._place * _SEEDS_APART) % (1 << 32),
                    is_needed=is_over.is_completed if by_clock else None,
                )
                own = _tried(problem, limit, options, header.bound_ns, seed)
                wait(is_over)
                winner = self._contest(own, wait)
                if winner:
                    self._result(own, winner, wait)
            except RuntimeError as failure:  # the planner rank or another one has gone, with training or before it
                logger.debug("the thread that searches with other ranks ends: %s", failure)
                return

    def _contest(self, own: SearchResult | Exception, finish: Callable[[dist.Work], None]) -> int:
        """The place of the rank with the best result; the planner rank's where it has none, since what it cannot fit nobody can."""
        makespan_ns = own.schedule.makespan_ns if isinstance(own, SearchResult) else -1 if self._place == 0 else int(NEVER)
        rows = [torch.zeros(1, dtype=torch.int64) for _ in self._ranks]
        finish(dist.all_gather(rows, torch.tensor([makespan_ns]), group=self._group, async_op=True))
        return min(range(len(rows)), key=lambda place: (int(rows[place]), place))

    def _result(
        self, own: SearchResult | Exception | None, winner: int, finish: Callable[[dist.Work], None]
    ) -> list[NDArray[np.int32]]:
        """The winner's orders (one after another), choice, forward and backward priorities."""
        sizes = torch.zeros(5, dtype=torch.int64)
        parts: list[NDArray[np.int32]] = []
        if isinstance(own, SearchResult) and self._place == winner:
            orders = [order.astype(np.int32) for order in own.schedule.order]
            parts = [np.array(list(map(len, orders)), np.int32), np.concatenate(orders), own.choice, own.priorities.forward, own.priorities.backward]
            sizes = torch.tensor([len(part) for part in parts])
        finish(dist.broadcast(sizes, self._ranks[winner], group=self._group, async_op=True))
        flat = torch.zeros(int(sizes.sum()), dtype=torch.int32)
        if parts:
            flat = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        finish(dist.broadcast(flat, self._ranks[winner], group=self._group, async_op=True))
        return np.split(flat.numpy(), np.cumsum(sizes.numpy())[:-1])

    def _finish(self, deadline: float) -> Callable[[dist.Work], None]:
        """Waits for a collective until then; never longer, whatever other ranks do."""

        def finish(work: dist.Work) -> None:
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise SearchEnded("no answer within the time limit")
                time.sleep(_POLL_S)
            work.wait()

        return finish


def search_of(groups: PipelineGroups, ranks: SearchRanks, threads: int, timeout_s: float) -> SharedSearch | None:
    """The search of this rank's replica, None: it is the planner rank's alone. Collective over all ranks of the job; see SharedSearch.

    Args:
        ranks: equal on all ranks.
    """
    if ranks == "auto":
        every = [False] * dist.get_world_size()
        dist.all_gather_object(every, cores_of_rank() >= 2)
        ranks = "all" if all(every) else "one"
    return SharedSearch(groups, threads, timeout_s) if ranks == "all" else None


def cores_of_rank() -> int:
    """This process' share of the machine's cores."""
    return len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _tried(
    problem: StageProblem, limit: NDArray[np.int64], options: SearchOptions, bound_ns: int, seed: Seed | None
) -> SearchResult | Exception:
    """A result, or why there is none: all ranks go on to the contest."""
    try:
        return search(problem, limit, options, bound_ns, seed)
    except Exception as error:
        return error


def _wait(work: dist.Work) -> None:
    work.wait()


def _with(own: SearchResult, problem: StageProblem, parts: Sequence[NDArray[np.int32]]) -> SearchResult:
    """The winner's result, with the other schedules that were found here."""
    lengths, flat, choice, forward, backward = parts
    orders = np.split(flat, np.cumsum(lengths)[:-1])
    schedule = time_order(problem.graph(choice), orders)
    assert schedule is not None, "another rank's orders wait for each other"
    return replace(own, schedule=schedule, choice=choice, priorities=Priorities(forward, backward))


_GRAPH = tuple(field.name for field in fields(TaskGraph) if field.name not in ("num_ranks", "module_names"))
_PROBLEM = tuple(field.name for field in fields(StageProblem) if field.name not in ("fastest", "sub_microbatches", "candidates", "rooms"))
"""What a search reads of a problem."""
_NO_ROOMS = Rooms(**{field.name: np.zeros((0, 0), np.int64) for field in fields(Rooms)})


def _packed(
    problem: StageProblem, limit: NDArray[np.int64], options: SearchOptions, bound_ns: int, seed: Seed | None
) -> tuple[_Header, list[NDArray[Any]]]:
    graph = {name: getattr(problem.fastest, name) for name in _GRAPH}
    own = {name: getattr(problem, name) for name in _PROBLEM}
    others: dict[str, NDArray[Any]] = {"limit": limit}
    if seed is not None:
        others |= {
            "lengths": np.array([len(order) for order in seed.orders]), "order": np.concatenate(seed.orders), "choice": seed.choice,
            "forward": seed.priorities.forward, "backward": seed.priorities.backward,
        }
    header = _Header(
        problem.fastest.num_ranks, _described(graph), _described(own), _described(others), bound_ns, options.method, options.time_budget_s,
        options.evaluations, options.threads, options.seed,
    )
    return header, [np.ascontiguousarray(array) for part in (graph, own, others) for array in part.values()]


def _described(arrays: dict[str, NDArray[Any]]) -> list[tuple[str, str, list[int]]]:
    return [(name, array.dtype.str, list(array.shape)) for name, array in arrays.items()]


def _unpacked(header: _Header, arrays: Sequence[NDArray[Any]]) -> tuple[StageProblem, NDArray[np.int64], Seed | None]:
    rest = iter(arrays)
    graph, own, others = ({name: next(rest) for name, _, _ in part} for part in (header.graph, header.problem, header.others))
    problem = StageProblem(
        fastest=TaskGraph(num_ranks=header.num_ranks, module_names=(), **graph), sub_microbatches=(), candidates=(), rooms=_NO_ROOMS, **own
    )
    seed = None
    if "order" in others:
        orders = np.split(others["order"], np.cumsum(others["lengths"])[:-1])
        seed = Seed(orders=orders, choice=others["choice"], priorities=Priorities(others["forward"], others["backward"]))
    return problem, others["limit"], seed


def _tell(
    group: dist.ProcessGroup, source: int, header: _Header, arrays: Sequence[NDArray[Any]], finish: Callable[[dist.Work], None]
) -> None:
    encoded = np.frombuffer(msgspec.msgpack.encode(header), np.uint8)
    body = np.empty(len(encoded) + sum(array.nbytes for array in arrays), np.uint8)
    at = 0
    for part in (encoded, *arrays):  # one by one: no copy holds the interpreter's lock for long
        body[at : at + part.nbytes] = part.reshape(-1).view(np.uint8)
        at += part.nbytes
    finish(dist.broadcast(torch.tensor([len(encoded), len(body)]), source, group=group, async_op=True))
    finish(dist.broadcast(torch.from_numpy(body), source, group=group, async_op=True))


def _hear(group: dist.ProcessGroup, source: int, finish: Callable[[dist.Work], None]) -> tuple[_Header, list[NDArray[Any]]]:
    sizes = torch.zeros(2, dtype=torch.int64)
    finish(dist.broadcast(sizes, source, group=group, async_op=True))
    head, size = sizes.tolist()
    body = torch.zeros(size, dtype=torch.uint8)
    finish(dist.broadcast(body, source, group=group, async_op=True))
    data = body.numpy()
    header = msgspec.msgpack.decode(data[:head].tobytes(), type=_Header)
    arrays, at = [], head
    for _, dtype, shape in (*header.graph, *header.problem, *header.others):
        array = np.empty(shape, dtype)  # aligned as its type wants it
        array.reshape(-1).view(np.uint8)[:] = data[at : at + array.nbytes]
        arrays.append(array)
        at += array.nbytes
    return header, arrays
