"""Which weights of a model's chunks are trained, and what they take: found on the chunks that were built, whoever froze what.

In: one chunk and its place in the cut. Out: a :class:`ChunkWeights`; the chunks of all ranks together are the model's
:class:`~megatron_dip.spec.model.BuiltModelSpec` (:func:`built_model`). A layer with a trained adapter is a trained layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_dip.cost.modules import Connector, Kernels
from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.parts import STEM
from megatron_dip.spec.model import BuiltModelSpec, ModelSpec, TrainableParts
from megatron_dip.spec.partition import Partition

Place = tuple[str, int, int]
"""(module, vp_stage, rank) of a chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWeights:
    """Of one chunk; plain values, to be sent between ranks."""

    first: bool
    """Whether something before the layers is trained."""
    layers: tuple[bool, ...]
    last: bool
    """Whether something behind the layers is."""
    frozen_bytes: int
    """Of weights that are not trained, on one tensor-parallel rank."""
    trained_parameters: int
    """Number of weights that are, on one tensor-parallel rank."""
    is_rotary: bool
    """Whether attention turns queries and keys by their positions."""
    connector: Connector | None
    """Of a chunk that ends in a projector."""


_UNCUT = "_dip_uncut_width"


def mark_uncut(layer: torch.nn.Module, width: int | None) -> None:
    """Makes a module of any kind count as one layer of its chunk.

    Args:
        width: of its output; None: not known.
    """
    setattr(layer, _UNCUT, width)


def uncut_layers(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in chunk.modules() if _UNCUT in vars(module)]


def transformer_blocks(chunk: torch.nn.Module) -> list[TransformerBlock]:
    """Those whose layers the cut counts: not those within a layer that is not cut."""
    within = {module for layer in uncut_layers(chunk) for module in layer.modules()}
    return [module for module in chunk.modules() if isinstance(module, TransformerBlock) and module not in within]


def chunk_weights(chunk: torch.nn.Module, cut: ModuleCut, vp_stage: int, rank: int) -> ChunkWeights:
    """Args:
    chunk: perhaps inside Megatron's wrappers.
    """
    layers = [*uncut_layers(chunk), *(layer for block in transformer_blocks(chunk) for layer in block.layers)]
    inside = {id(weight) for layer in layers for weight in layer.parameters()}
    at_first, at_last = (vp_stage, rank) == cut.first, (vp_stage, rank) == cut.last
    first = last = False
    for name, weight in chunk.named_parameters():
        if id(weight) in inside or not weight.requires_grad:
            continue
        before = at_first and (not at_last or _stands_before_the_layers(name))
        first, last = first or before, last or not before
    return ChunkWeights(
        first=first, layers=tuple(any(weight.requires_grad for weight in layer.parameters()) for layer in layers), last=last,
        frozen_bytes=sum(weight.numel() * weight.element_size() for weight in chunk.parameters() if not weight.requires_grad),
        trained_parameters=sum(weight.numel() for weight in chunk.parameters() if weight.requires_grad),
        is_rotary=any(hasattr(module, "rotary_pos_emb") or getattr(module, "has_rotary_positions", False) for module in chunk.modules()),
        connector=_connector(chunk, layers[0]) if layers else None,
    )


def _connector(chunk: torch.nn.Module, layer: torch.nn.Module) -> Connector | None:
    """Of a chunk that ends in a projector, by one of its layers."""
    projector = next((module for module in chunk.modules() if isinstance(module, MultimodalProjector)), None)
    is_uncut = _UNCUT in vars(layer)
    width = vars(layer)[_UNCUT] if is_uncut else layer.config.hidden_size  # type: ignore[union-attr]
    if projector is None or width is None:
        return None
    is_single = projector.projector_type == "affine"
    first = projector.encoder if is_single else projector.encoder.linear_fc1
    return Connector(
        merge=max(1, first.weight.shape[1] // width),
        hidden=None if is_single else projector.config.ffn_hidden_size,
    )


def _stands_before_the_layers(name: str) -> bool:
    """By a weight's name, where a chunk has both ends of its module."""
    steps = name.split(".")
    return "embedding" in steps or any(step in STEM for step in steps)


def built_kernels(chunks: Sequence[torch.nn.Module]) -> Kernels:
    """Which implementations the layers of chunks run. Attention keeps its scores, and is slower, unless Transformer Engine runs it by a
    fused kernel; where modules differ the costlier answer is given for all."""
    fused, dropout = True, False
    for layer in (layer for chunk in chunks for block in transformer_blocks(chunk) for layer in block.layers):
        core = getattr(getattr(layer, "self_attention", None), "core_attention", None)
        by_engine = any("TEDotProductAttention" in base.__name__ for base in type(core).__mro__)
        backend = getattr(getattr(layer.config, "attention_backend", None), "name", "auto")
        fused = fused and by_engine and backend not in ("unfused", "local")
        dropout = dropout or layer.config.attention_dropout > 0 or layer.config.hidden_dropout > 0
    return Kernels(attention="fused" if fused else "unfused", dropout=dropout, masks=not fused)


def built_model(spec: ModelSpec, partition: Partition, weights: Mapping[Place, ChunkWeights]) -> BuiltModelSpec:
    """Args:
    weights: of all chunks of all pipeline ranks.
    """
    parts: dict[str, TrainableParts] = {}
    for name, rows in partition.chunks.items():
        places = [(name, vp_stage, rank) for vp_stage in range(len(rows)) for rank in range(len(rows[0]))]
        of_chunks = [weights[place] for place in places]
        parts[name] = TrainableParts(
            any(chunk.first for chunk in of_chunks), tuple(trained for chunk in of_chunks for trained in chunk.layers),
            any(chunk.last for chunk in of_chunks),
        )
        assert len(parts[name].layers) == spec.module(name).num_layers, (name, parts[name])
    modules = [msgspec.structs.replace(module, trainable=parts[module.name].any) for module in spec.modules]
    return BuiltModelSpec(modules=modules, parts=parts)
