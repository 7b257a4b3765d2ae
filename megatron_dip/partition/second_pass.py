"""Deals a global batch on by planned times, once plans of what replicas were dealt are known.

In: work, a deal, what the plan of each replica's share takes. Out: another deal to plan, until the slowest plan is near the mean or
nothing is left to try.

How: pass for pass, slow replicas are paired with fast ones, and each pair swaps the two microbatches that promise most. A pair keeps its
swap where plans say that its slower one got faster, and takes it back otherwise, so one swap's bad luck does not undo another's good. A
swap that was tried is not tried again. What a share's plan will take is foretold: as its last plan, plus what its load changes, plus what
its heaviest microbatch changes times a factor, for a pipeline fills and drains at the pace of that one. The factor is the slope of "plan
beyond load" over "heaviest microbatch" in the plans at hand, by least squares. Where a swap is taken back, what its plans took beyond what
was foretold is held against the next swaps of these replicas, which so move more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.partition.deal import Deal, checked, deal_of, shares_of

PASSES = 12
"""Deals planned after the first, at most."""
ENOUGH = 0.002
"""A slowest plan this share of the mean beyond it is good enough."""
_NEAR = 2000
"""Swaps that bring a pair within 1 / this of the mean are as good as any."""
_TRIES = 4
"""Partners beyond the first that relieves a slow replica which are tried for a better swap."""
_FORGOTTEN = 4
"""Of what plans took beyond what was foretold, 1 / this is forgotten with each deal: else swaps end that would help."""
_THOUSAND = 1000


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
    """One global batch, one deal after the other; who has the plans made tells what they take.

    Args:
        work: as :func:`megatron_dip.partition.deal.deal` takes it.
        dealt: the deal to plan first.
    """

    def __init__(self, work: NDArray[np.int64], dealt: Deal) -> None:
        self._work = checked(work, dealt.num_replicas)
        self.dealt = dealt
        """To be planned, or the last one planned."""
        self.best: PlannedDeal | None = None
        """With every swap that helped; None: none was planned yet."""
        self._pairs: list[tuple[int, int]] = []
        """(slow, fast) replicas that swapped in the deal to be planned."""
        self._foretold: list[tuple[int, int]] = []
        """ns of their plans."""
        self._surplus = np.zeros(dealt.num_replicas, dtype=np.int64)
        """[R] ns that plans of a replica's swaps took beyond what was foretold, since its share changed last."""
        self._tried = np.empty(0, dtype=np.int64)
        """Swaps, ascending: microbatch that left the slow one * N + the one that came for it."""

    def tell(self, planned_ns: Sequence[int]) -> bool:
        """[R] ns that plans of the last deal take (0: cannot be planned); returns whether it is good enough.

        Of replicas whose share stayed, what was told first counts: plans made anew scatter.
        """
        if self.best is None:
            self.best = PlannedDeal(dealt=self.dealt, planned_ns=tuple(planned_ns))
        else:
            replica_of, planned = self.best.dealt.replica_of.copy(), list(self.best.planned_ns)
            for (slow, fast), foretold in zip(self._pairs, self._foretold, strict=True):
                if min(planned_ns[slow], planned_ns[fast]) == 0:
                    continue
                is_faster = max(planned_ns[slow], planned_ns[fast]) < planned[slow]
                for replica, expected in zip((slow, fast), foretold, strict=True):
                    if is_faster:
                        replica_of[self.dealt.replica_of == replica] = replica
                        planned[replica] = planned_ns[replica]
                    self._surplus[replica] = 0 if is_faster else max(0, self._surplus[replica] + planned_ns[replica] - expected)
            self.best = PlannedDeal(dealt=deal_of(self._work, replica_of, self.dealt), planned_ns=tuple(planned))
        return self.best.imbalance <= 1.0 + ENOUGH

    def following(self) -> Deal | None:
        """The next deal to plan; None: no swap promises anything."""
        assert self.best is not None, "no deal was planned yet"
        best = self.best
        self._surplus -= self._surplus // _FORGOTTEN
        planned = np.array(best.planned_ns, dtype=np.int64)
        replica_of = best.dealt.replica_of.copy()
        mean = int(planned.sum()) // len(planned)
        swaps = swap_pairs(
            self._work, planned, self._surplus, fill_permille(self._work, best), round(mean * (1 + ENOUGH)), mean + mean // _NEAR, self._tried,
            replica_of,
        )
        if not len(swaps):
            return None
        leaving, coming = swaps[:, 0], swaps[:, 1]
        self._foretold = [(int(slow), int(fast)) for slow, fast in swaps[:, 2:]]
        self._pairs = [(int(best.dealt.replica_of[out]), int(best.dealt.replica_of[into])) for out, into in swaps[:, :2]]
        self._tried = np.sort(np.concatenate([self._tried, leaving * len(replica_of) + coming]))
        self.dealt = deal_of(self._work, replica_of, best.dealt)
        return self.dealt


