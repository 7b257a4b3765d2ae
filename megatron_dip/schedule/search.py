"""Searches the orders of priority and the memory choice of one iteration.

In: a :class:`~megatron_dip.schedule.graph.StageProblem`, the bytes that each rank may hold, a budget. Out: a :class:`SearchResult`.

How the shipped search (``anneal``) goes:

1. *Portfolio* (:mod:`megatron_dip.schedule.portfolio`). Heuristic orders, what a rank prefers, levels of memory saving (every pair takes
   its candidate number l) and tighter limits on memory in flight than the rank has, are interleaved once each.
2. *Chains* (:mod:`megatron_dip.schedule.chains`). The best few are annealed for a short while, then the best of them (one for each
   thread) in cycles, each cooling from a quarter of the gap to the bound. Every other cycle begins at another row of the portfolio: the
   best schedules lie in many valleys. Cycles' lengths grow slowly (Luby's sequence). Nothing in it looks at the budget, so a larger one
   goes through the same states and can only find more.
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

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.chains import Chain, PaperChain
from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.interleave import NEVER, Policy
from megatron_dip.schedule.paper_search import METHODS as PAPER_METHODS
from megatron_dip.schedule.paper_search import make_paper_state
from megatron_dip.schedule.portfolio import Place, Portfolio, Start
from megatron_dip.schedule.result import Schedule, time_order
from megatron_dip.schedule.space import Found, Priorities, Progress, SearchSpace, make_space

SearchMethod = Literal["anneal", "mcts", "dfs", "random", "fifo"]

_ROUND_STAGES = 200_000
"""Most stages that a chain interleaves between two looks at the clock: at most some 20 ms."""
_ROUND_STEPS = 32
"""Most steps of a round."""
_ROUNDS_APART = 64
"""Most rounds that chains on several threads take before all wait for each other: up to some tenths of a second. To follow the best chain
sooner won nothing and cost a tenth of the threads' time."""
_FIRST_CHAINS = 4
"""Chains that start; each thread goes on with one."""
_TRIAL_STEPS = 8
"""Steps that every first chain takes before the best go on."""


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
    is_needed: Callable[[], bool] | None = None
    """Asked between rounds: True ends the search before its budget, with what it has found. None: nobody waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    schedule: Schedule
    choice: NDArray[np.int32]
    """[Q] candidate of each stage pair"""
    priorities: Priorities
    """The best orders of priority; refinement may have taken the schedule further"""
    evaluations: int
    others: tuple[Found, ...]
    """The next best schedules that were found, each slower than the one before"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """A schedule that a search starts from, beside its portfolio: what it finds is never worse."""

    orders: list[NDArray[np.int32]]
    """[P] tasks of each rank in order, within the limits under ``choice``"""
    choice: NDArray[np.int32]
    """[Q]"""
    priorities: Priorities


SearchFunction = Callable[[StageProblem, NDArray[np.int64], SearchOptions, int, Seed | None], SearchResult]
"""As :func:`search`: what searches, here or on several ranks."""


class DoesNotFit(Exception):
    """Even with every pair's leanest candidate one microbatch exceeds a rank's memory.

    Attributes:
        missing: [P] bytes that are missing on each rank (negative = to spare).
        microbatches: [P] the microbatch that needs most on each rank; -1 = it is not one alone.
    """

    def __init__(self, missing: NDArray[np.int64], microbatches: NDArray[np.int64]) -> None:
        self.missing, self.microbatches = missing, microbatches
        super().__init__(f"bytes missing on each rank: {missing.tolist()}")


def search(
    problem: StageProblem, limit: NDArray[np.int64], options: SearchOptions, bound_ns: int = 0, seed: Seed | None = None
) -> SearchResult:
    """Best schedule found within the budget.

    Args:
        limit: [P] bytes that live stages may hold on each rank, UNLIMITED for no limit.
        bound_ns: a makespan that no schedule can beat; the search ends when it is reached.
        seed: a schedule to start from (method ``anneal``).

    Raises:
        DoesNotFit: no schedule keeps the limit.
    """
    progress = Progress(
        bound_ns=bound_ns, evaluations_limit=options.evaluations, time_budget_s=options.time_budget_s, is_needed=options.is_needed
    )
    space = make_space(problem, limit, bound_ns)
    if space.bounded:
        _check_fit(space, problem)
    known = None if seed is None else space.timed(seed.orders, seed.choice)
    if known is not None:
        progress.offer(known)
    portfolio = Portfolio(space, progress, () if seed is None else (seed.priorities,))
    chains: Sequence[Chain] = ()
    if options.method == "anneal":
        starts = portfolio.whole()
        if not progress.spent():
            chains = [
                Chain(space, progress, starts, start, chains=options.threads, number=number, seed=options.seed * 1009 + number)
                for number, start in enumerate(starts[: max(_FIRST_CHAINS, options.threads)])
            ]
            # What the first chain refines first.
            chains[0].best = known
    elif options.method == "fifo":
        portfolio.in_given_order(range(space.most_level() + 1 if space.bounded else 1))
    else:
        most = space.most_level() if space.bounded else 0
        portfolio.in_given_order(range(most, most + 1))
        start = Start(int(NEVER), Place(most, 1.0), Policy(), space.given_order())
        paper = make_paper_state(options.method, space.kernel)
        assert options.method in PAPER_METHODS
        chains = [PaperChain(space, progress, start, seed=options.seed, method=options.method, paper=paper)]
    if chains:
        chains = _rounds(progress, options.threads, chains, problem.fastest.num_tasks)
    priorities = min(chains, key=lambda chain: chain.score).best_priorities() if chains else portfolio.best_priorities()
    return _result(problem, progress, priorities)


def _check_fit(space: SearchSpace, problem: StageProblem) -> None:
    costs = space.fresh_costs()
    space.set_choice(costs, space.leanest)
    if (costs.worst > space.limit).any():
        of_units = (costs.need + costs.extra).reshape(-1, problem.fastest.num_ranks)
        raise DoesNotFit(costs.worst - space.limit, np.unique(problem.fastest.microbatch)[of_units.argmax(axis=0)].astype(np.int64))


def _result(problem: StageProblem, progress: Progress, priorities: Priorities) -> SearchResult:
    best = progress.best
    assert best is not None, "the first row of the portfolio is always tried"
    schedule = time_order(problem.graph(best.choice), best.orders)
    assert schedule is not None
    assert schedule.makespan_ns == best.makespan_ns, (schedule.makespan_ns, best.makespan_ns)
    return SearchResult(schedule=schedule, choice=best.choice, priorities=priorities, evaluations=progress.evaluations, others=tuple(progress.kept[1:]))


def _rounds(progress: Progress, threads: int, chains: Sequence[Chain], num_tasks: int) -> Sequence[Chain]:
    """Runs chains until the budget is spent: all of them for a trial, then the best, one for each thread, which are returned."""
    steps = min(_ROUND_STEPS, max(4, _ROUND_STAGES // num_tasks))
    with ThreadPoolExecutor(threads) as pool:
        trial = True
        # Whole rounds only: a larger budget has to go through the same states. Two steps more each: the polish, and another start's end.
        while not progress.spent(wanted := len(chains) * (steps + 2)):
            if trial and min(chain.steps for chain in chains) >= _TRIAL_STEPS:
                trial = False
                chains = sorted(chains, key=lambda chain: chain.score)[:threads]
                for number, chain in enumerate(chains):
                    chain.number = number
            if threads == 1:
                for chain in chains:
                    chain.advance(steps)
            else:
                apart = 1 if trial else _ROUNDS_APART
                while apart > 1 and progress.spent(apart * wanted):
                    apart //= 2
                list(pool.map(Chain.advance_apart, chains, [steps] * len(chains), [apart] * len(chains)))
            for chain in chains:
                progress.evaluations += chain.taken
                for found in chain.found:
                    progress.offer(found)
                chain.found.clear()
            if not any(chain.taken for chain in chains):
                # A single group has one order: there is nothing to try, and no budget would ever be used up.
                break
            if not trial and len(chains) > 1:
                _share_best(chains)
    return chains


def _share_best(chains: Sequence[Chain]) -> None:
    """At the start of a cycle every chain goes on from the best chain's order; their random numbers differ."""
    if all(chain.at_cycle_start for chain in chains):
        leader = min(chains, key=lambda chain: chain.score)
        for chain in chains:
            if chain is not leader and chain.score > leader.score:
                chain.follow(leader)
