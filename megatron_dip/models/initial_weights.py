"""First weights that do not depend on how a model is cut: each is drawn from a generator of its own, seeded by its checkpoint name."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state


@torch.no_grad()
def draw_weights(
    stage: torch.nn.Module, *, seed: int, tensor_parallel: int, std_of: Callable[[str, torch.nn.Parameter], float],
    key_of: Callable[[str], str],
) -> None:
    """Draws the matrices of a stage. Vectors (biases, norms) keep Megatron's zeros and ones; torch's own layers get zero biases too.

    Under tensor parallelism every rank draws the whole matrix and keeps its part.

    Args:
        std_of: (name in the stage, parameter) -> standard deviation; 0 = zeros.
        key_of: name in the stage -> name that seeds the generator, see :func:`global_name`.
    """
    tensor_rank = parallel_state.get_tensor_model_parallel_rank() if tensor_parallel > 1 else 0
    for module in stage.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module.bias is not None:
            module.bias.zero_()
    for name, parameter in stage.named_parameters():
        if parameter.ndim < 2:
            continue
        dimension = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
        shape = list(parameter.shape)
        if dimension >= 0:
            shape[dimension] *= tensor_parallel
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key_of(name)}".encode()))
        whole = torch.empty(shape, dtype=torch.float32).normal_(0.0, std_of(name, parameter), generator=generator)
        if dimension >= 0:
            # A gated MLP's first matrix is two stacked ones, each spread by itself.
            stacked = 2 if _is_gated(stage, name) else 1
            parts = [half.chunk(tensor_parallel, dim=dimension)[tensor_rank] for half in whole.chunk(stacked, dim=0)]
            whole = torch.cat(parts, dim=0) if stacked > 1 else parts[0]
        parameter.copy_(whole)


def _is_gated(stage: torch.nn.Module, name: str) -> bool:
    layer, found, _ = name.partition(".mlp.linear_fc1.weight")
    config: Any = getattr(stage.get_submodule(layer), "config", None) if found else None
    return config is not None and config.gated_linear_unit


def global_name(stage: torch.nn.Module, name: str) -> str:
    """A parameter's name with its layer's number in the whole module instead of in the stage."""
    part, dot, rest = name.partition(".decoder.layers.")
    if not dot:
        return name
    index, _, tail = rest.partition(".")
    decoder: Any = stage.get_submodule(f"{part}.decoder")
    return f"{part}.decoder.layers.{decoder.layers[int(index)].layer_number - 1}.{tail}"
