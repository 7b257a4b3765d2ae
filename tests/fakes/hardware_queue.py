"""Devices whose streams share hardware queues, replayed from what :class:`tests.fakes.cuda.FakeCuda` recorded.

Every launch enters the queue of its stream in the order of the host's launches. The head of a queue leaves it once its stream's launch
before it is over, and what it waits for is; until then it holds up everything behind it, of whatever stream. With one queue
(``CUDA_DEVICE_MAX_CONNECTIONS=1``) that is every launch of the device. A message is over when both of its ends have left their queues,
and its time has passed. This is a model (NVIDIA's Hyper-Q note describes it); no GPU was asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from tests.fakes.cuda import Device, Entry


class Hang(AssertionError):
    """No queue can go on."""


def replay(
    devices: Sequence[Device], *, connections: int | None = None, duration: Callable[[Entry], int] = lambda entry: int(entry.kind == "kernel")
) -> int:
    """When the last launch of all devices is over, on hosts that launch everything at once.

    Args:
        connections: hardware queues of a device; None = one for each stream.
        duration: of a kernel; of a message from when both ends are there.
    Raises:
        Hang: with the head of every queue.
    """
    queues: list[list[deque[Entry]]] = []
    for device in devices:
        count = len(device.streams) if connections is None else connections
        own: list[deque[Entry]] = [deque() for _ in range(count)]
        for entry in device.entries:
            if entry.kind != "host":
                own[entry.stream % count].append(entry)
        queues.append(own)
    over: list[dict[int, int]] = [{} for _ in devices]
    """Rank -> entry -> when it is over."""
    before: list[dict[int, int]] = [{} for _ in devices]
    """Rank -> stream -> its entry that left last."""
    left: list[list[int]] = [[0] * len(own) for own in queues]
    ends: dict[object, list[tuple[int, Entry, int]]] = {}
    """Message -> its ends that left their queues: (rank, entry, when)."""
    moved = True
    while moved:
        moved = False
        for rank, own in enumerate(queues):
            for number, queue in enumerate(own):
                while queue:
                    entry = queue[0]
                    needed = [before[rank].get(entry.stream), entry.awaited]
                    if any(one is not None and one not in over[rank] for one in needed):
                        break
                    at = max([left[rank][number], *(over[rank][one] for one in needed if one is not None)])
                    queue.popleft()
                    moved = True
                    left[rank][number], before[rank][entry.stream] = at, entry.index
                    if entry.message is None:
                        over[rank][entry.index] = at + duration(entry)
                        continue
                    both = ends.setdefault(entry.message, [])
                    both.append((rank, entry, at))
                    if len(both) == 2:
                        end = max(when for _, _, when in both) + duration(entry)
                        for owner, one, _ in both:
                            over[owner][one.index] = end
    heads = [f"rank {rank}: {queue[0].kind} {queue[0].name!r} on stream {queue[0].stream}" for rank, own in enumerate(queues) for queue in own if queue]
    if heads:
        raise Hang("nothing can leave its queue: " + "; ".join(heads))
    if any(len(both) == 1 for both in ends.values()):
        raise Hang("a message has one end only")
    return max((end for one in over for end in one.values()), default=0)
