"""Attention of local layers under context parallelism, which Megatron-Core's own leaves to Transformer Engine.

A rank has pieces ``r`` and ``2 CP - 1 - r`` of the 2 CP pieces of every sequence, as ``get_batch_on_this_cp_rank`` divides it. Here it
gathers the keys and values of all ranks and attends to them as one process would, up to the order of sums.

Also a layer's spec for ``--spec`` of Megatron-LM's scripts, with norms that take sequence parallelism, and what lets a LLaVAModel take
this attention for Transformer Engine's, which it asks for under context or sequence parallelism.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import sys
import types
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.multimodal import llava_model
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank

from megatron_dip.models.layers import Norm


class GatheringAttention(DotProductAttention):
    """[S / CP, b, heads, width] queries, keys and values -> [S / CP, b, h]."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        self.divided = config.context_parallel_size > 1

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, *, packed_seq_params: Any = None,
        **others: Any,
    ) -> torch.Tensor:
        assert packed_seq_params is None or packed_seq_params.qkv_format == "sbhd", "packed sequences need Transformer Engine"
        if self.divided:
            key, value = _Gather.apply(key), _Gather.apply(value)
            if attention_mask is None:
                length = key.shape[0]
                mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=key.device).triu_(1)
                attention_mask = on_this_rank({"attention_mask": mask})["attention_mask"]
        return super().forward(query, key, value, attention_mask, **others)


class _Gather(torch.autograd.Function):
    """[S / CP, ...] of each context-parallel rank -> [S, ...]; the gradients of all ranks add up."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        group = parallel_state.get_context_parallel_group()
        of_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(of_ranks, mine.contiguous(), group=group)
        halves = [half.chunk(2) for half in of_ranks]
        return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        group = parallel_state.get_context_parallel_group()
        grad = grad.contiguous()
        dist.all_reduce(grad, group=group)
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        pieces = grad.chunk(2 * ranks)
        return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def on_this_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """This context-parallel rank's part of tensors [b, S, ...] (of a mask [b, 1, S, S] its rows)."""
    options = {"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else {}
    return get_batch_on_this_cp_rank(dict(batch), cp_group=parallel_state.get_context_parallel_group(), **options)  # type: ignore[no-any-return]


def gathering(layer: ModuleSpec) -> ModuleSpec:
    """The spec of a local layer, given this attention."""
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    layer.submodules.self_attention.submodules.core_attention = GatheringAttention
    return layer


LAYER = gathering(get_gpt_layer_local_spec())
EXPERTS = gathering(get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False))


def let_llava_take_it() -> None:
    """In this process LLaVAModel finds this attention where it looks for Transformer Engine's."""
    llava_model.TEDotProductAttention = GatheringAttention
    llava_model.HAVE_TE = True
    llava_model.is_te_min_version = lambda version: True
    if importlib.util.find_spec("megatron.training") is None:  # the wheel has no scripts; there LLaVAModel of 0.16 looks for this function
        training, utils = types.ModuleType("megatron.training"), types.ModuleType("megatron.training.utils")
        utils.get_batch_on_this_cp_rank = get_batch_on_this_cp_rank  # type: ignore[attr-defined]
        sys.modules |= {"megatron.training": training, "megatron.training.utils": utils}
