"""What each stage pair may choose between: up to S candidates of (forward time, backward time, bytes held).

In: the cost of one layer, the number of layers, and the layer's memory strategies. Out: :class:`Candidates`, from the fastest to the
leanest. Source: DIP (arXiv 2504.14145), section on per-layer memory optimisation: the fastest, the leanest, and S - 2 by memory bucket
from a multiple-choice knapsack over the layers' strategies. The layers of a chunk are alike, so a knapsack's solution is a number of
layers for each strategy, and all of them can be listed.

Not modelled: strategies of the first and last extras (embedding, head), which always keep their activations.

Offloaded layers: copies each way have the rank's host link to themselves (both ways at once) and run one after the other; where ranks of
a node share a link, ``bytes_per_second`` is a rank's share of it. Under a profile alone a layer takes the longer of its compute and its
copy, by the format of plans. Where all memory counts, offloaded layers are spread among those that keep all, and a stage takes as long as
its layers or as its copies, which cannot hide more than there is time for: the first begins behind the first offloaded layer, and the last
one is over when the stage is. What is on its way counts in :mod:`megatron_dip.schedule.rooms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import PartCost
from megatron_dip.schedule.rooms import layer_place, offloaded_places
from megatron_dip.spec.profile import Strategy

MAX_CANDIDATES = 10
"""S: candidates of a stage pair (paper: 10)."""
_MIX_OF_THREE_LIMIT = 4096
"""Up to this many combinations are listed in full; beyond it, mixes of two strategies."""


@dataclass(frozen=True, slots=True)
class LayerOption:
    """One layer under one memory strategy."""

    label: str
    forward_ns: float
    backward_input_ns: float
    activation_bytes: float
    place: tuple[int, float] = (2, 0.0)
    """Where such layers stand among a stage's"""
    copy_ns: float = 0.0
    """Of an offloaded layer, each way, where it is no part of the times above"""


@dataclass(frozen=True, slots=True)
class Candidates:
    """S candidates of one kind of stage pair: time rises and bytes fall with the index."""

    forward_ns: NDArray[np.float64]
    """[S] sums over the layers, before rounding; extras not included"""
    backward_input_ns: NDArray[np.float64]
    """[S]"""
    activation_bytes: NDArray[np.float64]
    """[S]"""
    counts: tuple[tuple[tuple[str, int], ...], ...]
    """S tuples of (strategy, layers under it)."""
    moving: frozenset[str] = frozenset()
    """Strategies that offload."""

    def strategy_list(self, index: int) -> list[str]:
        """The strategy of each layer, in the order in which stages run them."""
        given = dict(self.counts[index])
        num_kept, moved = given.pop("none", 0), [label for label, count in self.counts[index] if label in self.moving for _ in range(count)]
        first = [label for label, count in given.items() if label not in self.moving for _ in range(count)]
        turn = ["none"] * (num_kept + len(moved))
        for place, label in zip(offloaded_places(len(moved), len(turn)), moved, strict=True):
            turn[place] = label
        return first + turn


def layer_options(
    layer: PartCost, strategies: Mapping[str, Strategy], *, has_backward: bool, spread: bool = False
) -> list[LayerOption]:
    """``none`` and each strategy that is worth choosing: no other but ``none`` is at least as good in both time and bytes.

    ``none`` stays even where an offload hides behind compute, since it moves nothing. A module without a backward holds nothing, so only the plain forward remains.

    Args:
        spread: offloaded layers stand among those that keep all, so that their copies are counted by the stage
            (:func:`pair_candidates`) and not by the layer.
    """
    options = [_apply("none", strategies["none"], layer, spread)]
    if has_backward:
        options += [_apply(label, strategy, layer, spread) for label, strategy in strategies.items() if label != "none"]
    options.sort(key=lambda option: (option.forward_ns + option.backward_input_ns, option.label != "none", option.activation_bytes))
    kept: list[LayerOption] = []
    for option in options:
        # What copies cost depends on the other layers, so that they put nothing out of question.
        lean = [other.activation_bytes for other in kept if not other.copy_ns]
        if option.copy_ns or not lean or option.activation_bytes < min(lean):
            kept.append(option)
    return sorted(kept, key=lambda option: option.label != "none") if spread else kept


def _apply(label: str, strategy: Strategy, layer: PartCost, spread: bool) -> LayerOption:
    forward = layer.forward_ns
    backward = layer.backward_input_ns + strategy.extra_forward * layer.forward_ns
    held = strategy.activation * layer.activation_bytes
    if strategy.offload is not None:
        moved = held * (1.0 - strategy.offload.activation)
        held *= strategy.offload.activation
        transfer = moved * 1e9 / strategy.offload.bytes_per_second
        if spread:
            return LayerOption(label, forward, backward, held, layer_place(strategy), transfer)
        forward, backward = max(forward, transfer), max(backward, transfer)
    return LayerOption(label, forward, backward, held, layer_place(strategy))


