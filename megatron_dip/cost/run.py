"""Costs of a run: times and activations of another model, and memory that means all of what a rank holds.

Analytic and measured costs differ in where times come from. What weights, gradients and optimizer take is known of the chunks that were
built, and a limit on memory means the same with either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

    def static_bytes(self, module: str, num_layers: int, *, first: bool, last: bool) -> int:
        return self._chunk_bytes[module, num_layers, first, last]

    def counts_all_memory(self) -> bool:
        return True

    def input_bytes(self, module: str, lengths: Sequence[int], *, at_first: bool) -> int:
        return input_bytes(self._model.module(module), lengths, at_first=at_first)
