"""Where a search starts: heuristic orders of priority under levels of memory saving and limits on memory in flight.

In: a :class:`~megatron_dip.schedule.space.SearchSpace` and the budget. Out: :class:`Start` rows from best to worst, and the best schedule
among them in the :class:`~megatron_dip.schedule.space.Progress`. A schedule under a uniform level is already valid; under a limit the best
few levels get a quick memory choice, and where that came out best all orders are tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.interleave import ALTERNATE, FORWARD_FIRST, NEVER, Policy, interleave_kernel, make_workspace
from megatron_dip.schedule.memory import choose
from megatron_dip.schedule.result import paths_ns
from megatron_dip.schedule.space import Priorities, Progress, SearchSpace

_PROBES = 3
"""Orders of the portfolio that are tried with every policy, the others with the first alone."""
_SCOUTED_PLACES, _SCOUT_ITERATIONS = 4, 40
"""Places whose worth after a memory choice is found out, and subgradient steps for that."""
_BEST_PLACES = 2
"""Those of them that are tried with all orders."""
_AHEAD = 3
"""Light microbatches ahead of the heavy ones in one of the orders."""
_LIMIT_SHARES = (1.0, 0.8, 0.64)
"""Limits on memory in flight, as shares of what the rank has."""


class Place(NamedTuple):
    """How much memory is saved, and how much is kept in flight."""

    level: int
    """Every pair takes its candidate with this number"""
    limit_share: float
    """Of each rank's limit"""


@dataclass(frozen=True, slots=True)
class Start:
    """One row of the portfolio."""

    makespan_ns: int
    """Under a limit on memory: what is to be expected of it after the memory choice"""
    place: Place
    policy: Policy
    priorities: Priorities


class Portfolio:
    """Interleaves rows within the budget (the first that fits always) and keeps what came out."""

    def __init__(self, space: SearchSpace, progress: Progress, extra: Sequence[Priorities] = ()) -> None:
        """``extra``: orders to try besides the heuristic ones."""
        self.space, self.progress = space, progress
        self.extra = tuple(extra)
        self.starts: list[Start] = []
        self.work = make_workspace(space.kernel)
        self.costs = space.fresh_costs()

    def in_given_order(self, levels: range) -> list[Start]:
        """One row for each level: microbatches as they come."""
        for level in levels:
            if not self.rows(Place(level, 1.0), [Policy(ALTERNATE)], [self.space.given_order()]):
                break
        return unlike(self.starts)

    def whole(self) -> list[Start]:
        """Every row, unlike ones only, from best to worst."""
        orders = [*self.extra, *heuristic_orders(self.space)]
        has_weights = bool((self.space.problem.pair_weight >= 0).any())
        policies = [Policy(ALTERNATE), Policy(FORWARD_FIRST)]
        eager = [Policy(ALTERNATE, weight_fit=0)] if has_weights else []
        if self.space.bounded:
            self._bounded_rows(orders, policies, eager)
        else:
            probes, others = orders[: _PROBES + len(self.extra)], orders[_PROBES + len(self.extra) :]
            if self.rows(Place(0, 1.0), policies, probes):
                self.rows(Place(0, 1.0), policies[:1] + eager, others)
        return unlike(self.starts)

    def _bounded_rows(self, orders: Sequence[Priorities], policies: list[Policy], eager: list[Policy]) -> None:
        """First what to save and how much to keep in flight, by one order. What a place is worth shows after the memory choice. Then all
        orders where that went best.
        """
        worth: dict[Place, float] = {}
        places = [Place(level, share) for level in range(self.space.most_level() + 1) for share in _LIMIT_SHARES]
        if all(self.rows(place, policies[:1], orders[:1]) for place in places):
            scores: dict[Place, int] = {}
            for start in sorted(self.starts, key=lambda start: start.makespan_ns)[:_SCOUTED_PLACES]:
                if self.progress.spent():
                    break
                scores[start.place] = score = self._scouted(start)
                worth[start.place] = score / start.makespan_ns
            for place in sorted(scores, key=lambda place: scores[place])[:_BEST_PLACES]:
                probes = orders[: _PROBES + len(self.extra)]
                if not (self.rows(place, policies[1:] + eager, probes) and self.rows(place, policies[:1], orders[1:])):
                    break
        self.starts = [replace(start, makespan_ns=round(start.makespan_ns * worth.get(start.place, 1.0))) for start in self.starts]

    def best_priorities(self) -> Priorities:
        return min(self.starts, key=lambda start: start.makespan_ns).priorities

    def rows(self, place: Place, policies: Sequence[Policy], orders: Sequence[Priorities]) -> bool:
        """Interleaves each order under each policy. False where the budget is spent."""
        space, progress = self.space, self.progress
        choice = space.level(place.level)
        space.set_choice(self.costs, choice)
        limit = space.limit_at(place.limit_share)
        if (self.costs.worst > limit).any():
            return True
        for priorities in orders:
            for policy in policies:
                if progress.spent() and self.starts:
                    return False
                value = self._interleaved(limit, policy, priorities)
                self.starts.append(Start(value, place, policy, priorities))
                if value < progress.best_makespan_ns:
                    progress.offer(space.timed(self.work.orders(), choice))
        return True

    def _scouted(self, start: Start) -> int:
        """Makespan of a row after a quick memory choice, which is offered."""
        space = self.space
        choice = space.level(start.place.level)
        space.set_choice(self.costs, choice)
        self._interleaved(space.limit_at(start.place.limit_share), start.policy, start.priorities)
        orders = self.work.orders()
        if not choose(space.tables, orders, space.limit, choice, _SCOUT_ITERATIONS):
            return start.makespan_ns
        found = space.timed(orders, choice)
        self.progress.offer(found)
        return min(start.makespan_ns, found.makespan_ns)

    def _interleaved(self, limit: NDArray[np.int64], policy: Policy, priorities: Priorities) -> int:
        self.progress.evaluations += 1
        return int(interleave_kernel(self.space.kernel, self.costs, limit, *priorities, policy.array(), NEVER, self.work))


