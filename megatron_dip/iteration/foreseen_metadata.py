"""Instance lengths of items that were read ahead, before their iteration comes.

In: an item of the data iterator and the user's forward_step. Out: its :data:`~megatron_dip.spec.workload.Microbatch`. Three ways, in this
order: a function ``dip_metadata(item)`` beside the script's forward_step; forward_step itself, recorded as it is for the batch
(so that both say the same); the model description's reading of the item. Recording runs on a copy of the item, and random numbers are put back
as they were: the iteration itself then sees what it would have seen.

forward_step is not run ahead under tensor or context parallelism, where it exchanges data with ranks that read nothing ahead.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_dip.iteration.randomness import drawing
from megatron_dip.models.capture import CapturedCall, capture
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Microbatch

HOOK = "dip_metadata"
"""Name of the function of a script that says what an item means: item -> {module: [length of each instance]}."""


class ForeseenMetadata:
    """
    Args:
        chunk: one of this rank, for what forward_step asks of its model.
        item_metadata: instance lengths of an item by its form.
        call_metadata: instance lengths of a captured microbatch; None: ``item_metadata`` says them for the batch too.
        records: whether forward_step may be run ahead on this rank alone.
    """

    def __init__(
        self, chunk: torch.nn.Module, item_metadata: Callable[[Any], Microbatch], call_metadata: Callable[[CapturedCall], Microbatch] | None,
        num_outputs: int | None, *, records: bool,
    ) -> None:
        self._chunk = chunk
        self._item_metadata = item_metadata
        self._call_metadata = call_metadata
        self._num_outputs = num_outputs
        self._records = records

    def __call__(self, forward_step: Callable[..., Any], item: Any) -> Microbatch | Exception:
        """The item's instance lengths, or why they are not known."""
        try:
            if self._call_metadata is None:
                return self._item_metadata(item)
            hook = script_function(forward_step, HOOK)
            if hook is not None:
                return _checked(hook(item))
            if not self._records:
                return self._item_metadata(item)
            return self._recorded(forward_step, item)
        except Exception as error:
            return error

    def _recorded(self, forward_step: Callable[..., Any], item: Any) -> Microbatch:
        assert self._call_metadata is not None
        try:
            with drawing(0), torch.no_grad():
                found = self._call_metadata(capture(forward_step, iter([copy.deepcopy(item)]), self._chunk, self._num_outputs))
        except Exception as error:
            try:
                return self._item_metadata(item)
            except Exception:
                raise error from None
        return found or self._item_metadata(item)


def script_function(forward_step: Callable[..., Any], name: str) -> Callable[..., Any] | None:
    """The function of this name in the module of the user's forward_step; None where there is none."""
    function: Any = forward_step
    while not hasattr(function, "__globals__"):
        if isinstance(function, functools.partial):
            function = function.func
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return None
    found = function.__globals__.get(name)
    return found if callable(found) else None


def _checked(said: Any) -> Microbatch:
    """Raises InputError for what is no microbatch."""
    if not isinstance(said, dict) or not all(
        isinstance(module, str) and isinstance(lengths, list | tuple) and all(isinstance(n, int) and n > 0 for n in lengths)
        for module, lengths in said.items()
    ):
        raise InputError(HOOK, said, "is not what an item can be", 'return the length of each instance of every module, such as {"vit": [256], "lm": [4096]}')
    return {module: list(lengths) for module, lengths in said.items() if lengths}
