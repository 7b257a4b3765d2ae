"""Once a run: how the layers of each module are cut into chunks, and the sub-microbatch sizes.

In: the model, the ranks, a sample of batches, costs. Out: a :class:`~megatron_dip.spec.partition.Partition`. Three ways:

- :func:`even_partition`: given K and B, layers as even as can be.
- :func:`paper_partition`: the rules of DIP (arXiv 2504.14145, section on the modality-aware partitioner): the smallest B_i that keeps
  95 % of the best efficiency, K_i = floor(T_i / T_1), layers even.
- :func:`choose_partition`: our own joint choice of B, K and uneven layers. It descends over one choice at a time and judges every
  candidate by what it is told: the caller's ``evaluate``, the time of a scheduled batch. It starts from several corners, since the
  choices interact.

Not modelled: choices that differ between batches (weights never move), and K other than :data:`CHUNKS`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from megatron_dip.cost.interface import CostModel, Part
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import Microbatch

Batch = Sequence[Microbatch]
"""One replica's microbatches of one iteration."""

CHUNKS = (1, 2, 3, 4, 6, 8)
"""K that are tried, as far as a chunk has a layer."""
EFFICIENCY = 0.95
"""Of the paper's rule for B_i."""
_SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64)
"""Sub-microbatch sizes that are tried."""
_TOLL = 0.0005
"""Share by which every further chunk a rank must shorten the iteration: more stages leave the online search fewer tries."""
_WASTE = 1.25
"""Sizes whose work exceeds the best size's by more than this are not tried."""
TIME_LIMIT_S = 25.0
"""Of the joint choice: the largest setup takes half of it on an ordinary core."""
_SHORT_SHARE = 0.6
"""Share of the time limit for short evaluations."""
_WORK_SAMPLE = 256
"""Microbatches whose work is summed up; a sample's loads converge well before."""


def even_partition(
    model: ModelSpec, num_ranks: int, chunks: Mapping[str, int], sub_microbatch_size: Mapping[str, int]
) -> Partition:
    """Cuts every module into ``chunks[module]`` chunks a rank with numbers of layers as equal as can be.

    Where P * K does not divide the layers, the first chunks in layer order hold one more: ranks differ by at most one layer, and the
    last chunk, which may hold a head, is among the smaller ones. With fewer layers than P * K the last chunks are empty.

    Args:
        chunks: module -> K, chunks a rank; a module that is absent gets 1.
        sub_microbatch_size: module -> instances in a full sub-microbatch; a module that is absent gets 1.
    """
    for field, given in (("chunks", chunks), ("sub_microbatch_size", sub_microbatch_size)):
        for name, value in given.items():
            if name not in {module.name for module in model.modules}:
                raise InputError(field, name, "the model has no such module", f"use {[module.name for module in model.modules]}")
            if value < 1:
                raise InputError(f"{field}.{name}", value, "must be at least 1", "give a positive whole number")
    rows: dict[str, list[list[int]]] = {}
    for module in model.modules:
        slots = num_ranks * chunks.get(module.name, 1)
        base, extra = divmod(module.num_layers, slots)
        sizes = [base + (slot < extra) for slot in range(slots)]
        rows[module.name] = [sizes[start : start + num_ranks] for start in range(0, slots, num_ranks)]
    return Partition(chunks=rows, sub_microbatch_size={m.name: sub_microbatch_size.get(m.name, 1) for m in model.modules})


def largest_count(module: str, batches: Sequence[Batch]) -> int:
    """Most instances of a module in one microbatch; 0 where it never has any."""
    return max((len(microbatch.get(module, ())) for batch in batches for microbatch in batch), default=0)