def unlike(starts: Sequence[Start]) -> list[Start]:
    """From best to worst, at most two of one place and one of a makespan, so that chains do not all start alike."""
    taken: dict[Place, int] = {}
    result: list[Start] = []
    for start in sorted(starts, key=lambda start: start.makespan_ns):
        if result and start.makespan_ns == result[-1].makespan_ns:
            continue
        taken[start.place] = taken.get(start.place, 0) + 1
        if taken[start.place] <= 2 or len(taken) == 1:
            result.append(start)
    return result


def heuristic_orders(space: SearchSpace) -> list[Priorities]:
    """Orders of forward and backward groups, the most promising first.

    Microbatches by work: light ones at both ends, heavy ones first, light ones first, some light ones ahead of the heavy ones, light
    and heavy ones in turns. Forwards of a microbatch together, or one module before the other; backwards always of the modules
    nearest to the loss first: what is left of the encoders then fills the ranks while the pipeline drains.
    """
    kernel, graph = space.kernel, space.problem.fastest
    work = np.zeros(len(kernel.unit_offset) - 1)
    np.add.at(work, np.repeat(kernel.segment_unit, kernel.num_ranks), graph.duration_ns)
    light = np.argsort(work, kind="stable")
    heavy, half = light[::-1], (len(light) + 1) // 2
    ends = np.concatenate((light[::2], light[1::2][::-1]))
    ahead = np.concatenate((light[:_AHEAD], light[_AHEAD:][::-1]))
    turns = np.empty_like(light)
    turns[::2], turns[1::2] = light[:half], light[half:][::-1]

    group_depth = _group_depths(space)
    num_forward = kernel.num_forward_groups
    unit, by_depth = kernel.group_unit[:num_forward], group_depth[:num_forward]
    together = np.zeros_like(by_depth)
    forwards = [_ordered(units, level, unit) for units, level in (
        (ends, together), (heavy, by_depth), (light, together), (ends, by_depth), (ends, -by_depth), (heavy, together), (light, by_depth),
        (ahead, together),
    )]
    backwards = [_ordered(units, -group_depth[num_forward:], kernel.group_unit[num_forward:]) for units in (heavy, ends, ahead, turns)]
    rows = sorted(((i, j) for i in range(len(forwards)) for j in range(len(backwards))), key=lambda row: (sum(row), row))
    pairs = [Priorities(forwards[i], backwards[j]) for i, j in rows]
    pairs.insert(_PROBES - 1, space.given_order())
    return list({(pair.forward.tobytes(), pair.backward.tobytes()): pair for pair in pairs}.values())


def _group_depths(space: SearchSpace) -> NDArray[np.int64]:
    """[G] how far from the start of all a group's module begins, by chains alone, ns."""
    kernel, graph = space.kernel, space.problem.fastest
    head, _ = paths_ns(graph)
    forwards = kernel.num_forward * kernel.num_ranks
    depth = np.zeros(len(graph.module_names), dtype=np.int64)
    np.maximum.at(depth, graph.module[:forwards], head[:forwards])
    return depth[graph.module[kernel.group_segment[kernel.group_offset[:-1]] * kernel.num_ranks]]


def _ordered(units: NDArray[np.int64], level: NDArray[np.int64], unit: NDArray[np.int32]) -> NDArray[np.int32]:
    """Groups by ``level``, then by their unit's place in ``units``."""
    place = np.empty(len(units), dtype=np.int64)
    place[units] = np.arange(len(units))
    return np.lexsort((place[unit], level)).astype(np.int32)
