# mypy: no-check-untyped-defs
"""Where each rank posts its sends and receives: the orders are run on a device with one hardware queue, and a post stands where it starts.

In: a task graph, each rank's order, its messages. Out: all launches of all ranks on one line, with the times at which they start.

The device. Under ``CUDA_DEVICE_MAX_CONNECTIONS=1`` the launches of all streams of a device pass one queue in the order in which the host
made them, and a launch that still waits (for its own stream, or for an event) holds up all behind it:

* a task waits for the task before it (the compute stream) and for the messages that it needs;
* a send waits for all tasks launched before it (its stream waits for the compute stream) and for the message before it in its channel
  (the same NCCL stream on its end);
* a receive waits for the message before it in its channel alone;
* a message is over ``lag`` after both ends have started.

Where posts stand. The line is made in the order of time, and

* a send is posted behind its task as soon as its channel is free, and the rank's next task waits for that: so the makespan without the
  limit does not change, since there no channel is ever waited for;
* a receive is posted when the task that makes its message has started and its channel is free: where its send stands on the line, or
  later. No task waits for that, and no receive stands on the device long before its message.

Why programs made of this line cannot hang. Each launch stands on the line behind all that it waits for: both posts of the message before
it in its channel, both posts of the messages that its task needs. These are relations between launches, not between times, so whatever
the times turn out to be, the first launch on the line that is not over can go on. Devices with more queues, or whose posts never wait
for their channel, keep only some of these relations.

A stage is taken as one launch. It is many kernels: what stands behind it in the queue may be held up until its last kernel has started.
That changes times, not what waits for what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.program.messages import Messages, make_messages
from megatron_dip.spec.tasks import TaskGraph

SEND, RECEIVE, TASK = 0, 1, 2
"""Kinds of launches; of launches that can start at one time the lowest kind goes first."""
_NEVER = np.int64(1) << 62


class Launches(NamedTuple):
    """Letters: T tasks, M messages, P ranks."""

    num_launches: int
    """T + 2 M, or less where the orders contradict the dependencies"""
    kind: NDArray[np.int8]
    """[T + 2 M] SEND, RECEIVE or TASK of each launch, in the order of the line"""
    item: NDArray[np.int32]
    """[T + 2 M] its message or task"""
    start_ns: NDArray[np.int64]
    """[T + 2 M]"""
    next_index: NDArray[np.int64]
    """[P] index into the flat order behind each rank's last launched task"""


class _Device(NamedTuple):
    """What all ranks have come to."""

    queue_ns: NDArray[np.int64]
    """[P] when the rank's last launch started: the next one starts no earlier"""
    free_ns: NDArray[np.int64]
    """[P] when the rank's last task ends"""
    next_index: NDArray[np.int64]
    """[P]"""
    task_ns: NDArray[np.int64]
    """[T] start of each task, -1 = not launched"""
    posted_ns: NDArray[np.int64]
    """[2, M] start of each message's SEND and RECEIVE, -1 = not posted"""
    over_ns: NDArray[np.int64]
    """[M] when the message has arrived, -1 = not known"""
    head: NDArray[np.int64]
    """[2, P * P] index into by_channel of the next message to post at either end"""


def run_orders(graph: TaskGraph, order_offset: NDArray[np.int64], order: NDArray[np.int32], messages: Messages) -> Launches:
    """All launches on one line.

    Args:
        order_offset: [P + 1] tasks of rank r are order[order_offset[r] : order_offset[r + 1]].
    """
    num_ranks, num_tasks, num_messages = graph.num_ranks, graph.num_tasks, len(messages.producer)
    device = _Device(
        queue_ns=np.zeros(num_ranks, np.int64), free_ns=np.zeros(num_ranks, np.int64), next_index=order_offset[:-1].copy(),
        task_ns=np.full(num_tasks, -1, np.int64), posted_ns=np.full((2, num_messages), -1, np.int64),
        over_ns=np.full(num_messages, -1, np.int64), head=np.stack([messages.channel_offset[:-1]] * 2),
    )
    size = num_tasks + 2 * num_messages
    kind, item, start_ns = np.empty(size, np.int8), np.empty(size, np.int32), np.empty(size, np.int64)
    count = _launch_kernel(
        graph.rank, graph.duration_ns, graph.dep_offset, graph.dep_task, order_offset, order, messages, device, kind, item, start_ns
    )
    return Launches(num_launches=int(count), kind=kind, item=item, start_ns=start_ns, next_index=device.next_index)


def one_queue_ns(graph: TaskGraph, order: Sequence[NDArray[np.int32]]) -> int:
    """Makespan in ns of orders that run, with posts at the places that lowering gives them, on a device with one hardware queue."""
    flat, offset = np.concatenate(order), np.cumsum([0, *map(len, order)], dtype=np.int64)
    launches = run_orders(graph, offset, flat, make_messages(graph, flat))
    assert launches.num_launches == len(launches.kind), "the orders contradict the dependencies"
    tasks = launches.kind == TASK
    return int((launches.start_ns[tasks] + graph.duration_ns[launches.item[tasks]]).max())


