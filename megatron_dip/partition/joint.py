"""Our own choice of B, K and uneven layers together, once a run.

In: the model, the ranks, a sample of batches, costs, and ``evaluate``, which schedules one batch on one partition. Out: a
:class:`PartitionChoice`. A cut is worth the mean, over all judged batches, of the time that a batch takes on it over the batch's free bound
(:func:`~megatron_dip.partition.offline.cheapest_work_ns` / P), so that light batches count as much as heavy ones. Judged are some batches
of the sample and drifted ones made from it (:mod:`megatron_dip.partition.drift`), since weights stay where they are while the data move.

The choice descends over one thing at a time, first with short evaluations, then from the best few with thorough ones. It starts from
several corners, since the choices interact. Its limits are numbers of evaluations: the same input gives the same cut on every machine. A
module without work in the sample is cut evenly, since nothing is known of its weight.

Not modelled: choices that differ between batches (weights never move), and K other than :data:`CHUNKS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.drift import drifted_batches
from megatron_dip.partition.offline import (
    EFFICIENCY,
    LEADS,
    LEVELS,
    TILTS,
    Batch,
    Cut,
    ModuleWork,
    balanced_partition,
    cheapest_work_ns,
    largest_count,
    layer_ns,
    module_work,
    sizes_up_to,
)
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import Microbatch

CHUNKS = (1, 2, 3, 4, 6, 8)
"""K that are tried, as far as a chunk has a layer."""
_TOLL = 0.0005
"""Share by which every further chunk a rank must shorten the iteration: more stages leave the online search fewer tries."""
_WASTE = 1.25
"""Sizes whose work exceeds the best size's by more than this are not tried."""
_WORK_SAMPLE = 256
"""Microbatches whose work is summed up; a sample's loads converge well before."""
_GIVEN_JUDGED = 2
"""Batches of the sample that are judged as they are, evenly spaced."""
_UNSEEN_CHUNKS, _UNSEEN_SIZE, _UNSEEN_TOKENS = 2, 4, 1024
"""Of a module without work in the sample: K, the least B, and the length for which B is efficient."""

Evaluate = Callable[[Partition, Batch, bool], float]
"""ns that a batch takes on a partition, found out thoroughly (True) or shortly (False); math.inf where it does not fit."""


class NothingFits(Exception):
    """Every partition that was judged exceeds a rank's memory on the sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceLimits:
    """Partitions evaluated at most."""

    short: int = 60
    thorough: int = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionChoice:
    partition: Partition
    expected_ns: float
    """Mean over the judged batches of the sample, drifted ones left out, of the scheduled time"""
    ratio: float
    """Mean over all judged batches of the scheduled time over the batch's free bound"""
    judged: int
    """Batches that every candidate was judged on"""
    candidates: int
    """Evaluations of a partition, short and thorough ones"""
    warnings: tuple[str, ...]
    """Modules of which the sample says nothing"""


