"""The memory choice as an integer programme, solved by HiGHS: an option, and the judge of what the relaxation leaves open.

In: what :func:`megatron_dip.schedule.memory.choose_kernel` takes: a rank's order and the bytes it may hold. Out: the candidates with the
least sum of times. Source: DIP (arXiv 2504.14145), per-layer memory optimisation: one candidate for each stage pair, and at each instant
at which memory can peak the live pairs within the limit. Needs the optional dependency ``highspy``, which cannot be loaded into one
process with OR-tools.

The least sum of a rank's times is not the least makespan: a pair on no critical path may take its time. :func:`with_exact_memory`
therefore keeps the search's own choice where the exact one ends later.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.memory import MemoryTables, RankProblem, make_tables, rank_problem
from megatron_dip.schedule.result import time_order
from megatron_dip.schedule.search import SearchResult
from megatron_dip.spec.errors import InputError

RANK_SECONDS = 10.0
"""Of the solver for one rank; it then gives the best choice that it has."""
GAP = 1e-4
"""Relative gap at which the solver stops."""
_SOLVES = 4
"""Solver calls for one rank: it works with floats, so a choice may exceed a limit by some bytes and is solved again with as many less."""


def with_exact_memory(problem: StageProblem, limit: NDArray[np.int64], result: SearchResult) -> SearchResult:
    """Chooses the memory of a found schedule anew, exactly, for its orders; the better of both comes back.

    Args:
        limit: [P] bytes that live stages may hold on each rank, UNLIMITED for none.

    Raises:
        InputError: highspy is not installed.
    """
    tables, choice = make_tables(problem), result.choice.copy()
    for rank, order in enumerate(result.schedule.order):
        if limit[rank] < UNLIMITED:
            choose_exactly(tables, order, int(limit[rank]), choice, RANK_SECONDS, GAP)
    schedule = time_order(problem.graph(choice), result.schedule.order)
    assert schedule is not None
    return replace(result, schedule=schedule, choice=choice) if schedule.makespan_ns < result.schedule.makespan_ns else result


def choose_exactly(
    tables: MemoryTables, order: NDArray[np.int32], limit: int, choice: NDArray[np.int32], time_limit_s: float = 60.0, gap: float = 0.0
) -> int:
    """One rank's choice, in place; returns the sum of times in ns. Starts from what ``choice`` holds where that fits.

    Args:
        gap: relative gap at which the solver may stop.

    Raises:
        InputError: highspy is not installed, or there is no feasible choice (none found within the time limit).
    """
    highspy = load_solver()
    problem = rank_problem(tables, order, limit)
    kinds = tables.pair_class[problem.pair]
    time = tables.forward_ns[kinds] + tables.backward_ns[kinds]
    picked = np.zeros(len(problem.pair), dtype=np.int32)
    if (_excess(tables, problem, picked) > 0).any():
        margin = np.zeros(len(problem.room), dtype=np.int64)
        start = choice[problem.pair]
        for _ in range(_SOLVES):
            picked = _solve(highspy, tables, problem, margin, start, time_limit_s, gap)
            excess = _excess(tables, problem, picked)
            if (excess <= 0).all():
                break
            margin = np.where(excess > 0, margin + excess, margin)
        else:
            raise InputError(
                "memory_capacity_bytes", limit, "the solver's choices exceed it by its rounding", "leave the choice to --memory relaxation"
            )
    choice[problem.pair] = picked
    return int(np.take_along_axis(time, picked[:, None].astype(np.int64), axis=1).sum())


def load_solver() -> ModuleType:
    """highspy. Raises InputError where it is not installed."""
    try:
        import highspy
    except ImportError as error:
        raise InputError(
            "--memory", "exact", "highspy is not installed", "pip install 'megatron-dip[solver]', or take --memory relaxation"
        ) from error
    return highspy  # type: ignore[no-any-return]


def _excess(tables: MemoryTables, problem: RankProblem, picked: NDArray[np.int32]) -> NDArray[np.int64]:
    """[m] bytes above the room at each point, in whole numbers."""
    held = tables.held_bytes[tables.pair_class[problem.pair], picked]
    change = np.zeros(len(problem.room) + 1, dtype=np.int64)
    rest = held - held // 2
    np.add.at(change, problem.first, held)
    np.add.at(change, problem.half, rest - held)
    np.add.at(change, problem.last, -rest)
    return np.cumsum(change[:-1]) - problem.room


def _solve(
    highspy: Any, tables: MemoryTables, problem: RankProblem, margin: NDArray[np.int64], start: NDArray[np.int32], time_limit_s: float,
    gap: float,
) -> NDArray[np.int32]:
    """[n] candidates; columns are (pair, candidate), rows one candidate for each pair, then the room at each point."""
    size, points = len(problem.pair), len(problem.room)
    kinds = tables.pair_class[problem.pair]
    counts = tables.num_candidates[kinds].astype(np.int64)
    first_column = np.concatenate(([0], np.cumsum(counts)))
    of_pair = np.repeat(np.arange(size), counts)
    candidate = np.arange(len(of_pair)) - first_column[of_pair]
    held = tables.held_bytes[kinds[of_pair], candidate]
    # Numbers near 1 for the solver, and whole ones where they are small.
    byte, ns = 1.0 / max(1.0, float(held.max()) / 1e4), 1e-3
    # Column by column: its pair's row, the points with the whole bytes, the points with the half that a split backward leaves.
    whole = (problem.half - problem.first)[of_pair]
    half = (problem.last - problem.half)[of_pair]
    entries = 1 + whole + half
    begin = np.concatenate(([0], np.cumsum(entries)))
    column = np.repeat(np.arange(len(of_pair)), entries)
    place = np.arange(int(begin[-1])) - begin[column]
    index = np.where(place == 0, of_pair[column], size + problem.first[of_pair[column]] + place - 1)
    rest = held - held // 2
    value = np.where(place == 0, 1.0, np.where(place <= whole[column], held[column], rest[column]) * byte)
    solver = highspy.Highs()
    solver.silent()
    for option, setting in (("time_limit", time_limit_s), ("mip_rel_gap", gap), ("threads", 1)):
        solver.setOptionValue(option, setting)
    model = highspy.HighsLp()
    model.num_col_, model.num_row_ = len(of_pair), size + points
    model.col_cost_ = (tables.forward_ns[kinds[of_pair], candidate] + tables.backward_ns[kinds[of_pair], candidate]) * ns
    model.col_lower_, model.col_upper_ = np.zeros(len(of_pair)), np.ones(len(of_pair))
    model.row_lower_ = np.concatenate((np.ones(size), np.full(points, -highspy.kHighsInf)))
    model.row_upper_ = np.concatenate((np.ones(size), (problem.room - margin) * byte))
    model.integrality_ = [highspy.HighsVarType.kInteger] * len(of_pair)
    model.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    model.a_matrix_.start_, model.a_matrix_.index_, model.a_matrix_.value_ = begin, index, value
    solver.passModel(model)
    given = highspy.HighsSolution()
    given.col_value = (candidate == start[of_pair]).astype(float).tolist()
    solver.setSolution(given)
    solver.run()
    if solver.getInfo().primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        raise InputError(
            "memory_capacity_bytes", int(problem.room.max(initial=0)), "no choice of memory strategies was found for this order",
            "give more memory, or leave the choice to --memory relaxation",
        )
    solution = np.array(solver.getSolution().col_value)
    picked = np.empty(size, dtype=np.int32)
    for number in range(size):
        picked[number] = int(np.argmax(solution[first_column[number] : first_column[number + 1]]))
    return picked
