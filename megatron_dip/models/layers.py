"""Megatron's layers as the models here use them: local (no Transformer Engine), every mask and norm as the module needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig


class Norm:
    """LayerNorm or RMSNorm of torch, as ``config.normalization`` says, also under sequence parallelism.

    Under sequence parallelism each rank normalises its own tokens, so the weights' gradients are partial sums: marked as such, they
    are all-reduced by Megatron's ``finalize_model_grads``. Megatron's own wrapper of torch norms refuses sequence parallelism.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> torch.nn.Module:  # type: ignore[misc]
        if not config.sequence_parallel:
            return WrappedTorchNorm(config=config, hidden_size=hidden_size, eps=eps)
        kind: Callable[..., torch.nn.Module] = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
        return norm


def transformer_block_spec(num_layers: int, *, causal: bool) -> TransformerBlockSubmodules:
    """``num_layers`` local layers and a final norm. Not causal = no mask at all (Megatron's local ViT spec is causal)."""
    layer = get_gpt_layer_local_spec()
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask}
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)


def projector_spec() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


