"""Searches the orders of priority and the memory choice of one iteration.

In: a :class:`~megatron_dip.schedule.graph.StageProblem`, the bytes that each rank may hold, a budget. Out: a :class:`SearchResult`.

How the shipped search (``anneal``) goes:

1. *Portfolio.* Heuristic orders, what a rank prefers, levels of memory saving (every pair takes its candidate number l) and tighter
   limits on memory in flight than the rank has, are interleaved once each. A schedule under a uniform level is already valid; under a
   limit the best few levels get a quick memory choice, and where that came out best all orders are tried.
2. *Chains.* The best few are annealed for a short while, then the best of them (one for each thread) in cycles, each cooling from a
   quarter of the gap to the bound. Every other cycle begins at another row of the portfolio: the best schedules lie in many valleys.
   Cycles' lengths grow slowly (:func:`_luby`). Nothing in it looks at the budget, so a larger one goes through the same states and can
   only find more.
3. *Polish.* Every few rounds a chain's best order, if new, gets its own memory choice (:mod:`megatron_dip.schedule.memory`) and is
   timed with the durations that follow. The search's score is the makespan after that.
4. *Refinement.* After each cycle what it found, or a chain's best schedule, is improved task by task
   (:mod:`megatron_dip.schedule.refine`) for some steps more than the cycle had: the smaller the problem, the more.
5. *Real times.* Under a limit the refined orders get their own memory choice, and the next cycle orders with the times that follow.

The paper's methods (``mcts``, ``dfs``, ``random``; :mod:`megatron_dip.schedule.paper_search`) work on times of the leanest candidates
and polish what they find; ``fifo`` is the portfolio's first row alone. Source: DIP (arXiv 2504.14145), schedule search.

The same problem, seed, number of evaluations and number of threads give the same result; budgets are looked at between rounds, and no
round begins that could exceed the evaluations.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.anneal import AnnealState, anneal_kernel, make_state
from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.interleave import (
    ALTERNATE,
    FORWARD_FIRST,
    NEVER,
    UNLIMITED,
    Costs,
    KernelGraph,
    Policy,
    Workspace,
    interleave_kernel,
    make_costs,
    make_kernel_graph,
    make_workspace,
    refresh_costs,
)
from megatron_dip.schedule.memory import MemoryTables, apply_choice, choose, make_tables
from megatron_dip.schedule.paper_search import METHODS as PAPER_METHODS
from megatron_dip.schedule.paper_search import make_paper_state
from megatron_dip.schedule.refine import RefineState, make_refine_state, refine_kernel
from megatron_dip.schedule.result import Schedule, paths_ns, time_order

SearchMethod = Literal["anneal", "mcts", "dfs", "random", "fifo"]

_ROUND_STAGES = 200_000
"""Most stages that a chain interleaves between two looks at the clock: at most some 20 ms."""
_ROUNDS_APART = 64
"""Most rounds that chains on several threads take before all wait for each other: up to some tenths of a second. To follow the best chain
sooner won nothing and cost a tenth of the threads' time."""
_FIRST_CHAINS = 4
"""Chains that start; each thread goes on with one."""
_TRIAL_STEPS = 8
"""Steps that every first chain takes before the best go on."""
_FIRST_CYCLE = 32
"""Steps of the first cooling cycle; see :func:`_luby` for the others."""
_POLISH_ROUNDS = 3
_HOT, _COLD = 0.25, 0.01
"""First and last temperature of a cycle as shares of the gap between the chain's best and the bound."""
_REFINE_STAGES = 1_000
"""A problem of so many stages takes one step of refinement for each step of the cycle before it, a smaller one more, within bounds."""
_MOST_REFINEMENT, _LEAST_REFINEMENT = 8.0, 2.0
_PROBES = 3
"""Orders of the portfolio that are tried with every policy, the others with the first alone."""
_SCOUTED_PLACES, _SCOUT_ITERATIONS = 4, 40
"""Pairs of level and limit whose worth after a memory choice is found out, and subgradient steps for that."""
_BEST_PLACES = 2
"""Those of them that are tried with all orders."""
_AHEAD = 3
"""Light microbatches ahead of the heavy ones in one of the orders."""
_LIMIT_SHARES = (1.0, 0.8, 0.64)
"""Limits on memory in flight, as shares of what the rank has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchOptions:
    """What a search may spend."""

    method: SearchMethod = "anneal"
    time_budget_s: float | None = None
    """Seconds; None = ``evaluations`` alone limit the search."""
    evaluations: int | None = None
    """Whole schedules that may be tried (at least one is)."""
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    schedule: Schedule
    choice: NDArray[np.int32]
    """[Q] candidate of each stage pair"""
    evaluations: int


class DoesNotFit(Exception):
    """Even with every pair's leanest candidate one microbatch exceeds a rank's memory.

    Attributes:
        missing: [P] bytes that are missing on each rank (negative = to spare).
    """

    def __init__(self, missing: NDArray[np.int64]) -> None:
        self.missing = missing
        super().__init__(f"bytes missing on each rank: {missing.tolist()}")


def search(problem: StageProblem, limit: NDArray[np.int64], options: SearchOptions, bound_ns: int = 0) -> SearchResult:
    """Best schedule found within the budget.

    Args:
        limit: [P] bytes that live stages may hold on each rank, UNLIMITED for no limit.
        bound_ns: a makespan that no schedule can beat; the search ends when it is reached.

    Raises:
        DoesNotFit: no schedule keeps the limit.
    """
    searcher = _Searcher(problem, limit, options, bound_ns)
    searcher.run()
    return searcher.result()


@dataclass(frozen=True, slots=True)
class _Start:
    """One row of the portfolio."""

    makespan_ns: int
    """Under a limit on memory: what is to be expected of it after the memory choice"""
    level: int
    limit_share: float
    policy: Policy
    forward: NDArray[np.int32]
    backward: NDArray[np.int32]


class _Searcher:
    """State of one search. Threads touch only their own chains; everything else happens between rounds."""

    def __init__(self, problem: StageProblem, limit: NDArray[np.int64], options: SearchOptions, bound_ns: int) -> None:
        self.began = time.monotonic()
        self.problem, self.options, self.bound_ns = problem, options, bound_ns
        self.kernel = make_kernel_graph(problem.fastest)
        self.tables = make_tables(problem)
        self.leanest = problem.leanest()
        costs = make_costs(problem.fastest, self.kernel)
        # A limit that everything together keeps is none, which spares the interleaver the admission check.
        everything = costs.need.reshape(-1, self.kernel.num_ranks).sum(axis=0) + costs.extra.max(initial=0)
        self.limit = np.where(limit >= everything, UNLIMITED, limit).astype(np.int64)
        self.bounded = bool((self.limit < UNLIMITED).any())
        self.starts: list[_Start] = []
        self.evaluations = 0
        self.best_makespan = int(NEVER)
        self.best_orders: list[NDArray[np.int32]] = []
        self.best_choice = np.zeros(problem.num_pairs, dtype=np.int32)

    def run(self) -> None:
        if self.bounded:
            leanest = self.chain_at(int(self.leanest.max()), 1.0, Policy(), *self.fifo(), 0)
            if (leanest.costs.worst > self.limit).any():
                raise DoesNotFit(leanest.costs.worst - self.limit)
        most = int(self.leanest.max()) if self.bounded else 0
        if self.options.method in PAPER_METHODS:
            self.portfolio(range(most, most + 1))
            self.rounds([_PaperChain(self, most, *self.fifo(), make_paper_state(self.options.method, self.kernel))])
            return
        starts = self.starts = self.portfolio(range(most + 1))
        if self.options.method == "anneal" and not self.spent():
            chains = [self.chain_from(start, number) for number, start in enumerate(starts[: max(_FIRST_CHAINS, self.options.threads)])]
            self.rounds(chains)

    def result(self) -> SearchResult:
        schedule = time_order(self.problem.graph(self.best_choice), self.best_orders)
        assert schedule is not None
        assert schedule.makespan_ns == self.best_makespan, (schedule.makespan_ns, self.best_makespan)
        return SearchResult(schedule=schedule, choice=self.best_choice, evaluations=self.evaluations)

    def fifo(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        kernel = self.kernel
        num_backward = len(kernel.group_unit) - kernel.num_forward_groups
        return np.arange(kernel.num_forward_groups, dtype=np.int32), np.arange(num_backward, dtype=np.int32)

    def spent(self, wanted: int = 1) -> bool:
        """Whether the budget has no room for ``wanted`` evaluations more, or nothing is left to win."""
        if self.best_makespan <= self.bound_ns:
            return True
        if self.options.evaluations is not None and self.evaluations + wanted > self.options.evaluations:
            return True
        return self.out_of_time()

    def out_of_time(self) -> bool:
        return self.options.time_budget_s is not None and time.monotonic() - self.began >= self.options.time_budget_s

    # Portfolio

    def portfolio(self, levels: range) -> list[_Start]:
        """Interleaves every row within the budget (the first that fits always); returns them from best to worst, unlike ones only.

        Methods other than ``anneal`` have one row for each level: microbatches in the given order.
        """
        starts: list[_Start] = []
        work = make_workspace(self.kernel)
        costs = make_costs(self.problem.fastest, self.kernel)
        annealing = self.options.method == "anneal"
        orders = self.heuristic_orders() if annealing else [self.fifo()]

        def interleaved(level: int, share: float, policies: Sequence[Policy], rows: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]]) -> bool:
            """False where the budget is spent."""
            choice = np.minimum(level, self.leanest).astype(np.int32)
            _set_choice(self.kernel, self.tables, costs, choice)
            limit = _shared(self.limit, share)
            if (costs.worst > limit).any():
                return True
            for forward, backward in rows:
                for policy in policies:
                    if self.spent() and starts:
                        return False
                    value = int(interleave_kernel(self.kernel, costs, limit, forward, backward, policy.array(), NEVER, work))
                    self.evaluations += 1
                    starts.append(_Start(value, level, share, policy, forward, backward))
                    if value < self.best_makespan:
                        self.offer(work.orders(), choice)
            return True

        both = [Policy(ALTERNATE), Policy(FORWARD_FIRST)] if annealing else [Policy(ALTERNATE)]
        eager = [Policy(ALTERNATE, weight_fit=0)] if annealing and (self.problem.pair_weight >= 0).any() else []
        if not (self.bounded and annealing):
            for level in levels:
                if not (interleaved(level, 1.0, both, orders[:_PROBES]) and interleaved(level, 1.0, both[:1] + eager, orders[_PROBES:])):
                    break
            return self.unlike(starts)
        # First what to save and how much to keep in flight, by one order. What a place is worth shows after the memory choice. Then all
        # orders where that went best.
        worth: dict[tuple[int, float], float] = {}
        if all(interleaved(level, share, both[:1], orders[:1]) for level in levels for share in _LIMIT_SHARES):
            scores: dict[tuple[int, float], int] = {}
            for start in sorted(starts, key=lambda start: start.makespan_ns)[:_SCOUTED_PLACES]:
                if self.spent():
                    break
                scores[start.level, start.limit_share] = score = self.scouted(start, costs, work)
                worth[start.level, start.limit_share] = score / start.makespan_ns
            for level, share in sorted(scores, key=lambda place: scores[place])[:_BEST_PLACES]:
                if not (interleaved(level, share, both[1:] + eager, orders[:_PROBES]) and interleaved(level, share, both[:1], orders[1:])):
                    break
        starts = [replace(start, makespan_ns=round(start.makespan_ns * worth.get((start.level, start.limit_share), 1.0))) for start in starts]
        return self.unlike(starts)

    def scouted(self, start: _Start, costs: Costs, work: Workspace) -> int:
        """Makespan of a row of the portfolio after a quick memory choice, which is offered."""
        choice = np.minimum(start.level, self.leanest).astype(np.int32)
        _set_choice(self.kernel, self.tables, costs, choice)
        limit = _shared(self.limit, start.limit_share)
        interleave_kernel(self.kernel, costs, limit, start.forward, start.backward, start.policy.array(), NEVER, work)
        self.evaluations += 1
        orders = work.orders()
        if not choose(self.tables, orders, self.limit, choice, _SCOUT_ITERATIONS):
            return start.makespan_ns
        schedule = time_order(self.problem.graph(choice), orders)
        assert schedule is not None
        if schedule.makespan_ns < self.best_makespan:
            self.offer(orders, choice)
        return min(start.makespan_ns, schedule.makespan_ns)

    def heuristic_orders(self) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Orders of forward and backward groups, the most promising first.

        Microbatches by work: light ones at both ends, heavy ones first, light ones first, some light ones ahead of the heavy ones, light
        and heavy ones in turns. Forwards of a microbatch together, or one module before the other; backwards always of the modules
        nearest to the loss first: what is left of the encoders then fills the ranks while the pipeline drains.
        """
        kernel, graph = self.kernel, self.problem.fastest
        work = np.zeros(len(kernel.unit_offset) - 1)
        np.add.at(work, np.repeat(kernel.segment_unit, kernel.num_ranks), graph.duration_ns)
        light = np.argsort(work, kind="stable")
        heavy, half = light[::-1], (len(light) + 1) // 2
        ends = np.concatenate((light[::2], light[1::2][::-1]))
        ahead = np.concatenate((light[:_AHEAD], light[_AHEAD:][::-1]))
        turns = np.empty_like(light)
        turns[::2], turns[1::2] = light[:half], light[half:][::-1]

        # How far from the start of all a module's first stages lie, by chains alone.
        head, _ = paths_ns(graph)
        first = kernel.group_segment[kernel.group_offset[:-1]] * kernel.num_ranks
        group_module = graph.module[first]
        depth = np.zeros(len(graph.module_names), dtype=np.int64)
        np.maximum.at(depth, graph.module[: kernel.num_forward * kernel.num_ranks], head[: kernel.num_forward * kernel.num_ranks])
        group_depth = depth[group_module]
        cut = kernel.num_forward_groups

        def ordered(units: NDArray[np.int64], level: NDArray[np.int64], unit: NDArray[np.int32]) -> NDArray[np.int32]:
            place = np.empty(len(units), dtype=np.int64)
            place[units] = np.arange(len(units))
            return np.lexsort((place[unit], level)).astype(np.int32)

        unit, by_depth = kernel.group_unit[:cut], group_depth[:cut]
        together = np.zeros_like(by_depth)
        forwards = [ordered(units, level, unit) for units, level in (
            (ends, together), (heavy, by_depth), (light, together), (ends, by_depth), (ends, -by_depth), (heavy, together), (light, by_depth),
            (ahead, together),
        )]
        backwards = [ordered(units, -group_depth[cut:], kernel.group_unit[cut:]) for units in (heavy, ends, ahead, turns)]
        rows = sorted(((i, j) for i in range(len(forwards)) for j in range(len(backwards))), key=lambda row: (sum(row), row))
        pairs = [(forwards[i], backwards[j]) for i, j in rows]
        pairs.insert(_PROBES - 1, self.fifo())
        return list({(forward.tobytes(), backward.tobytes()): (forward, backward) for forward, backward in pairs}.values())

    @staticmethod
    def unlike(starts: list[_Start]) -> list[_Start]:
        """From best to worst, at most two of one level and share and one of a makespan, so that chains do not all start at one place."""
        taken: dict[tuple[int, float], int] = {}
        result: list[_Start] = []
        for start in sorted(starts, key=lambda start: start.makespan_ns):
            if result and start.makespan_ns == result[-1].makespan_ns:
                continue
            key = (start.level, start.limit_share)
            taken[key] = taken.get(key, 0) + 1
            if taken[key] <= 2 or len(taken) == 1:
                result.append(start)
        return result

    # Chains

    def chain_from(self, start: _Start, number: int) -> _Chain:
        return self.chain_at(start.level, start.limit_share, start.policy, start.forward, start.backward, number)

    def chain_at(
        self, level: int, share: float, policy: Policy, forward: NDArray[np.int32], backward: NDArray[np.int32], number: int
    ) -> _Chain:
        return _Chain(self, level, share, policy, make_state(forward, backward, self.options.seed * 1009 + number), number)

    def rounds(self, chains: Sequence[_Chain]) -> None:
        """Runs chains until the budget is spent: all of them for a trial, then the best, one for each thread."""
        steps = min(_FIRST_CYCLE, max(4, _ROUND_STAGES // self.problem.fastest.num_tasks))
        with ThreadPoolExecutor(self.options.threads) as pool:
            trial = True
            # Whole rounds only: a larger budget has to go through the same states. Two steps more each: the polish, and another start's end.
            while not self.spent(wanted := len(chains) * (steps + 2)):
                if trial and min(chain.steps for chain in chains) >= _TRIAL_STEPS:
                    trial = False
                    chains = sorted(chains, key=lambda chain: chain.score)[: self.options.threads]
                    for number, chain in enumerate(chains):
                        chain.number = number
                if self.options.threads == 1:
                    for chain in chains:
                        chain.advance(steps)
                else:
                    apart = 1 if trial else _ROUNDS_APART
                    while apart > 1 and self.spent(apart * wanted):
                        apart //= 2
                    list(pool.map(_Chain.advance_apart, chains, [steps] * len(chains), [apart] * len(chains)))
                for chain in chains:
                    self.evaluations += chain.taken
                    for orders, choice, makespan in chain.found:
                        if makespan < self.best_makespan:
                            self.offer(orders, choice)
                    chain.found.clear()
                if not any(chain.taken for chain in chains):
                    # A single group has one order: there is nothing to try, and no budget would ever be used up.
                    break
                if not trial and len(chains) > 1:
                    self.share_best(chains)

    @staticmethod
    def share_best(chains: Sequence[_Chain]) -> None:
        """At the start of a cycle every chain goes on from the best chain's order; their random numbers differ."""
        if all(chain.at_cycle_start for chain in chains):
            leader = min(chains, key=lambda chain: chain.score)
            for chain in chains:
                if chain is not leader and chain.score > leader.score:
                    chain.follow(leader)

    def offer(self, orders: list[NDArray[np.int32]], choice: NDArray[np.int32]) -> None:
        """Takes a schedule as the best if, timed by its orders, it is."""
        schedule = time_order(self.problem.graph(choice), orders)
        assert schedule is not None
        if schedule.makespan_ns < self.best_makespan:
            self.best_makespan, self.best_orders, self.best_choice = schedule.makespan_ns, orders, choice.copy()


class _Chain:
    """One annealing chain: its own costs, workspace and orders."""

    def __init__(self, searcher: _Searcher, level: int, share: float, policy: Policy, state: AnnealState, number: int) -> None:
        self.searcher, self.state, self.policy, self.number = searcher, state, policy.array(), number
        self.choice = np.minimum(level, searcher.leanest).astype(np.int32)
        self.costs = make_costs(searcher.problem.fastest, searcher.kernel)
        _set_choice(searcher.kernel, searcher.tables, self.costs, self.choice)
        self.limit = _shared(searcher.limit, share)
        self.work = make_workspace(searcher.kernel)
        self.steps = 0
        """Steps taken in all."""
        self.taken = 0
        """Evaluations of the last round."""
        self.found: list[tuple[list[NDArray[np.int32]], NDArray[np.int32], int]] = []
        """Schedules worth offering, of the last round: orders, memory choice, makespan."""
        self.score = int(NEVER)
        self.cycle, self.cycle_length, self.cycle_done, self.rounds_unpolished = 0, _FIRST_CYCLE, 0, 0
        self.kept: tuple[NDArray[np.int32], NDArray[np.int32], int, NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]] | None = None
        """Best orders of priority, their makespan, policy, memory choice and limit, while a cycle from another start runs."""
        self.polished = int(NEVER)
        """Best makespan before the memory choice that was polished."""
        self.hot = 1.0
        self.best: tuple[list[NDArray[np.int32]], NDArray[np.int32]] | None = None
        """Orders and memory choice behind ``score``."""
        self.refining: RefineState | None = None
        self.refining_choice = self.choice
        self.refine_length = self.refine_done = 0
        self.refined: tuple[RefineState, int] | None = None
        """The last refinement with the makespan that it reached."""

    @property
    def at_cycle_start(self) -> bool:
        return self.cycle_done == 0 and self.refining is None

    def advance_apart(self, steps: int, rounds: int) -> None:
        """Takes up to so many rounds, and ends at the start of a cycle if there is one in their second half: all chains end alike."""
        taken = 0
        for number in range(1, rounds + 1):
            self.advance(steps)
            taken += self.taken
            if (number >= rounds // 2 and self.at_cycle_start) or self.searcher.out_of_time():
                break
        self.taken = taken

    def advance(self, steps: int) -> None:
        """Takes some steps, and polishes a new best every few rounds."""
        if self.refining is not None:
            self.refine(self.refining, steps)
            return
        searcher, state = self.searcher, self.state
        if self.cycle_done == 0:
            if self.cycle % 2 == 1:
                self.leave()
            best = int(state.makespan[1])
            reference = best if best < NEVER else searcher.best_makespan
            self.hot = max(1.0, _HOT * (reference - searcher.bound_ns))
            state.forward[:] = state.best_forward
            state.backward[:] = state.best_backward
            state.makespan[0] = state.makespan[1]
        begin, end = self.cycle_done / self.cycle_length, min(1.0, (self.cycle_done + steps) / self.cycle_length)
        fall = _COLD / _HOT
        self.taken = int(anneal_kernel(
            searcher.kernel, self.costs, self.limit, self.policy, self.work, state, steps, self.hot * fall**begin, self.hot * fall**end,
            searcher.bound_ns,
        ))
        self.steps += steps
        self.cycle_done += steps
        if self.cycle_done >= self.cycle_length:
            done, self.cycle_done = self.cycle_length, 0
            self.cycle += 1
            self.cycle_length = _FIRST_CYCLE * _luby(self.cycle // 2 + 1)
            if self.kept is None:
                self.begin_refinement(done)
            else:
                self.come_back(done)
        self.rounds_unpolished += 1
        if state.makespan[1] < self.polished and (self.rounds_unpolished >= _POLISH_ROUNDS or self.polished >= NEVER):
            self.polish()

    def leave(self) -> None:
        """Begins a cycle at another row of the portfolio."""
        searcher, state, starts = self.searcher, self.state, self.searcher.starts
        start = starts[(self.cycle // 2 * searcher.options.threads + self.number + 1) % len(starts)]
        self.kept = (state.best_forward.copy(), state.best_backward.copy(), int(state.makespan[1]), self.policy, self.choice, self.limit)
        self.policy, self.limit = start.policy.array(), _shared(searcher.limit, start.limit_share)
        self.choice = np.minimum(start.level, searcher.leanest).astype(np.int32)
        if searcher.bounded:
            _set_choice(searcher.kernel, searcher.tables, self.costs, self.choice)
        state.best_forward[:], state.best_backward[:] = start.forward, start.backward
        state.makespan[:] = NEVER

    def come_back(self, cycle_length: int) -> None:
        """Refines what a cycle from another start has found, and goes on from the better of both."""
        assert self.kept is not None
        searcher, state, score = self.searcher, self.state, self.score
        self.interleave_best()
        orders, choice = self.work.orders(), self.choice.copy()
        self._offer(orders, self.choice)
        if searcher.bounded and choose(searcher.tables, orders, searcher.limit, choice):
            self._offer(orders, choice)
        self.begin_refining(make_refine_state(searcher.problem.graph(choice), orders), choice, cycle_length)
        # Under a limit only scores compare, for makespans before the memory choice are of different levels.
        if self.score >= score if searcher.bounded else self.kept[2] <= state.makespan[1]:
            state.best_forward[:], state.best_backward[:], state.makespan[1], self.policy, self.choice, self.limit = self.kept
            if searcher.bounded:
                _set_choice(searcher.kernel, searcher.tables, self.costs, self.choice)
        self.kept = None

    def interleave_best(self) -> None:
        """Leaves the best orders' schedule in the workspace."""
        searcher, state = self.searcher, self.state
        value = interleave_kernel(
            searcher.kernel, self.costs, self.limit, state.best_forward, state.best_backward, self.policy, NEVER, self.work
        )
        assert value == state.makespan[1], (value, state.makespan[1])
        self.taken += 1

    def begin_refining(self, refining: RefineState, choice: NDArray[np.int32], cycle_length: int) -> None:
        share = min(_MOST_REFINEMENT, max(_LEAST_REFINEMENT, _REFINE_STAGES / self.searcher.problem.fastest.num_tasks))
        self.refining, self.refining_choice = refining, choice
        self.refine_length, self.refine_done = max(1, int(share * cycle_length)), 0

    def begin_refinement(self, cycle_length: int) -> None:
        """Refines the best schedule next, from where the last refinement ended if nothing better has come since."""
        if self.best is None:
            return
        orders, choice = self.best
        if self.refined is None or self.refined[1] != self.score:
            self.refined = (make_refine_state(self.searcher.problem.graph(choice), orders), self.score)
        self.begin_refining(self.refined[0], choice, cycle_length)

    def refine(self, refining: RefineState, steps: int) -> None:
        """Takes some steps of refinement on the best schedule."""
        searcher = self.searcher
        value = int(refine_kernel(refining, searcher.limit, self.state.random, steps, searcher.bound_ns))
        self.taken = steps
        if value < self.score:
            self._offer(list(refining.best_order.reshape(searcher.kernel.num_ranks, -1).copy()), self.refining_choice)
            self.refined = (refining, self.score)
        self.refine_done += steps
        if self.refine_done >= self.refine_length:
            self.refining = None
            if searcher.bounded:
                self.choose_again()

    def polish(self) -> None:
        """Gives the best order its own memory choice and offers what comes out."""
        searcher, state = self.searcher, self.state
        self.polished, self.rounds_unpolished = int(state.makespan[1]), 0
        self.interleave_best()
        orders = self.work.orders()
        self._offer(orders, self.choice)
        if searcher.bounded:
            choice = self.choice.copy()
            if choose(searcher.tables, orders, searcher.limit, choice):
                self._offer(orders, choice)

    def choose_again(self) -> None:
        """Gives the best schedule's orders their own memory choice; the next cycle orders with the times that follow."""
        assert self.best is not None
        searcher = self.searcher
        orders, choice = self.best
        choice = choice.copy()
        if choose(searcher.tables, orders, searcher.limit, choice):
            self._offer(orders, choice)
        self.take_times(self.best[1])

    def take_times(self, choice: NDArray[np.int32]) -> None:
        """Goes on with the durations and memory of a choice, unless a microbatch alone would then exceed the limit."""
        searcher = self.searcher
        if np.array_equal(choice, self.choice):
            return
        _set_choice(searcher.kernel, searcher.tables, self.costs, choice)
        if (self.costs.worst > searcher.limit).any():
            _set_choice(searcher.kernel, searcher.tables, self.costs, self.choice)
            return
        self.choice, self.limit = choice.copy(), searcher.limit
        self.state.forward[:] = self.state.best_forward
        self.state.backward[:] = self.state.best_backward
        self.state.makespan[:] = NEVER
        self.polished = int(NEVER)

    def _offer(self, orders: list[NDArray[np.int32]], choice: NDArray[np.int32]) -> None:
        schedule = time_order(self.searcher.problem.graph(choice), orders)
        assert schedule is not None
        if schedule.makespan_ns < self.score:
            self.score, self.best = schedule.makespan_ns, (orders, choice.copy())
        self.found.append((orders, choice, schedule.makespan_ns))

    def follow(self, leader: _Chain) -> None:
        """Goes on from another chain's costs and best order."""
        self.choice, self.limit, self.policy = leader.choice, leader.limit, leader.policy
        _set_choice(self.searcher.kernel, self.searcher.tables, self.costs, self.choice)
        for mine, other in ((self.state.best_forward, leader.state.best_forward), (self.state.best_backward, leader.state.best_backward)):
            mine[:] = other
        self.state.makespan[:] = leader.state.makespan[1]
        self.polished, self.score, self.best = leader.polished, leader.score, leader.best


class _PaperChain(_Chain):
    """One of the paper's methods in a chain's clothes: no cycles, another kernel."""

    def __init__(self, searcher: _Searcher, level: int, forward: NDArray[np.int32], backward: NDArray[np.int32], paper: object) -> None:
        super().__init__(searcher, level, 1.0, Policy(ALTERNATE), make_state(forward, backward, searcher.options.seed), 0)
        self.paper = paper

    def advance(self, steps: int) -> None:
        searcher = self.searcher
        kernel = PAPER_METHODS[searcher.options.method]
        self.taken = int(kernel(searcher.kernel, self.costs, self.limit, self.policy, self.work, self.state, self.paper, steps))
        self.steps += steps
        if self.state.makespan[1] < self.polished:
            self.polish()


def _luby(number: int) -> int:
    """1 1 2 1 1 2 4 1 1 2 1 1 2 4 8 ..., from number 1: lengths of runs that need not know how long is long enough.

    Source: Luby, Sinclair, Zuckerman, Optimal speedup of Las Vegas algorithms (1993).
    """
    while True:
        bits = number.bit_length()
        if number == (1 << bits) - 1:
            return 1 << (bits - 1)
        number -= (1 << (bits - 1)) - 1


def _set_choice(kernel: KernelGraph, tables: MemoryTables, costs: Costs, choice: NDArray[np.int32]) -> None:
    apply_choice(tables, choice, costs.duration, costs.mem_start, costs.mem_end)
    refresh_costs(kernel, costs)


def _shared(limit: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    return np.array([value if value >= UNLIMITED else math.floor(value * share) for value in limit.tolist()], dtype=np.int64)
