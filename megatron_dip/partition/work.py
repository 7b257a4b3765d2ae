"""How much a microbatch asks of each pipeline rank, before anything is planned: what dealing microbatches to replicas goes by.

In: metadata, the run's partition and a cost model. Out: ns on each rank, forward and backward, nothing recomputed: the sum of the
durations of the stages that the microbatch would have. A replica's planned time follows the load of its busiest rank closely; what
bubbles and recomputation add is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.online import split
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import Microbatch


class WorkEstimate:
    """Work of microbatches under one partition and one cost model; equal metadata are asked for once.

    Args:
        costs: as the plans will be made with.
    """

    def __init__(self, model: ModelSpec, partition: Partition, costs: CostModel) -> None:
        self._model, self._partition, self._costs = model, partition, costs
        self._runs_backward = model.backward_modules()
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], NDArray[np.int64]] = {}
        self._units: dict[tuple[str, tuple[int, ...]], NDArray[np.float64]] = {}
        self._layers = {
            module.name: np.sum(np.array(partition.chunks[module.name], dtype=np.int64), axis=0) for module in model.modules
        }

    def of(self, microbatches: Sequence[Microbatch]) -> NDArray[np.int64]:
        """ns on each pipeline rank [microbatches, ranks]. Raises InputError for metadata that no model could run."""
        work = np.empty((len(microbatches), self._partition.num_ranks), dtype=np.int64)
        for index, microbatch in enumerate(microbatches):
            key = tuple(sorted((name, tuple(lengths)) for name, lengths in microbatch.items()))
            if key not in self._known:
                self._known[key] = self._work(microbatch)
            work[index] = self._known[key]
        return work

    def _work(self, microbatch: Microbatch) -> NDArray[np.int64]:
        total = np.zeros(self._partition.num_ranks)
        for sub in split([microbatch], self._model, self._partition, self._costs):
            key = (sub.module, tuple(sorted(sub.lengths)))
            if key not in self._units:
                self._units[key] = self._unit(*key)
            total += self._units[key]
        return np.rint(total).astype(np.int64)

    def _unit(self, name: str, lengths: tuple[int, ...]) -> NDArray[np.float64]:
        """ns on each rank of one pass of these instances through the whole module and back."""
        layer, first, last = (self._part_ns(name, part, lengths) for part in ("layer", "first", "last"))
        unit = self._layers[name] * layer
        unit[0] += first
        unit[-1] += last
        return unit

    def _part_ns(self, name: str, part: str, lengths: tuple[int, ...]) -> float:
        cost = self._costs.part(name, part, lengths)  # type: ignore[arg-type]
        if not self._runs_backward[name]:
            return cost.forward_ns
        weight = cost.backward_weight_ns if self._model.module(name).trainable else 0.0
        return cost.forward_ns + cost.backward_input_ns + weight
