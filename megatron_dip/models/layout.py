"""The layer-to-stage mapper: which layers of a module a chunk builds, said in Megatron's own words.

Megatron-Core decides how many layers a ``TransformerBlock`` builds, and with which layer numbers (hence checkpoint keys), from the
``TransformerConfig`` alone. So every chunk gets a config of its own whose ``virtual_pipeline_model_parallel_size`` is the module's K
and whose ``pipeline_model_parallel_layout`` holds the module's rows of the partition; nothing in Megatron-Core is changed.

Letters: P pipeline ranks, K chunks of the module on each rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.runtime.interface import ChunkKey
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition


class ModuleLayout(PipelineParallelLayerLayout):
    """Megatron's layer layout for one module, with that module's own number of chunks a rank.

    Megatron's class takes the number from ``parallel_state``, of which there is one for all modules; this one takes ``vp_stage`` as it
    is given (None = the only chunk).
    """

    def get_num_layers_to_build(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        rank = parallel_state.get_pipeline_model_parallel_rank() if pp_rank is None else pp_rank
        return self.layout[rank][vp_stage or 0].count(layer_type)

    def get_layer_offset(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        rank = parallel_state.get_pipeline_model_parallel_rank() if pp_rank is None else pp_rank
        stage = vp_stage or 0
        before = sum(self.layout[r][s].count(layer_type) for s in range(stage) for r in range(self.pipeline_model_parallel_size))
        return before + sum(self.layout[r][stage].count(layer_type) for r in range(rank))


@dataclass(frozen=True, slots=True)
class ModuleCut:
    """How one module's layers lie on the ranks.

    ``first`` and ``last`` are the (vp_stage, rank) that hold what stands before the first layer (stem, embedding) and behind the last
    one (final norm, projector, head).
    """

    rows: tuple[tuple[int, ...], ...]
    """For each vp_stage the number of layers on each rank."""
    first: tuple[int, int]
    last: tuple[int, int]

    @classmethod
    def of_partition(cls, partition: Partition, module: str) -> ModuleCut:
        """A module over all ranks, as DIP cuts it: first chunk on rank 0, last chunk on rank P - 1."""
        rows = tuple(tuple(row) for row in partition.chunks[module])
        return cls(rows, (0, 0), (len(rows) - 1, len(rows[0]) - 1))

    @property
    def num_ranks(self) -> int:
        return len(self.rows[0])

    @property
    def num_chunks(self) -> int:
        return len(self.rows)

    def is_present(self, vp_stage: int, rank: int) -> bool:
        """Whether the module has anything on this place."""
        return self.rows[vp_stage][rank] > 0 or (vp_stage, rank) in (self.first, self.last)

    def rows_have_layers(self, rank: int) -> bool:
        """Whether a rank has layers of the module in any chunk."""
        return any(row[rank] > 0 for row in self.rows)

    def vp_stage(self, index: int) -> int | None:
        """Megatron's number of chunk ``index``: None where the module has one chunk a rank."""
        return None if self.num_chunks == 1 else index

    def config(self, config: TransformerConfig, **changes: Any) -> TransformerConfig:
        """``config`` of the whole module, narrowed to this cut; ``changes`` are set as well.

        With one rank and one chunk there is nothing to say. With one rank and several chunks the config claims two pipeline ranks:
        Megatron-Core takes a module for whole, whatever its layout says, when the size is 1. A config that was made for one rank says
        no type for messages: theirs is that of the parameters.
        """
        if self.num_ranks * self.num_chunks == 1:
            return replace(config, **changes) if changes else config
        flat: list[list[LayerType]] = []
        for vp_stage, row in enumerate(self.rows):
            for rank, layers in enumerate(row):
                flat.append(
                    [LayerType.embedding] * ((vp_stage, rank) == self.first)
                    + [LayerType.decoder] * layers
                    + [LayerType.loss] * ((vp_stage, rank) == self.last)
                )
        return replace(
            config,
            pipeline_model_parallel_size=max(2, self.num_ranks),
            virtual_pipeline_model_parallel_size=None if self.num_chunks == 1 else self.num_chunks,
            pipeline_model_parallel_layout=ModuleLayout(flat, self.num_ranks),
            pipeline_dtype=config.pipeline_dtype or config.params_dtype,
            **changes,
        )


def check_enough_layers(partition: Partition) -> None:
    """Raises InputError where a module has fewer layers than P * K although it could have fewer chunks (with K = 1 some ranks have none)."""
    for module, rows in partition.chunks.items():
        layers, slots = sum(map(sum, rows)), len(rows) * len(rows[0])
        if len(rows) > 1 and layers < slots:
            raise InputError(
                f"chunks.{module}", len(rows), f"{layers} layers cannot fill {slots} chunks ({len(rows[0])} pipeline ranks x {len(rows)})",
                f"use at most {max(1, layers // len(rows[0]))} chunks a rank, fewer pipeline ranks or more layers",
            )


def chunk_order(partition: Partition, rank: int, outermost: str) -> tuple[ChunkKey, ...]:
    """Chunks of a rank as Megatron's functions get them, equal on all replicas.

    Megatron's ``finalize_model_grads`` looks for the embedding in the first chunk of the first rank and for the head in the last chunk
    of the last one: the module that has both, ``outermost``, stands around the others.
    """
    around: list[ChunkKey] = [(outermost, vp_stage) for vp_stage in range(partition.num_chunks(outermost))]
    others: list[ChunkKey] = [(name, vp_stage) for name in partition.chunks if name != outermost for vp_stage in range(partition.num_chunks(name))]
    if len(around) == 1 and 0 < rank == partition.num_ranks - 1:
        return (*others, *around)
    return (around[0], *others, *around[1:])


def backward_order(keys: Sequence[ChunkKey], modules: Sequence[str]) -> tuple[ChunkKey, ...]:
    """A rank's chunks in the order in which their last backwards come in most plans: against the data's way, equal on all replicas.

    Args:
        modules: all modules, those that feed others first.
    """
    return tuple(sorted(keys, key=lambda key: (modules.index(key[0]), key[1]), reverse=True))
