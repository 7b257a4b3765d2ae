"""How modules are cut for a whole run: the ``megatron-dip/partition/1`` format. Weights never move while training.

Chunk k of a module on rank r is number k * P + r in the order of its layers, so the module's first layers are on rank 0 and every
segment runs over ranks 0..P-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from megatron_dip.spec.errors import InputError

PARTITION_FORMAT: Literal["megatron-dip/partition/1"] = "megatron-dip/partition/1"


@dataclass(frozen=True, slots=True)
class SubMicrobatch:
    """One module's share of one microbatch that runs as one forward (and one backward) segment a chunk.

    Instances ``first_instance`` .. ``first_instance + len(lengths) - 1`` of the microbatch's list for this module, in order.
    """

    module: str
    microbatch: int
    sub_microbatch: int
    """Number within (module, microbatch), from 0."""
    first_instance: int
    lengths: tuple[int, ...]
    """Tokens of each instance; at least one instance."""


class Partition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: Literal["megatron-dip/partition/1"] = PARTITION_FORMAT
    chunks: dict[str, list[list[int]]]
    """Module -> for each vp_stage the number of layers on each rank (at least 0; some chunk may hold only an embedding or a head)."""
    sub_microbatch_size: dict[str, int]
    """Module -> instances in a full sub-microbatch."""

    @property
    def num_ranks(self) -> int:
        return len(next(iter(self.chunks.values()))[0])

    def num_chunks(self, module: str) -> int:
        """K of the module: its chunks a rank."""
        return len(self.chunks[module])

    def layer_range(self, module: str, vp_stage: int, rank: int) -> tuple[int, int]:
        """First layer (0-based within the module) and number of layers of one chunk."""
        before = sum(sum(row) for row in self.chunks[module][:vp_stage]) + sum(self.chunks[module][vp_stage][:rank])
        return before, self.chunks[module][vp_stage][rank]

    def validate(self, num_layers: dict[str, int], num_ranks: int, where: str = "partition") -> None:
        """Raises InputError unless every module's chunks cover its layers on exactly ``num_ranks`` ranks."""
        for module, layers in num_layers.items():
            if module not in self.chunks:
                raise InputError(f"{where}.chunks", sorted(self.chunks), f"module {module!r} is missing", "give its layers on each rank")
            rows = self.chunks[module]
            if not rows:
                raise InputError(f"{where}.chunks.{module}", rows, "no chunks", "give at least one row of layers on each rank")
            for index, row in enumerate(rows):
                if len(row) != num_ranks:
                    raise InputError(
                        f"{where}.chunks.{module}[{index}]", row, f"has {len(row)} entries for {num_ranks} pipeline ranks",
                        "give one number of layers for each rank",
                    )
                if min(row) < 0:
                    raise InputError(f"{where}.chunks.{module}[{index}]", row, "negative number of layers", "use 0 or more")
            if sum(map(sum, rows)) != layers:
                raise InputError(
                    f"{where}.chunks.{module}", rows, f"adds up to {sum(map(sum, rows))} layers, the module has {layers}",
                    "make the numbers add up to the module's layers",
                )
            if self.sub_microbatch_size.get(module, 0) < 1:
                raise InputError(
                    f"{where}.sub_microbatch_size.{module}", self.sub_microbatch_size.get(module), "must be at least 1",
                    "give the instances in a sub-microbatch",
                )
        for module in self.chunks:
            if module not in num_layers:
                raise InputError(f"{where}.chunks", module, "the model has no such module", f"use {sorted(num_layers)}")
