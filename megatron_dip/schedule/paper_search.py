# mypy: no-check-untyped-defs
"""The paper's ways to search segment orders, as they stand, for comparison: Monte Carlo tree search, depth-first, random.

In: what :mod:`megatron_dip.schedule.anneal` takes, plus a state of their own. Out: the best orders met, in the anneal state. All three
order the items, forward and backward groups together, in one sequence; a queue's priorities are its items' order in it. Source: DIP
(arXiv 2504.14145), segment order search:

- *mcts*: a path in the tree is a sequence of items. A node keeps the best score among its descendants; selection maximises
  (reference / makespan)^alpha + beta * sqrt(log N_parent / N); one node is expanded a visit; :data:`COMPLETIONS` random completions,
  the best is backed up. Scores are divided by the first completion's makespan, since the paper leaves their scale open.
- *dfs*: sequences in lexicographic order from the given one, last positions first.
- *random*: independent random sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.anneal import below
from megatron_dip.schedule.interleave import NEVER, KernelGraph, interleave_kernel

COMPLETIONS = 10
_ALPHA, _BETA = 4.0, 0.02
_MAX_NODES = 1 << 16
"""Nodes of the tree; when all are used, the tree stays as it is and selection goes on."""


class PaperState(NamedTuple):
    """Letters: n items (forward groups, then backward groups), N nodes."""

    sequence: NDArray[np.int32]
    """[n] current sequence of items"""
    parent: NDArray[np.int32]
    """[N]"""
    item: NDArray[np.int32]
    """[N] item that leads into the node"""
    child: NDArray[np.int32]
    """[N] first child, -1 = none"""
    sibling: NDArray[np.int32]
    """[N] next child of the same parent"""
    visits: NDArray[np.int64]
    """[N]"""
    best: NDArray[np.int64]
    """[N] least makespan below the node"""
    size: NDArray[np.int64]
    """[2] nodes in use, reference makespan"""


def make_paper_state(method: str, kernel: KernelGraph) -> PaperState:
    nodes = _MAX_NODES if method == "mcts" else 1

    def nodes32() -> NDArray[np.int32]:
        return np.full(nodes, -1, dtype=np.int32)

    return PaperState(
        sequence=np.arange(len(kernel.group_unit), dtype=np.int32), parent=nodes32(), item=nodes32(), child=nodes32(), sibling=nodes32(),
        visits=np.zeros(nodes, dtype=np.int64), best=np.full(nodes, NEVER, dtype=np.int64), size=np.array([1, 0], dtype=np.int64),
    )


@numba.njit(nogil=True, cache=True)
def _evaluate(kernel, costs, limit, policy, work, state, sequence):  # type: ignore[no-untyped-def]
    """Makespan of a sequence of items; keeps the best."""
    first, second = 0, 0
    for item in sequence:
        if item < kernel.num_forward_groups:
            state.forward[first] = item
            first += 1
        else:
            state.backward[second] = item - kernel.num_forward_groups
            second += 1
    value = interleave_kernel(kernel, costs, limit, state.forward, state.backward, policy, NEVER, work)
    if value < state.makespan[1]:
        state.makespan[1] = value
        state.best_forward[:] = state.forward
        state.best_backward[:] = state.backward
    return value


@numba.njit(nogil=True, cache=True)
def _shuffle(sequence, begin, random):  # type: ignore[no-untyped-def]
    for index in range(len(sequence) - 1, begin, -1):
        other = begin + below(random, index - begin + 1)
        sequence[index], sequence[other] = sequence[other], sequence[index]


@numba.njit(nogil=True, cache=True)
def _random_kernel(kernel, costs, limit, policy, work, state, paper, steps):  # type: ignore[no-untyped-def]
    for _ in range(steps):
        _shuffle(paper.sequence, 0, state.random)
        _evaluate(kernel, costs, limit, policy, work, state, paper.sequence)
    return steps


@numba.njit(nogil=True, cache=True)
def _dfs_kernel(kernel, costs, limit, policy, work, state, paper, steps):  # type: ignore[no-untyped-def]
    sequence = paper.sequence
    for step in range(steps):
        _evaluate(kernel, costs, limit, policy, work, state, sequence)
        # Next permutation in lexicographic order.
        index = len(sequence) - 2
        while index >= 0 and sequence[index] > sequence[index + 1]:
            index -= 1
        if index < 0:
            return step + 1
        other = len(sequence) - 1
        while sequence[other] < sequence[index]:
            other -= 1
        sequence[index], sequence[other] = sequence[other], sequence[index]
        low, high = index + 1, len(sequence) - 1
        while low < high:
            sequence[low], sequence[high] = sequence[high], sequence[low]
            low += 1
            high -= 1
    return steps


@numba.njit(nogil=True, cache=True)
def _mcts_kernel(kernel, costs, limit, policy, work, state, paper, steps):  # type: ignore[no-untyped-def]
    sequence = paper.sequence
    count = len(sequence)
    done = 0
    while done < steps:
        # Selection: fixed items stand in front; the sequence behind them holds those that are left.
        node, depth = np.int64(0), 0
        while True:
            children, best, best_child = 0, -np.inf, np.int64(-1)
            child = np.int64(paper.child[node])
            while child >= 0:
                children += 1
                score = (paper.size[1] / paper.best[child]) ** _ALPHA
                score += _BETA * np.sqrt(np.log(max(2, paper.visits[node])) / paper.visits[child])
                if score > best:
                    best, best_child = score, child
                child = paper.sibling[child]
            if children < count - depth and paper.size[0] < len(paper.parent):
                # Expansion: one item that is no child yet, chosen at random.
                for place in range(depth, count):
                    other = depth + below(state.random, count - depth)
                    sequence[place], sequence[other] = sequence[other], sequence[place]
                for place in range(depth, count):
                    known = False
                    child = np.int64(paper.child[node])
                    while child >= 0:
                        known = known or paper.item[child] == sequence[place]
                        child = paper.sibling[child]
                    if not known:
                        new = paper.size[0]
                        paper.size[0] += 1
                        paper.parent[new] = node
                        paper.item[new] = sequence[place]
                        paper.sibling[new] = paper.child[node]
                        paper.child[node] = new
                        sequence[place], sequence[depth] = sequence[depth], sequence[place]
                        node = new
                        depth += 1
                        break
                break
            if best_child < 0:
                break
            for place in range(depth, count):
                if sequence[place] == paper.item[best_child]:
                    sequence[place], sequence[depth] = sequence[depth], sequence[place]
                    break
            node = best_child
            depth += 1
        least = np.int64(NEVER)
        for _ in range(COMPLETIONS):
            _shuffle(sequence, depth, state.random)
            least = min(least, _evaluate(kernel, costs, limit, policy, work, state, sequence))
            done += 1
            if depth >= count - 1:
                break
        if paper.size[1] == 0:
            paper.size[1] = least
        while node >= 0:
            paper.visits[node] += 1
            paper.best[node] = min(paper.best[node], least)
            node = np.int64(paper.parent[node])
    return done


METHODS: dict[str, Callable[..., int]] = {"mcts": _mcts_kernel, "dfs": _dfs_kernel, "random": _random_kernel}
"""Kernels with the arguments of a round: kernel graph, costs, limit, policy, workspace, anneal state, paper state, steps."""
