"""What the layers of a stage need for a moment besides what they hold: recomputed layers, and offloaded ones on their way.

In: how many layers of a stage pair are under each strategy. Out: :class:`Rooms`, bytes of each candidate. Layers stand in the order in
which stages run them (:func:`layer_place`): recomputed ones first, then offloaded ones, then those that keep all, beside which copies run.

- A forward has the last two offloaded layers whole: one that runs, one that is being copied; the copy is over behind the next layer.
- A backward finds its topmost offloaded layer fetched: that has come since the task before it. While one layer's backward runs the one
  below is fetched. A recomputed layer is there whole while its backward runs, with what is held of the layers below it.
- Where the backward is split, the inputs of linear layers stay for the weights' part: by the convention of plans half of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import PartCost
from megatron_dip.spec.profile import Strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """[candidates] bytes each; [C, S] for all classes of a problem."""

    forward: NDArray[np.int64]
    """For the forward's time"""
    backward: NDArray[np.int64]
    """For the backward's time (its input part's, when split), besides ``ahead``"""
    ahead: NDArray[np.int64]
    """From the start of the task before the backward to the backward's end"""
    between: NDArray[np.int64]
    """From the forward's start to the backward's end: the input of a stage whose first layer is offloaded, which stays"""
    weight: NDArray[np.int64]
    """From the backward's start to the weight part's end"""


def layer_place(strategy: Strategy) -> tuple[int, float]:
    """Sorts the strategies of a stage's layers from the first layers to the last."""
    if strategy.offload is not None:
        return 1, 0.0
    return (0, strategy.activation) if strategy.extra_forward > 0 else (2, 0.0)


@dataclass(frozen=True, slots=True)
class _Layers:
    """Equal layers of a stage."""

    count: int
    kept: float
    """Bytes of one layer from forward to backward"""
    moved: float
    recomputed: float


def layer_rooms(layer: PartCost, strategies: Mapping[str, Strategy], mixes: Sequence[Sequence[tuple[str, int]]], *, split: bool) -> Rooms:
    """Args:
    layer: one layer that keeps all.
    mixes: the candidates, each as (strategy, layers under it).
    split: whether the weights' part of the backward stands apart.
    """
    rows = [_rooms_of(layer, strategies, mix, split) for mix in mixes]
    forward, backward, ahead, between, weight = (np.rint(np.array(column)).astype(np.int64) for column in zip(*rows, strict=True))
    return Rooms(forward=forward, backward=backward, ahead=ahead, between=between, weight=weight)


def _rooms_of(
    layer: PartCost, strategies: Mapping[str, Strategy], mix: Sequence[tuple[str, int]], split: bool
) -> tuple[float, float, float, float, float]:
    whole = layer.activation_bytes
    layers = []
    for label, count in sorted(mix, key=lambda pair: layer_place(strategies[pair[0]])):
        strategy = strategies[label]
        there = whole * strategy.activation
        kept = there if strategy.offload is None else there * strategy.offload.activation
        layers.append(_Layers(count, kept, there - kept, whole - there if strategy.extra_forward > 0 else 0.0))
    held = sum(of.count * of.kept for of in layers)

    forward_peak, live, moving = held, 0.0, 0.0
    for of in layers:
        if of.moved > 0:
            live += of.count * of.kept
            forward_peak = max(forward_peak, live + min(of.count, 2) * of.moved)
            moving = of.moved
        else:
            forward_peak = max(forward_peak, live + of.kept + moving)
            live += of.count * of.kept
            moving = 0.0

    ahead = max((of.moved for of in layers), default=0.0)
    backward_peak, live = held + ahead, held
    for of in reversed(layers):
        # One layer that is there again; of offloaded ones the next one beside it.
        again = min(of.count, 2) * of.moved if of.moved > 0 else of.recomputed
        backward_peak = max(backward_peak, live + again)
        live -= of.count * of.kept * (0.5 if split else 1.0)
    between = layer.boundary_bytes if layers and layers[0].moved > 0 and layers[0].kept < layer.boundary_bytes else 0.0
    weight = 0.5 * sum(of.count * (of.moved + of.recomputed) for of in layers) if split else 0.0
    return forward_peak - held, backward_peak - held - ahead, ahead, between, weight
