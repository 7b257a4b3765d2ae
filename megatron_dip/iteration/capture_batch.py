"""This replica's microbatches of one iteration: pulled from the data iterator and captured, nothing runs.

In: the user's forward_step and data iterator. Out: what forward_step gives the model for each microbatch, and how long its instances are. Whatever
fails here is kept as an error, since every rank must come to the point where all ranks tell each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from megatron_dip.iteration.agreement import sha256
from megatron_dip.iteration.randomness import DrawPlace, drawing
from megatron_dip.models.capture import CapturedCall, capture
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedBatch:
    calls: list[CapturedCall]
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

    def __call__(
        self, forward_step: Callable[..., Any], iterator: Iterator[Any] | None, num_microbatches: int, place: DrawPlace
    ) -> CapturedBatch:
        """Args:
        place: gives the random states that forward_step runs under.
        """
        calls: list[CapturedCall] = []
        microbatches: list[Microbatch] | None = None
        conditions = b""
        error: Exception | None = None
        is_replay = is_replaying(iterator)
        try:
            if iterator is None:
                calls = [self._capture(forward_step, None, place.of_microbatch(i)) for i in range(num_microbatches)]
            else:
                items = [next(iterator) for _ in range(num_microbatches)]
                if self.call_metadata is None:
                    microbatches = [self.metadata(item) for item in items]
                calls = [self._capture(forward_step, iter([item]), place.of_microbatch(i)) for i, item in enumerate(items)]
            if self.call_metadata is not None:
                known = [self.call_metadata(call) for call in calls]
                microbatches = known if all(known) else None
            if self.call_conditions is not None:
                conditions = sha256(msgspec.json.encode([self.call_conditions(call) for call in calls]))
        except StopIteration:
            error = InputError("data_iterator", num_microbatches, "ended before it gave this many microbatches", "give more data or fewer iterations")
        except Exception as caught:
            error = caught
        return CapturedBatch(calls=calls, microbatches=microbatches, conditions=conditions, error=error, is_replay=is_replay)

    def _capture(self, forward_step: Callable[..., Any], iterator: Iterator[Any] | None, seed: int) -> CapturedCall:
        with drawing(seed):
            return capture(forward_step, iterator, self.chunk, self.num_outputs)


def is_replaying(iterator: Any) -> bool:
    """Whether Megatron's rerun state machine repeats an iteration, as its iterator knows."""
    return bool(getattr(iterator, "replaying", False))
