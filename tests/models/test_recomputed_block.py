"""Which layers recompute: as the plan says, and at least what the user's flags ask for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launcher import launch
from tests.hooks.test_adapters import prepare

pytestmark = pytest.mark.distributed


def run(rank: int, ranks: int, modules: list[str]) -> list[list[dict[str, bool]]]:
    """For three choices of strategies which of the asked-for recomputations are on, by layer; equal losses and gradients under all."""
    prepare(1, ranks, 1)
    import torch
    from megatron.core import tensor_parallel
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dip.models.layers import transformer_block_spec
    from megatron_dip.models.staged import RecomputedBlock
    from megatron_dip.without_cuda.core import CpuDeviceMode

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=3, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
        recompute_granularity="selective", recompute_modules=modules,
    )
    torch.manual_seed(0)
    block = TransformerBlock(config, transformer_block_spec(3, causal=True))
    recomputed = RecomputedBlock(block, block)
    hidden, found, gradients = torch.randn(5, 2, 32), [], []
    for strategies in (["none"] * 3, ["none", "none", "full"], ["full"] * 3):
        recomputed.set_strategies(strategies, passes_on=True)
        names = ("checkpoint_core_attention", "recompute_mlp", "recompute_input_layernorm", "recompute_pre_mlp_layernorm")
        found.append([
            {name: getattr(layer.self_attention if name == names[0] else layer, name, False) for name in names} for layer in block.layers
        ])
        block.zero_grad()
        mask: Any = torch.ones(5, 5, dtype=torch.bool).triu_(1)[None, None]
        with CpuDeviceMode():
            block(hidden, mask).square().sum().backward()  # an input that needs no gradient
        gradients.append([None if weight.grad is None else weight.grad.clone() for weight in block.parameters()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    return found


def test_what_the_users_flags_ask_for_stays_on_in_layers_that_are_not_recomputed_whole() -> None:
    name = "checkpoint_core_attention"
    (found,) = launch(run, 1, ["core_attn"], timeout_s=120)
    assert [[layer[name] for layer in layers] for layers in found] == [[True] * 3, [False, True, True], [False] * 3]
