"""Once a run: how the layers of each module are cut into chunks, and the sub-microbatch sizes.

In: the model, the ranks, a sample of batches, costs. Out: a :class:`~megatron_dip.spec.partition.Partition`. Three ways:

- :func:`even_partition`: given K and B, layers as even as can be.
- :func:`paper_partition`: the rules of DIP (arXiv 2504.14145, section on the modality-aware partitioner): the smallest B_i that keeps
  95 % of the best efficiency, K_i = floor(T_i / T_1), layers even.
- :mod:`megatron_dip.partition.joint`: our own joint choice of B, K and uneven layers, for which :func:`balanced_partition` levels them.

Not modelled: choices that differ between batches (weights never move).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_dip.cost.interface import CostModel, Part
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import Microbatch

Batch = Sequence[Microbatch]
"""One replica's microbatches of one iteration."""

EFFICIENCY = 0.95
"""Of the paper's rule for B_i."""
_SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64)
"""Sub-microbatch sizes that are tried."""


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
        rows[module.name] = even_rows(module.num_layers, num_ranks, chunks.get(module.name, 1))
    return Partition(chunks=rows, sub_microbatch_size={m.name: sub_microbatch_size.get(m.name, 1) for m in model.modules})


def even_rows(num_layers: int, num_ranks: int, num_chunks: int) -> list[list[int]]:
    """[K][P] layers of each chunk, as equal as can be, the larger ones first in layer order."""
    slots = num_ranks * num_chunks
    base, extra = divmod(num_layers, slots)
    sizes = [base + (slot < extra) for slot in range(slots)]
    return [sizes[start : start + num_ranks] for start in range(0, slots, num_ranks)]


def largest_count(module: str, batches: Sequence[Batch]) -> int:
    """Most instances of a module in one microbatch; 0 where it never has any."""
    return max((len(microbatch.get(module, ())) for batch in batches for microbatch in batch), default=0)


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


def module_work(
    model: ModelSpec, module: str, size: int, microbatches: Sequence[Microbatch], costs: CostModel, *, rounded_down: bool = False,
) -> ModuleWork:
    """Work of a module in parts of equal count (what the sub-microbatches of equal cost come to, near enough to rank by).

    Args:
        rounded_down: every part's times to whole ns, which no stage's rounded sum of them can be below.
    """
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
            times = (cost.forward_ns, cost.backward_input_ns, cost.backward_weight_ns)
            forward, inputs, weights = (math.floor(time) for time in times) if rounded_down else times
            result += count * (forward + passed * inputs + trained * weights)
        return result

    return ModuleWork(total("layer"), total("first"), total("last"), shapes.total())


def cheapest_work_ns(model: ModelSpec, microbatches: Sequence[Microbatch], costs: CostModel) -> int:
    """Work of a batch, over all ranks, with every module at its cheapest sub-microbatch size: divided by the ranks, no schedule on
    any partition is faster (as far as the tried sizes go). It keeps an uneven or inefficient cut from hiding behind its own bound.
    """
    return least_work(model, microbatches, costs).total


@dataclass(frozen=True, slots=True)
class LeastWork:
    """ns that no partition and no schedule of a batch can do without, as far as the tried sub-microbatch sizes go."""

    total: int
    """Over all ranks"""
    whole: int
    """On one rank: the largest of what cannot be shared out (a module's stem, its head, one layer)"""


def least_work(model: ModelSpec, microbatches: Sequence[Microbatch], costs: CostModel) -> LeastWork:
    """Of every module at its cheapest sub-microbatch size."""
    total, whole = 0.0, 0.0
    for module in model.modules:
        most = largest_count(module.name, [microbatches])
        if most:
            sizes = {*range(1, min(most, 8) + 1), *sizes_up_to(most)}
            works = [module_work(model, module.name, size, microbatches, costs, rounded_down=True) for size in sizes]
            total += min(module.num_layers * work.layer + work.first + work.last for work in works)
            whole = max(whole, *(min(getattr(work, part) for work in works) for part in ("layer", "first", "last")))
    return LeastWork(math.floor(total), math.floor(whole))


def sizes_up_to(most: int) -> list[int]:
    """Sub-microbatch sizes worth trying for at most so many instances."""
    return sorted({size for size in _SIZES if size < most} | {most})


def paper_sizes(model: ModelSpec, batches: Sequence[Batch], costs: CostModel) -> dict[str, int]:
    """B_i: the smallest size that keeps 95 % of the module's best efficiency (instances a second) on instances of its mean length."""
    sizes = {}
    for module in model.modules:
        most = max(1, largest_count(module.name, batches))
        lengths = [length for batch in batches for microbatch in batch for length in microbatch.get(module.name, ())]
        mean = round(sum(lengths) / len(lengths)) if lengths else 1
        efficiency = {size: size / max(layer_ns(module.name, [mean] * size, costs), 1e-9) for size in sizes_up_to(most)}
        best = max(efficiency.values())
        sizes[module.name] = min(size for size, value in efficiency.items() if value >= EFFICIENCY * best)
    return sizes


def layer_ns(module: str, lengths: Sequence[int], costs: CostModel) -> float:
    """ns of one layer, forward and backward."""
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
            latency[module.name] = module.num_layers * layer_ns(module.name, [mean] * sizes[module.name], costs)
    shortest = max(min(latency.values()), 1e-9)
    chunks = {
        name: max(1, min(math.floor(value / shortest), model.module(name).num_layers // num_ranks)) for name, value in latency.items()
    }
    return even_partition(model, num_ranks, chunks, sizes)


LEADS = (1.0, 2 / 3, 1 / 3, 0.0)
"""First chunk's layers as a share of an even chunk's (at least one layer). A rank waits for its predecessors' first chunks when an
iteration begins, and they run when it ends: a short first chunk cuts that time without more chunks."""

TILTS = (0.0, 0.25, 0.5, 0.75)
"""By how much the first rank's first chunk is shorter, and the last rank's longer, than an even one, as a share of it; the last chunks make
up for it. It cuts the time that later ranks wait for the first segment as a short first chunk does, without lengthening other segments.
On two ranks 2 + 2 and 2 + 2 layers become 1 + 3 and 3 + 1."""

Level = Literal["module", "work", "end"]
"""What the layers level over the ranks: each module's work by itself; all modules' work together; or when a rank's work ends, which
lies a hop later from rank to rank, since later ranks start later and wait longer for what follows them."""
LEVELS: tuple[Level, ...] = get_args(Level)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What the joint choice varies."""

    chunks: tuple[int, ...]
    """K by module, in the model's order"""
    sizes: tuple[int, ...]
    """B by module"""
    lead: tuple[int, ...]
    """Index into :data:`LEADS` by module"""
    tilt: tuple[int, ...]
    """Index into :data:`TILTS` by module"""
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
        if not own.parts:
            # What it will weigh is unknown: it may make up for no other module's unevenness.
            rows[module.name] = even_rows(module.num_layers, num_ranks, num_chunks)
            continue
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
            inner[0] += (1.0 - LEADS[cut.lead[index]]) * total / num_chunks
            tilt = TILTS[cut.tilt[index]] * total / num_chunks * (1 - 2 * rank / max(num_ranks - 1, 1))
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