def _work_sample(batches: Sequence[Batch]) -> list[Microbatch]:
    """Microbatches evenly spaced over the sample."""
    everything = [microbatch for batch in batches for microbatch in batch]
    step = max(1, len(everything) // _WORK_SAMPLE)
    return everything[::step]


@dataclass(frozen=True, slots=True)
class ModuleWork:
    """ns that the sample's microbatches spend in a module, forward and backward, in sub-microbatches of one size."""

    layer: float
    """In one layer"""
    first: float
    """In the embedding or stem"""
    last: float
    """In the head and loss"""
    parts: int
    """Sub-microbatches"""


def module_work(model: ModelSpec, module: str, size: int, microbatches: Sequence[Microbatch], costs: CostModel) -> ModuleWork:
    """Work of a module in parts of equal count (what the sub-microbatches of equal cost come to, near enough to rank by)."""
    parts = model.trainable_parts(module)
    # For each way in which a microbatch's other modules need gradients: the module as if it were one stage.
    whole = {
        below: parts.stage(0, model.module(module).num_layers, at_first=True, at_last=True, below=below) for below in (False, True)
    }
    needs: dict[frozenset[str], bool] = {}
    shapes: Counter[tuple[tuple[int, ...], bool]] = Counter()
    for microbatch in microbatches:
        lengths = microbatch.get(module, ())
        num_parts = -(-len(lengths) // size)
        present = frozenset(name for name, instances in microbatch.items() if instances)
        if present not in needs:
            needs[present] = model.gradients_into(present).get(module, False)
        below = needs[present]
        for part in range(num_parts):
            start, end = part * len(lengths) // num_parts, (part + 1) * len(lengths) // num_parts
            shapes[tuple(sorted(lengths[start:end])), below] += 1

    def total(part: Part) -> float:
        result = 0.0
        for (lengths, below), count in shapes.items():
            cost, backward = costs.part(module, part, lengths), whole[below]
            layers = model.module(module).num_layers
            # Of a layer the share of layers, since all of a module's count alike here.
            passed, trained = {
                "first": (backward.first, backward.weight_first), "last": (backward.last, backward.weight_last),
                "layer": (backward.layers / layers, backward.weight_layers / layers),
            }[part]
            result += count * (cost.forward_ns + passed * cost.backward_input_ns + trained * cost.backward_weight_ns)
        return result

    return ModuleWork(total("layer"), total("first"), total("last"), shapes.total())


def cheapest_work_ns(model: ModelSpec, microbatches: Sequence[Microbatch], costs: CostModel) -> int:
    """Work of a batch, over all ranks, with every module at its cheapest sub-microbatch size: divided by the ranks, no schedule on
    any partition is faster (as far as the tried sizes go). It keeps an uneven or inefficient cut from hiding behind its own bound.
    """
    total = 0.0
    for module in model.modules:
        most = largest_count(module.name, [microbatches])
        if most:
            works = [module_work(model, module.name, size, microbatches, costs) for size in {*range(1, min(most, 8) + 1), *_sizes_up_to(most)}]
            total += min(module.num_layers * work.layer + work.first + work.last for work in works)
    return math.floor(total)


def _sizes_up_to(most: int) -> list[int]:
    return sorted({size for size in _SIZES if size < most} | {most})


def paper_sizes(model: ModelSpec, batches: Sequence[Batch], costs: CostModel) -> dict[str, int]:
    """B_i: the smallest size that keeps 95 % of the module's best efficiency (instances a second) on instances of its mean length."""
    sizes = {}
    for module in model.modules:
        most = max(1, largest_count(module.name, batches))
        lengths = [length for batch in batches for microbatch in batch for length in microbatch.get(module.name, ())]
        mean = round(sum(lengths) / len(lengths)) if lengths else 1
        efficiency = {size: size / max(_layer_ns(module.name, [mean] * size, costs), 1e-9) for size in _sizes_up_to(most)}
        best = max(efficiency.values())
        sizes[module.name] = min(size for size, value in efficiency.items() if value >= EFFICIENCY * best)
    return sizes


def _layer_ns(module: str, lengths: Sequence[int], costs: CostModel) -> float:
    cost = costs.part(module, "layer", lengths)
    return cost.forward_ns + cost.backward_input_ns + cost.backward_weight_ns


def paper_partition(model: ModelSpec, num_ranks: int, batches: Sequence[Batch], costs: CostModel) -> Partition:
    """The paper's partitioner: B_i by the 95 % rule, K_1 = 1 for the module of the least latency T_1 at its B, K_i = floor(T_i / T_1).

    A module has at least one layer a chunk: K_i is bounded by its layers.
    """
    sizes = paper_sizes(model, batches, costs)
    latency: dict[str, float] = {}
    for module in model.modules:
        lengths = [length for batch in batches for microbatch in batch for length in microbatch.get(module.name, ())]
        if lengths:
            mean = round(sum(lengths) / len(lengths))
            latency[module.name] = module.num_layers * _layer_ns(module.name, [mean] * sizes[module.name], costs)
    shortest = max(min(latency.values()), 1e-9)
    chunks = {
        name: max(1, min(math.floor(value / shortest), model.module(name).num_layers // num_ranks)) for name, value in latency.items()
    }
    return even_partition(model, num_ranks, chunks, sizes)


_LEADS = (1.0, 2 / 3, 1 / 3, 0.0)
"""First chunk's layers as a share of an even chunk's (at least one layer). A rank waits for its predecessors' first chunks when an
iteration begins, and they run when it ends: a short first chunk cuts that time without more chunks."""

_TILTS = (0.0, 0.25, 0.5, 0.75)
"""By how much the first rank's first chunk is shorter, and the last rank's longer, than an even one, as a share of it; the last chunks make
up for it. It cuts the time that later ranks wait for the first segment as a short first chunk does, without lengthening other segments.
On two ranks 2 + 2 and 2 + 2 layers become 1 + 3 and 3 + 1."""

Level = Literal["module", "work", "end"]
"""What the layers level over the ranks: each module's work by itself; all modules' work together; or when a rank's work ends, which
lies a hop later from rank to rank, since later ranks start later and wait longer for what follows them."""
_LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What the joint choice varies."""

    chunks: tuple[int, ...]
    """K by module, in the model's order"""
    sizes: tuple[int, ...]
    """B by module"""
    lead: tuple[int, ...]
    """Index into :data:`_LEADS` by module"""
    tilt: tuple[int, ...]
    """Index into :data:`_TILTS` by module"""
    level: Level


def balanced_partition(model: ModelSpec, num_ranks: int, cut: Cut, work: Sequence[ModuleWork]) -> Partition:
    """Layers so that the ranks' work is level, embeddings and heads counted in.

    Args:
        work: of each module, on the sample.
    """
    load = [0.0] * num_ranks
    if cut.level == "end":
        hop = _hop(model, num_ranks, cut, work)
        load = [rank * hop for rank in range(num_ranks)]
    rows: dict[str, list[list[int]]] = {}
    # The modules of the costliest layers first: the finest grain levels what they leave.
    for index in sorted(range(len(model.modules)), key=lambda index: (-work[index].layer, index)):
        module, own = model.modules[index], work[index]
        num_chunks = cut.chunks[index]
        extras = [0.0] * num_ranks
        extras[0] += own.first
        extras[-1] += own.last
        unit = max(own.layer, 1e-9)
        below = [extra + (0.0 if cut.level == "module" else held) for extra, held in zip(extras, load, strict=True)]
        # A chunk without layers still passes every segment on: each keeps one layer where there are enough.
        least = num_chunks if module.num_layers >= num_chunks * num_ranks else 0
        totals = _fill(module.num_layers, [value / unit for value in below], least)
        table = [[0] * num_ranks for _ in range(num_chunks)]
        for rank, total in enumerate(totals):
            # Whole layers' worth only: a stem of a tenth of a layer is no reason for a chunk that is shorter than its segment's others.
            inner = [0.0] * num_chunks
            inner[0] += round(own.first / unit) if rank == 0 else 0.0
            inner[-1] += round(own.last / unit) if rank == num_ranks - 1 else 0.0
            inner[0] += (1.0 - _LEADS[cut.lead[index]]) * total / num_chunks
            tilt = _TILTS[cut.tilt[index]] * total / num_chunks * (1 - 2 * rank / max(num_ranks - 1, 1))
            inner[0] += tilt
            inner[-1] -= tilt
            for vp_stage, layers in enumerate(_fill(total, inner, min(1, least))):
                table[vp_stage][rank] = layers
            load[rank] += total * own.layer + extras[rank]
        rows[module.name] = table
    return Partition(chunks=rows, sub_microbatch_size={m.name: size for m, size in zip(model.modules, cut.sizes, strict=True)})


def _hop(model: ModelSpec, num_ranks: int, cut: Cut, work: Sequence[ModuleWork]) -> float:
    """ns that one sub-microbatch of the first module with work takes through one stage, forward and backward."""
    order = [module.name for module in model.modules]
    for name in model.topological():
        index = order.index(name)
        if work[index].parts:
            return work[index].layer / work[index].parts * model.modules[index].num_layers / (num_ranks * cut.chunks[index])
    return 0.0


def _fill(items: int, below: Sequence[float], least: int) -> list[int]:
    """Puts items one by one where the level (what lies ``below`` + items) is lowest, after ``least`` in every place."""
    counts = [least] * len(below)
    for _ in range(items - least * len(below)):
        lowest = min(range(len(below)), key=lambda place: (below[place] + counts[place], place))
        counts[lowest] += 1
    return counts


class NothingFits(Exception):
    """Every partition that was judged exceeds a rank's memory on the sample."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionChoice:
    partition: Partition
    expected_ns: float
    """Mean over the judged batches of the scheduled time"""
    candidates: int
    """Evaluations of a partition, short and thorough ones"""
    cut_short: bool
    """Whether the time limit ended the choice, which would have gone on"""


def choose_partition(
    model: ModelSpec,
    num_ranks: int,
    batches: Sequence[Batch],
    costs: CostModel,
    evaluate: Callable[[Partition, Batch, bool], float],
    *,
    num_judged: int = 3,
    max_candidates: int = 60,
    max_refined: int = 12,
    chunks: Mapping[str, int] | None = None,
    sizes: Mapping[str, int] | None = None,
    progress: Callable[[int, float], None] | None = None,
    time_limit_s: float = TIME_LIMIT_S,
) -> PartitionChoice:
    """Our own joint choice of B, K and uneven layers: least expected iteration time over the sample. Deterministic if ``evaluate`` is and
    the time limit is not reached.

    First a descent with short evaluations, then the best few and the neighbourhood of the best with thorough ones.

    Args:
        batches: the sample; work is levelled over all of it, and ``num_judged`` of them, evenly spaced, are scheduled.
        evaluate: ns that a batch takes on a partition, found out thoroughly (True) or shortly (False); math.inf where it does not fit.
        max_candidates, max_refined: partitions evaluated shortly and thoroughly at most.
        chunks, sizes: K and B that are given and not varied.
        progress: called after each evaluation with their number and the best expectation so far.
        time_limit_s: no evaluation begins that would, at the pace of the longest, end later; some short and one thorough one always run.

    Raises:
        NothingFits: no candidate does.
    """
    began = time.monotonic()
    longest, cut_short = 0.0, False
    microbatches = _work_sample(batches)
    judged = [batches[index * len(batches) // num_judged] for index in range(num_judged)] if len(batches) > num_judged else list(batches)
    table: dict[tuple[int, int], ModuleWork] = {}

    def work_of(index: int, size: int) -> ModuleWork:
        if (index, size) not in table:
            table[index, size] = module_work(model, model.modules[index].name, size, microbatches, costs)
        return table[index, size]

    size_options: list[list[int]] = []
    chunk_options: list[list[int]] = []
    for index, module in enumerate(model.modules):
        if sizes is not None and module.name in sizes:
            size_options.append([sizes[module.name]])
        else:
            most = max(1, largest_count(module.name, batches))
            tried = _sizes_up_to(most)
            cheapest = min(work_of(index, size).layer for size in tried)
            size_options.append([size for size in tried if work_of(index, size).layer <= _WASTE * cheapest])
        given = None if chunks is None else chunks.get(module.name)
        chunk_options.append([given] if given is not None else [count for count in CHUNKS if count == 1 or count * num_ranks <= module.num_layers])

    options = {"chunks": chunk_options, "sizes": size_options, "lead": [list(range(len(_LEADS)))] * len(model.modules),
               "tilt": [list(range(len(_TILTS)))] * len(model.modules)}

    def build(cut: Cut) -> Partition:
        return balanced_partition(model, num_ranks, cut, [work_of(index, size) for index, size in enumerate(cut.sizes)])

    scores: dict[tuple[str, bool], float] = {}

    def score(cut: Cut, fine: bool) -> float:
        partition = build(cut)
        key = (repr(partition), fine)  # another levelling may change nothing
        if key not in scores:
            nonlocal longest
            start_s = time.monotonic()
            expected = sum(evaluate(partition, batch, fine) for batch in judged) / len(judged)
            scores[key] = expected * (1.0 + _TOLL * sum(cut.chunks))
            longest = max(longest, time.monotonic() - start_s)
            if progress is not None:
                progress(len(scores), min(scores.values()))
        return scores[key]

    def out_of_time(fine: bool) -> bool:
        nonlocal cut_short
        over = time.monotonic() - began + longest > time_limit_s * (1.0 if fine else _SHORT_SHARE)
        cut_short = cut_short or over
        return over

    def descend(cut: Cut, fine: bool, limit: int) -> Cut:
        improved = True
        while improved:
            improved = False
            for neighbour in _neighbours(cut, options):
                if sum(key[1] == fine for key in scores) >= limit or out_of_time(fine):
                    return cut
                if score(neighbour, fine) < score(cut, fine):
                    cut, improved = neighbour, True
                    break
        return cut

    def start(chunk_share: float, size_share: float) -> Cut:
        def at(values: Sequence[int], share: float) -> int:
            return values[min(len(values) - 1, int(share * len(values)))]

        return Cut(
            chunks=tuple(at(values, chunk_share) for values in chunk_options),
            sizes=tuple(at(values, size_share) for values in size_options),
            lead=(0,) * len(model.modules),
            tilt=(0,) * len(model.modules),
            level="work",
        )

    starts = [start(*shares) for shares in ((0.0, 0.5), (0.3, 0.3), (0.9, 0.6), (0.3, 0.0), (0.6, 0.2))]
    # Few chunks and large parts, whose first segment is short by its tilt alone: best where every further stage costs time.
    starts.append(replace(start(0.3, 0.9), tilt=(_TILTS.index(0.5),) * len(model.modules)))
    ranked = sorted(dict.fromkeys(starts), key=lambda cut: score(cut, False))
    # Two descents: the better of two valleys, and a wider choice for the thorough look.
    ends = [descend(cut, False, max_candidates * (number + 1) // 2) for number, cut in enumerate(ranked[:2])]
    near = [neighbour for end in ends for neighbour in [end, *_neighbours(end, options)]]
    known = [cut for cut in dict.fromkeys([*ends, *near, *starts]) if (repr(build(cut)), False) in scores]
    finalists = sorted(known, key=lambda cut: score(cut, False))[: max(1, max_refined // 3)]
    best = finalists[0]
    score(best, True)
    for cut in finalists[1:]:
        if out_of_time(True):
            break
        best = min(best, cut, key=lambda cut: score(cut, True))
    best = descend(best, True, max_refined)
    if math.isinf(score(best, True)):
        raise NothingFits
    expected_ns = score(best, True) / (1.0 + _TOLL * sum(best.chunks))
    return PartitionChoice(partition=build(best), expected_ns=expected_ns, candidates=len(scores), cut_short=cut_short)


def _neighbours(cut: Cut, options: Mapping[str, Sequence[Sequence[int]]]) -> list[Cut]:
    """Cuts that differ in one choice by one step, and those that change it for all modules together.

    Args:
        options: field of a cut -> for each module its values in order.
    """
    found = [replace(cut, level=level) for level in _LEVELS if level != cut.level]
    for field, by_module in options.items():
        values: tuple[int, ...] = getattr(cut, field)
        for step in (1, -1):
            moved = []
            for index, own in enumerate(by_module):
                at = own.index(values[index]) + step
                if 0 <= at < len(own):
                    moved.append((index, own[at]))
                    found.append(replace(cut, **{field: (*values[:index], own[at], *values[index + 1 :])}))  # type: ignore[arg-type]
            if len(moved) > 1:
                together = dict(moved)
                found.append(replace(cut, **{field: tuple(together.get(index, value) for index, value in enumerate(values))}))  # type: ignore[arg-type]
    return found
