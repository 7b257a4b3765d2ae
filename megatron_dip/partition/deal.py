"""Every iteration: deals the microbatches of a global batch to the data-parallel replicas, so that none waits long for another.

In: the work of every microbatch on each pipeline rank (:mod:`megatron_dip.partition.work`) and which replica read it. Out: which
replica trains it. Every replica gets as many as every other, as Megatron wants it; the step's losses and gradients are the same sums
in another order. A replica's *load* is that of its busiest rank; the slowest replica sets the pace, so the largest load is what is
made small, and among deals within :data:`SLACK` of the best found one with few moves is taken.

How: swaps from the deal as it was read, each between the replica with the largest load and the lightest one that relieves it, until
the largest load is near the bound. Where swaps get stuck before, the longest-processing-time rule with room (Graham 1969; heaviest
first, to the lightest replica that has room) and swaps from there say what can be reached. Integers only: every replica that knows the
same metadata computes the same deal.

:func:`deal_by_plans` then goes by planned times: what a plan takes beyond its replica's load is held to stay as microbatches are
swapped, and the loads with it are made even again. Not modelled: what a plan's memory choice will make of other microbatches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.errors import InputError

SLACK = 0.005
"""A deal this near to the best in load is as good: fewer moves are worth more."""
_FINE = 10_000
"""Swaps end within 1 / this of the bound."""
_TRIES = 4
"""Partners beyond the first that relieves the replica with the largest load which are tried for a better swap."""
_PLANNED_FINE = 250
"""By planned times, which differ by more from what is held of them, swaps end within 1 / this of the bound: replicas so near keep their
shares, whose plans are known."""
PASSES = 8
"""Times that :func:`deal_by_plans` deals anew, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """Letters: R replicas, M microbatches of each, N = R * M in the global batch."""

    replica_of: NDArray[np.int32]
    """[N] which replica trains the microbatch; number i was read by replica i mod R."""
    load_before_ns: NDArray[np.int64]
    """[R] load of each replica's own microbatches."""
    load_ns: NDArray[np.int64]
    """[R] load of those it was dealt."""
    bound_ns: int
    """No deal has a smaller largest load."""

    @property
    def num_replicas(self) -> int:
        return len(self.load_ns)

    @property
    def moves(self) -> int:
        """Microbatches that another replica trains than read them."""
        return int(np.count_nonzero(self.replica_of != _as_read(len(self.replica_of), self.num_replicas)))

    @property
    def imbalance_before(self) -> float:
        """Largest load over the mean, as read."""
        return _imbalance(self.load_before_ns)

    @property
    def imbalance(self) -> float:
        """Largest load over the mean, as dealt."""
        return _imbalance(self.load_ns)

    @property
    def gap(self) -> float:
        """What the largest load has more than the bound, as a share of it."""
        return int(self.load_ns.max()) / self.bound_ns - 1.0 if self.bound_ns > 0 else 0.0

    def shares(self) -> list[list[int]]:
        """Each replica's microbatches, as numbers in the global batch, in the order in which it trains them.

        One that stays keeps its place; those that come, by number, take the places of those that go.
        """
        count, replicas = len(self.replica_of), self.num_replicas
        shares = []
        for replica in range(replicas):
            places = list(range(replica, count, replicas))
            coming = iter([i for i in np.flatnonzero(self.replica_of == replica).tolist() if i % replicas != replica])
            shares.append([i if self.replica_of[i] == replica else next(coming) for i in places])
        return shares


def deal(work: NDArray[np.int64], num_replicas: int) -> Deal:
    """Deals a global batch by estimated work.

    Args:
        work: [N, K] ns of each microbatch on each of K pipeline ranks; number i was read by replica i mod ``num_replicas``.

    Raises:
        InputError: N is no multiple of the replicas, or works are negative or beyond what can be added up.
    """
    work = _checked(work, num_replicas)
    start, none = _as_read(len(work), num_replicas), np.zeros(num_replicas, dtype=np.int64)
    replica_of = np.empty(len(work), dtype=np.int32)
    bound = _deal(work, num_replicas, round(1 / SLACK), _FINE, replica_of)
    return Deal(
        replica_of=replica_of, load_before_ns=_loads(work, start, none), load_ns=_loads(work, replica_of, none), bound_ns=int(bound)
    )


