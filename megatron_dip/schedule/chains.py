"""Annealing chains: what one thread of the search does, round by round.

In: a :class:`~megatron_dip.schedule.space.SearchSpace`, a row of the portfolio to start from. Out: schedules worth offering, in
:attr:`Chain.found`. A chain touches nothing but its own state, so that several run on threads. Its life is a sequence of *cycles* of
annealing, each followed by a *refinement*; see :mod:`megatron_dip.schedule.search` for why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.anneal import anneal_kernel, make_state
from megatron_dip.schedule.interleave import NEVER, interleave_kernel, make_workspace
from megatron_dip.schedule.memory import choose
from megatron_dip.schedule.paper_search import METHODS as PAPER_METHODS
from megatron_dip.schedule.paper_search import PaperState
from megatron_dip.schedule.portfolio import Start
from megatron_dip.schedule.refine import RefineState, make_refine_state, refine_kernel
from megatron_dip.schedule.space import Found, Priorities, Progress, SearchSpace

_FIRST_CYCLE = 32
"""Steps of the first cooling cycle; see :func:`_luby` for the others."""
_POLISH_ROUNDS = 3
"""Rounds from one memory choice for a new best order to the next."""
_HOT, _COLD = 0.25, 0.01
"""First and last temperature of a cycle as shares of the gap between the chain's best and the bound."""
_REFINE_STAGES = 1_000
"""A problem of so many stages takes one step of refinement for each step of the cycle before it, a smaller one more, within bounds."""
_MOST_REFINEMENT, _LEAST_REFINEMENT = 8.0, 2.0


class _Position(NamedTuple):
    """Where a chain stood before a cycle from another start."""

    forward: NDArray[np.int32]
    """[Gf] best orders of priority"""
    backward: NDArray[np.int32]
    """[Gb]"""
    makespan: int
    """Of these, before a memory choice of their own"""
    policy: NDArray[np.int64]
    choice: NDArray[np.int32]
    """[Q]"""
    limit: NDArray[np.int64]
    """[P]"""


