"""What all pipeline ranks together know of the model that was built: which parts are trained, and what each chunk's weights take.

Scripts freeze parts before, while and after chunks are built; by the first iteration it is settled. Collective over the replica's ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.trained import ChunkWeights, Place, built_model, chunk_weights
from megatron_dip.runtime.groups import PipelineGroups
from megatron_dip.runtime.interface import ChunkKey
from megatron_dip.spec.model import BuiltModelSpec, ModelSpec
from megatron_dip.spec.partition import Partition


@dataclass(frozen=True, slots=True)
class TrainedModel:
    spec: BuiltModelSpec
    weights: Mapping[Place, ChunkWeights]
    """Of all chunks of all pipeline ranks."""


def describe_built_model(
    spec: ModelSpec, partition: Partition, keys: Sequence[ChunkKey], chunks: Sequence[torch.nn.Module], groups: PipelineGroups
) -> TrainedModel:
    """Args:
    keys, chunks: of this rank.
    """
    own: dict[Place, ChunkWeights] = {
        (module, vp_stage, groups.rank): chunk_weights(chunk, ModuleCut.of_partition(partition, module), vp_stage, groups.rank)
        for (module, vp_stage), chunk in zip(keys, chunks, strict=True)
    }
    told: list[dict[Place, ChunkWeights]] = [own]
    if len(groups.control_ranks) > 1:
        told = [own] * len(groups.control_ranks)
        dist.all_gather_object(told, own, group=groups.control)
    weights = {place: of_chunk for of_rank in reversed(told) for place, of_chunk in of_rank.items()}
    return TrainedModel(built_model(spec, partition, weights), weights)
