"""Data-parallel communication of an iteration, in an order of chunks that all replicas share, whose plans differ.

In: this rank's chunks inside Megatron's DDP, and the plan. Out: which gradient reductions start behind which stage; the gathering of updated
parameters before the first stage. Source: Megatron-Core's ``DistributedDataParallel`` (``start_grad_sync``, ``start_param_sync``, ``no_sync``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_dip.models.layout import backward_order
from megatron_dip.runtime.interface import ChunkKey
from megatron_dip.spec.plan import Plan

AT_START = -1
"""Where reductions start that wait for no stage."""


def grad_sync_points(
    chunks: Sequence[torch.nn.Module], chunk_keys: Sequence[ChunkKey], modules: Sequence[str], plan: Plan, rank: int, config: Any,
    force_all_reduce: bool,
) -> dict[int, list[Callable[[], None]]]:
    """Stage id -> gradient reductions to start once that stage has run (``AT_START``: before the first stage).

    Replicas run different plans, but collectives must come in one order on all of them: against the data's way, in which last backwards
    come in most plans (docs/results/gradient_sync.md). Chunk i of that order is reduced once the last gradient of chunks 0..i has been
    made. With ``force_all_reduce``, several instances of the distributed optimizer (whose finish starts a
    reduction whether one was started or not), or without overlap ``finalize_model_grads`` does it all at the end.

    Args:
        modules: of the model, those that feed others first.
    """
    functions: dict[ChunkKey, Callable[[], None]] = {}
    for index, (key, chunk) in enumerate(zip(chunk_keys, chunks, strict=True)):
        if _has_several_optimizer_instances(chunk):
            continue
        if config.grad_sync_func is not None:
            function = config.grad_sync_func[index] if isinstance(config.grad_sync_func, list) else config.grad_sync_func
            functions[key] = _bound(function, chunk)
        elif _overlaps_grad_reduce(chunk) and not force_all_reduce:
            functions[key] = chunk.start_grad_sync  # type: ignore[assignment]
    last: dict[ChunkKey, int] = {}
    for position, stage_id in enumerate(plan.order[rank]):
        stage = plan.stages[stage_id]
        if stage.kind != "fw":
            last[stage.module, stage.vp_stage] = position
    points: dict[int, list[Callable[[], None]]] = {}
    position = -1
    for key in backward_order(chunk_keys, modules):
        position = max(position, last.get(key, -1))
        if key in functions:
            stage_id = AT_START if position < 0 else plan.order[rank][position]
            points.setdefault(stage_id, []).append(functions[key])
    return points


def start_param_sync(chunks: Sequence[torch.nn.Module]) -> None:
    """Starts the gathering of updated parameters where it overlaps with the forward pass: all chunks, in canonical order.

    Left to the forward hooks, the order would be that of the plan, which differs between replicas.
    """
    for chunk in chunks:
        if getattr(chunk, "remove_forward_pre_hook_handles", None) and not all(
            group.param_gather_dispatched for group in _bucket_groups(chunk)
        ):
            chunk.start_param_sync()  # type: ignore[operator]


def finish_param_sync(chunks: Sequence[torch.nn.Module]) -> None:
    """Waits for the gathering of chunks that had nothing to do in this iteration; the others waited in their forward hooks."""
    for chunk in chunks:
        if getattr(chunk, "remove_forward_pre_hook_handles", None):
            for group in _bucket_groups(chunk):
                if group.param_gather_handle is not None:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)


def no_sync(config: Any) -> contextlib.AbstractContextManager[Any]:
    functions = config.no_sync_func
    stack = contextlib.ExitStack()
    for function in functions if isinstance(functions, list) else [] if functions is None else [functions]:
        stack.enter_context(function())
    return stack


def _bucket_groups(chunk: Any) -> list[Any]:
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def _overlaps_grad_reduce(chunk: Any) -> bool:
    ddp_config = getattr(chunk, "ddp_config", None)
    return ddp_config is not None and ddp_config.overlap_grad_reduce


def _has_several_optimizer_instances(chunk: Any) -> bool:
    ddp_config = getattr(chunk, "ddp_config", None)
    return ddp_config is not None and ddp_config.num_distributed_optimizer_instances > 1


def _bound(function: Callable[..., None], chunk: torch.nn.Module) -> Callable[[], None]:
    return lambda: function(chunk.parameters())