@numba.njit(nogil=True, cache=True)
def _launch_kernel(rank, duration_ns, dep_offset, dep_task, order_offset, order, messages, device, kind, item, start_ns):
    """Fills kind, item and start_ns with launches in the order of their starts; returns their number.

    Of launches that could start at one time the lowest rank's comes first, on one rank the lowest kind, then the lowest number.
    """
    num_ranks = len(order_offset) - 1
    peers = _peers(messages.channel_offset, num_ranks)
    stale = np.ones(num_ranks, np.bool_)  # whose next launch must be looked up again
    next_kind = np.zeros(num_ranks, np.int64)
    next_item = np.zeros(num_ranks, np.int64)
    next_ns = np.zeros(num_ranks, np.int64)
    count = 0
    while True:
        best = -1
        for r in range(num_ranks):
            if stale[r]:
                next_kind[r], next_item[r], next_ns[r] = _next_launch(
                    rank, dep_offset, dep_task, order_offset, order, messages, peers, device, r
                )
                stale[r] = False
            if next_ns[r] < _NEVER and (best < 0 or next_ns[r] < next_ns[best]):
                best = r
        if best < 0:
            return count
        kind[count], item[count], start_ns[count] = next_kind[best], next_item[best], next_ns[best]
        count += 1
        device.queue_ns[best] = next_ns[best]
        if next_kind[best] == TASK:
            task = next_item[best]
            device.task_ns[task] = next_ns[best]
            device.free_ns[best] = next_ns[best] + duration_ns[task]
            device.next_index[best] += 1
            # Dependencies between ranks are messages: another rank's next launch changes only where it can be a receive from this one.
            stale[best] = True
            for other in peers[SEND, best]:
                if other < 0:
                    break
                stale[other] = True
        else:
            m = next_item[best]
            _post(rank, messages, device, next_kind[best], m, next_ns[best])
            stale[rank[messages.producer[m]]] = True
            stale[rank[messages.consumer[m]]] = True


@numba.njit(nogil=True, cache=True)
def _peers(channel_offset, num_ranks):
    """[2, P, P] the ranks that rank r sends to (SEND) and receives from (RECEIVE), -1 behind the last one."""
    peers = np.full((2, num_ranks, num_ranks), -1, np.int64)
    count = np.zeros((2, num_ranks), np.int64)
    for sender in range(num_ranks):
        for receiver in range(num_ranks):
            channel = sender * num_ranks + receiver
            if channel_offset[channel] < channel_offset[channel + 1]:
                peers[SEND, sender, count[SEND, sender]] = receiver
                count[SEND, sender] += 1
                peers[RECEIVE, receiver, count[RECEIVE, receiver]] = sender
                count[RECEIVE, receiver] += 1
    return peers


@numba.njit(nogil=True, cache=True)
def _post(rank, messages, device, end, m, now):
    """Posts one end (SEND or RECEIVE) of message m."""
    device.posted_ns[end, m] = now
    device.head[end, rank[messages.producer[m]] * (len(device.queue_ns)) + rank[messages.consumer[m]]] += 1
    if device.posted_ns[1 - end, m] >= 0:
        device.over_ns[m] = max(device.posted_ns[0, m], device.posted_ns[1, m]) + messages.lag_ns[m]


@numba.njit(nogil=True, cache=True)
def _next_post(messages, device, end, channel):
    """(message, time at which its channel is free for it) of the next post at one end of a channel; (-1, _NEVER) where there is none."""
    index = device.head[end, channel]
    if index == messages.channel_offset[channel + 1]:
        return np.int64(-1), _NEVER
    m = messages.by_channel[index]
    if device.task_ns[messages.producer[m]] < 0:
        return np.int64(-1), _NEVER
    if index == messages.channel_offset[channel]:
        return m, np.int64(0)
    free = device.over_ns[messages.by_channel[index - 1]]
    return m, free if free >= 0 else _NEVER


@numba.njit(nogil=True, cache=True)
def _next_launch(rank, dep_offset, dep_task, order_offset, order, messages, peers, device, r):
    """(kind, item, start) of rank r's launch that can start first; the start is _NEVER where none can.

    Args:
        peers: from :func:`_peers`.
    """
    num_ranks = len(order_offset) - 1
    kind, item, start = np.int64(TASK), np.int64(-1), _NEVER
    idle = max(device.queue_ns[r], device.free_ns[r])
    posts_ns = idle  # when all that the rank has made is posted
    for other in peers[SEND, r]:
        if other < 0:
            break
        m, free = _next_post(messages, device, SEND, r * num_ranks + other)
        if m >= 0:
            ready = max(idle, free)
            posts_ns = max(posts_ns, ready)
            if (ready, SEND, m) < (start, kind, item):
                kind, item, start = np.int64(SEND), m, ready
    for other in peers[RECEIVE, r]:
        if other < 0:
            break
        m, free = _next_post(messages, device, RECEIVE, other * num_ranks + r)
        if m >= 0:
            ready = max(device.queue_ns[r], device.task_ns[messages.producer[m]], free)
            if (ready, RECEIVE, m) < (start, kind, item):
                kind, item, start = np.int64(RECEIVE), m, ready
    if device.next_index[r] < order_offset[r + 1]:
        task = order[device.next_index[r]]
        ready = posts_ns
        for m in range(messages.in_offset[task], messages.in_offset[task + 1]):
            ready = max(ready, device.over_ns[m]) if device.over_ns[m] >= 0 else _NEVER
        for e in range(dep_offset[task], dep_offset[task + 1]):
            if device.task_ns[dep_task[e]] < 0:
                ready = _NEVER
        if (ready, TASK, np.int64(task)) < (start, kind, item):
            kind, item, start = np.int64(TASK), np.int64(task), ready
    return kind, item, start
