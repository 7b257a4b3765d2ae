"""Every iteration: deals the microbatches of a global batch to the data-parallel replicas, so that none waits long for another.

In: the work of every microbatch on each pipeline rank (:mod:`megatron_dip.partition.work`) and which replica read it. Out: which
replica trains it. Every replica gets as many as every other, as Megatron wants it; the step's losses and gradients are the same sums
in another order. A replica's *load* is that of its busiest rank; the slowest replica sets the pace, so the largest load is what is
made small, and among deals within :data:`SLACK` of the best found one with few moves is taken.

How: swaps from the deal as it was read, each between the replica with the largest load and the lightest one that relieves it, until
the largest load is near the bound. Where swaps get stuck before, the longest-processing-time rule with room (Graham 1969; heaviest
first, to the lightest replica that has room) and swaps from there say what can be reached. Integers only: every replica that knows the
same metadata computes the same deal.

:mod:`megatron_dip.partition.second_pass` then goes on by planned times.
"""

from __future__ import annotations

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
    work = checked(work, num_replicas)
    start = _as_read(len(work), num_replicas)
    replica_of = np.empty(len(work), dtype=np.int32)
    bound = _deal(work, num_replicas, round(1 / SLACK), _FINE, replica_of)
    return Deal(
        replica_of=replica_of, load_before_ns=_loads(work, start, num_replicas), load_ns=_loads(work, replica_of, num_replicas), bound_ns=int(bound)
    )


def undealt(work: NDArray[np.int64], num_replicas: int) -> Deal:
    """The global batch as it was read, in the same terms. Raises as :func:`deal` does."""
    work = checked(work, num_replicas)
    start = _as_read(len(work), num_replicas)
    loads = _loads(work, start, num_replicas)
    return Deal(replica_of=start, load_before_ns=loads, load_ns=loads, bound_ns=int(_bound(work, num_replicas)))


def deal_of(work: NDArray[np.int64], replica_of: NDArray[np.int32], like: Deal) -> Deal:
    """The deal that gives microbatches so, of the same global batch as ``like``."""
    return Deal(replica_of=replica_of, load_before_ns=like.load_before_ns, load_ns=_loads(work, replica_of, like.num_replicas), bound_ns=like.bound_ns)


_MOST_NS = 1 << 53
"""Of all microbatches together: far beyond a day, and sums stay exact."""


def checked(work: NDArray[np.int64], num_replicas: int) -> NDArray[np.int64]:
    """[N, K] as the kernels take it. Raises as :func:`deal` does."""
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
def _loads(work, replica_of, num_replicas):  # type: ignore[no-untyped-def]
    """[R] work on the busiest rank of each replica."""
    sums = np.zeros((num_replicas, work.shape[1]), dtype=np.int64)
    for index in range(len(work)):
        for rank in range(work.shape[1]):
            sums[replica_of[index], rank] += work[index, rank]
    loads = np.empty(num_replicas, dtype=np.int64)
    for replica in range(num_replicas):
        loads[replica] = sums[replica].max()
    return loads


@numba.njit(nogil=True, cache=True)
def _bound(work, num_replicas):  # type: ignore[no-untyped-def]
    """No deal's largest load is smaller: the mean of the busiest rank; and a heaviest microbatch among the lightest ones."""
    count, num_ranks = work.shape
    size = count // num_replicas
    bound = np.int64(-(1 << 62))
    for rank in range(num_ranks):
        column = np.sort(work[:, rank])
        mean = -(-column.sum() // num_replicas)
        crowded = column[count - 1] + column[: size - 1].sum()
        bound = max(bound, mean, crowded)
    return bound


@numba.njit(nogil=True, cache=True)
def shares_of(work, replica_of, num_replicas):  # type: ignore[no-untyped-def]
    """[R, M] microbatches of each replica, ascending, and [R, K] their work on each rank."""
    count, num_ranks = work.shape
    members = np.empty((num_replicas, count // num_replicas), dtype=np.int64)
    filled = np.zeros(num_replicas, dtype=np.int64)
    sums = np.zeros((num_replicas, num_ranks), dtype=np.int64)
    for index in range(count):
        replica = replica_of[index]
        members[replica, filled[replica]] = index
        filled[replica] += 1
        sums[replica] += work[index]
    return members, sums


@numba.njit(nogil=True, cache=True)
def _swap(work, num_replicas, target, replica_of):  # type: ignore[no-untyped-def]
    """Swaps pairs of microbatches, in ``replica_of``, until the largest load is ``target`` or no swap lowers it. Returns that load.

    Each swap is of the replica with the largest load (the first of equals) with another. Partners are tried from the lightest on (the
    first of equals), until a swap brings both to ``target`` or the second largest load, or until :data:`_TRIES` were tried beyond the
    first with which a swap helps at all; the swap that brings both lowest is made, the first of equals.
    """
    count, num_ranks = work.shape
    size = count // num_replicas
    members, sums = shares_of(work, replica_of, num_replicas)
    loads = np.empty(num_replicas, dtype=np.int64)
    for replica in range(num_replicas):
        loads[replica] = sums[replica].max()
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
                    value = max(of_heavy, of_light)
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
        loads[heavy] = sums[heavy].max()
        loads[best_light] = sums[best_light].max()


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
    bound = _bound(work, num_replicas)
    for index in range(count):
        replica_of[index] = index % num_replicas
    if _swap(work, num_replicas, bound + bound // slack, replica_of) <= bound + bound // slack:
        return bound
    fresh = np.empty(count, dtype=np.int32)
    _heaviest_first(work, num_replicas, fresh)
    best = _swap(work, num_replicas, bound + bound // fine, fresh)
    swapped = replica_of.copy()
    reached = _swap(work, num_replicas, bound + bound // fine, swapped)
    wanted = min(best, reached) + min(best, reached) // slack
    for index in range(count):
        replica_of[index] = index % num_replicas
    if _swap(work, num_replicas, wanted, replica_of) <= wanted:
        return bound
    if reached <= wanted:
        replica_of[:] = swapped
    else:
        _rename(num_replicas, fresh)
        replica_of[:] = fresh
    return bound