def deal_by_plans(
    work: NDArray[np.int64], dealt: Deal, planned_time: Callable[[Sequence[int]], int], *, passes: int = PASSES
) -> PlannedDeal:
    """The second pass with plans made here.

    Args:
        planned_time: ns that a plan of these microbatches (numbers in the global batch) takes; asked once for each distinct share.
        passes: 0 = only plan ``dealt``.
    """
    known: dict[tuple[int, ...], int] = {}

    def planned(candidate: Deal) -> list[int]:
        times = []
        for share in candidate.shares():
            # Plans do not depend much on the order within a share.
            key = tuple(sorted(share))
            if key not in known:
                known[key] = planned_time(share)
            times.append(known[key])
        return times

    second = SecondPass(work, dealt)
    is_enough = second.tell(planned(dealt))
    for _ in range(passes):
        following = None if is_enough else second.following()
        if following is None:
            break
        is_enough = second.tell(planned(following))
    assert second.best is not None
    return second.best


def fill_permille(work: NDArray[np.int64], planned: PlannedDeal) -> int:
    """Thousandths of a share's heaviest microbatch (work of all ranks) that its plan takes beyond its load: at least 0."""
    dealt = planned.dealt
    heaviest = np.zeros(dealt.num_replicas)
    np.maximum.at(heaviest, dealt.replica_of, work.sum(axis=1))
    beyond = np.array(planned.planned_ns, dtype=np.float64) - dealt.load_ns
    heaviest -= heaviest.mean()
    spread = float(heaviest @ heaviest)
    return max(0, round(_THOUSAND * float(heaviest @ beyond) / spread)) if spread > 0 else 0


@numba.njit(nogil=True, cache=True)
def swap_pairs(work, planned, surplus, fill, too_slow, near, tried, replica_of):  # type: ignore[no-untyped-def]
    """Pairs replicas slower than ``too_slow`` with faster ones, each replica once, and swaps a microbatch of each pair in ``replica_of``.

    The slowest chooses first (the first of equals). Its partners are tried from the fastest on (the first of equals), until a swap is
    foretold to bring both to ``near``, or until :data:`_TRIES` were tried beyond the first that helps; the swap after which the slower of
    both is foretold the fastest is made, the first of equals.

    Args:
        work: [N, K] ns
        planned: [R] ns
        surplus: [R] ns that plans of each replica are foretold to take besides
        fill: thousandths of the heaviest microbatch that a plan takes beyond its load
        tried: swaps that are not made, ascending: leaving microbatch * N + coming one

    Returns:
        [pairs, 4] microbatches that leave the slow one and come for it, ns foretold of the slow one and of the fast one.
    """
    (count, num_ranks), num_replicas = work.shape, len(planned)
    members, sums = shares_of(work, replica_of, num_replicas)
    whole = work.sum(axis=1)
    heaviest, second = np.zeros(num_replicas, dtype=np.int64), np.zeros(num_replicas, dtype=np.int64)
    for replica in range(num_replicas):
        for index in members[replica]:
            if whole[index] > heaviest[replica]:
                heaviest[replica], second[replica] = whole[index], heaviest[replica]
            elif whole[index] > second[replica]:
                second[replica] = whole[index]
    is_free = np.ones(num_replicas, dtype=np.bool_)
    swaps = np.empty((num_replicas // 2, 4), dtype=np.int64)
    num_swaps = 0
    for slow in np.argsort(-planned, kind="mergesort"):
        if planned[slow] <= too_slow:
            break
        if not is_free[slow]:
            continue
        best, best_fast, best_out, best_in = planned[slow], -1, -1, -1
        best_foretold = planned[slow], planned[slow]
        tries = 0
        for fast in np.argsort(planned, kind="mergesort"):
            if not is_free[fast] or planned[fast] >= planned[slow]:
                continue
            for leaving in members[slow]:
                rest_slow = second[slow] if whole[leaving] == heaviest[slow] else heaviest[slow]
                for coming in members[fast]:
                    of_slow = of_fast = np.int64(0)
                    for rank in range(num_ranks):
                        difference = work[leaving, rank] - work[coming, rank]
                        of_slow = max(of_slow, sums[slow, rank] - difference)
                        of_fast = max(of_fast, sums[fast, rank] + difference)
                    rest_fast = second[fast] if whole[coming] == heaviest[fast] else heaviest[fast]
                    fill_slow = fill * (max(rest_slow, whole[coming]) - heaviest[slow]) // _THOUSAND
                    fill_fast = fill * (max(rest_fast, whole[leaving]) - heaviest[fast]) // _THOUSAND
                    slow_then = planned[slow] + surplus[slow] + of_slow - sums[slow].max() + fill_slow
                    fast_then = planned[fast] + surplus[fast] + of_fast - sums[fast].max() + fill_fast
                    value = max(slow_then, fast_then)
                    if value < best:
                        key = leaving * count + coming
                        place = np.searchsorted(tried, key)
                        if place == len(tried) or tried[place] != key:
                            best, best_fast, best_out, best_in = value, fast, leaving, coming
                            best_foretold = slow_then, fast_then
            if best_fast >= 0:
                if best <= near or tries == _TRIES:
                    break
                tries += 1
        if best_fast < 0:
            continue
        replica_of[best_out], replica_of[best_in] = best_fast, slow
        is_free[slow] = is_free[best_fast] = False
        swaps[num_swaps, 0], swaps[num_swaps, 1] = best_out, best_in
        swaps[num_swaps, 2], swaps[num_swaps, 3] = best_foretold
        num_swaps += 1
    return swaps[:num_swaps]
