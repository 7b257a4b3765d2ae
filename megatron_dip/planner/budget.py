"""How long a plan may be searched for: no longer than it can be before training waits for it."""

from __future__ import annotations

import statistics
from collections import deque

SHARE = 0.8
"""Of an iteration: a plan that takes as long as all of it is late as soon as an iteration is a little shorter."""
LOOKED_BACK = 9
"""Iterations whose median counts: one with an evaluation or a checkpoint behind it does not."""


class SearchBudget:
    """Seconds of search for one plan: what was asked for, or less where iterations are shorter than that.

    Args:
        limit_s: what was asked for.
        side_by_side: plans that are made at a time, each of which has so many iterations.
    """

    def __init__(self, limit_s: float, side_by_side: int = 1) -> None:
        self._limit_s = limit_s
        self._side_by_side = side_by_side
        self._iterations_s: deque[float] = deque(maxlen=LOOKED_BACK)

    def observe(self, iteration_s: float) -> None:
        """To be told the length of each training iteration, without what it waited for its plan."""
        self._iterations_s.append(iteration_s)

    def seconds(self) -> float:
        lengths = list(self._iterations_s)  # training appends meanwhile
        return min(self._limit_s, SHARE * self._side_by_side * statistics.median(lengths)) if lengths else self._limit_s
