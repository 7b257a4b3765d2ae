"""Activations that wait for their backward in host memory, layer by layer.

In: the forward of a stage (:meth:`ActivationOffload.stage`), within it the layers that the plan's strategies offload
(:meth:`ActivationOffload.layer`). What autograd saves of such a layer is copied to page-locked buffers when the layer's forward is
launched, and its memory on the device goes when the next offloaded layer's is (or when the next stage begins), by then on the computing
stream that waits for the copy: at most two layers are under way, however far the host runs ahead. A backward finds its topmost layer on the device or
on its way: :meth:`ActivationOffload.fetch_ahead`, called one stage earlier, begins with it; each layer that is needed begins with the
one below, the lowest one with the stage that comes next.

Each storage is copied once and whole, however many views of it are saved. Left alone: weights and buffers of the layer, what the layer
was given besides its input (masks, rotary embeddings), the stage's own inputs, fp8 tensors and whatever Transformer Engine marks as
not to be offloaded, tensors of other devices, small ones, and what the pool has no room for (counted, and said once).

A tensor that went through a hook comes back without its attributes, weights as well: Megatron-Core and Transformer Engine take
``main_grad`` from elsewhere, and give autograd no gradient for weights that they have added to it.

Copies each way have a stream of their own. Memory on the device is always taken on the computing stream and given back there behind a
wait, so that streams share no memory by the allocator's ``record_stream``, whose effect depends on timing. Without CUDA the "host" is a
second set of buffers and copies are done at once; all else is the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_dip.runtime.memory_meter import MemoryMeter, as_saved

logger = logging.getLogger(__name__)

_LEAST_BYTES = 1 << 16
"""Smaller storages stay on a GPU: a copy costs some microseconds whatever its size."""
_LEAST_BUFFER = 512
_NEVER_MOVED = {torch.uint8, *(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))}
"""Number formats of fp8 tensors, whose scales and workspaces belong to their layers."""


@dataclass(slots=True)
class OffloadFigures:
    """Since the start of the run, but for what is in use."""

    moved_bytes: int = 0
    """To the host."""
    kept_bytes: int = 0
    """What should have been moved and found no room."""
    late_fetches: int = 0
    """Layers whose backward came before anything had begun to fetch them."""
    host_bytes: int = 0
    """Buffers taken from the host."""
    most_in_use: int = 0
    """Of these at a time."""


class HostPool:
    """Host buffers, each a power of two of bytes (to which PyTorch rounds page-locked memory), kept for use again.

    Args:
        limit_bytes: of all buffers together.
    """

    def __init__(self, device: torch.device, limit_bytes: int, figures: OffloadFigures) -> None:
        self._pinned = device.type == "cuda"
        self._limit = limit_bytes
        self._free: dict[int, list[torch.Tensor]] = {}
        self._in_use = 0
        self._figures = figures

    def take(self, num_bytes: int) -> torch.Tensor | None:
        """A buffer of at least so many bytes; None where the pool is exhausted."""
        size = max(_LEAST_BUFFER, 1 << (num_bytes - 1).bit_length())
        if self._free.get(size):
            buffer = self._free[size].pop()
        elif self._figures.host_bytes + size <= self._limit:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            self._figures.host_bytes += size
        else:
            larger = min((free for free, buffers in self._free.items() if free > size and buffers), default=None)
            if larger is None:
                return None
            buffer = self._free[larger].pop()
        self._in_use += len(buffer)
        self._figures.most_in_use = max(self._figures.most_in_use, self._in_use)
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        self._in_use -= len(buffer)
        self._free.setdefault(len(buffer), []).append(buffer)


class ActivationOffload:
    """One rank's. Not for use from several threads at once (autograd's own is waited for by the one that calls it).

    Args:
        device: where stages compute.
        limit_bytes: of host memory.
        meter: told what stays on the device and what comes back to it.
    """

    def __init__(self, device: torch.device, limit_bytes: int, meter: MemoryMeter | None = None) -> None:
        self.figures = OffloadFigures()
        self.meter = meter
        self._device = device
        self._pool = HostPool(device, limit_bytes, self.figures)
        self._least_bytes = _LEAST_BYTES if device.type == "cuda" else 1
        self._streams: _CopyStreams | None = None
        """Made with the first layer."""
        self._of_stage: dict[int, list[_Layer]] = {}
        """Forward stage -> its offloaded layers from the lowest up."""
        self._stage: int | None = None
        """The forward stage that runs."""
        self._layer: _Layer | None = None
        """The layer that runs."""
        self._left_alone: set[int] = set()
        self._stage_inputs: set[int] = set()
        """Addresses of storages."""
        self._under_way: list[_Layer] = []
        """Layers whose memory on the device is still held."""
        self._has_warned = False

    # ---- forward ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stage(self, stage: int, inputs: Iterable[torch.Tensor]) -> Iterator[None]:
        """Around the forward of stage ``stage``, which got ``inputs``."""
        self._stage, self._stage_inputs = stage, {tensor.untyped_storage().data_ptr() for tensor in inputs}
        try:
            yield
        finally:
            self._stage, self._stage_inputs = None, set()

    @property
    def is_collecting(self) -> bool:
        """Whether a stage's forward runs that has a backward to come: not while a backward recomputes layers."""
        return self._stage is not None

    @contextlib.contextmanager
    def layer(self, layer: torch.nn.Module, conditions: Iterable[torch.Tensor]) -> Iterator[None]:
        """Around the forward of a layer whose saved tensors are to be moved.

        Args:
            conditions: what the layer is given besides its input.
        """
        assert self._stage is not None, "a layer is offloaded outside of a stage"
        if self._streams is None:
            self._streams = _CopyStreams(self._device)
        own = [*layer.parameters(), *layer.buffers(), *conditions]
        self._left_alone = {tensor.untyped_storage().data_ptr() for tensor in own} | self._stage_inputs
        current = self._layer = _Layer(self._streams, self.meter)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._layer = None
        self._let_go()
        if current.storages:
            current.copy_out()
            layers = self._of_stage.setdefault(self._stage, [])
            if layers:
                current.then = layers[-1]
            layers.append(current)
            self._under_way.append(current)

    def _let_go(self) -> None:
        """Memory of the layers that were copied goes."""
        for layer in self._under_way:
            layer.let_go()
        self._under_way.clear()

    def keep(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Keeps a tensor for the backward as autograd would at this point, and gives what brings it back."""
        if self._layer is None:
            return lambda: tensor
        packed = self._pack(tensor)
        return partial(_unpack, packed)

    # ---- backward ---------------------------------------------------------------------------------------------------------------

    def settle(self, *backwards: int | None) -> None:
        """Before each compute action: memory of the forward before it goes, but for a backward that is about to come.

        Args:
            backwards: the forward stages whose backwards run next, and behind that.
        """
        stays = [layer for stage in backwards if stage is not None for layer in self._of_stage.get(stage, ())]
        for layer in self._under_way:
            if layer in stays:
                layer.stay()
        self._let_go()

    def fetch_ahead(self, stage: int, during: int | None) -> None:
        """One stage before the backward of forward stage ``stage``: its topmost layer is fetched, where what is on its way out has gone.

        Args:
            during: the forward stage whose backward runs meanwhile, which has the copies' stream first; None: another kind of stage.
        """
        self.settle(during, stage)
        layers = self._of_stage.get(stage)
        if not layers:
            return
        before = () if during is None else [layer for layer in self._of_stage.get(during, ()) if not layer.is_fetched]
        if before:
            before[0].then = layers[-1]
        else:
            layers[-1].fetch()

    def finish(self, stage: int) -> None:
        """The backward of forward stage ``stage`` has run."""
        for layer in self._of_stage.pop(stage, ()):
            self.figures.late_fetches += layer.was_late

    def forget(self) -> None:
        """Lets go of an iteration, which may not have ended well."""
        self._let_go()
        self._of_stage.clear()

    def assert_empty(self) -> None:
        """At the end of an iteration."""
        assert not self._of_stage, f"stages {sorted(self._of_stage)} were offloaded and have no backward"

    # ---- hooks ------------------------------------------------------------------------------------------------------------------

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Packed:
        assert self._layer is not None
        if self.meter is not None:
            self.meter.add(tensor)
        storage = tensor.untyped_storage()
        if not self._is_movable(tensor, storage):
            return as_saved(tensor)
        key = (storage.data_ptr(), storage.nbytes())
        for layer in (self._layer, *reversed(self._under_way)):
            found = layer.storages.get(key)
            moved = None if found is None else found()
            if moved is not None:
                break
        else:
            buffer = self._pool.take(storage.nbytes())
            if buffer is None:
                self._say_that_it_is_full(storage.nbytes())
                return as_saved(tensor)
            self.figures.moved_bytes += storage.nbytes()
            moved = _Moved(self._layer, self._pool, buffer, _bytes_of(tensor))
            self._layer.storages[key] = weakref.ref(moved)
        return _Packed(moved, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _is_movable(self, tensor: torch.Tensor, storage: torch.UntypedStorage) -> bool:
        return (
            type(tensor) is torch.Tensor and tensor.layout == torch.strided and tensor.device.type == self._device.type
            and storage.nbytes() >= self._least_bytes and storage.nbytes() % tensor.element_size() == 0
            and tensor.dtype not in _NEVER_MOVED and not tensor.is_conj() and not tensor.is_neg()
            and storage.data_ptr() not in self._left_alone and not getattr(tensor, "_TE_do_not_offload", False)
        )

    def _say_that_it_is_full(self, num_bytes: int) -> None:
        self.figures.kept_bytes += num_bytes
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the host buffers of offloaded activations are full (%.2f GiB, --dip-host-memory): what finds no room stays on the device",
                self.figures.host_bytes / 2**30,
            )


class _Layer:
    """What one layer of one stage moved."""

    def __init__(self, streams: _CopyStreams, meter: MemoryMeter | None) -> None:
        self.storages: dict[tuple[int, int], weakref.ref[_Moved]] = {}
        """By address and size: true while the memory there is held."""
        self.then: _Layer | None = None
        """Fetched when this one is used."""
        self.is_fetched = False
        """Or on its way to the device; or still there."""
        self.was_late = False
        self._streams = streams
        self._meter = meter
        self._copied: Any = None
        """Event of the copies to the host, until the computing stream waits for them; likewise back."""
        self._fetched: Any = None

    def _alive(self) -> list[_Moved]:
        return [moved for moved in (found() for found in self.storages.values()) if moved is not None]

    def copy_out(self) -> None:
        self._copied = self._streams.run("out", [(moved.on_host, moved.on_device) for moved in self._alive() if moved.on_device is not None])

    def let_go(self) -> None:
        """The memory on the device goes behind the copy, unless it stays."""
        if not self.is_fetched:
            self.wait()
            for moved in self._alive():
                moved.on_device = None

    def stay(self) -> None:
        """What was copied is needed at once, so that it stays where it is."""
        self.is_fetched = True

    def fetch(self) -> None:
        if self.is_fetched:
            return
        self.is_fetched = True
        alive = self._alive()
        for moved in alive:
            moved.on_device = torch.empty(moved.num_bytes, dtype=torch.uint8, device=self._streams.device)
            if self._meter is not None:
                self._meter.add(moved.on_device)
        self._fetched = self._streams.run("in", [(moved.on_device, moved.on_host) for moved in alive if moved.on_device is not None])

    def use(self) -> None:
        """The layer's backward begins, or goes on."""
        if not self.is_fetched:
            self.was_late = True
            self.fetch()
        if self._fetched is not None:
            self._streams.wait(self._fetched)
            self._fetched = None
        if self.then is not None:
            self.then.fetch()
            self.then = None

    def wait(self) -> None:
        """The computing stream waits for copies that use the memory on the device, which then may go."""
        for event in (self._copied, self._fetched):
            if event is not None:
                self._streams.wait(event)
        self._copied = self._fetched = None


class _Moved:
    """One storage: its bytes on the device (1-d, uint8; None while they are on the host alone) and on the host."""

    def __init__(self, layer: _Layer, pool: HostPool, buffer: torch.Tensor, on_device: torch.Tensor) -> None:
        self.layer = layer
        self.num_bytes = len(on_device)
        self.on_device: torch.Tensor | None = on_device
        self._pool = pool
        self._buffer = buffer

    @property
    def on_host(self) -> torch.Tensor:
        return self._buffer[: self.num_bytes]

    def __del__(self) -> None:
        """Nothing that autograd holds needs it any more."""
        if self.on_device is not None:
            self.layer.wait()
        self._pool.give_back(self._buffer)


@dataclass(slots=True)
class _Packed:
    """A saved tensor: a view of a moved storage."""

    moved: _Moved
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def _unpack(packed: torch.Tensor | _Packed) -> torch.Tensor:
    if isinstance(packed, torch.Tensor):
        return packed
    packed.moved.layer.use()
    on_device = packed.moved.on_device
    assert on_device is not None
    with torch.no_grad():
        return on_device.view(packed.dtype).as_strided(packed.shape, packed.stride, packed.offset)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage, 1-d."""
    with torch.no_grad():
        whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
        return whole.view(torch.uint8)


class _CopyStreams:
    """A stream for copies each way; without CUDA copies are done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._by_way: dict[str, Any] = {}
        if device.type == "cuda":
            self._by_way = {"out": torch.cuda.Stream(device), "in": torch.cuda.Stream(device)}

    def run(self, way: str, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Copies (to, from) behind what was launched for computing so far; gives an event (None: it is done)."""
        with torch.no_grad():
            if not self._by_way:
                for to, source in copies:
                    to.copy_(source)
                return None
            stream = self._by_way[way]
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for to, source in copies:
                    to.copy_(source, non_blocking=True)
            return stream.record_event()

    def wait(self, event: Any) -> None:
        """What is launched for computing from now on waits."""
        torch.cuda.current_stream(self.device).wait_event(event)


_LINK_BYTES, _LINK_COPIES, _LINK_RUNS = 1 << 26, 4, 3


def host_link_bytes_per_second(device: torch.device) -> float:
    """What copies to the host, and at the same time back, were measured to move each way on this device: median of a few runs."""
    pinned = device.type == "cuda"
    on_device = [torch.zeros(_LINK_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    on_host = [torch.zeros(_LINK_BYTES, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
    streams = _CopyStreams(device)
    seconds = []
    for _ in range(1 + _LINK_RUNS):
        began = time.perf_counter()
        for _ in range(_LINK_COPIES):
            streams.run("out", [(on_host[0], on_device[0])])
            streams.run("in", [(on_device[1], on_host[1])])
        if pinned:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    # The first run touches the memory.
    return _LINK_COPIES * _LINK_BYTES / statistics.median(seconds[1:])


def host_memory_limit(share: float = 0.5) -> int:
    """Bytes for one rank's buffers: so much of what the machine has free, shared by its ranks (torchrun's LOCAL_WORLD_SIZE)."""
    with Path("/proc/meminfo").open() as lines:
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return int(share * available / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
