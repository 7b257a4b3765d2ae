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
from megatron_dip.partition.deal import Deal, deal, undealt
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
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], NDArray[np.int64]] = {}
        self._units: dict[tuple[str, tuple[int, ...], bool], NDArray[np.float64]] = {}

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
        below = self._model.gradients_into([name for name, lengths in microbatch.items() if lengths])
        for sub in split([microbatch], self._model, self._partition, self._costs):
            key = (sub.module, tuple(sorted(sub.lengths)), below[sub.module])
            if key not in self._units:
                self._units[key] = self._unit(*key)
            total += self._units[key]
        return np.rint(total).astype(np.int64)

    def _unit(self, name: str, lengths: tuple[int, ...], below: bool) -> NDArray[np.float64]:
        """ns on each rank of one pass of these instances through the whole module and back, as far as gradients go.

        Args:
            below: whether what feeds the module needs a gradient.
        """
        layer, first, last = (self._costs.part(name, part, lengths) for part in ("layer", "first", "last"))  # type: ignore[arg-type]
        parts, num_ranks = self._model.trainable_parts(name), self._partition.num_ranks
        sizes = [layers for row in self._partition.chunks[name] for layers in row]
        unit, first_layer = np.zeros(num_ranks), 0
        for index, layers in enumerate(sizes):
            at_first, at_last = index == 0, index == len(sizes) - 1
            backward = parts.stage(first_layer, layers, at_first=at_first, at_last=at_last, below=below)
            first_layer += layers
            unit[index % num_ranks] += layers * layer.forward_ns + first.forward_ns * at_first + last.forward_ns * at_last
            unit[index % num_ranks] += (
                backward.layers * layer.backward_input_ns + backward.first * first.backward_input_ns + backward.last * last.backward_input_ns
                + backward.weight_layers * layer.backward_weight_ns + backward.weight_first * first.backward_weight_ns
                + backward.weight_last * last.backward_weight_ns
            )
        return unit


def deal_batch(
    microbatches: Sequence[Microbatch], num_replicas: int, model: ModelSpec, partition: Partition, costs: CostModel, *, as_read: bool = False
) -> Deal | None:
    """A global batch dealt as training would; None where its microbatches are not as many for each replica, which training never has.

    Args:
        as_read: leave every microbatch with the replica that read it, number i with replica i mod ``num_replicas``.
    """
    if len(microbatches) % num_replicas:
        return None
    work = WorkEstimate(model, partition, costs).of(microbatches)
    return undealt(work, num_replicas) if as_read else deal(work, num_replicas)
