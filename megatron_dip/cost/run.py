"""Costs of a run: times and activations of another model, and memory that means all of what a rank holds.

Analytic and measured costs differ in where times come from. What weights, gradients and optimizer take is known of the chunks that were
built, and a limit on memory means the same with either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.memory import input_bytes
from megatron_dip.cost.wrapped import WrappedCost
from megatron_dip.spec.model import ModelSpec

ChunkShape = tuple[str, int, bool, bool]
"""(module, layers, whether it has the embedding or stem, whether it has the projector or head)."""


class RunCosts(WrappedCost):
    def __init__(self, costs: CostModel, model: ModelSpec, chunk_bytes: Mapping[ChunkShape, int]) -> None:
        """Args:
        chunk_bytes: weights, gradients and optimizer state of a chunk of each shape on one rank; of unlike chunks of a shape the most.
        """
        super().__init__(costs)
        self._model = model
        self._chunk_bytes = dict(chunk_bytes)
        self._part_bytes = {module: _part_bytes(chunk_bytes, module) for module in {shape[0] for shape in chunk_bytes}}

    def static_bytes(self, module: str, num_layers: int, *, first: bool, last: bool) -> int:
        """Of a shape that was not built (another cut is being judged): by the bytes of a layer and of the ends that those built tell."""
        known = self._chunk_bytes.get((module, num_layers, first, last))
        if known is not None:
            return known
        layer, at_first, at_last = self._part_bytes[module]
        return round(num_layers * layer + first * at_first + last * at_last)

    def counts_all_memory(self) -> bool:
        return True

    def input_bytes(self, module: str, lengths: Sequence[int], *, at_first: bool) -> int:
        return input_bytes(self._model.module(module), lengths, at_first=at_first)


def _part_bytes(chunk_bytes: Mapping[ChunkShape, int], module: str) -> tuple[float, float, float]:
    """Bytes of a layer, of the embedding or stem, and of the projector or head: the least-squares solution, the smallest one where the
    chunks that were built do not tell them apart."""
    shapes = [shape for shape in chunk_bytes if shape[0] == module]
    rows = np.array([shape[1:] for shape in shapes], dtype=np.float64)
    solved, *_ = np.linalg.lstsq(rows, np.array([chunk_bytes[shape] for shape in shapes], dtype=np.float64))
    layer, first, last = np.maximum(solved, 0.0).tolist()
    return layer, first, last
