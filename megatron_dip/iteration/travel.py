"""Items of a data iterator as bytes that travel between ranks: as they came, neither converted nor padded.

In: any item that can be pickled: nested structures of tensors on the CPU, NumPy arrays and plain values, dataclasses among them. Out:
one ``uint8`` tensor. Tensors and arrays stand in it as they are, behind the pickled structure that holds them together. Tensors that
come back share the received buffer.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

_ALIGNMENT = 16
"""Bytes; every tensor starts at a multiple, so that it can be viewed in its own type."""
_LENGTH = 8
"""Bytes of the number in front: how long the structure is."""


@dataclass(frozen=True, slots=True)
class _Leaf:
    """Where a tensor's data stand behind the structure, and what it looks like."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PackedItem:
    """An item that is ready to travel; its tensors are still the item's own."""

    structure: bytes
    parts: tuple[tuple[int, torch.Tensor], ...]
    """(place behind the structure, flat uint8 view)"""
    num_bytes: int
    """Of :meth:`join`'s result."""

    def join(self) -> torch.Tensor:
        """[num_bytes] uint8"""
        whole = torch.zeros(self.num_bytes, dtype=torch.uint8)
        whole[:_LENGTH] = torch.tensor([len(self.structure)], dtype=torch.int64).view(torch.uint8)
        whole[_LENGTH : _LENGTH + len(self.structure)] = torch.frombuffer(bytearray(self.structure), dtype=torch.uint8)
        first = _padded(_LENGTH + len(self.structure))
        for start, part in self.parts:
            whole[first + start : first + start + part.numel()] = part
        return whole


class _Pickler(pickle.Pickler):
    """Leaves tensors out of the structure."""

    def __init__(self, file: io.BytesIO, parts: list[tuple[int, torch.Tensor]]) -> None:
        super().__init__(file, protocol=5, buffer_callback=self._take_buffer)
        self._parts = parts
        self._end = 0
        self.buffers: list[_Leaf] = []

    def persistent_id(self, value: Any) -> _Leaf | None:
        if not isinstance(value, torch.Tensor):
            return None
        if type(value) is not torch.Tensor or value.device.type != "cpu" or value.layout != torch.strided or value.requires_grad:
            raise pickle.PicklingError(f"a {type(value).__name__} on {value.device}, {value.layout}, requires_grad {value.requires_grad}")
        flat = value.contiguous().reshape(-1)
        return self._take(flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8), value.dtype, tuple(value.shape))

    def _take(self, data: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> _Leaf:
        leaf = _Leaf(self._end, dtype, shape)
        self._parts.append((self._end, data))
        self._end = _padded(self._end + data.numel())
        return leaf

    def _take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        data = torch.frombuffer(bytearray(raw) if raw.readonly else raw, dtype=torch.uint8) if raw.nbytes else torch.empty(0, dtype=torch.uint8)
        self.buffers.append(self._take(data, torch.uint8, (data.numel(),)))
        return False


def pack(item: Any) -> PackedItem:
    """Raises pickle.PicklingError, TypeError or AttributeError for what cannot travel: tensors elsewhere than on the CPU, functions,
    open files."""
    file = io.BytesIO()
    parts: list[tuple[int, torch.Tensor]] = []
    pickler = _Pickler(file, parts)
    pickler.dump(item)
    structure = pickle.dumps((file.getvalue(), pickler.buffers))
    size = _padded(_LENGTH + len(structure)) + (parts[-1][0] + parts[-1][1].numel() if parts else 0)
    return PackedItem(structure, tuple(parts), size)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, data: torch.Tensor, buffers: list[_Leaf]) -> None:
        super().__init__(file, buffers=[_view(data, leaf).numpy() for leaf in buffers])
        self._data = data

    def persistent_load(self, pid: _Leaf) -> torch.Tensor:
        return _view(self._data, pid)


def unpack(whole: torch.Tensor) -> Any:
    """The item of :meth:`PackedItem.join`."""
    length = int(whole[:_LENGTH].view(torch.int64))
    structure, buffers = pickle.loads(whole[_LENGTH : _LENGTH + length].numpy().tobytes())
    return _Unpickler(io.BytesIO(structure), whole[_padded(_LENGTH + length) :], buffers).load()


def _view(data: torch.Tensor, leaf: _Leaf) -> torch.Tensor:
    count = leaf.dtype.itemsize
    for size in leaf.shape:
        count *= size
    if count == 0:
        return torch.empty(leaf.shape, dtype=leaf.dtype)
    return data[leaf.start : leaf.start + count].view(leaf.dtype).reshape(leaf.shape)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