@dataclass(slots=True)
class _Cycle:
    """Where a chain is in its cycles of annealing."""

    number: int = 0
    length: int = _FIRST_CYCLE
    """Steps"""
    done: int = 0
    """Steps of the current one"""
    hot: float = 1.0
    """Its first temperature, ns"""

    def next(self) -> None:
        self.number += 1
        self.length, self.done = _FIRST_CYCLE * _luby(self.number // 2 + 1), 0


@dataclass(slots=True)
class _Refinement:
    """A refinement that is under way."""

    state: RefineState
    choice: NDArray[np.int32]
    """[Q]"""
    length: int
    """Steps"""
    done: int = 0


class _Refined(NamedTuple):
    """A finished refinement, to go on from while nothing better has come."""

    state: RefineState
    makespan_ns: int


class Chain:
    """One annealing chain: its own costs, workspace and orders.

    Args:
        starts: rows of the portfolio that cycles begin at, in turns with the chain's own best.
        chains: how many chains go through ``starts`` together.
        number: which of them this is.
        seed: of this chain's random numbers.
    """

    def __init__(self, space: SearchSpace, progress: Progress, starts: Sequence[Start], start: Start, *, chains: int, number: int, seed: int) -> None:
        self.space, self.progress, self.starts, self.chains, self.number = space, progress, starts, chains, number
        self.state = make_state(*start.priorities, seed)
        self.policy = start.policy.array()
        self.choice = space.level(start.place.level)
        self.limit = space.limit_at(start.place.limit_share)
        self.costs = space.fresh_costs()
        space.set_choice(self.costs, self.choice)
        self.work = make_workspace(space.kernel)
        self.steps = 0
        """Steps taken in all."""
        self.taken = 0
        """Evaluations of the last round."""
        self.found: list[Found] = []
        """Schedules worth offering, of the last round."""
        self.best: Found | None = None
        self.cycle = _Cycle()
        self.rounds_unpolished = 0
        self.polished = int(NEVER)
        """Best makespan before the memory choice that was polished."""
        self.left: _Position | None = None
        """While a cycle from another start runs."""
        self.refinement: _Refinement | None = None
        self.refined: _Refined | None = None

    @property
    def score(self) -> int:
        """Makespan of the best schedule, after a memory choice of its own."""
        return int(NEVER) if self.best is None else self.best.makespan_ns

    def best_priorities(self) -> Priorities:
        """The chain's own, not those of a cycle from another start."""
        if self.left is not None:
            return Priorities(self.left.forward, self.left.backward)
        return Priorities(self.state.best_forward.copy(), self.state.best_backward.copy())

    @property
    def at_cycle_start(self) -> bool:
        return self.cycle.done == 0 and self.refinement is None

    def advance_apart(self, steps: int, rounds: int) -> None:
        """Takes up to so many rounds, and ends at the start of a cycle if there is one in their second half: all chains end alike."""
        taken = 0
        for number in range(1, rounds + 1):
            self.advance(steps)
            taken += self.taken
            if (number >= rounds // 2 and self.at_cycle_start) or self.progress.out_of_time():
                break
        self.taken = taken

    def advance(self, steps: int) -> None:
        """Takes some steps, and polishes a new best every few rounds."""
        if self.refinement is not None:
            self._refine(self.refinement, steps)
            return
        if self.cycle.done == 0:
            self._begin_cycle()
        self._anneal(steps)
        if self.cycle.done >= self.cycle.length:
            length = self.cycle.length
            self.cycle.next()
            if self.left is None:
                self._begin_refinement(length)
            else:
                self._come_back(length)
        self.rounds_unpolished += 1
        if self.state.makespan[1] < self.polished and (self.rounds_unpolished >= _POLISH_ROUNDS or self.polished >= NEVER):
            self._polish()

    def follow(self, leader: Chain) -> None:
        """Goes on from another chain's costs and best order."""
        self.choice, self.limit, self.policy = leader.choice, leader.limit, leader.policy
        self.space.set_choice(self.costs, self.choice)
        for mine, other in ((self.state.best_forward, leader.state.best_forward), (self.state.best_backward, leader.state.best_backward)):
            mine[:] = other
        self.state.makespan[:] = leader.state.makespan[1]
        self.polished, self.best = leader.polished, leader.best

    # Annealing

    def _begin_cycle(self) -> None:
        if self.cycle.number % 2 == 1:
            self._leave()
        state = self.state
        best = int(state.makespan[1])
        reference = best if best < NEVER else self.progress.best_makespan_ns
        self.cycle.hot = max(1.0, _HOT * (reference - self.space.bound_ns))
        state.forward[:] = state.best_forward
        state.backward[:] = state.best_backward
        state.makespan[0] = state.makespan[1]

    def _anneal(self, steps: int) -> None:
        cycle, space = self.cycle, self.space
        begin, end = cycle.done / cycle.length, min(1.0, (cycle.done + steps) / cycle.length)
        fall = _COLD / _HOT
        self.taken = int(anneal_kernel(
            space.kernel, self.costs, self.limit, self.policy, self.work, self.state, steps, cycle.hot * fall**begin, cycle.hot * fall**end,
            space.bound_ns,
        ))
        self.steps += steps
        cycle.done += steps

    def _leave(self) -> None:
        """Begins a cycle at another row of the portfolio."""
        space, state, starts = self.space, self.state, self.starts
        start = starts[(self.cycle.number // 2 * self.chains + self.number + 1) % len(starts)]
        self.left = _Position(
            state.best_forward.copy(), state.best_backward.copy(), int(state.makespan[1]), self.policy, self.choice, self.limit
        )
        self.policy, self.limit = start.policy.array(), space.limit_at(start.place.limit_share)
        self.choice = space.level(start.place.level)
        if space.bounded:
            space.set_choice(self.costs, self.choice)
        state.best_forward[:], state.best_backward[:] = start.priorities
        state.makespan[:] = NEVER

    def _come_back(self, cycle_length: int) -> None:
        """Refines what a cycle from another start has found, and goes on from the better of both."""
        assert self.left is not None
        space, state, left, score = self.space, self.state, self.left, self.score
        self._interleave_best()
        orders, choice = self.work.orders(), self.choice.copy()
        self._offer(orders, self.choice)
        if space.bounded and choose(space.tables, orders, space.limit, choice):
            self._offer(orders, choice)
        self._begin_refining(make_refine_state(space.problem.graph(choice), orders), choice, cycle_length)
        # Under a limit only scores compare, for makespans before the memory choice are of different levels.
        if self.score >= score if space.bounded else left.makespan <= state.makespan[1]:
            state.best_forward[:], state.best_backward[:], state.makespan[1] = left.forward, left.backward, left.makespan
            self.policy, self.choice, self.limit = left.policy, left.choice, left.limit
            if space.bounded:
                space.set_choice(self.costs, self.choice)
        self.left = None

    def _interleave_best(self) -> None:
        """Leaves the best orders' schedule in the workspace."""
        space, state = self.space, self.state
        value = interleave_kernel(space.kernel, self.costs, self.limit, state.best_forward, state.best_backward, self.policy, NEVER, self.work)
        assert value == state.makespan[1], (value, state.makespan[1])
        self.taken += 1

    # Memory choice

    def _polish(self) -> None:
        """Gives the best order its own memory choice and offers what comes out."""
        self.polished, self.rounds_unpolished = int(self.state.makespan[1]), 0
        self._interleave_best()
        orders = self.work.orders()
        self._offer(orders, self.choice)
        self._choose(orders, self.choice)

    def _choose(self, orders: list[NDArray[np.int32]], choice: NDArray[np.int32]) -> None:
        """Offers the orders with the memory choice that is best for them, starting from ``choice``."""
        if self.space.bounded:
            choice = choice.copy()
            if choose(self.space.tables, orders, self.space.limit, choice):
                self._offer(orders, choice)

    def _take_times(self, choice: NDArray[np.int32]) -> None:
        """Goes on with the durations and memory of a choice, unless a microbatch alone would then exceed the limit."""
        space = self.space
        if np.array_equal(choice, self.choice):
            return
        space.set_choice(self.costs, choice)
        if (self.costs.worst > space.limit).any():
            space.set_choice(self.costs, self.choice)
            return
        self.choice, self.limit = choice.copy(), space.limit
        self.state.forward[:] = self.state.best_forward
        self.state.backward[:] = self.state.best_backward
        self.state.makespan[:] = NEVER
        self.polished = int(NEVER)

    # Refinement

    def _begin_refining(self, state: RefineState, choice: NDArray[np.int32], cycle_length: int) -> None:
        share = min(_MOST_REFINEMENT, max(_LEAST_REFINEMENT, _REFINE_STAGES / self.space.problem.fastest.num_tasks))
        self.refinement = _Refinement(state, choice, max(1, int(share * cycle_length)))

    def _begin_refinement(self, cycle_length: int) -> None:
        """Refines the best schedule next, from where the last refinement ended if nothing better has come since."""
        if self.best is None:
            return
        if self.refined is None or self.refined.makespan_ns != self.score:
            self.refined = _Refined(make_refine_state(self.space.problem.graph(self.best.choice), self.best.orders), self.score)
        self._begin_refining(self.refined.state, self.best.choice, cycle_length)

    def _refine(self, refinement: _Refinement, steps: int) -> None:
        """Takes some steps of refinement; at its end the best orders get a memory choice, and the next cycle orders with its times."""
        space = self.space
        value = int(refine_kernel(refinement.state, space.limit, self.state.random, steps, space.bound_ns))
        self.taken = steps
        if value < self.score:
            self._offer(list(refinement.state.best_order.reshape(space.kernel.num_ranks, -1).copy()), refinement.choice)
            self.refined = _Refined(refinement.state, self.score)
        refinement.done += steps
        if refinement.done >= refinement.length:
            self.refinement = None
            if space.bounded:
                assert self.best is not None
                self._choose(self.best.orders, self.best.choice)
                self._take_times(self.best.choice)

    def _offer(self, orders: list[NDArray[np.int32]], choice: NDArray[np.int32]) -> None:
        found = self.space.timed(orders, choice)
        if found.makespan_ns < self.score:
            self.best = found
        self.found.append(found)


class PaperChain(Chain):
    """One of the paper's methods in a chain's clothes: no cycles, another kernel."""

    def __init__(self, space: SearchSpace, progress: Progress, start: Start, *, seed: int, method: str, paper: PaperState) -> None:
        super().__init__(space, progress, [start], start, chains=1, number=0, seed=seed)
        self.method, self.paper = method, paper

    def advance(self, steps: int) -> None:
        kernel = PAPER_METHODS[self.method]
        self.taken = int(kernel(self.space.kernel, self.costs, self.limit, self.policy, self.work, self.state, self.paper, steps))
        self.steps += steps
        if self.state.makespan[1] < self.polished:
            self._polish()


def _luby(number: int) -> int:
    """1 1 2 1 1 2 4 1 1 2 1 1 2 4 8 ..., from number 1: lengths of runs that need not know how long is long enough.

    Source: Luby, Sinclair, Zuckerman, Optimal speedup of Las Vegas algorithms (1993).
    """
    while True:
        bits = number.bit_length()
        if number == (1 << bits) - 1:
            return 1 << (bits - 1)
        number -= (1 << (bits - 1)) - 1
