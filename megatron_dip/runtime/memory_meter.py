"""Measures what stages keep: saved tensors and messages under way, by the lives of their storages.

On a device without memory statistics (the CPU) this is how a run's peak is held against its plan's. Each storage counts once, from when
autograd first saves it or the executor first gives it away until nobody holds it any more; weights, gradients and whatever else stands in
:meth:`MemoryMeter.leave_out` do not count. Not counted, as in plans: what operators need for themselves.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch


class MemoryMeter:
    """Live bytes and their peak on one rank. Not for use from several threads at once."""

    def __init__(self) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self._left_out: frozenset[int] = frozenset()
        self._known: set[int] = set()
        """Storages that count, by address; an address is free again when its storage has gone."""

    def begin(self) -> None:
        """Starts an iteration: the peak is what is live now."""
        self.peak_bytes = self.live_bytes

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Storages of these never count (weights, what holds gradients)."""
        self._left_out = frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage from now on."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known or address in self._left_out:
            return
        self._known.add(address)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, address, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live_bytes -= size

    def watching(self) -> AbstractContextManager[None]:
        """Within it everything that autograd saves counts, but for layers that are offloaded, which report themselves."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        self.add(tensor)
        return as_saved(tensor)


def as_saved(tensor: torch.Tensor) -> torch.Tensor:
    """What a hook may hold of a tensor that stays as it is. Of what a node made, an alias outside of the graph: node and tensor would hold
    each other for ever."""
    return tensor if tensor.grad_fn is None else tensor.detach()


def _unpack(saved: torch.Tensor) -> torch.Tensor:
    return saved


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Those in arguments of a call, in lists, dicts and dataclasses (packed sequences' bounds) as well."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in tensors_in(one)]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])
    return []
