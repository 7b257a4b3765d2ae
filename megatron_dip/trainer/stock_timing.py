"""Start and end of every stage that Megatron's own schedules run, for Gantt charts beside DIP's.

Megatron's schedules call ``schedules.forward_step`` and ``schedules.backward_step`` by their names in that module; while a
:class:`StockTimer` is entered, those names lead to functions that note the times around the originals.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

from megatron_dip.spec.plan import StageKind
from megatron_dip.spec.timeline import Bar


class StockTimer:
    """Context manager around one call of a forward-backward function.

    Args:
        chunks: the model list of the call.
        modules: for each chunk the modules of which it holds layers, joined by ``+``.
        rank: pipeline rank.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], modules: Sequence[str], rank: int) -> None:
        self.bars: list[Bar] = []
        """Times are of this host's monotonic clock."""
        self._chunk_of = {id(chunk): index for index, chunk in enumerate(chunks)}
        self._modules = modules
        self._rank = rank
        self._seen = [0] * len(modules)
        self._made_by: dict[int, tuple[int, int]] = {}
        self._kept: list[Any] = []
        self._originals: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def __enter__(self) -> StockTimer:
        self._originals = (schedules.forward_step, schedules.backward_step)
        schedules.forward_step = self._forward
        schedules.backward_step = self._backward
        return self

    def __exit__(self, *_: object) -> None:
        assert self._originals is not None
        schedules.forward_step, schedules.backward_step = self._originals
        self._kept.clear()

    def _forward(self, forward_step_func: Any, data_iterator: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert self._originals is not None
        chunk = self._chunk_of[id(model)]
        microbatch = self._seen[chunk]
        self._seen[chunk] += 1
        begin = time.perf_counter_ns()
        result = self._originals[0](forward_step_func, data_iterator, model, *args, **kwargs)
        self._note("fw", chunk, microbatch, begin)
        output = _first_tensor(result[0])
        self._made_by[id(output)] = (chunk, microbatch)
        self._kept.append(output)  # so that no other tensor takes its id
        return result

    def _backward(self, input_tensor: Any, output_tensor: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._originals is not None
        chunk, microbatch = self._made_by[id(_first_tensor(output_tensor))]
        begin = time.perf_counter_ns()
        result = self._originals[1](input_tensor, output_tensor, *args, **kwargs)
        self._note("bw", chunk, microbatch, begin)
        return result

    def _note(self, kind: StageKind, chunk: int, microbatch: int, begin: int) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.bars.append(
            Bar(
                rank=self._rank, kind=kind, module=self._modules[chunk], vp_stage=chunk, microbatch=microbatch, sub_microbatch=0,
                start=begin, end=time.perf_counter_ns(),
            )
        )


def _first_tensor(output: Any) -> Any:
    return output[0] if isinstance(output, list | tuple) else output
