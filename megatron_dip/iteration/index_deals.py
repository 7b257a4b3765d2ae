"""Balance across data-parallel replicas where lengths are known before data are read: indices are dealt, and no data move.

Every replica knows which samples all of them are going to read and how long these are, computes the same deal, and reads what it was
dealt. Nothing is exchanged, nothing can be late. Estimates must be the same on all ranks, so they come from costs that are not measured
by one of them. For Megatron's samplers over a map-style data set (:class:`DealtSampler`) that tells lengths (:class:`TellsLengths`).
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from megatron_dip.iteration.balance import BalanceFigures
from megatron_dip.iteration.dealing import WORTH, Estimate
from megatron_dip.partition.deal import deal
from megatron_dip.spec.workload import Microbatch

_PROBED_LENGTHS = (64, 1024, 4096)
"""Tokens."""

logger = logging.getLogger(__name__)


@runtime_checkable
class TellsLengths(Protocol):
    """A map-style data set whose samples' lengths are known without reading them."""

    def instance_lengths(self, index: int) -> Mapping[str, Sequence[int]]:
        """Module -> sequence length of each instance (image, text) of the sample, as the model will be given it."""
        ...


def find_lengths(dataset: Any) -> TellsLengths | None:
    """The data set that tells lengths, at or below ``dataset`` (Megatron wraps one to seed it, and keeps it in ``dataset``)."""
    while dataset is not None and not isinstance(dataset, TellsLengths):
        dataset = getattr(dataset, "dataset", None)
    return dataset


class IndexDeals:
    """Deals global batches from their metadata, on every rank alike.

    Args:
        estimate: work of microbatches, the same on all ranks.
    """

    def __init__(self, estimate: Estimate, num_replicas: int) -> None:
        self._estimate = estimate
        self._num_replicas = num_replicas
        self._left: Counter[str] = Counter()
        self._dealt = self._moves = 0
        self._imbalance_before = self._imbalance = 1.0

    def shares(self, microbatches: Sequence[Microbatch]) -> list[list[int]]:
        """Each replica's microbatches as numbers in the global batch, of which number n is replica n mod R's as read."""
        as_read = [list(range(replica, len(microbatches), self._num_replicas)) for replica in range(self._num_replicas)]
        try:
            dealt = deal(self._estimate(microbatches), self._num_replicas)
        except Exception as error:
            if not self._left["unknown"]:
                logger.warning("a global batch could not be dealt (counted, not said again): %s: %s", type(error).__name__, error)
            self._left["unknown"] += 1
            return as_read
        self._imbalance_before = self._imbalance = dealt.imbalance_before
        if dealt.load_before_ns.max() - dealt.load_ns.max() < WORTH * dealt.load_before_ns.max():
            self._left["even"] += 1
            return as_read
        self._imbalance = dealt.imbalance
        self._dealt += 1
        self._moves += dealt.moves
        return dealt.shares()

    def fingerprint(self, modules: Sequence[str]) -> str:
        """Equal where estimates are: with each of the model's modules at a few lengths in turn."""
        short = {module: [_PROBED_LENGTHS[0]] for module in modules}
        probes = [{**short, module: [length]} for module in modules for length in _PROBED_LENGTHS]
        return hashlib.sha256(np.asarray(self._estimate(probes)).tobytes()).hexdigest()

    def figures(self, measured_imbalance: float) -> BalanceFigures:
        """Of the batches read so far, which are ahead of those trained. ``measured_imbalance``: of the last iteration."""
        return BalanceFigures(
            dealt=self._dealt, left=dict(self._left), moves=self._moves, bytes_sent=0, seconds=0.0, waited_s=0.0,
            imbalance_before=self._imbalance_before, imbalance=self._imbalance, planned_imbalance=None, measured_imbalance=measured_imbalance,
        )


class DealtSampler:
    """A replica's batch sampler whose global batches are dealt: gives lists of indices, one for each microbatch.

    Args:
        sampler: one of Megatron's: it has ``data_parallel_rank``, and with another one gives what that replica reads.
        num_replicas: R.
        lengths: of one sample.
        sizes: microbatches of a replica in each global batch to come.
        deals: the same on all ranks.
    """

    def __init__(
        self, sampler: Any, num_replicas: int, lengths: Callable[[int], Mapping[str, Sequence[int]]], sizes: Iterator[int], deals: IndexDeals
    ) -> None:
        self._sampler = sampler
        self._num_replicas = num_replicas
        self._lengths = lengths
        self._sizes = sizes
        self._deals = deals
        self._left = 0
        """Microbatches to come of a global batch that an epoch's end divides."""

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[list[int]]:
        of_replicas = []
        for replica in range(self._num_replicas):
            other = copy.copy(self._sampler)
            other.data_parallel_rank = replica
            of_replicas.append(other)
        own, streams = self._sampler.data_parallel_rank, [iter(sampler) for sampler in of_replicas]
        at_end = False
        while not at_end:
            size = self._left or next(self._sizes)
            batch: list[Any] = []
            while len(batch) < size * self._num_replicas and not at_end:
                row = [next(stream, None) for stream in streams]
                if all(indices is not None and len(indices) == self._sampler.micro_batch_size for indices in row):
                    batch += row
                else:
                    at_end = True
            self._left = size - len(batch) // self._num_replicas
            yield from self._dealt(batch, own)
            # Samplers that count what they give go on from there in their next epoch.
            self._sampler.consumed_samples = of_replicas[own].consumed_samples
            if at_end and row[own]:
                yield row[own]  # a remainder, of a sampler that does not drop it

    def _dealt(self, batch: Sequence[Any], replica: int) -> list[list[int]]:
        """The replica's microbatches of a global batch, or of what an epoch's end leaves of it."""
        if not batch:
            return []
        microbatches = []
        for indices in batch:
            joined: dict[str, list[int]] = {}
            for index in indices:
                for module, lengths in self._lengths(index).items():
                    joined.setdefault(module, []).extend(lengths)
            microbatches.append(joined)
        return [batch[number] for number in self._deals.shares(microbatches)[replica]]
