"""A fake of torch.cuda that computes at once on the CPU and checks that a real device, which does not, would compute the same.

Every rank is a thread with a device of its own. Whatever torch runs on a device's tensors is a launch on the current stream. The fake
keeps, for every stream, which launches of other streams are certain to be over when its next launch begins (a vector clock: events,
waits and synchronisations join them), and raises :class:`Violation` where

* a launch reads memory that a launch of another stream writes, or writes what another reads, and neither waits for the other;
* memory goes back to the pool of the stream that it was allocated on while a launch of another stream, for which that stream has not
  waited and which ``record_stream`` does not name, may still use it (PyTorch's caching allocator would hand it out again);
* memory is used on a stream that has not waited for the allocating stream's launches up to the allocation (they may use its former owner);
* a launch mixes tensors of host and device; the host writes pinned memory that a copy may still read.

What is left out: real concurrency, more devices than one a rank, graphs, user-made allocators.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict[int, int]
"""Stream -> the last of its launches that is certain to be over."""

_here = threading.local()


class Violation(AssertionError):
    """Something that a real device could do otherwise than the program means."""


def join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


@dataclass(slots=True)
class Entry:
    """One command in the order of the host's launches."""

    index: int
    kind: str
    """``kernel``, ``wait`` (for another stream's entry), ``send``, ``recv``, or ``host`` (what the host did in between)."""
    name: str
    stream: int
    awaited: int | None = None
    """wait: index of the entry that must be over; None: nothing was launched there yet."""
    message: tuple[Any, int] | None = None
    """send, recv: (channel, number in it)."""


@dataclass(slots=True)
class Memory:
    """What the fake knows of one storage on a device."""

    storage: StorageWeakRef
    num_bytes: int
    pool: int
    """The stream that was current at the allocation."""
    born: int
    """That stream's last launch before it."""
    name: str
    written: tuple[int, int, str] | None = None
    """Stream, launch and name of the last write."""
    read: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Stream -> its last launch that reads."""
    recorded: set[int] = field(default_factory=set)
    """Streams named by record_stream."""


class Stream:
    """torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.owner = current_device()
        self.number = len(self.owner.streams)
        self.tick = 0
        self.clock: Clock = {}
        self.last_entry: int | None = None
        self.owner.streams.append(self)

    def wait_event(self, event: Event) -> None:
        self.owner.wait(self, event.clock, event.entry, "event")

    def wait_stream(self, stream: Stream) -> None:
        self.owner.wait(self, stream.clock, stream.last_entry, f"stream {stream.number}")

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.owner.synchronise(self)

    def query(self) -> bool:
        return self.owner.covers(self.owner.host, self.number, self.tick)


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.enable_timing = enable_timing
        self.clock: Clock = {}
        self.entry: int | None = None
        self.time_ns: int | None = None
        self._synchronised = False

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or current_device().current
        self.clock, self.entry, self.time_ns = dict(stream.clock), stream.last_entry, time.perf_counter_ns()
        self._synchronised = False

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_device().current).wait_event(self)

    def synchronize(self) -> None:
        device = current_device()
        device.host_syncs += 1
        join(device.host, self.clock)

    def query(self) -> bool:
        return all(current_device().covers(current_device().host, stream, tick) for stream, tick in self.clock.items())

    def elapsed_time(self, end: Event) -> float:
        """ms; both must have been recorded with timing, and the host must have waited for them."""
        for event in (self, end):
            if not event.enable_timing or event.time_ns is None:
                raise Violation("elapsed_time of an event that was not recorded with timing")
            if not event.query():
                raise Violation("elapsed_time of an event that may not have come yet")
        assert self.time_ns is not None
        assert end.time_ns is not None
        return (end.time_ns - self.time_ns) / 1e6


