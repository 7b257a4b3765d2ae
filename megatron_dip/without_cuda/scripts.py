"""Megatron-LM's own training scripts on a machine without CUDA: what they need beyond :mod:`megatron_dip.without_cuda.core`.

:func:`prepare_scripts` is called once a process, after the checkout is importable and before the script starts. It

* answers the questions that scripts, not models, ask of ``torch.cuda`` (is it there, how much memory, device properties);
* stands a stub in for Triton, which Megatron-LM imports at its top although only GPU kernels use it;
* leaves out the compilation of fused kernels, and takes the index helpers of data sets from an installed megatron-core where the
  checkout has not compiled its own;
* mends what Megatron-Core does only right with Transformer Engine (the CLIP vision model's norm, norms under sequence parallelism, the
  experts' router).

Limits: as in :mod:`megatron_dip.without_cuda.core`; tried with the scripts of 0.16.1.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dip.without_cuda.core import CpuDeviceMode, enable_cpu

_HELPERS = "megatron.core.datasets.helpers_cpp"


def prepare_scripts() -> None:
    """Makes the scripts of the Megatron-LM tree on ``sys.path`` run on the CPU. Raises InputError where CUDA is present."""
    prepare_imports()
    from megatron_dip.without_cuda.torch_adam import (
        mend_distributed_optimizer,  # imports Megatron-Core, which asks for what was just prepared
    )

    enable_cpu()
    _answer_for_cuda()
    _leave_out_kernels()
    mend_without_transformer_engine()
    mend_distributed_optimizer()
    # The training loop says device="cuda" in dozens of places; in a script that is only tried out the mode's cost does not matter.
    CpuDeviceMode().__enter__()


def prepare_imports() -> None:
    """The part that a spawned child needs too, before it unpickles what Megatron sends it."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch._dynamo

    torch._dynamo.config.disable = True
    if importlib.util.find_spec("triton") is None:
        from torch.utils import _triton

        # torch caches this answer: asked first, it stays "no" when the stub can be imported.
        _triton.has_triton_package()
        sys.meta_path.append(_StubFinder("triton"))
    sys.meta_path.append(_InstalledHelpersFinder())


class _StubModule(types.ModuleType):
    """A module whose every attribute is a decorator that gives back what it decorates."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _pass_through


def _pass_through(*args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs and callable(args[0]):
        return args[0]
    return _pass_through


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stub for ``name`` and everything below it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname == self._name or fullname.startswith(self._name + "."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _StubModule(spec.name)
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _InstalledHelpersFinder(importlib.abc.MetaPathFinder):
    """Finds the compiled index helpers in an installed megatron-core when the checkout has none."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HELPERS:
            return None
        folders = [str(Path(entry) / "megatron/core/datasets") for entry in sys.path]
        return importlib.machinery.PathFinder.find_spec(fullname, folders)


def _answer_for_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.get_device_name = lambda device=None: "cpu"
    cuda.get_device_capability = lambda device=None: (0, 0)
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        name="cpu", major=0, minor=0, total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), multi_processor_count=os.cpu_count()
    )
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda device=None: 0)
    cuda.memory_stats = lambda device=None: {}
    stream = _OnlyStream()
    # Classes: transformers has annotations like ``torch.cuda.Stream | None``.
    cuda.Stream, cuda.Event = _OnlyStream, _PassedEvent
    cuda.current_stream = cuda.default_stream = lambda device=None: stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.set_stream = lambda stream: None
    cuda.nvtx = types.SimpleNamespace(range_push=lambda message: 0, range_pop=lambda: 0, mark=lambda message: None)
    # Of torch's builds with CUDA too: its optimizers ask here before they ask the current stream.
    accelerator: Any = torch.accelerator
    accelerator.current_accelerator = lambda check_available=False: None
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None
    tensor.pin_memory = lambda self, device=None: self


class _OnlyStream:
    """The CPU does everything in the order it was asked."""

    cuda_stream = 0

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: object = None) -> _PassedEvent:
        return _PassedEvent()


class _PassedEvent:
    """What was asked before it is done."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


def _leave_out_kernels() -> None:
    initialize = importlib.import_module("megatron.training.initialize")
    initialize._compile_dependencies = _compile_index_helpers  # type: ignore[attr-defined]
    initialize._warmup_jit_function = lambda *args, **kwargs: None  # type: ignore[attr-defined]


def _compile_index_helpers() -> None:
    if importlib.util.find_spec(_HELPERS) is None and torch.distributed.get_rank() == 0:
        importlib.import_module("megatron.core.datasets.utils").compile_helpers()
    torch.distributed.barrier()


def mend_without_transformer_engine() -> None:
    """What Megatron-Core does only right with Transformer Engine, or on a GPU: CLIPViTModel's default norm is torch's, which does not
    take Megatron's arguments; its wrapper of torch's norms refuses sequence parallelism; the experts' router asks for a name that it has
    not imported; and their dispatcher gives the exchange its numbers of tokens as they are where they lie on the CPU already, as a tensor,
    which torch does not take."""
    clip = importlib.import_module("megatron.core.models.vision.clip_vit_model")
    defaults = clip.CLIPViTModel.__init__.__defaults__
    wrapped = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    clip.CLIPViTModel.__init__.__defaults__ = tuple(wrapped if value is torch.nn.LayerNorm else value for value in defaults)
    _let_norms_divide_sequences(wrapped)
    router = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(router, "te_general_gemm"):
        router.te_general_gemm = None  # type: ignore[attr-defined]
    dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = (  # type: ignore[attr-defined]
        lambda tensor, as_numpy=False, record_stream=False: tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor
    )


def _let_norms_divide_sequences(wrapped: Any) -> None:
    """Has Megatron's wrapper of torch's norms build one that knows sequence parallelism where the model asks for it."""
    norm_class = importlib.import_module("megatron_dip.models.layers").Norm
    build = wrapped.__new__

    def build_either(cls: type, config: Any, hidden_size: int, *args: Any, **kwargs: Any) -> torch.nn.Module:
        if config.sequence_parallel:
            return norm_class(config, hidden_size, *args, **kwargs)  # type: ignore[no-any-return]
        return build(cls, config, hidden_size, *args, **kwargs)  # type: ignore[no-any-return]

    wrapped.__new__ = build_either
