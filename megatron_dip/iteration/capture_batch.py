"""This replica's microbatches of one iteration: pulled from the data iterator and captured, nothing runs.

In: the user's forward_step and data iterator. Out: what this rank's chunks need of what forward_step gives the model for each microbatch, and how
long its instances are. Whatever fails here is kept as an error, since every rank must come to the point where all ranks tell each other. Images
beyond a budget are let go at once: forward_step is then run again, under the same random states, when the microbatch's stem is about to run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch

from megatron_dip.iteration.agreement import sha256
from megatron_dip.iteration.randomness import DrawPlace, drawing
from megatron_dip.models.capture import CapturedCall, capture
from megatron_dip.runtime.interface import BoundCall
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Microbatch


class DataEnded(InputError):
    """The data iterator gave fewer items than a batch has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedBatch:
    calls: list[CapturedCall]
    """Without the arguments for the model."""
    inputs: list[BoundCall]
    """What the rank's chunks need of these arguments."""
    recapture: Callable[[int], CapturedCall]
    """The call of a microbatch that reads again, arguments included; once each."""
    microbatches: list[Microbatch] | None
    """Instance lengths; None: this rank was not given its data."""
    conditions: bytes
    """Digest of what microbatches give to every layer; empty: nothing to compare."""
    error: Exception | None
    is_replay: bool
    """Whether Megatron's rerun state machine repeats an iteration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCapture:
    """How microbatches are read; the arguments are explained in ``forward_backward.IterationSettings``."""

    chunk: torch.nn.Module
    """One of this rank, for what forward_step asks of its model."""
    metadata: Callable[[Any], Microbatch]
    call_metadata: Callable[[CapturedCall], Microbatch] | None
    call_conditions: Callable[[CapturedCall], Sequence[str]] | None
    num_outputs: int | None
    bind: Callable[[CapturedCall], BoundCall]
    """What this rank's chunks need of a call's arguments."""

    def __call__(
        self, forward_step: Callable[..., Any], iterator: Iterator[Any] | None, num_microbatches: int, place: DrawPlace
    ) -> CapturedBatch:
        """Args:
        place: gives the random states that forward_step runs under.
        """
        calls: list[CapturedCall] = []
        inputs: list[BoundCall] = []
        items: list[Any] = []
        microbatches: list[Microbatch] | None = None
        conditions = b""
        error: Exception | None = None
        is_replay = is_replaying(iterator)

        def captured(microbatch: int) -> CapturedCall:
            item = None if iterator is None else iter([_same_tensors(items[microbatch])])
            return self._capture(forward_step, item, place.of_microbatch(microbatch))

        def recapture(microbatch: int) -> CapturedCall:
            call = captured(microbatch)
            items[microbatch] = None
            return call

        try:
            if iterator is None:
                items += [None] * num_microbatches
            else:
                items += [next(iterator) for _ in range(num_microbatches)]
                if self.call_metadata is None:
                    microbatches = [self.metadata(item) for item in items]
            known: list[Microbatch] = []
            given: list[Sequence[str]] = []
            for microbatch in range(num_microbatches):
                call = captured(microbatch)
                if self.call_metadata is not None:
                    known.append(self.call_metadata(call))
                if self.call_conditions is not None:
                    given.append(self.call_conditions(call))
                inputs.append(self.bind(call))
                if not inputs[-1].reads_again:
                    items[microbatch] = None  # it will not be read again
                calls.append(replace(call, args=(), kwargs={}))
            if self.call_metadata is not None:
                microbatches = known if all(known) else None
            if self.call_conditions is not None:
                conditions = sha256(msgspec.json.encode(given))
        except StopIteration:
            error = DataEnded("data_iterator", num_microbatches, "ended before it gave this many microbatches", "give more data or fewer iterations")
        except Exception as caught:
            error = caught
        return CapturedBatch(
            calls=calls, inputs=inputs, recapture=recapture, microbatches=microbatches, conditions=conditions, error=error, is_replay=is_replay
        )

    def _capture(self, forward_step: Callable[..., Any], iterator: Iterator[Any] | None, seed: int) -> CapturedCall:
        with drawing(seed):
            return capture(forward_step, iterator, self.chunk, self.num_outputs)


def _same_tensors(item: Any) -> Any:
    """A copy of an item's containers with the same tensors: forward_step may take things out of it, and it may be needed again."""
    if type(item) in (list, tuple):
        return type(item)(map(_same_tensors, item))
    if type(item) is dict:
        return {key: _same_tensors(value) for key, value in item.items()}
    return item if isinstance(item, torch.Tensor) else copy.copy(item)


def is_replaying(iterator: Any) -> bool:
    """Whether Megatron's rerun state machine repeats an iteration, as its iterator knows."""
    return bool(getattr(iterator, "replaying", False))
