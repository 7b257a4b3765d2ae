"""Split backward for Megatron's linear layers: B makes the gradients that others wait for, W those of the weights.

Local layers. Within :meth:`LinearWeightDeferral.collecting` a ColumnParallelLinear or RowParallelLinear runs on a detached weight, for
which Megatron itself computes no weight gradient (``linear_with_frozen_weight``); its input, and in B the gradient of its output, are
kept for :meth:`LinearWeightDeferral.run`, which multiplies them and adds to ``main_grad``: in fp32 by Megatron's own kernel where
gradient accumulation is fused, else rounded to the training's number format first, as Megatron does.

Transformer Engine's layers put weight gradients off themselves (``delay_wgrad_compute``): while a layer's ``wgrad_store`` is enabled, its
backward stores what is to be multiplied, and ``backward_dw`` does it. Here the store is enabled for the stages that the plan splits alone,
and each stage has a queue of its own, so that W may come in any order. **Never run on a GPU**; tested on a stand-in with this protocol.

Everything else (norms, embeddings, local layers' biases, layers whose input needs no gradient) gets its weight gradient in B as ever.
Zero Bubble Pipeline Parallelism (arXiv 2401.10241), section 2.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_dip.spec.errors import InputError


@dataclass(slots=True)
class _Product:
    """A weight gradient to be computed: grad_output^T @ input."""

    weight: torch.nn.Parameter
    input: torch.Tensor
    grad_output: torch.Tensor
    sequence_parallel_group: Any
    """Tensor-parallel group over which the input must be gathered; None = it is whole."""
    fused: bool
    """Megatron's ``gradient_accumulation_fusion``: the product is added to ``main_grad`` unrounded."""


class _WeightGradStore(Protocol):
    """Transformer Engine's ``WeightGradStore``, as far as it is used here."""

    enabled: bool
    context: queue.Queue[Any] | None


_TRANSFORMER_ENGINE = "transformer_engine"


def engine_layers(chunks: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """Transformer Engine's layers with weights of two or more dimensions that are trained (linear ones, with or without a norm before)."""
    return [
        module
        for chunk in chunks
        for module in chunk.modules()
        if any(one.__module__.split(".")[0] == _TRANSFORMER_ENGINE for one in type(module).__mro__)
        and any(parameter.requires_grad and parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    ]


def check_split(chunks: Sequence[torch.nn.Module]) -> None:
    """Raises InputError where layers cannot put off their weight gradients, so that a plan with split backwards would time what does not
    happen."""
    for module in engine_layers(chunks):
        if not hasattr(module, "wgrad_store") or not hasattr(module, "backward_dw"):
            raise InputError(
                "--dip-split-backward", type(module).__name__, "this Transformer Engine layer cannot compute weight gradients later",
                "install transformer-engine 2.3 or later, or leave the flag out",
            )
        if getattr(module, "ub_bulk_wgrad", False):
            raise InputError(
                "--dip-split-backward", "--tp-comm-overlap", "communication overlaps with the weight gradients inside of the layer's backward",
                "leave one of the two out",
            )


def can_split(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether :func:`check_split` has nothing to say."""
    try:
        check_split(chunks)
    except InputError:
        return False
    return True


class LinearWeightDeferral:
    """Takes over the linear layers of ``chunks``; outside of :meth:`collecting` they work as before."""

    def __init__(self, chunks: Sequence[torch.nn.Module], keep: Callable[[torch.Tensor], Callable[[], torch.Tensor]] | None = None) -> None:
        """Args:
        keep: keeps a linear layer's input until B as autograd would keep it (:meth:`megatron_dip.runtime.offload.ActivationOffload.keep`).
        """
        check_split(chunks)
        self._keep = keep or _keep_here
        self._collected: dict[int, list[_Product]] = {}
        self._engine_layers = engine_layers(chunks)
        self._delayed: dict[int, list[tuple[torch.nn.Module, queue.Queue[Any]]]] = {}
        """Stage -> layers with what they put off."""
        self._current: list[_Product] | None = None
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                    module._forward_impl = partial(self._linear, module._forward_impl)

    @contextlib.contextmanager
    def collecting(self, stage: int) -> Iterator[None]:
        """For the forward and the B of a forward stage: weight gradients are collected instead of computed."""
        self._current = self._collected.setdefault(stage, [])
        for layer in self._engine_layers:
            store = _store(layer)
            store.context, store.enabled = queue.Queue(), True
        try:
            yield
        finally:
            self._current = None
            for layer in self._engine_layers:
                store = _store(layer)
                if store.context is not None and store.context.qsize():
                    self._delayed.setdefault(stage, []).append((layer, store.context))
                store.context, store.enabled = None, False

    @torch.no_grad()
    def run(self, stage: int) -> None:
        """The W of a forward stage."""
        products = self._collected.pop(stage)
        for product in products:
            whole = product.input
            if product.sequence_parallel_group is not None:
                whole = gather_from_sequence_parallel_region(whole, group=product.sequence_parallel_group)
            grad_output, whole = product.grad_output.flatten(0, -2), whole.flatten(0, -2)
            total = getattr(product.weight, "main_grad", product.weight.grad)
            if total is None:
                product.weight.grad = grad_output.t() @ whole
            elif product.fused and total.dtype == torch.float32:
                megatron_layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(whole, grad_output, total)
            elif total.dtype == whole.dtype:
                total.addmm_(grad_output.t(), whole)
            else:  # sums in fp32 over products in the training's number format, as Megatron has them
                total.add_(grad_output.t() @ whole)
        products.clear()  # the hooks of the stage's outputs hold the list
        for layer, put_off in self._delayed.pop(stage, ()):
            _run_put_off(layer, put_off)

    def assert_empty(self) -> None:
        assert not self._delayed, f"W of stages {sorted(self._delayed)} never ran"
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
        fused = options["gradient_accumulation_fusion"]
        kept = self._keep(input.detach())
        # Detached: Megatron's cross entropy gives the logits back as their gradient, in the graph that holds this hook. Such a ring through
        # autograd's nodes is never collected, and the stage's activations with it.
        output.register_hook(lambda grad: collected.append(_Product(weight, kept(), grad.detach(), group, fused)))
        return output if bias is None else output + bias


def _keep_here(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _store(layer: torch.nn.Module) -> _WeightGradStore:
    return cast(_WeightGradStore, layer.wgrad_store)


def _run_put_off(layer: torch.nn.Module, put_off: queue.Queue[Any]) -> None:
    """Computes weight gradients that a Transformer Engine layer put off, and adds those that are not added to ``main_grad`` by its kernel.

    Megatron's subclass calls the layer's ``backward_dw`` only under its own flag, so it is taken from Transformer Engine's class.
    """
    own = next(
        one for one in type(layer).__mro__ if one.__module__.split(".")[0] == _TRANSFORMER_ENGINE and "backward_dw" in vars(one)
    )
    store = _store(layer)
    store.context, store.enabled = put_off, True
    parameters = [parameter for parameter in layer.parameters(recurse=False) if parameter.requires_grad]
    try:
        while put_off.qsize():
            sums = [(parameter, parameter.grad) for parameter in parameters]
            for parameter in parameters:  # the layer overwrites what stands there
                parameter.grad = None
            own.backward_dw(layer)  # type: ignore[attr-defined]
            for parameter, before in sums:
                made, parameter.grad = parameter.grad, before
                if made is None:
                    continue
                main_grad = getattr(parameter, "main_grad", None)
                if main_grad is not None:
                    main_grad.add_(made)
                elif before is None:
                    parameter.grad = made
                else:
                    before.add_(made)
    finally:
        store.context, store.enabled = None, False