def undealt(work: NDArray[np.int64], num_replicas: int) -> Deal:
    """The global batch as it was read, in the same terms. Raises as :func:`deal` does."""
    work = _checked(work, num_replicas)
    start, none = _as_read(len(work), num_replicas), np.zeros(num_replicas, dtype=np.int64)
    loads = _loads(work, start, none)
    return Deal(replica_of=start, load_before_ns=loads, load_ns=loads, bound_ns=int(_bound(work, num_replicas, none)))


def deal_again(work: NDArray[np.int64], dealt: Deal, planned_ns: Sequence[int], fine: int = _FINE) -> Deal:
    """Swaps on from ``dealt`` to make planned times even: what each replica's plan takes beyond its load is held to stay.

    Args:
        planned_ns: [R] what plans of the shares as dealt take.
        fine: swaps end within 1 / this of the bound. Replicas that need none keep their shares, and so their plans.
    """
    work = _checked(work, dealt.num_replicas)
    beyond = np.asarray(planned_ns, dtype=np.int64) - dealt.load_ns
    replica_of = dealt.replica_of.copy()
    bound = _bound(work, dealt.num_replicas, beyond)
    _swap(work, dealt.num_replicas, beyond, bound + bound // fine, replica_of)
    none = np.zeros(dealt.num_replicas, dtype=np.int64)
    return Deal(
        replica_of=replica_of, load_before_ns=dealt.load_before_ns, load_ns=_loads(work, replica_of, none), bound_ns=dealt.bound_ns
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDeal:
    """A deal with what its plans take."""

    dealt: Deal
    planned_ns: tuple[int, ...]
    """[R]"""

    @property
    def imbalance(self) -> float:
        return max(self.planned_ns) / (sum(self.planned_ns) / len(self.planned_ns))


class SecondPass:
    """Deals on by planned times, one deal after the other; who has the plans made tells what they take.

    Args:
        work: as :func:`deal` takes it.
        dealt: the deal to plan first.
        enough: a slowest plan this share of the mean beyond it is good enough.
    """

    def __init__(self, work: NDArray[np.int64], dealt: Deal, *, enough: float = 0.002) -> None:
        self._work, self._enough = work, enough
        self.dealt = dealt
        """To be planned, or the last one planned."""
        self.best: PlannedDeal | None = None
        """With the fastest slowest plan so far; None: none was planned yet."""
        self._told: PlannedDeal | None = None

    def tell(self, planned_ns: Sequence[int]) -> bool:
        """[R] ns that plans of the last deal take; returns whether it is good enough."""
        self._told = PlannedDeal(dealt=self.dealt, planned_ns=tuple(planned_ns))
        if self.best is None or max(self._told.planned_ns) < max(self.best.planned_ns):
            self.best = self._told
        return self._told.imbalance <= 1.0 + self._enough

    def following(self) -> Deal | None:
        """The next deal to plan; None: no swap helps."""
        assert self._told is not None, "no deal was planned yet"
        # From where the last pass ended, better or not: what its plans told is worth more than where they stand.
        following = deal_again(self._work, self._told.dealt, self._told.planned_ns, _PLANNED_FINE)
        if np.array_equal(following.replica_of, self._told.dealt.replica_of):
            return None
        self.dealt = following
        return following


def deal_by_plans(
    work: NDArray[np.int64], dealt: Deal, planned_time: Callable[[Sequence[int]], int], *, passes: int = PASSES, enough: float = 0.002
) -> PlannedDeal:
    """The second pass with plans made here: keeps the deal whose slowest plan is the fastest.

    Args:
        planned_time: ns that a plan of these microbatches (numbers in the global batch) takes; asked once for each distinct share.
        passes: 0 = only plan ``dealt``.
        enough: ends when the slowest plan is this share of the mean beyond it.
    """
    known: dict[tuple[int, ...], int] = {}

    def planned(candidate: Deal) -> list[int]:
        times = []
        for share in candidate.shares():
            # Plans do not depend much on the order within a share: swaps that cancel out cost no new plan.
            key = tuple(sorted(share))
            if key not in known:
                known[key] = planned_time(share)
            times.append(known[key])
        return times

    second = SecondPass(work, dealt, enough=enough)
    is_enough = second.tell(planned(dealt))
    for _ in range(passes):
        following = None if is_enough else second.following()
        if following is None:
            break
        is_enough = second.tell(planned(following))
    assert second.best is not None
    return second.best


_MOST_NS = 1 << 53
"""Of all microbatches together: far beyond a day, and sums stay exact."""


def _checked(work: NDArray[np.int64], num_replicas: int) -> NDArray[np.int64]:
    work = np.ascontiguousarray(work, dtype=np.int64)
    assert work.ndim == 2, work.shape
    if num_replicas < 1 or len(work) == 0 or len(work) % num_replicas:
        raise InputError(
            "microbatches", len(work), f"cannot be dealt to {num_replicas} replicas, as many to each", "give a multiple of the replicas"
        )
    if work.min() < 0 or float(work.sum(dtype=np.float64)) > _MOST_NS:
        raise InputError("work", [int(work.min()), int(work.max())], "negative or too large to be added up", "correct the costs or the metadata")
    return work


def _as_read(count: int, num_replicas: int) -> NDArray[np.int32]:
    return (np.arange(count) % num_replicas).astype(np.int32)


def _imbalance(load_ns: NDArray[np.int64]) -> float:
    total = int(load_ns.sum())
    return int(load_ns.max()) * len(load_ns) / total if total > 0 else 1.0


@numba.njit(nogil=True, cache=True)
def _loads(work, replica_of, beyond):  # type: ignore[no-untyped-def]
    """[R] of each replica: ``beyond`` [R] and the work on its busiest rank."""
    sums = np.zeros((len(beyond), work.shape[1]), dtype=np.int64)
    for index in range(len(work)):
        for rank in range(work.shape[1]):
            sums[replica_of[index], rank] += work[index, rank]
    loads = np.empty(len(beyond), dtype=np.int64)
    for replica in range(len(beyond)):
        loads[replica] = beyond[replica] + sums[replica].max()
    return loads


@numba.njit(nogil=True, cache=True)
def _bound(work, num_replicas, beyond):  # type: ignore[no-untyped-def]
    """No deal's largest load is smaller: the mean of the busiest rank; and a heaviest microbatch among the lightest ones."""
    count, num_ranks = work.shape
    size = count // num_replicas
    bound = np.int64(-(1 << 62))
    for rank in range(num_ranks):
        column = np.sort(work[:, rank])
        mean = -(-(column.sum() + beyond.sum()) // num_replicas)
        crowded = beyond.min() + column[count - 1] + column[: size - 1].sum()
        bound = max(bound, mean, crowded)
    return bound


@numba.njit(nogil=True, cache=True)
def _swap(work, num_replicas, beyond, target, replica_of):  # type: ignore[no-untyped-def]
    """Swaps pairs of microbatches, in ``replica_of``, until the largest load is ``target`` or no swap lowers it. Returns that load.

    Each swap is of the replica with the largest load (the first of equals) with another. Partners are tried from the lightest on (the
    first of equals), until a swap brings both to ``target`` or the second largest load, or until :data:`_TRIES` were tried beyond the
    first with which a swap helps at all; the swap that brings both lowest is made, the first of equals.
    """
    count, num_ranks = work.shape
    size = count // num_replicas
    members = np.empty((num_replicas, size), dtype=np.int32)
    filled = np.zeros(num_replicas, dtype=np.int64)
    sums = np.zeros((num_replicas, num_ranks), dtype=np.int64)
    for index in range(count):
        replica = replica_of[index]
        members[replica, filled[replica]] = index
        filled[replica] += 1
        for rank in range(num_ranks):
            sums[replica, rank] += work[index, rank]
    loads = np.empty(num_replicas, dtype=np.int64)
    for replica in range(num_replicas):
        loads[replica] = beyond[replica] + sums[replica].max()
    while True:
        heavy = np.argmax(loads)
        if loads[heavy] <= target:
            return loads[heavy]
        enough = target
        for replica in range(num_replicas):
            if replica != heavy and loads[replica] > enough:
                enough = loads[replica]
        best, best_light, best_out, best_in = loads[heavy], -1, -1, -1
        tries = 0
        for light in np.argsort(loads, kind="mergesort"):
            if light == heavy or loads[light] >= loads[heavy]:
                continue
            for out in range(size):
                leaving = members[heavy, out]
                for entering in range(size):
                    coming = members[light, entering]
                    of_heavy = of_light = np.int64(0)
                    for rank in range(num_ranks):
                        difference = work[leaving, rank] - work[coming, rank]
                        of_heavy = max(of_heavy, sums[heavy, rank] - difference)
                        of_light = max(of_light, sums[light, rank] + difference)
                    value = max(beyond[heavy] + of_heavy, beyond[light] + of_light)
                    if value < best:
                        best, best_light, best_out, best_in = value, light, out, entering
            if best_light >= 0:
                if best <= enough or tries == _TRIES:
                    break
                tries += 1
        if best_light < 0:
            return loads[heavy]
        leaving, coming = members[heavy, best_out], members[best_light, best_in]
        members[heavy, best_out], members[best_light, best_in] = coming, leaving
        replica_of[leaving], replica_of[coming] = best_light, heavy
        for rank in range(num_ranks):
            difference = work[leaving, rank] - work[coming, rank]
            sums[heavy, rank] -= difference
            sums[best_light, rank] += difference
        loads[heavy] = beyond[heavy] + sums[heavy].max()
        loads[best_light] = beyond[best_light] + sums[best_light].max()


@numba.njit(nogil=True, cache=True)
def _heaviest_first(work, num_replicas, replica_of):  # type: ignore[no-untyped-def]
    """The heaviest microbatch (by the sum over ranks, the first of equals) to the lightest replica with room, and so on."""
    count, num_ranks = work.shape
    size = count // num_replicas
    sums = np.zeros((num_replicas, num_ranks), dtype=np.int64)
    loads = np.zeros(num_replicas, dtype=np.int64)
    filled = np.zeros(num_replicas, dtype=np.int64)
    for index in np.argsort(-work.sum(axis=1), kind="mergesort"):
        chosen = -1
        for replica in range(num_replicas):
            if filled[replica] < size and (chosen < 0 or loads[replica] < loads[chosen]):
                chosen = replica
        replica_of[index] = chosen
        filled[chosen] += 1
        for rank in range(num_ranks):
            sums[chosen, rank] += work[index, rank]
        loads[chosen] = sums[chosen].max()


@numba.njit(nogil=True, cache=True)
def _rename(num_replicas, replica_of):  # type: ignore[no-untyped-def]
    """Gives shares to the replicas that read most of them: the largest overlap first (the first of equals)."""
    count = len(replica_of)
    overlap = np.zeros((num_replicas, num_replicas), dtype=np.int64)
    for index in range(count):
        overlap[replica_of[index], index % num_replicas] += 1
    name = np.full(num_replicas, -1, dtype=np.int32)
    taken = np.zeros(num_replicas, dtype=np.bool_)
    for position in np.argsort(-overlap.ravel(), kind="mergesort"):
        share, replica = position // num_replicas, position % num_replicas
        if name[share] < 0 and not taken[replica]:
            name[share] = replica
            taken[replica] = True
    for index in range(count):
        replica_of[index] = name[replica_of[index]]


@numba.njit(nogil=True, cache=True)
def _deal(work, num_replicas, slack, fine, replica_of):  # type: ignore[no-untyped-def]
    """Writes the deal within 1 / ``slack`` of the best found that needs few moves. Returns the bound."""
    count = len(work)
    none = np.zeros(num_replicas, dtype=np.int64)
    bound = _bound(work, num_replicas, none)
    for index in range(count):
        replica_of[index] = index % num_replicas
    if _swap(work, num_replicas, none, bound + bound // slack, replica_of) <= bound + bound // slack:
        return bound
    fresh = np.empty(count, dtype=np.int32)
    _heaviest_first(work, num_replicas, fresh)
    best = _swap(work, num_replicas, none, bound + bound // fine, fresh)
    swapped = replica_of.copy()
    reached = _swap(work, num_replicas, none, bound + bound // fine, swapped)
    wanted = min(best, reached) + min(best, reached) // slack
    for index in range(count):
        replica_of[index] = index % num_replicas
    if _swap(work, num_replicas, none, wanted, replica_of) <= wanted:
        return bound
    if reached <= wanted:
        replica_of[:] = swapped
    else:
        _rename(num_replicas, fresh)
        replica_of[:] = fresh
    return bound
