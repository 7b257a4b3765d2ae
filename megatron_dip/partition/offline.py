"""Once a run: how the layers of each module are cut into chunks, and the sub-microbatch sizes.

Source of the rules: DIP (arXiv 2504.14145), section on the modality-aware partitioner.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition


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
