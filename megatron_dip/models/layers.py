"""Megatron's layers as the models here use them: local (no Transformer Engine), every mask and norm as the module needs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
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


_DENSE = 1 << 15
"""Pairs of queries and keys up to which a mask costs less than many small products."""


class PackedAttention(MegatronModule):
    """Core attention over packed sequences without Transformer Engine, each by itself; under a mask where all are small."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, attention_type: str,
        softmax_scale: float | None = None, **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.is_causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None, attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """[S, heads, head size] (keys and values [T, ...]) -> [S, heads * head size]"""
        assert packed_seq_params is not None, "PackedAttention needs the bounds of its sequences"
        if query.shape[0] * key.shape[0] <= _DENSE:
            return self._together(query, key, value, packed_seq_params)
        queries = packed_seq_params.cu_seqlens_q.diff().tolist()
        keys = packed_seq_params.cu_seqlens_kv.diff().tolist()
        # [n] x [length, heads, head size]; sequences of equal lengths are computed together
        parts = list(zip(query.split(queries), key.split(keys), value.split(keys), strict=True))
        alike: dict[tuple[int, int], list[int]] = {}
        for number, lengths in enumerate(zip(queries, keys, strict=True)):
            alike.setdefault(lengths, []).append(number)
        outputs: list[torch.Tensor] = [query] * len(parts)
        for numbers in alike.values():
            q, k, v = (torch.stack([parts[number][i] for number in numbers]).transpose(1, 2) for i in range(3))
            output = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=self.is_causal, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            for number, part in zip(numbers, output.transpose(1, 2).unbind(), strict=True):
                outputs[number] = part
        return torch.cat(outputs).flatten(1)

    def _together(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: PackedSeqParams) -> torch.Tensor:
        """All sequences at once, under a mask of the pairs that belong together."""
        rows = torch.bucketize(torch.arange(len(query), device=query.device), bounds.cu_seqlens_q[1:], right=True)
        columns = torch.bucketize(torch.arange(len(key), device=key.device), bounds.cu_seqlens_kv[1:], right=True)
        mask = rows[:, None] == columns
        if self.is_causal:
            mask = mask.tril_()
        output = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None], key.transpose(0, 1)[None], value.transpose(0, 1)[None], attn_mask=mask, scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1).flatten(1)


def transformer_block_spec(
    num_layers: int, *, causal: bool, packed: bool = False, qk_layernorm: bool = False, transformer_engine: bool = False,
    core_attention: ModuleSpec | type | None = None,
) -> TransformerBlockSubmodules:
    """``num_layers`` layers and a final norm.

    Args:
        causal: False = no mask at all (Megatron's local ViT spec is causal).
        packed: attention takes the bounds of packed sequences (``packed_seq_params``) instead of a mask.
        transformer_engine: layers of Transformer Engine instead of local ones; it must be installed.
        core_attention: another one than the layers' own.
    """
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm) if transformer_engine else get_gpt_layer_local_spec()
    attention = layer.submodules.self_attention
    attention.params = {"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask}
    if core_attention is not None:
        attention.submodules.core_attention = core_attention
    elif packed and not transformer_engine:
        attention.submodules.core_attention = PackedAttention
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    if qk_layernorm:
        attention.submodules.q_layernorm = attention.submodules.k_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=Norm)


def projector_spec() -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