def judged_batches(model: ModelSpec, batches: Sequence[Batch], *, drift: bool = True) -> tuple[list[Batch], list[Batch]]:
    """(batches of the sample that are judged as they are, drifted ones)."""
    count = min(len(batches), _GIVEN_JUDGED)
    given = [batches[index * len(batches) // count] for index in range(count)]
    return given, drifted_batches(model, batches) if drift else []


def choose_partition(
    model: ModelSpec,
    num_ranks: int,
    batches: Sequence[Batch],
    costs: CostModel,
    evaluate: Evaluate,
    *,
    drift: bool = True,
    limits: ChoiceLimits | None = None,
    chunks: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> PartitionChoice:
    """The cut of least expected time over free bound. Deterministic if ``evaluate`` is.

    Args:
        batches: the sample.
        drift: judge drifted batches too.
        chunks, sizes: K and B that are given and not varied.
        progress: called after each evaluation with their number and the best ratio so far.

    Raises:
        NothingFits: no candidate does.
    """
    given, drifted = judged_batches(model, batches, drift=drift)
    descent = _Descent(model, num_ranks, [*given, *drifted], costs, evaluate, limits or ChoiceLimits(), chunks or {}, sizes or {}, progress)
    # What a module may be cut into goes by the whole sample.
    descent.find_options(batches)
    best = descent.run()
    times = descent.times(best, True)
    if math.isinf(sum(times)):
        raise NothingFits
    return PartitionChoice(
        partition=descent.build(best), expected_ns=sum(times[: len(given)]) / len(given), ratio=descent.ratio(times),
        judged=len(times), candidates=len(descent.known), warnings=tuple(
            f"no batch of the sample has any work for module {name!r}: it is cut evenly, without knowing what it weighs; give a sample that has some"
            for name in descent.unseen
        ),
    )


class _Descent:
    """The choices, what is known of each, and the way down."""

    def __init__(
        self, model: ModelSpec, num_ranks: int, judged: Sequence[Batch], costs: CostModel, evaluate: Evaluate, limits: ChoiceLimits,
        chunks: Mapping[str, int], sizes: Mapping[str, int], progress: Callable[[int, float], None] | None,
    ) -> None:
        self.model, self.num_ranks, self.judged, self.costs = model, num_ranks, judged, costs
        self.evaluate, self.limits, self.progress = evaluate, limits, progress
        self.given_chunks, self.given_sizes = chunks, sizes
        self.free = [max(cheapest_work_ns(model, batch, costs) / num_ranks, 1.0) for batch in judged]
        everything = [microbatch for batch in judged for microbatch in batch]
        self.microbatches: list[Microbatch] = everything[:: max(1, len(everything) // _WORK_SAMPLE)]
        self.known: dict[tuple[str, bool], list[float]] = {}
        """(partition, thoroughly) -> ns of judged batches, in their order, as far as these were needed"""
        self.unseen: list[str] = []
        self.chunk_options: list[list[int]] = []
        self.size_options: list[list[int]] = []
        self._work: dict[tuple[int, int], ModuleWork] = {}
        self._built: dict[Cut, Partition] = {}

    def find_options(self, batches: Sequence[Batch]) -> None:
        """K and B that are tried for each module."""
        for index, module in enumerate(self.model.modules):
            most = largest_count(module.name, batches)
            chunks = [count for count in CHUNKS if count == 1 or count * self.num_ranks <= module.num_layers]
            if most:
                tried = sizes_up_to(most)
                cheapest = min(self.work(index, size).layer for size in tried)
                sizes = [size for size in tried if self.work(index, size).layer <= _WASTE * cheapest]
            else:
                self.unseen.append(module.name)
                sizes = [self._unseen_size(module.name)]
                chunks = [count for count in chunks if count <= _UNSEEN_CHUNKS][-1:]
            self.chunk_options.append([self.given_chunks[module.name]] if module.name in self.given_chunks else chunks)
            self.size_options.append([self.given_sizes[module.name]] if module.name in self.given_sizes else sizes)

    def _unseen_size(self, module: str) -> int:
        sizes = [size for size in sizes_up_to(16) if size >= _UNSEEN_SIZE]
        efficiency = {size: size / max(layer_ns(module, [_UNSEEN_TOKENS] * size, self.costs), 1e-9) for size in sizes}
        return min(size for size, value in efficiency.items() if value >= EFFICIENCY * max(efficiency.values()))

    def work(self, index: int, size: int) -> ModuleWork:
        if (index, size) not in self._work:
            self._work[index, size] = module_work(self.model, self.model.modules[index].name, size, self.microbatches, self.costs)
        return self._work[index, size]

    def build(self, cut: Cut) -> Partition:
        if cut not in self._built:
            work = [self.work(index, size) for index, size in enumerate(cut.sizes)]
            self._built[cut] = balanced_partition(self.model, self.num_ranks, cut, work)
        return self._built[cut]

    def _known(self, cut: Cut, thorough: bool) -> list[float]:
        """Another levelling may change nothing: a partition is judged once."""
        return self.known.setdefault((repr(self.build(cut)), thorough), [])

    def times(self, cut: Cut, thorough: bool) -> list[float]:
        """ns of each judged batch."""
        self.score(cut, thorough)
        return self._known(cut, thorough)

    def ratio(self, times: Sequence[float]) -> float:
        """Of time over free bound, mean over all judged batches; no batch that is not known yet can be below its bound."""
        known = sum(time / free for time, free in zip(times, self.free, strict=False))
        return (known + len(self.judged) - len(times)) / len(self.judged)

    def score(self, cut: Cut, thorough: bool, limit: float = math.inf) -> float:
        """What the descent goes by; or, where that is at least ``limit``, some number from there up to it: batches are judged until it shows."""
        partition, times = self.build(cut), self._known(cut, thorough)
        before = len(times)
        toll = 1.0 + _TOLL * sum(cut.chunks)
        while len(times) < len(self.judged) and self.ratio(times) * toll < limit:
            times.append(self.evaluate(partition, self.judged[len(times)], thorough))
        if len(times) > before and self.progress is not None:
            complete = [self.ratio(of_one) for of_one in self.known.values() if len(of_one) == len(self.judged)]
            self.progress(len(self.known), min(complete, default=math.inf))
        return self.ratio(times) * toll

    def best_of(self, cuts: Sequence[Cut], thorough: bool, count: int) -> list[Cut]:
        """The ``count`` cuts of least score, the best one first, equal ones in their order. The others are judged only until that shows."""
        left = list(cuts)
        found: list[Cut] = []
        while left and len(found) < count:
            bounds = [self.score(cut, thorough, 0.0) for cut in left]
            first = min(range(len(left)), key=bounds.__getitem__)
            others = [bound for index, bound in enumerate(bounds) if index != first]
            # Up to where it would not be the first any more, at least by one batch.
            exact = self.score(left[first], thorough, math.nextafter(min(others, default=math.inf), math.inf))
            is_known = math.isinf(exact) or len(self._known(left[first], thorough)) == len(self.judged)
            if is_known and exact <= min(others, default=math.inf):
                found.append(left.pop(first))
        return found

    def full(self, thorough: bool, limit: int) -> bool:
        return sum(key[1] == thorough for key in self.known) >= limit

    def run(self) -> Cut:
        """Two short descents: the better of two valleys, and a wider choice for the thorough look; then one thorough descent."""
        starts = self.starts()
        ranked = self.best_of(list(dict.fromkeys(starts)), False, 2)
        ends = [self.descend(cut, False, self.limits.short * (number + 1) // 2) for number, cut in enumerate(ranked)]
        near = [neighbour for end in ends for neighbour in [end, *self.neighbours(end)]]
        tried = [cut for cut in dict.fromkeys([*ends, *near, *starts]) if (repr(self.build(cut)), False) in self.known]
        finalists = self.best_of(tried, False, max(1, self.limits.thorough // 3))
        best, = self.best_of(finalists, True, 1)
        return self.descend(best, True, self.limits.thorough)

    def starts(self) -> list[Cut]:
        starts = [self._corner(*shares) for shares in ((0.0, 0.5), (0.3, 0.3), (0.9, 0.6), (0.3, 0.0), (0.6, 0.2))]
        # Few chunks and large parts, whose first segment is short by its tilt alone: best where every further stage costs time.
        return [*starts, replace(self._corner(0.3, 0.9), tilt=(TILTS.index(0.5),) * len(self.model.modules))]

    def _corner(self, chunk_share: float, size_share: float) -> Cut:
        def at(values: Sequence[int], share: float) -> int:
            return values[min(len(values) - 1, int(share * len(values)))]

        none = (0,) * len(self.model.modules)
        return Cut(
            chunks=tuple(at(values, chunk_share) for values in self.chunk_options),
            sizes=tuple(at(values, size_share) for values in self.size_options), lead=none, tilt=none, level="work",
        )

    def descend(self, cut: Cut, thorough: bool, limit: int) -> Cut:
        """Goes on to the first better neighbour until there is none, or so many evaluations have been made."""
        improved = True
        while improved:
            improved = False
            for neighbour in self.neighbours(cut):
                if self.full(thorough, limit):
                    return cut
                score = self.score(cut, thorough)
                if self.score(neighbour, thorough, score) < score:
                    cut, improved = neighbour, True
                    break
        return cut

    def neighbours(self, cut: Cut) -> list[Cut]:
        """Cuts that differ in one choice by one step, and those that change it for all modules together."""
        count = len(self.model.modules)
        options: dict[str, list[list[int]]] = {
            "chunks": self.chunk_options, "sizes": self.size_options, "lead": [list(range(len(LEADS)))] * count,
            "tilt": [list(range(len(TILTS)))] * count,
        }
        found = [replace(cut, level=level) for level in LEVELS if level != cut.level]
        for field, by_module in options.items():
            values: tuple[int, ...] = getattr(cut, field)
            for step in (1, -1):
                moved = {}
                for index, own in enumerate(by_module):
                    at = own.index(values[index]) + step
                    if 0 <= at < len(own):
                        moved[index] = own[at]
                        found.append(_with(cut, field, (*values[:index], own[at], *values[index + 1 :])))
                if len(moved) > 1:
                    found.append(_with(cut, field, tuple(moved.get(index, value) for index, value in enumerate(values))))
        return found


def _with(cut: Cut, field: str, values: tuple[int, ...]) -> Cut:
    return replace(cut, **{field: values})  # type: ignore[arg-type]
