"""Backward split in B and W: the numbers of a whole backward, and the weight gradients really made in W."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch
from tests.distributed.test_parity_dip import check
from tests.distributed.tiny_vlm import Case

pytestmark = pytest.mark.distributed
SPLIT = ("split_backward", True)


def test_split_backward_equals_one_process() -> None:
    two = Parallel(pipeline=2)
    check(
        [
            Case(parallel=two, chunks=(1, 2), options=(SPLIT,)),
            Case(parallel=two, chunks=(2, 2), tied=True, gated=True, options=(SPLIT, ("random", 5))),
            Case(parallel=two, chunks=(1, 2), trainable=(False, True), options=(SPLIT,)),
            Case(parallel=two, chunks=(1, 2), trainable=(True, False), options=(SPLIT,)),
            Case(parallel=two, chunks=(1, 1), options=(SPLIT, ("memory", 2_000_000))),
        ],
        1e-6,
    )


def test_split_backward_equals_one_process_under_tensor_and_data_parallel() -> None:
    check([Case(parallel=Parallel(pipeline=2, tensor=2, sequence=sequence), chunks=(1, 2), options=(SPLIT,)) for sequence in (False, True)], 5e-6)
    case = Case(
        parallel=Parallel(pipeline=2, data=2), chunks=(1, 2), image_counts=((3, 0, 5, 1), (0, 2, 0, 4)), steps=2, options=(SPLIT,),
        overlap_grad_reduce=True, distributed_optimizer=True,
    )
    check([case], 5e-6)


def _when_gradients_come(rank: int, num_ranks: int) -> list[tuple[float, float, float, float]]:
    """Weight and bias gradient sums behind B and behind W, for a layer of each kind; with and without recomputation."""
    from megatron.core import tensor_parallel
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dip.models.deferral import LinearWeightDeferral
    from megatron_dip.trainer.build import initialize_parallel

    initialize_parallel(Parallel(), device="cpu", seed=1)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True)
    seen = []
    for recompute in (False, True):
        for layer_class, options in ((ColumnParallelLinear, {}), (RowParallelLinear, {"input_is_parallel": True})):
            layer = layer_class(4, 6, config=config, init_method=torch.nn.init.ones_, bias=True, skip_bias_add=False, **options)
            deferral = LinearWeightDeferral([layer])
            x = torch.arange(8.0).reshape(2, 1, 4).requires_grad_()
            with deferral.collecting(3):
                y = tensor_parallel.checkpoint(lambda x, layer=layer: layer(x)[0], False, x) if recompute else layer(x)[0]
            with deferral.collecting(3):
                y.backward(torch.ones_like(y))
            assert x.grad is not None
            assert layer.bias.grad is not None
            behind_b = 0.0 if layer.weight.grad is None else float(layer.weight.grad.sum())
            deferral.run(3)
            deferral.assert_empty()
            seen.append((behind_b, float(layer.weight.grad.sum()), float(layer.bias.grad.sum()), float(x.grad.sum())))
    return seen


def test_weight_gradients_come_with_w_and_all_others_with_b() -> None:
    assert launch(_when_gradients_come, 1)[0] == [(0.0, 168.0, 12.0, 48.0)] * 4


class _Witness:
    """Lives as long as the graph that it stands in."""


class _Witnessed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, witness: _Witness) -> torch.Tensor:
        ctx.witness = witness
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0], None


def _graph_lives_behind_w(rank: int, num_ranks: int) -> bool:
    """Whether the graph of a stage does: below the head and Megatron's cross entropy."""
    import gc
    import weakref

    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dip.models.deferral import LinearWeightDeferral
    from megatron_dip.trainer.build import initialize_parallel

    initialize_parallel(Parallel(), device="cpu", seed=1)
    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1, use_cpu_initialization=True)
    head = ColumnParallelLinear(4, 6, config=config, init_method=torch.nn.init.ones_, bias=False, skip_bias_add=False)
    deferral = LinearWeightDeferral([head])
    witness = _Witness()
    alive = weakref.ref(witness)
    x = torch.randn(3, 1, 4).requires_grad_()
    with deferral.collecting(0):
        hidden = _Witnessed.apply(x, witness)  # type: ignore[no-untyped-call]
        loss = vocab_parallel_cross_entropy(head(hidden)[0], torch.tensor([[1], [2], [3]])).sum()
    with deferral.collecting(0):
        loss.backward()
    del hidden, loss, witness
    deferral.run(0)
    gc.collect()
    return alive() is not None


def test_activations_go_with_w() -> None:
    """Megatron's cross entropy gives the logits themselves back as their gradient: kept for W it must not hold the graph it stands in."""
    assert launch(_graph_lives_behind_w, 1) == [False]


def _fused_products(rank: int, num_ranks: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.dtype]]:
    """What W adds to ``main_grad`` under fused accumulation, in bf16; the exact sum; what Megatron's kernel was given.

    The kernel needs CUDA: one that does its arithmetic stands in for it.
    """
    from types import SimpleNamespace

    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dip.models.deferral import LinearWeightDeferral
    from megatron_dip.trainer.build import initialize_parallel

    initialize_parallel(Parallel(), device="cpu", seed=1)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True, params_dtype=torch.bfloat16)
    layer = layers.ColumnParallelLinear(8, 6, config=config, init_method=torch.nn.init.ones_, bias=False, skip_bias_add=False)
    layer.gradient_accumulation_fusion = True
    layer.weight.main_grad = torch.zeros(6, 8)
    given: list[torch.dtype] = []

    def accumulate(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
        given.append(main_grad.dtype)
        main_grad.addmm_(grad_output.float().t(), total_input.float())

    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    deferral = LinearWeightDeferral([layer])
    expected = torch.zeros(6, 8)
    for stage in (0, 1):
        x = torch.randn(5, 1, 8).bfloat16().requires_grad_()
        grad = torch.randn(5, 1, 6).bfloat16()
        with deferral.collecting(stage):
            y = layer(x)[0]
            y.backward(grad)
        expected += grad[:, 0].float().t() @ x.detach()[:, 0].float()
    assert not layer.weight.main_grad.any()
    for stage in (1, 0):
        deferral.run(stage)
    return layer.weight.main_grad, expected, given


def test_fused_accumulation_adds_products_that_were_not_rounded() -> None:
    ((got, expected, given),) = launch(_fused_products, 1)
    assert given == [torch.float32] * 2
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(got, got.bfloat16().float())
