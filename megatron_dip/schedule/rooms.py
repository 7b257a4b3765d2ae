"""What the layers of a stage need for a moment besides what they hold: recomputed layers, and offloaded ones on their way.

In: how many layers of a stage pair are under each strategy. Out: :class:`Rooms`, bytes of each candidate. Layers stand in the order in
which stages run them: recomputed ones first (:func:`layer_place`), then the others, among which offloaded ones are spread evenly
(:func:`offloaded_places`), so that copies run beside layers that keep all.

- A forward has the last two offloaded layers whole: one that runs, one that is being copied; the copy is over behind the next offloaded
  layer, or before the rank's next task.
- A backward finds its topmost offloaded layer fetched: that has come since the task before it. From the start of one offloaded layer's
  backward on the next one below is fetched. A recomputed layer is there whole while its backward runs, with what is held of the layers below it.
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


def offloaded_places(num_offloaded: int, num_layers: int) -> list[int]:
    """Which of ``num_layers`` layers, those that are not recomputed, are the offloaded ones: evenly spread, the first among them."""
    return [number * num_layers // num_offloaded for number in range(num_offloaded)]


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

    moved = max((of.moved for of in layers), default=0.0)
    # Layers that keep all and stand behind the last offloaded one.
    offloaded = sum(of.count for of in layers if of.moved > 0)
    in_turn = sum(of.count for of in layers if of.moved > 0 or of.recomputed == 0.0)
    behind = in_turn - 1 - offloaded_places(offloaded, in_turn)[-1] if offloaded else 0
    two = min(offloaded, 2) * moved - behind * whole
    forward_peak = held + max(moved, two, 0.0)

    freed = 0.5 if split else 1.0
    backward_peak = held + max(moved, min(offloaded, 2) * moved - freed * behind * whole)
    live = held
    for of in reversed(layers):
        backward_peak = max(backward_peak, live + of.recomputed)
        live -= of.count * of.kept * freed
    between = layer.boundary_bytes if layers and layers[0].moved > 0 and layers[0].kept < layer.boundary_bytes else 0.0
    weight = 0.5 * sum(of.count * (of.moved + of.recomputed) for of in layers) if split else 0.0
    return forward_peak - held, backward_peak - held - moved, moved, between, weight
