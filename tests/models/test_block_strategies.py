"""Which layers recompute or are offloaded: as the plan says, and at least what the user's flags ask for; numbers are those of keeping all."""

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
    from megatron_dip.models.staged import BlockStrategies
    from megatron_dip.runtime.offload import ActivationOffload
    from megatron_dip.without_cuda.core import CpuDeviceMode

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=3, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
        recompute_granularity="selective", recompute_modules=modules,
    )
    torch.manual_seed(0)
    block = TransformerBlock(config, transformer_block_spec(3, causal=True))
    offload = ActivationOffload(torch.device("cpu"), 1 << 30)
    chosen = BlockStrategies(block, block, offload)
    hidden, found, gradients = torch.randn(5, 2, 32), [], []
    for strategies in (["none"] * 3, ["none", "none", "full"], ["full"] * 3):
        block.zero_grad()
        mask: Any = torch.ones(5, 5, dtype=torch.bool).triu_(1)[None, None]
        with CpuDeviceMode():
            with chosen.under(strategies, passes_on=True):
                names = ("checkpoint_core_attention", "recompute_mlp", "recompute_input_layernorm", "recompute_pre_mlp_layernorm")
                found.append([
                    {name: getattr(layer.self_attention if name == names[0] else layer, name, False) for name in names}
                    for layer in block.layers
                ])
                output = block(hidden, mask)
            output.square().sum().backward()  # an input that needs no gradient
        gradients.append([None if weight.grad is None else weight.grad.clone() for weight in block.parameters()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    return found


def test_what_the_users_flags_ask_for_stays_on_in_layers_that_are_not_recomputed_whole() -> None:
    name = "checkpoint_core_attention"
    (found,) = launch(run, 1, ["core_attn"], timeout_s=120)
    assert [[layer[name] for layer in layers] for layers in found] == [[True] * 3, [False, True, True], [False] * 3]


def run_assignments(rank: int, ranks: int, num_assignments: int) -> tuple[int, int, list[int]]:
    """Pairs of stages under random strategies, one after the other or in one another's time; assignments that differ from keeping all,
    bytes that were moved, and how often core attention ran in each layer of a backward that recomputes it."""
    prepare(1, ranks, 1)
    import random

    import torch
    from megatron.core import tensor_parallel
    from megatron.core.transformer.transformer_block import TransformerBlock
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dip.models.layers import transformer_block_spec
    from megatron_dip.models.staged import BlockStrategies
    from megatron_dip.runtime.offload import ActivationOffload
    from megatron_dip.without_cuda.core import CpuDeviceMode

    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = TransformerConfig(
        num_layers=4, hidden_size=16, num_attention_heads=2, use_cpu_initialization=True, hidden_dropout=0.2, attention_dropout=0.2,
    )
    torch.manual_seed(0)
    block = TransformerBlock(config, transformer_block_spec(4, causal=True))
    offload = ActivationOffload(torch.device("cpu"), 1 << 30)
    chosen = BlockStrategies(block, block, offload)
    mask: Any = torch.ones(5, 5, dtype=torch.bool).triu_(1)[None, None]
    attention_runs = [0] * 4
    for index, layer in enumerate(block.layers):
        layer.self_attention.core_attention.register_forward_hook(  # type: ignore[union-attr]
            lambda *_, index=index: attention_runs.__setitem__(index, attention_runs[index] + 1)
        )

    def run(strategies: list[list[str]], nested: bool) -> list[torch.Tensor]:
        block.zero_grad()
        hidden = [torch.full((5, 2, 16), 0.1 * (stage + 1)).cumsum(0).requires_grad_() for stage in range(2)]
        outputs: list[torch.Tensor] = []

        def forward(stage: int) -> None:
            torch.manual_seed(stage)
            tensor_parallel.model_parallel_cuda_manual_seed(stage)
            offload.settle()
            with offload.stage(stage, [hidden[stage]]), chosen.under(strategies[stage], passes_on=True):
                outputs.append(block(hidden[stage], mask))

        def backward(stage: int) -> None:
            offload.settle(stage)
            outputs[stage].square().sum().backward()
            offload.finish(stage)

        steps = [(forward, 0), (forward, 1), (backward, 1), (backward, 0)] if nested else [
            (forward, 0), (backward, 0), (forward, 1), (backward, 1),
        ]
        for step, stage in steps:
            step(stage)
        offload.assert_empty()
        return [*(one.grad for one in hidden), *(weight.grad.clone() for weight in block.parameters() if weight.grad is not None)]  # type: ignore[misc]

    draw = random.Random(1)
    differing = 0
    with CpuDeviceMode():
        expected = {nested: run([["none"] * 4] * 2, nested) for nested in (False, True)}
        for number in range(num_assignments):
            strategies = [[draw.choice(["none", "selective", "full", "offload"]) for _ in range(4)] for _ in range(2)]
            nested = number % 2 == 1
            found = run(strategies, nested)
            differing += not all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected[nested], strict=True))
        attention_runs[:] = [0] * 4
        run([["full"] * 4, ["selective"] * 4], True)
    return differing, offload.figures.moved_bytes, attention_runs


def test_numbers_under_200_random_assignments_are_those_of_keeping_all() -> None:
    ((differing, moved, attention_runs),) = launch(run_assignments, 1, 200, timeout_s=240)
    assert differing == 0
    assert moved > 0
    # Forward and once more, in both stages: never a recomputation within one.
    assert attention_runs == [4] * 4