class Device:
    """One rank's device, with the host thread that launches on it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.name = torch.device("cuda", rank)
        self.streams: list[Stream] = []
        self.entries: list[Entry] = []
        self.host: Clock = {}
        """What the host knows to be over."""
        self.host_syncs = 0
        self.memory: dict[int, Memory] = {}
        self.pinned: dict[int, Memory] = {}
        self.allocated: dict[int, int] = {}
        self.peak: dict[int, int] = {}
        """Pool -> bytes in use, and the most that were."""
        self._awaiting: list[tuple[int, int, Clock]] = []
        """Freed, but handed out again only when the streams named by record_stream are there: (pool, bytes, clock)."""
        self.placing = False
        """Whether what is made now is made on the device."""
        self.quiet = False
        self.stack: list[Stream] = []

    @property
    def current(self) -> Stream:
        return self.stack[-1]

    # ---- launches ---------------------------------------------------------------------------------------------------------------

    @staticmethod
    def covers(clock: Clock, stream: int, tick: int) -> bool:
        return clock.get(stream, 0) >= tick

    def append(self, kind: str, name: str, stream: Stream, **more: Any) -> Entry:
        entry = Entry(len(self.entries), kind, name, stream.number, **more)
        self.entries.append(entry)
        if kind != "host":
            stream.last_entry = entry.index
        return entry

    def note(self, text: str) -> None:
        """Puts a line of the host's between the launches."""
        self.append("host", text, self.current)

    def wait(self, stream: Stream, clock: Clock, entry: int | None, name: str) -> None:
        join(stream.clock, clock)
        self.append("wait", name, stream, awaited=entry)

    def synchronise(self, stream: Stream | None = None) -> None:
        """The host waits: for one stream, or for all."""
        self.host_syncs += 1
        for one in self.streams if stream is None else [stream]:
            join(self.host, one.clock)
        self.sweep()

    def launch(
        self, name: str, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor], stream: Stream | None = None, kind: str = "kernel",
        message: tuple[Any, int] | None = None,
    ) -> Entry:
        stream = stream or self.current
        self.sweep()
        join(stream.clock, self.host)
        stream.tick += 1
        stream.clock[stream.number] = stream.tick
        said = f"{name!r} on stream {stream.number}"
        for tensor in reads:
            memory = self.find(tensor)
            if memory is not None:
                self._check_born(memory, stream, said)
                self._check_written(memory, stream, f"{said} reads")
                memory.read[stream.number] = (stream.tick, name)
        for tensor in writes:
            memory = self.find(tensor)
            if memory is not None:
                self._check_born(memory, stream, said)
                self._check_written(memory, stream, f"{said} writes")
                for reader, (tick, by) in memory.read.items():
                    if not self.covers(stream.clock, reader, tick):
                        raise Violation(f"{said} writes {memory.name} while {by!r} on stream {reader} may still read it")
                memory.written, memory.read = (stream.number, stream.tick, name), {}
        return self.append(kind, name, stream, message=message)

    def _check_born(self, memory: Memory, stream: Stream, said: str) -> None:
        if memory.pool != stream.number and not self.covers(stream.clock, memory.pool, memory.born):
            raise Violation(f"{said} uses {memory.name} from the pool of stream {memory.pool}, on which it may still have another owner")

    def _check_written(self, memory: Memory, stream: Stream, said: str) -> None:
        if memory.written is not None and not self.covers(stream.clock, *memory.written[:2]):
            writer, _, by = memory.written
            raise Violation(f"{said} {memory.name} before {by!r} on stream {writer} is sure to have written it")

    def host_access(self, name: str, tensors: Sequence[torch.Tensor]) -> None:
        """The host writes memory of its own."""
        for tensor in tensors:
            memory = self.pinned.get(tensor.untyped_storage()._cdata)
            for reader, (tick, by) in {} if memory is None else memory.read.items():
                if not self.covers(self.host, reader, tick):
                    raise Violation(f"the host's {name!r} writes pinned memory while {by!r} on stream {reader} may still read it")

    # ---- memory -----------------------------------------------------------------------------------------------------------------

    def find(self, tensor: torch.Tensor) -> Memory | None:
        key = tensor.untyped_storage()._cdata
        return self.memory.get(key) or self.pinned.get(key)

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.memory

    def place(self, tensor: torch.Tensor, name: str) -> None:
        """A new tensor's storage comes from the current stream's pool."""
        storage = tensor.untyped_storage()
        pool = self.current
        self.memory[storage._cdata] = Memory(StorageWeakRef(storage), storage.nbytes(), pool.number, pool.tick, f"the output of {name!r}")
        self.allocated[pool.number] = self.allocated.get(pool.number, 0) + storage.nbytes()
        self.peak[pool.number] = max(self.peak.get(pool.number, 0), self.allocated[pool.number])

    def pin(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = Memory(StorageWeakRef(storage), storage.nbytes(), self.current.number, 0, "pinned memory")

    def sweep(self) -> None:
        """Takes back what nobody holds any more."""
        for key in [key for key, memory in self.pinned.items() if memory.storage.expired()]:
            del self.pinned[key]
        for key in [key for key, memory in self.memory.items() if memory.storage.expired()]:
            self._free(self.memory.pop(key))
        pending = self._awaiting
        self._awaiting = []
        for pool, num_bytes, clock in pending:
            known = dict(self.streams[pool].clock)
            join(known, self.host)
            if all(self.covers(known, stream, tick) for stream, tick in clock.items()):
                self.allocated[pool] -= num_bytes
            else:
                self._awaiting.append((pool, num_bytes, clock))

    def _free(self, memory: Memory) -> None:
        uses = {stream: used for stream, used in memory.read.items() if stream != memory.pool}
        if memory.written is not None and memory.written[0] != memory.pool:
            writer, tick, by = memory.written
            uses[writer] = max(uses.get(writer, (0, "")), (tick, by))
        known = dict(self.streams[memory.pool].clock)
        join(known, self.host)
        for stream in memory.recorded:  # handed out again only when these are where they are now
            join(known, self.streams[stream].clock)
        for stream, (tick, by) in uses.items():
            if not self.covers(known, stream, tick):
                raise Violation(f"{memory.name} goes back to the pool of stream {memory.pool} while {by!r} on stream {stream} may still use it")
        self._awaiting.append((memory.pool, memory.num_bytes, {stream: self.streams[stream].tick for stream in memory.recorded}))

    def reserved(self) -> int:
        """Bytes that the allocator took from the device: each pool at its fullest."""
        return sum(self.peak.values())


def current_device() -> Device:
    return _here.device


# ---- torch on tensors of the fake ---------------------------------------------------------------------------------------------------


class _Launches(TorchDispatchMode):
    """Everything that torch computes on a device's tensors is a launch."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        device = current_device()
        if device.quiet or func.is_view:
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        name = func.__name__
        written = _written(func, args, kwargs or {})
        on_device = [tensor for tensor in given if device.holds(tensor)]
        if not on_device and not device.placing:
            device.host_access(name, written)
            return out
        on_host = [tensor for tensor in given if not device.holds(tensor) and tensor.dim()]
        if on_device and on_host and not name.startswith(("copy_", "_copy")):
            raise Violation(f"{name!r} mixes tensors of host and device")
        there = {tensor.untyped_storage()._cdata for tensor in given}  # a copy to the host gives what it was given
        new = [tensor for tensor in made if not device.holds(tensor) and tensor.untyped_storage()._cdata not in there]
        for tensor in new:
            device.place(tensor, name)
        if name.startswith(("empty", "new_empty")):
            return out
        if "_local_scalar_dense" in name:
            device.synchronise(device.current)
        device.launch(name, given, [*written, *new])
        return out


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written.extend(leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return written


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cuda") or (isinstance(value, str) and value.startswith("cuda"))


def _is_cpu(value: Any) -> bool:
    return (isinstance(value, torch.device) and value.type == "cpu") or value == "cpu"


class _Placement(TorchFunctionMode):
    """Tensors asked for on ``cuda`` are made on the CPU and remembered as the device's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = current_device()
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if tensor is not None:
            if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
                return device.name if device.holds(tensor) else func(*args, **kwargs)
            if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
                return device.holds(tensor)
            if name in ("to", "cuda", "cpu"):
                return self._move(device, tensor, name, args[1:], kwargs)
            if name == "pin_memory":
                pinned = tensor.detach().clone()
                device.pin(pinned)
                return pinned
            if name in ("tolist", "numpy") and device.holds(tensor):
                device.synchronise(device.current)
        if kwargs.pop("pin_memory", False):
            pinned = func(*args, **kwargs)
            device.pin(pinned)
            return pinned
        if _is_cuda(kwargs.get("device")):
            del kwargs["device"]
            return self._placed(device, func, args, kwargs)
        return func(*args, **kwargs)

    @staticmethod
    def _placed(device: Device, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        before, device.placing = device.placing, True
        try:
            return func(*args, **kwargs)
        finally:
            device.placing = before

    def _move(self, device: Device, tensor: torch.Tensor, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
        asked = [*args, *kwargs.values()]
        like = [value for value in asked if isinstance(value, torch.Tensor)]
        to_device = name == "cuda" or any(map(_is_cuda, asked)) or any(map(device.holds, like))
        to_host = name == "cpu" or any(map(_is_cpu, asked)) or any(not device.holds(one) for one in like)
        non_blocking = bool(kwargs.get("non_blocking", next((value for value in args if isinstance(value, bool)), False)))
        for dtype in [value for value in asked if isinstance(value, torch.dtype)] + [one.dtype for one in like]:
            tensor = tensor.to(dtype)
        if to_device and not device.holds(tensor):
            moved = self._placed(device, torch.clone, (tensor,), {})
            pinned = device.pinned.get(tensor.untyped_storage()._cdata)
            if not (non_blocking and pinned is not None):  # pageable memory: the host waits
                device.synchronise(device.current)
            return moved
        if to_host and device.holds(tensor):
            device.launch("copy to host", [tensor], [])
            device.synchronise(device.current)
            device.quiet = True
            try:
                return tensor.clone()
            finally:
                device.quiet = False
        return tensor


class _Hooks(torch.autograd.graph.saved_tensors_hooks):
    """Hooks of saved tensors are called where torch has put the mode aside in which tensors of the fake are on its device."""

    def __init__(self, pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> None:
        super().__init__(self._placing(pack), self._placing(unpack))

    @staticmethod
    def _placing(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def placed(value: Any) -> Any:
            with _Placement():
                return hook(value)

        return placed


# ---- torch.cuda ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stream_context(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    device = current_device()
    device.stack.append(stream)
    try:
        yield
    finally:
        device.stack.pop()


def _record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    memory = current_device().find(tensor)
    if memory is None:
        raise Violation("record_stream on a tensor of the host")
    if memory.pool != stream.number:
        memory.recorded.add(stream.number)


class FakeCuda:
    """Devices of ``num_ranks`` ranks; within ``with`` torch.cuda is theirs."""

    def __init__(self, num_ranks: int) -> None:
        self.devices = [Device(rank) for rank in range(num_ranks)]
        self._stack = contextlib.ExitStack()
        self.failure: BaseException | None = None

    def __enter__(self) -> FakeCuda:
        def pushed(name: str) -> None:
            current_device().note(name)

        patches = {
            "Stream": Stream, "Event": Event, "stream": _stream_context,
            "current_stream": lambda device=None: current_device().current,
            "synchronize": lambda device=None: current_device().synchronise(),
            "current_device": lambda: current_device().rank,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "memory_allocated": lambda device=None: sum(current_device().allocated.values()),
            "max_memory_allocated": lambda device=None: sum(current_device().peak.values()),
            "memory_reserved": lambda device=None: current_device().reserved(),
        }
        for name, value in patches.items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        self._stack.enter_context(mock.patch.object(torch.cuda.nvtx, "range_push", pushed))
        self._stack.enter_context(mock.patch.object(torch.cuda.nvtx, "range_pop"))
        self._stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", _record_stream))
        self._stack.enter_context(mock.patch.object(torch.autograd.graph, "saved_tensors_hooks", _Hooks))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def on(self, rank: int) -> Iterator[Device]:
        """This thread becomes the host of a rank's device."""
        device = _here.device = self.devices[rank]
        if not device.streams:
            device.stack = []
            device.stack.append(Stream())
        try:
            with _Launches(), _Placement():
                yield device
        finally:
            del _here.device

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        """``function(rank)`` on every rank at once; what each returned. Raises the first error."""
        results: list[Any] = [None] * len(self.devices)
        errors: list[BaseException] = []

        def host(rank: int) -> None:
            try:
                with self.on(rank):
                    results[rank] = function(rank)
            except BaseException as error:
                errors.append(error)
                self.failure = self.failure or error

        threads = [threading.Thread(target=host, args=(rank,), daemon=True) for rank in range(len(self.devices))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60.0)
            assert not thread.is_alive(), "a rank does not end"
        if errors:
            raise errors[0]
        return results
