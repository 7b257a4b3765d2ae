"""Batches that differ from a sample as a run's later batches may: the same microbatches with more, fewer or no instances of a modality.

In: batches of a sample. Out: for each module that feeds another and has work in the sample, five batches: its instances scaled by 0, 1/4,
1/2 and 2, and two-humped, microbatches by turns without any and with twice as many. No microbatch gets more instances than the sample's
fullest one has, so that what fits into memory there fits here. Besides, where the last module's instances are packed (clips), one batch of long
ones and one of short ones. Not modelled else: lengths that change, and modalities that change together.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dip.partition.offline import Batch, largest_count
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.workload import Microbatch

SCALES = (0.0, 0.25, 0.5, 2.0)
_DOUBLE = 2.0


def drifted_batches(model: ModelSpec, batches: Sequence[Batch]) -> list[Batch]:
    """The drifts of every module but the last one in topological order, each made of another batch of the sample in turn."""
    *feeding, _ = model.topological()
    found: list[Batch] = []
    for module in feeding:
        most = largest_count(module, batches)
        if not most:
            continue
        for scale in SCALES:
            batch = batches[len(found) % len(batches)]
            found.append(_drifted(module, batch, [scale] * len(batch), most))
        batch = batches[len(found) % len(batches)]
        found.append(_drifted(module, batch, [_DOUBLE * (index % 2) for index in range(len(batch))], most))
    found += _of_one_length(model.topological()[-1], batches)
    # Without its only module a batch has nothing to run.
    trainable = [[_without_loose_ends(model, microbatch) for microbatch in batch] for batch in found]
    return [batch for batch in trainable if any(lengths for microbatch in batch for lengths in microbatch.values())]


def _of_one_length(module: str, batches: Sequence[Batch]) -> list[Batch]:
    """Where the last module's instances are packed, so many as fit: batches of its longest one alone in each microbatch, and of as many of its
    shortest one as there ever are. Modules that have one instance for each of its (captions) have their shortest beside the longest, and
    their longest beside the shortest."""
    microbatches = [microbatch for batch in batches for microbatch in batch if microbatch.get(module)]
    if len({len(microbatch[module]) for microbatch in microbatches}) < 2:
        return []
    paired = {
        name for name in microbatches[0] if all(len(microbatch.get(name, ())) == len(microbatch[module]) for microbatch in microbatches)
    }
    found: list[Batch] = []
    for count, own, of_paired in ((1, max, min), (largest_count(module, batches), min, max)):
        lengths = {
            name: [(own if name == module else of_paired)(length for microbatch in microbatches for length in microbatch[name])] * count
            for name in paired
        }
        found.append([
            {name: list(lengths.get(name, kept) if microbatch.get(module) else kept) for name, kept in microbatch.items()}
            for microbatch in batches[0]
        ])
    return found


def _without_loose_ends(model: ModelSpec, microbatch: Microbatch) -> Microbatch:
    """The microbatch without encoders' instances that feed nothing any more: no workload may hold them."""
    kept = dict(microbatch)
    for name in reversed(model.topological()):
        consumers = model.consumers_of(name)
        if model.module(name).role == "encoder" and consumers and not any(kept.get(consumer) for consumer in consumers):
            kept.pop(name, None)
    return kept


def _drifted(module: str, batch: Batch, scales: Sequence[float], most: int) -> list[Microbatch]:
    """Instances are left out, or repeated, evenly over a microbatch; what rounding leaves over is carried to the next microbatch."""
    result: list[Microbatch] = []
    owed = 0.0
    for microbatch, scale in zip(batch, scales, strict=True):
        lengths = microbatch.get(module, [])
        owed += scale * len(lengths)
        count = min(int(owed + 0.5), most) if lengths else 0
        owed = max(-0.5, min(owed - count, 0.5))
        kept = [lengths[index * len(lengths) // count] for index in range(count)]
        result.append({**{name: list(own) for name, own in microbatch.items() if name != module}, **({module: kept} if kept else {})})
    return result
