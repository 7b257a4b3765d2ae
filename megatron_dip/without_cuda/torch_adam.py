"""Megatron's optimizers over ``torch.optim``, which they fall back on without Transformer Engine and Apex: saving and loading their state.

Megatron-Core 0.16 fails there: its distributed optimizer asks for the step of an optimizer that has not stepped yet, and loads the step
as a tensor of the state. The repairs here stand around Megatron's own functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return list(optimizer.chained_optimizers) if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _torch_optimizers(optimizer: MegatronOptimizer) -> list[torch.optim.Optimizer]:
    return [part.optimizer for part in _parts(optimizer) if isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))]


def allocate_states(optimizer: MegatronOptimizer) -> None:
    """Gives a torch optimizer that has not stepped yet the state of step 0; Megatron's own allocation leaves ``step`` out."""
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


@contextmanager
def mended_steps(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Two repairs of Megatron's distributed optimizer over ``torch.optim``, while it gives or takes its state.

    Its loading copies every tensor of the inner state from the checkpoint, in which ``step`` stands with the parameter groups instead:
    the step set from there is kept. And it sets one and the same step tensor for all parameters, which each of them would then count
    up: every parameter gets its own.
    """
    # One of Megatron's functions may call the other: the repair already there stays.
    distributed = [
        part for part in _parts(optimizer)
        if isinstance(part, DistributedOptimizer) and "_set_main_param_and_optimizer_states" not in vars(part)
    ]
    for part in distributed:
        part._set_main_param_and_optimizer_states = _keeping_step(part, part._set_main_param_and_optimizer_states)
    try:
        yield
    finally:
        for part in distributed:
            del part._set_main_param_and_optimizer_states
        for inner in _torch_optimizers(optimizer):
            for state in inner.state.values():
                if "step" in state:
                    state["step"] = state["step"].clone()


def _keeping_step(part: Any, original: Any) -> Any:
    def set_states(model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group_index, group_order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group_index]["params"][group_order]]
        original(model_param, {**tensors, "step": state["step"]} if "step" in state else tensors)

    return set_states


def mend_distributed_optimizer() -> None:
    """Makes every distributed optimizer give and take its state under these repairs; ``load_parameter_state`` (for several optimizers
    ``load_parameter_state_from_dp_zero``) is that of the old checkpoint format, which forgets that weights in fp32 are leaves of
    autograd."""
    cls: Any = DistributedOptimizer
    for name in ("sharded_state_dict", "load_state_dict", "load_parameter_state", "load_parameter_state_from_dp_zero"):
        setattr(cls, name, _mended(getattr(cls, name)))


def _mended(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: DistributedOptimizer, *args: Any, **kwargs: Any) -> Any:
        allocate_states(self)
        with mended_steps(self), torch.no_grad():
            return original(self, *args, **kwargs)

    return wrapped