def pair_candidates(options: list[LayerOption], num_layers: int, limit: int = MAX_CANDIDATES, *, weight_ns: float = 0.0) -> Candidates:
    """Up to ``limit`` mixes of the options over ``num_layers`` equal layers: fastest, leanest and the fastest of each memory bucket.

    Args:
        weight_ns: of a layer's backward besides its input part, where it runs with that.
    """
    mixes = _mixes(num_layers, len(options))
    held = np.array([option.activation_bytes for option in options])
    forward, backward = _mix_times(options, mixes, weight_ns)
    time, size = forward + backward, mixes @ held
    changed = num_layers - mixes[:, 0] if options[0].label == "none" else np.zeros(len(mixes))
    order = np.lexsort((size, changed, time))
    # Pareto front: walking from the fastest, keep what needs less memory than everything faster.
    sizes = size[order]
    below = np.concatenate(([True], sizes[1:] < np.minimum.accumulate(sizes)[:-1]))
    front = order[below]
    if len(front) > limit:
        lean, full = size[front[-1]], size[front[0]]
        buckets = lean + (full - lean) * np.arange(limit) / (limit - 1)
        # The fastest on the front within each bucket's bytes.
        picked = [int(np.argmax(size[front] <= bucket * (1 + 1e-12))) for bucket in buckets[::-1]]
        front = front[sorted({0, len(front) - 1, *picked})]
    chosen = mixes[front]
    return Candidates(
        forward_ns=forward[front],
        backward_input_ns=backward[front],
        activation_bytes=chosen @ held,
        counts=tuple(
            tuple((option.label, int(n)) for option, n in sorted(zip(options, row, strict=True), key=lambda pair: pair[0].place) if n)
            for row in chosen
        ),
        moving=frozenset(option.label for option in options if option.place[0] == 1),
    )


def _mix_times(options: list[LayerOption], mixes: NDArray[np.int64], weight_ns: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[M] forward and backward (input part) of each mix, ns: of its layers, or of its copies where these take longer."""
    forward = mixes @ np.array([option.forward_ns for option in options])
    backward = mixes @ np.array([option.backward_input_ns for option in options])
    for index, option in enumerate(options):
        if not option.copy_ns:
            continue
        moved, in_turn = mixes[:, index], mixes[:, index] + mixes[:, 0]
        weights = mixes.sum(axis=1) * weight_ns
        forward = _copied_ns(forward, moved, in_turn, options[0].forward_ns, option.copy_ns)
        whole = _fetched_ns(backward + weights, moved, in_turn, options[0].backward_input_ns + weight_ns, option.copy_ns)
        backward = np.where(moved > 0, whole - weights, backward)
    return forward, backward


def _copied_ns(
    layers_ns: NDArray[np.float64], moved: NDArray[np.int64], in_turn: NDArray[np.int64], layer_ns: float, copy_ns: float
) -> NDArray[np.float64]:
    """[M] when stages' forwards and the copies of their offloaded layers are over.

    Args:
        layers_ns: [M] of the layers alone.
        moved, in_turn: [M] offloaded layers; those among which they are spread, themselves too, the last ones of the stage.
        layer_ns: of one of these.
    """
    now, copied, below = layers_ns - in_turn * layer_ns, np.zeros(len(moved)), np.full(len(moved), -1)
    for number in range(int(moved.max())):
        there = number < moved
        place = number * in_turn // np.maximum(moved, 1)
        ends = np.maximum(now + (place - below) * layer_ns, copied)  # by then the one before has been let go
        now, copied, below = np.where(there, ends, now), np.where(there, ends + copy_ns, copied), np.where(there, place, below)
    return np.maximum(now + (in_turn - 1 - below) * layer_ns, copied)


def _fetched_ns(
    layers_ns: NDArray[np.float64], moved: NDArray[np.int64], in_turn: NDArray[np.int64], layer_ns: float, copy_ns: float
) -> NDArray[np.float64]:
    """[M] when stages' backwards are over; the topmost offloaded layer is there, and the copies of a stage, of which the last is for the
    next stage, take no longer than the stage. Arguments as above."""
    now, arrives, above = np.zeros(len(moved)), np.zeros(len(moved)), in_turn.copy()
    for number in range(int(moved.max())):
        there = number < moved
        place = np.maximum(moved - 1 - number, 0) * in_turn // np.maximum(moved, 1)
        begins = np.maximum(now + (above - place - 1) * layer_ns, arrives)
        now, arrives = np.where(there, begins + layer_ns, now), np.where(there, np.maximum(begins, arrives) + copy_ns, arrives)
        above = np.where(there, place, above)
    return np.maximum(now + above * layer_ns + layers_ns - in_turn * layer_ns, moved * copy_ns)


def _mixes(num_layers: int, num_options: int) -> NDArray[np.int64]:
    """[M, num_options] ways to give each of ``num_layers`` equal layers one option, as counts (all of them while they are few)."""
    if num_options == 1:
        return np.array([[num_layers]], dtype=np.int64)
    rows: list[NDArray[np.int64]] = []
    if num_options == 3 and (num_layers + 1) * (num_layers + 2) // 2 <= _MIX_OF_THREE_LIMIT:
        first, second = np.meshgrid(np.arange(num_layers + 1), np.arange(num_layers + 1), indexing="ij")
        inside = first + second <= num_layers
        return np.stack((first[inside], second[inside], num_layers - first[inside] - second[inside]), axis=1)
    for a in range(num_options):
        for b in range(a + 1, num_options):
            mix = np.zeros((num_layers + 1, num_options), dtype=np.int64)
            mix[:, a] = np.arange(num_layers + 1)
            mix[:, b] = num_layers - mix[:, a]
            rows.append(mix)
    return np.unique(np.concatenate(rows), axis=0)
