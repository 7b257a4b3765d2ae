"""Split backward for Megatron's linear layers: B makes the gradients that others wait for, W those of the weights.

Within :meth:`LinearWeightDeferral.collecting` a ColumnParallelLinear or RowParallelLinear runs on a detached weight, for which Megatron
itself computes no weight gradient (``linear_with_frozen_weight``); its input, and in B the gradient of its output, are kept for
:meth:`LinearWeightDeferral.run`, which multiplies them and adds to ``main_grad``. Everything else (biases, norms, embeddings, layers
whose input needs no gradient, Transformer Engine's layers) gets its weight gradient in B as ever: right, only not deferred. Zero Bubble
Pipeline Parallelism (arXiv 2401.10241), section 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region


@dataclass(slots=True)
class _Product:
    """A weight gradient to be computed: grad_output^T @ input."""

    weight: torch.nn.Parameter
    input: torch.Tensor
    grad_output: torch.Tensor
    sequence_parallel_group: Any
    """Tensor-parallel group over which the input must be gathered; None = it is whole."""


class LinearWeightDeferral:
    """Takes over the linear layers of ``chunks``; outside of :meth:`collecting` they work as before."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._collected: dict[int, list[_Product]] = {}
        self._current: list[_Product] | None = None
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                    module._forward_impl = partial(self._linear, module._forward_impl)

    @contextlib.contextmanager
    def collecting(self, stage: int) -> Iterator[None]:
        """For the forward and the B of a forward stage: weight gradients are collected instead of computed."""
        self._current = self._collected.setdefault(stage, [])
        try:
            yield
        finally:
            self._current = None

    @torch.no_grad()
    def run(self, stage: int) -> None:
        """The W of a forward stage."""
        for product in self._collected.pop(stage):
            whole = product.input
            if product.sequence_parallel_group is not None:
                whole = gather_from_sequence_parallel_region(whole, group=product.sequence_parallel_group)
            grad_output, whole = product.grad_output.flatten(0, -2), whole.flatten(0, -2)
            total = getattr(product.weight, "main_grad", product.weight.grad)
            if total is None:
                product.weight.grad = grad_output.t() @ whole
            elif total.dtype == whole.dtype:
                total.addmm_(grad_output.t(), whole)
            else:  # sums in fp32 over products in the training's number format, as Megatron has them
                total.add_(grad_output.t() @ whole)

    def assert_empty(self) -> None:
        assert not self._collected, f"W of stages {sorted(self._collected)} never ran"

    def _linear(
        self, original: Callable[..., torch.Tensor], input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **options: Any
    ) -> torch.Tensor:
        collected = self._current
        if (
            collected is None or not torch.is_grad_enabled() or not input.requires_grad or not weight.requires_grad
            or not isinstance(weight, torch.nn.Parameter)
        ):
            return original(input=input, weight=weight, bias=bias, **options)
        # Megatron's layer without weight gradient drops the bias's too: it is added outside.
        output = original(input=input, weight=weight.detach(), bias=None, **options)
        group = options["tp_group"] if options["sequence_parallel"] else None
        kept = input.detach()
        output.register_hook(lambda grad: collected.append(_Product(weight, kept, grad, group)))
        return output if bias is None else output + bias
