"""The messages of a task graph: the edges that carry a tensor from one rank to another, numbered, and put into channels.

A channel is a directed pair of ranks. It is first in, first out: messages are received in the order in which they are sent, and that is
the order in which the sender's tasks make them. Messages are numbered by consumer, then by the consumer's edges.
"""

from __future__ import annotations

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.tasks import TaskGraph


class Messages(NamedTuple):
    """Letters: M messages, T tasks, P ranks."""

    producer: NDArray[np.int32]
    """[M] task that makes the message"""
    consumer: NDArray[np.int32]
    """[M] task that needs it"""
    lag_ns: NDArray[np.int64]
    """[M] time on the way"""
    in_offset: NDArray[np.int64]
    """[T + 1] messages that task t needs are in_offset[t] : in_offset[t + 1]"""
    channel_offset: NDArray[np.int64]
    """[P * P + 1] messages from rank s to rank r are by_channel[channel_offset[c] : channel_offset[c + 1]], c = s * P + r, ..."""
    by_channel: NDArray[np.int64]
    """[M] ... in the order in which they are sent"""


def make_messages(graph: TaskGraph, flat: NDArray[np.int32]) -> Messages:
    """The graph's messages.

    Args:
        flat: [T] all tasks, each rank's in the order in which it executes them.
    """
    num_tasks, num_channels = graph.num_tasks, graph.num_ranks * graph.num_ranks
    after = np.repeat(np.arange(num_tasks, dtype=np.int32), np.diff(graph.dep_offset))
    edges = np.flatnonzero(graph.dep_is_data & (graph.rank[graph.dep_task] != graph.rank[after]))
    producer, consumer = graph.dep_task[edges], after[edges]
    channel = graph.rank[producer].astype(np.int64) * graph.num_ranks + graph.rank[consumer]
    position = np.empty(num_tasks, np.int64)
    position[flat] = np.arange(num_tasks)
    return Messages(
        producer=producer,
        consumer=consumer,
        lag_ns=graph.dep_lag_ns[edges],
        in_offset=np.concatenate(([0], np.cumsum(np.bincount(consumer, minlength=num_tasks)))).astype(np.int64),
        channel_offset=np.concatenate(([0], np.cumsum(np.bincount(channel, minlength=num_channels)))).astype(np.int64),
        by_channel=np.lexsort((position[producer], channel)).astype(np.int64),
    )


@numba.njit(nogil=True, cache=True)
def group_by(key, num_keys, visit):
    """Stable counting sort: (offset [num_keys + 1], grouped), where those of ``visit`` with key k are grouped[offset[k] : offset[k + 1]]."""
    offset = np.zeros(num_keys + 1, np.int64)
    for item in visit:
        offset[key[item] + 1] += 1
    for k in range(num_keys):
        offset[k + 1] += offset[k]
    cursor = offset[:num_keys].copy()
    grouped = np.empty(len(visit), np.int64)
    for item in visit:
        grouped[cursor[key[item]]] = item
        cursor[key[item]] += 1
    return offset, grouped
