"""Runs Megatron-Core on a machine without CUDA, over gloo: for laptops, for tests, for continuous integration.

Megatron-Core asks ``torch.cuda`` for the current device, its random state and its synchronisation throughout. :func:`enable_cpu` puts
the CPU's answers there, once a process, before the model is built. Three kinds of touch points, each for a reason:

* ``torch.cuda`` functions and ``Tensor.cuda``, asked for while building, running and checkpointing a model. Megatron-Core uses the
  answer of ``torch.cuda.current_device()`` only as ``device=``.
* ``device="cuda"`` literals and ``Tensor.type()`` strings in the optimizers and gradient clipping: the functions that hold them run
  inside :class:`CpuDeviceMode`, which rewrites both. The mode costs microseconds for every torch call, so models never run inside it.
* ``torch.zeros(device="cuda")`` in Megatron's own schedules, around which models do run: that module sees a ``torch`` of which only
  ``zeros`` is another.

Limits: no Transformer Engine, Apex or fused kernels; fusions that need them stay off in the configuration (their default).
Tried with Megatron-Core 0.16.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_dip.spec.errors import InputError

_CPU = torch.device("cpu")
_enabled = False

# Only what names a device or a type: a step also runs thousands of small torch calls, and the mode costs microseconds for each.
_OPTIMIZER_METHODS = ("__init__", "state_dict", "load_state_dict", "sharded_state_dict", "reload_model_params")
_CLIPPING_FUNCTIONS = ("clip_grad_by_total_norm_fp32", "count_zeros_fp32", "get_grad_norm_fp32")


class CpuDeviceMode(TorchFunctionMode):
    """While active, ``device="cuda"`` means the CPU, no memory is pinned (for a copy to a device that is not there), and a CPU tensor's
    ``type()`` names the CUDA type that Megatron compares with."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str) and len(args) == 1 and ".cuda." not in result:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _is_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, torch.device) and device.type == "cuda")


def enable_cpu() -> None:
    """Makes Megatron-Core run on the CPU in this process; a second call does nothing.

    Raises InputError where CUDA is present: a run that silently leaves the GPUs idle is never what was meant.
    """
    global _enabled
    if _enabled:
        return
    if torch.cuda.is_available():
        raise InputError(
            "--device", "cpu", f"this machine has {torch.cuda.device_count()} CUDA device(s)",
            "use --device cuda, or hide the devices with CUDA_VISIBLE_DEVICES=''",
        )
    _replace_cuda_functions()
    _wrap_optimizers()
    _replace_schedule_zeros()
    _enabled = True


def _replace_cuda_functions() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.set_device = lambda device: None
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    # torch.manual_seed calls torch.cuda.manual_seed_all, so the latter must not call back; Megatron calls manual_seed alone.
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.manual_seed_all = lambda seed: None
    module: Any = megatron_random
    module._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    nn_module: Any = torch.nn.Module
    nn_module.cuda = lambda self, device=None: self


def _wrap_optimizers() -> None:
    from megatron.core.optimizer import distrib_optimizer, grad_scaler, optimizer

    classes = (
        grad_scaler.MegatronGradScaler, grad_scaler.DynamicGradScaler, optimizer.MegatronOptimizer, optimizer.MixedPrecisionOptimizer, optimizer.Float16OptimizerWithFloat16Params,
        optimizer.FP32Optimizer, optimizer.ChainedOptimizer, distrib_optimizer.DistributedOptimizer,
    )
    for cls in classes:
        for name in _OPTIMIZER_METHODS:
            if name in vars(cls):
                setattr(cls, name, _in_cpu_device_mode(vars(cls)[name]))
    for name in _CLIPPING_FUNCTIONS:
        setattr(optimizer, name, _in_cpu_device_mode(getattr(optimizer, name)))


def _in_cpu_device_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with CpuDeviceMode():
            return function(*args, **kwargs)

    return wrapped


class _TorchForSchedules(types.ModuleType):
    """``torch`` as Megatron's schedules see it: the same but for ``zeros``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, **{**kwargs, "device": _CPU})


def _replace_schedule_zeros() -> None:
    from megatron.core.pipeline_parallel import schedules

    module: Any = schedules
    module.torch = _TorchForSchedules("torch")
