"""What each stage pair may choose between: up to S candidates of (forward time, backward time, bytes held).

In: the cost of one layer, the number of layers, and the layer's memory strategies. Out: :class:`Candidates`, from the fastest to the
leanest. Source: DIP (arXiv 2504.14145), section on per-layer memory optimisation: the fastest, the leanest, and S - 2 by memory bucket
from a multiple-choice knapsack over the layers' strategies. The layers of a chunk are alike, so a knapsack's solution is a number of
layers for each strategy, and all of them can be listed.

Not modelled: strategies of the first and last extras (embedding, head), which always keep their activations.

Offloaded layers: copies each way have the rank's host link to themselves (both ways at once) and run one after the other, so that a layer
takes the longer of its compute and its copy, and copies cannot hide more than there is time for. Where ranks of a node share a link,
``bytes_per_second`` is a rank's share of it. What is on its way counts in :mod:`megatron_dip.schedule.rooms`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import PartCost
from megatron_dip.schedule.rooms import layer_place
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
    """S tuples of (strategy, layers under it), from a stage's first layers to its last."""

    def strategy_list(self, index: int) -> list[str]:
        """The strategy of each layer, layers under one strategy together."""
        return [label for label, count in self.counts[index] for _ in range(count)]


def layer_options(
    layer: PartCost, strategies: Mapping[str, Strategy], *, has_backward: bool, weight_beside: bool = False
) -> list[LayerOption]:
    """``none`` and each strategy that is worth choosing: no other but ``none`` is at least as good in both time and bytes.

    ``none`` stays even where an offload hides behind compute, since it moves nothing. A module without a backward holds nothing, so only the plain forward remains.

    Args:
        weight_beside: the weights' part of the backward runs while the next layer is fetched, too.
    """
    beside_ns = layer.backward_weight_ns if weight_beside else 0.0
    options = [_apply("none", strategies["none"], layer, beside_ns)]
    if has_backward:
        options += [_apply(label, strategy, layer, beside_ns) for label, strategy in strategies.items() if label != "none"]
    options.sort(key=lambda option: (option.forward_ns + option.backward_input_ns, option.label != "none", option.activation_bytes))
    kept: list[LayerOption] = []
    for option in options:
        if not kept or option.activation_bytes < kept[-1].activation_bytes:
            kept.append(option)
    return kept


def _apply(label: str, strategy: Strategy, layer: PartCost, beside_ns: float) -> LayerOption:
    forward = layer.forward_ns
    backward = layer.backward_input_ns + strategy.extra_forward * layer.forward_ns
    held = strategy.activation * layer.activation_bytes
    if strategy.offload is not None:
        moved = held * (1.0 - strategy.offload.activation)
        held *= strategy.offload.activation
        transfer = moved * 1e9 / strategy.offload.bytes_per_second
        forward, backward = max(forward, transfer), max(backward, transfer - beside_ns)
    return LayerOption(label, forward, backward, held, layer_place(strategy))


def pair_candidates(options: list[LayerOption], num_layers: int, limit: int = MAX_CANDIDATES) -> Candidates:
    """Up to ``limit`` mixes of the options over ``num_layers`` equal layers: fastest, leanest and the fastest of each memory bucket."""
    mixes = _mixes(num_layers, len(options))
    forward = np.array([option.forward_ns for option in options])
    backward = np.array([option.backward_input_ns for option in options])
    held = np.array([option.activation_bytes for option in options])
    time, size = mixes @ (forward + backward), mixes @ held
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
        forward_ns=chosen @ forward,
        backward_input_ns=chosen @ backward,
        activation_bytes=chosen @ held,
        counts=tuple(
            tuple((option.label, int(n)) for option, n in sorted(zip(options, row, strict=True), key=lambda pair: pair[0].place) if n)
            for row in chosen
        ),
    )


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
