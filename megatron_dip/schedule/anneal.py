# mypy: no-check-untyped-defs
"""Simulated annealing over the two orders of priority, as one compiled loop.

In: a kernel graph with costs and limits, a policy, the orders to start from. Out: the best orders met. One step moves, swaps or turns
around a few groups in one of the orders, interleaves, and keeps the change if the makespan stays below the current one plus an
exponentially distributed allowance (the Metropolis rule, drawn beforehand, so that the interleaver may give up early).
Steps reach near places more often than far ones. All randomness comes from the state that is passed in.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.schedule.interleave import NEVER, interleave_kernel


class AnnealState(NamedTuple):
    """One chain. Letters: Gf, Gb forward and backward groups."""

    forward: NDArray[np.int32]
    """[Gf] current order"""
    backward: NDArray[np.int32]
    """[Gb]"""
    best_forward: NDArray[np.int32]
    best_backward: NDArray[np.int32]
    kept: NDArray[np.int32]
    """[max(Gf, Gb)] scratch: the order before a step"""
    random: NDArray[np.uint64]
    """[1] state of the generator"""
    makespan: NDArray[np.int64]
    """[2] current, best; NEVER = not evaluated yet"""


def make_state(forward: NDArray[np.int32], backward: NDArray[np.int32], seed: int) -> AnnealState:
    return AnnealState(
        forward=forward.copy(), backward=backward.copy(), best_forward=forward.copy(), best_backward=backward.copy(),
        kept=np.zeros(max(len(forward), len(backward)), dtype=np.int32),
        random=np.random.SeedSequence(seed).generate_state(1, np.uint64).astype(np.uint64), makespan=np.full(2, NEVER, dtype=np.int64),
    )


@numba.njit(nogil=True, cache=True)
def anneal_kernel(kernel, costs, limit, policy, work, state, steps, hot, cold, bound):  # type: ignore[no-untyped-def]
    """Takes ``steps`` steps (evaluations), cooling from ``hot`` to ``cold`` ns; stops at ``bound``. Returns the evaluations taken."""
    forward, backward, kept, random = state.forward, state.backward, state.kept, state.random
    makespan = state.makespan
    done = 0
    if makespan[0] >= NEVER:
        makespan[0] = interleave_kernel(kernel, costs, limit, forward, backward, policy, NEVER, work)
        done = 1
        if makespan[0] < makespan[1]:
            makespan[1] = makespan[0]
            state.best_forward[:] = forward
            state.best_backward[:] = backward
    movable = (len(forward) if len(forward) > 1 else 0) + (len(backward) if len(backward) > 1 else 0)
    if movable == 0:
        return done
    temperature = hot
    cooling = (cold / hot) ** (1.0 / max(1, steps))
    while done < steps and makespan[1] > bound:
        at_forward = len(backward) < 2 or (len(forward) > 1 and below(random, movable) < len(forward))
        order = forward if at_forward else backward
        kept[: len(order)] = order
        _step(order, random)
        cutoff = makespan[0] + np.int64(-temperature * np.log(uniform(random)))
        value = interleave_kernel(kernel, costs, limit, forward, backward, policy, cutoff, work)
        if value <= cutoff:
            makespan[0] = value
            if value < makespan[1]:
                makespan[1] = value
                state.best_forward[:] = forward
                state.best_backward[:] = backward
        else:
            order[:] = kept[: len(order)]
        temperature *= cooling
        done += 1
    return done


@numba.njit(nogil=True, cache=True)
def _step(order, random):  # type: ignore[no-untyped-def]
    """Changes ``order`` in place: takes a run of groups elsewhere, swaps two groups, or turns a run around."""
    size = len(order)
    first = below(random, size)
    # Distances fall off: a uniform exponent reaches far places less often.
    distance = np.int64(size ** uniform(random))
    distance = min(max(distance, 1), size - 1)
    second = first + distance if below(random, 2) == 0 else first - distance
    if second < 0 or second >= size:
        second = first + distance if second < 0 else first - distance
        if second < 0 or second >= size:
            second = size - 1 - first if size - 1 - first != first else (first + 1) % size
    kind = below(random, 8)
    if kind < 4:
        moved = order[first]
        if first < second:
            for index in range(first, second):
                order[index] = order[index + 1]
        else:
            for index in range(first, second, -1):
                order[index] = order[index - 1]
        order[second] = moved
    elif kind < 7:
        order[first], order[second] = order[second], order[first]
    else:
        low, high = min(first, second), max(first, second)
        while low < high:
            order[low], order[high] = order[high], order[low]
            low += 1
            high -= 1


@numba.njit(nogil=True, cache=True)
def _random(random):  # type: ignore[no-untyped-def]
    """splitmix64 (Steele, Lea, Flood 2014)."""
    random[0] += np.uint64(0x9E3779B97F4A7C15)
    value = random[0]
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def uniform(random):  # type: ignore[no-untyped-def]
    """In (0, 1]."""
    return (np.float64(_random(random) >> np.uint64(11)) + 1.0) * (1.0 / 9007199254740992.0)


@numba.njit(nogil=True, cache=True)
def below(random, limit):  # type: ignore[no-untyped-def]
    """Whole number in 0 .. limit - 1."""
    return np.int64(_random(random) % np.uint64(limit))
