"""How long a plan may be searched for: until training needs it, which the length of iterations foretells."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

SHARE = 0.8
"""Of an iteration: a plan that takes as long as all of it is late as soon as an iteration is a little shorter."""
LOOKED_BACK = 9
"""Iterations whose median counts: one with an evaluation or a checkpoint behind it does not."""
FIRST_S = 1.0
"""Seconds of search as long as no iteration's length is known, where none were asked for."""


class SearchBudget:
    """Seconds of search for one plan: the iteration's length, and no more than was asked for.

    Args:
        limit_s: what was asked for; None: as long as iterations are.
        side_by_side: plans that are made at a time, each of which has so many iterations.
    """

    def __init__(self, limit_s: float | None, side_by_side: int = 1) -> None:
        self._limit_s = limit_s
        self._side_by_side = side_by_side
        self._iterations_s: deque[float] = deque(maxlen=LOOKED_BACK)
        self._ask: Callable[[], bool] = lambda: False

    def observe(self, iteration_s: float) -> None:
        """To be told the length of each training iteration, without what it waited for its plan."""
        self._iterations_s.append(iteration_s)

    def seconds(self) -> float:
        lengths = list(self._iterations_s)  # training appends meanwhile
        if not lengths:
            return FIRST_S if self._limit_s is None else self._limit_s
        foreseen = SHARE * self._side_by_side * statistics.median(lengths)
        return foreseen if self._limit_s is None else min(self._limit_s, foreseen)

    def ask(self, is_needed: Callable[[], bool]) -> None:
        """``is_needed`` knows whether training waits for the plan that the calling thread makes."""
        self._ask = is_needed

    def is_needed(self) -> bool:
        """Whether training waits for the plan that the calling thread makes; so its search ends, however much budget is left."""
        return self._ask()
