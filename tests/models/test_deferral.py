"""Transformer Engine's delayed weight gradients under the plan's W, on a stand-in for its layers: they need CUDA."""

from __future__ import annotations

import queue
from typing import Any

import pytest
import torch

from megatron_dip.models.deferral import LinearWeightDeferral, check_split
from megatron_dip.spec.errors import InputError


class _Store:
    """Transformer Engine's WeightGradStore (transformer_engine/pytorch/module/_common.py)."""

    def __init__(self) -> None:
        self.context: queue.Queue[Any] | None = None
        self.enabled = False

    def put(self, tensors: list[torch.Tensor], function: Any) -> None:
        assert self.enabled
        assert self.context is not None
        self.context.put([tensors, function])

    def pop(self) -> Any:
        assert self.enabled
        assert self.context is not None
        tensors, function = self.context.get_nowait()
        return function(*tensors), tensors


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, layer: _EngineLinear) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        layer = ctx.layer

        def weight_gradient(x: torch.Tensor, grad: torch.Tensor) -> Any:
            made = grad.t() @ x
            if not layer.fuse_wgrad_accumulation:
                return made, grad.sum(0)
            layer.weight.main_grad += made
            return None, grad.sum(0)

        if layer.wgrad_store.enabled:
            layer.wgrad_store.put([x, grad], weight_gradient)
            return grad @ weight, None, None, None
        made, bias = weight_gradient(x, grad)
        return grad @ weight, made, bias, None


class _EngineLinear(torch.nn.Module):
    """A linear layer whose ``backward_dw`` works, and overwrites, as TransformerEngineBaseModule's."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.bias = torch.nn.Parameter(torch.zeros(2))
        self.fuse_wgrad_accumulation = fused
        self.wgrad_store = _Store()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Product.apply(x, self.weight, self.bias, self)  # type: ignore[no-untyped-call, no-any-return]

    def backward_dw(self) -> None:
        if not self.wgrad_store.enabled:
            return
        (made, bias), _ = self.wgrad_store.pop()
        if not self.fuse_wgrad_accumulation:
            self.weight.grad = made.to(self.weight.dtype)
        if self.bias.grad is None:
            self.bias.grad = bias


_EngineLinear.__module__ = "transformer_engine.pytorch.module.linear"


class _MegatronLinear(_EngineLinear):
    """Megatron's subclass, which does nothing without its own flag."""

    def backward_dw(self) -> None:
        raise AssertionError("Megatron's backward_dw asks for --delay-wgrad-compute")


def _run(fused: bool, with_main_grad: bool, *, split: tuple[bool, ...]) -> tuple[torch.nn.Module, list[torch.Tensor], LinearWeightDeferral]:
    layer = _MegatronLinear(fused)
    deferral = LinearWeightDeferral([layer])
    if with_main_grad:
        for parameter in layer.parameters():
            parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
    inputs = []
    for stage, is_split in enumerate(split):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(stage)).requires_grad_()
        inputs.append(x)
        if is_split:
            with deferral.collecting(stage):
                y = layer(x)
            with deferral.collecting(stage):
                y.backward(torch.ones_like(y) * (stage + 1))
        else:
            layer(x).backward(torch.ones(4, 2) * (stage + 1))
            if with_main_grad:  # DDP's hook
                for parameter in layer.parameters():
                    if parameter.grad is not None:
                        parameter.main_grad += parameter.grad  # type: ignore[attr-defined]
                    parameter.grad = None
    return layer, inputs, deferral


@pytest.mark.parametrize(("fused", "with_main_grad"), [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_w_makes_what_b_put_off(fused: bool, with_main_grad: bool, order: tuple[int, int]) -> None:
    layer, inputs, deferral = _run(fused, with_main_grad, split=(True, True))

    def total(name: str) -> torch.Tensor:
        parameter = getattr(layer, name)
        found = parameter.main_grad if with_main_grad else parameter.grad
        return torch.zeros_like(parameter) if found is None else found

    assert all(x.grad is not None for x in inputs)
    assert not total("weight").any()
    done: list[int] = []
    for stage in order:
        deferral.run(stage)
        done.append(stage)
        torch.testing.assert_close(total("weight"), sum(((s + 1) * torch.ones(2, 4) @ inputs[s].detach() for s in done), torch.zeros(2, 3)))
        torch.testing.assert_close(total("bias"), torch.full((2,), float(sum(4 * (s + 1) for s in done))))
    deferral.assert_empty()


def test_stages_that_the_plan_does_not_split_put_nothing_off() -> None:
    layer, inputs, deferral = _run(False, True, split=(False, True, False))
    torch.testing.assert_close(layer.weight.main_grad, torch.ones(2, 4) @ inputs[0].detach() + 3 * torch.ones(2, 4) @ inputs[2].detach())
    with pytest.raises(AssertionError, match="W of stages"):
        deferral.assert_empty()
    deferral.run(1)
    deferral.assert_empty()


def test_layers_that_cannot_put_off_are_refused() -> None:
    old = _MegatronLinear(False)
    del old.wgrad_store
    with pytest.raises(InputError, match=r"--dip-split-backward.*transformer-engine 2\.3") as caught:
        check_split([torch.nn.Sequential(old)])
    assert "_MegatronLinear" in str(caught.value)
    overlapping = _MegatronLinear(False)
    overlapping.ub_bulk_wgrad = True  # type: ignore[assignment]
    with pytest.raises(InputError, match="tp-comm-overlap"):
        LinearWeightDeferral([overlapping])
    frozen = _MegatronLinear(False).requires_grad_(False)
    del frozen.wgrad_store
    check_split([frozen, torch.nn.Linear(2, 2)])
