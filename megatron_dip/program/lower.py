"""Lowering: a task graph and each rank's order of tasks become each rank's list of actions.

A rank's program is, for each of its tasks: waits for sends that must be over by now, waits for the task's messages, the task, the
sends of what it made, and the receives to be posted at this point.

Why it cannot deadlock. All tasks are put on one line (`sequence`): the order in which they start when every rank follows its order.
Each action gets a place on that line, and each wait stands behind both posts of its message, so running the actions along the line
blocks nowhere, even when a send ends only once its receive is posted. As a wait holds up all that stands behind it on its rank, this
also covers devices that start work strictly in the order of launch (``CUDA_DEVICE_MAX_CONNECTIONS=1``).

* A send is posted right behind its task.
* Receives from one rank are posted in the order of that rank's sends, since a channel (one for each directed pair of ranks) is first
  in, first out and NCCL knows no tags. A receive is posted early enough for itself and for all that come behind it in its channel,
  and ``lookahead`` tasks earlier still, so that the message travels while the receiver computes.
* A send is waited for ``send_slack`` tasks behind the first place on the line where its receive has been posted: late enough that a
  slow receiver does not hold the sender up, early enough that the buffer is not held all through the iteration.

Every post is waited for exactly once. Messages are numbered by consumer, then by the consumer's edges. DIP (arXiv 2504.14145),
deployment. Not modelled: batched posts (`group` stays absent; each directed pair has its own communicator).
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.program.program import IRECV, ISEND, NONE, WAIT_RECV, WAIT_SEND, Program, ProgramError
from megatron_dip.program.text import format_grid
from megatron_dip.spec.tasks import KIND_NAMES, TaskGraph

LOOKAHEAD = 2
SEND_SLACK = 8


@numba.njit(nogil=True, cache=True)
def _sequence(rank, duration_ns, dep_offset, dep_task, dep_lag_ns, order_offset, order, next_index, sequence):
    """Fills ``sequence`` [T] with each task's place among all starts; ``next_index`` [P] ends behind each rank's last placed task.

    Returns the number of tasks that could be placed: fewer than T when the orders contradict the dependencies.
    """
    num_ranks = len(order_offset) - 1
    num_tasks = len(rank)
    end = np.full(num_tasks, -1, np.int64)
    free_at = np.zeros(num_ranks, np.int64)
    start = np.full(num_ranks, -1, np.int64)  # of each rank's next task once it is known; -1 = not ready
    for r in range(num_ranks):
        next_index[r] = order_offset[r]
    placed = 0
    while True:
        best = -1
        for r in range(num_ranks):
            if next_index[r] == order_offset[r + 1]:
                continue
            if start[r] < 0:
                task = order[next_index[r]]
                earliest = free_at[r]
                for e in range(dep_offset[task], dep_offset[task + 1]):
                    if end[dep_task[e]] < 0:
                        earliest = -1
                        break
                    earliest = max(earliest, end[dep_task[e]] + dep_lag_ns[e])
                start[r] = earliest
            if start[r] >= 0 and (best < 0 or start[r] < start[best]):
                best = r
        if best < 0:
            return placed
        task = order[next_index[best]]
        sequence[task] = placed
        placed += 1
        end[task] = start[best] + duration_ns[task]
        free_at[best] = end[task]
        start[best] = -1
        next_index[best] += 1


@numba.njit(nogil=True, cache=True)
def _count_messages(rank, dep_offset, dep_task, dep_is_data):
    """Number of edges that carry a tensor from one rank to another."""
    messages = 0
    for task in range(len(rank)):
        for e in range(dep_offset[task], dep_offset[task + 1]):
            if dep_is_data[e] and rank[dep_task[e]] != rank[task]:
                messages += 1
    return messages


@numba.njit(nogil=True, cache=True)
def _number_messages(rank, dep_offset, dep_task, dep_is_data, producer, consumer, in_offset):
    """Fills producer, consumer [M] and in_offset [T + 1] (messages of task t are in_offset[t] : in_offset[t + 1])."""
    message = 0
    for task in range(len(rank)):
        in_offset[task] = message
        for e in range(dep_offset[task], dep_offset[task + 1]):
            if dep_is_data[e] and rank[dep_task[e]] != rank[task]:
                producer[message] = dep_task[e]
                consumer[message] = task
                message += 1
    in_offset[len(rank)] = message


@numba.njit(nogil=True, cache=True)
def _group_by(key, num_keys, visit, offset, grouped):
    """Stable counting sort: ``grouped`` lists the items of ``visit`` by ``key[item]``; those of key k are offset[k] : offset[k + 1]."""
    for i in range(num_keys + 1):
        offset[i] = 0
    for item in visit:
        offset[key[item] + 1] += 1
    for i in range(num_keys):
        offset[i + 1] += offset[i]
    cursor = offset[:num_keys].copy()
    for item in visit:
        grouped[cursor[key[item]]] = item
        cursor[key[item]] += 1


@numba.njit(nogil=True, cache=True)
def _emit(rank, kind, order_offset, order, sequence, in_offset, producer, consumer, distances, action_offset, out):
    """Writes all actions. ``distances`` = (lookahead, send_slack); ``out`` = [4, A] rows op, stage, peer, message.

    Slots: slot t is right behind task order[t] (flat index); the slot before a rank's first task is held apart, as num_tasks + rank.
    """
    num_ranks = len(order_offset) - 1
    num_tasks = len(order)
    num_messages = len(producer)
    lookahead, send_slack = distances
    position = np.empty(num_tasks, np.int64)  # flat index of each task in order
    by_sequence = np.empty(num_tasks, np.int64)
    for i in range(num_tasks):
        position[order[i]] = i
        by_sequence[sequence[order[i]]] = order[i]

    # Messages in the order in which they are sent: by their producer's place on the line.
    out_offset = np.empty(num_tasks + 1, np.int64)
    by_producer = np.empty(num_messages, np.int64)
    _group_by(producer, num_tasks, np.arange(num_messages), out_offset, by_producer)
    sent = np.empty(num_messages, np.int64)
    count = 0
    for i in range(num_tasks):
        task = by_sequence[i]
        for j in range(out_offset[task], out_offset[task + 1]):
            sent[count] = by_producer[j]
            count += 1

    # A receive is needed where its own consumer, or that of any later message of the channel, stands first.
    post_slot = np.empty(num_messages, np.int64)
    wait_slot = np.empty(num_messages, np.int64)
    needed = np.full((num_ranks, num_ranks), np.int64(1) << 60, np.int64)
    for i in range(num_messages - 1, -1, -1):
        message = sent[i]
        sender, receiver = rank[producer[message]], rank[consumer[message]]
        needed[sender, receiver] = min(needed[sender, receiver], position[consumer[message]])
        behind = needed[sender, receiver] - 1 - lookahead
        if behind < order_offset[receiver]:
            post_slot[message] = num_tasks + receiver
            posted_at = -1
        else:
            post_slot[message] = behind
            posted_at = sequence[order[behind]]
        # First task of the sender that starts behind the receive's post, and behind the send itself.
        low, high = position[producer[message]] + 1, order_offset[sender + 1]
        while low < high:
            middle = (low + high) // 2
            if sequence[order[middle]] > posted_at:
                high = middle
            else:
                low = middle + 1
        wait_slot[message] = min(low + send_slack, order_offset[sender + 1])
        if wait_slot[message] == order_offset[sender + 1]:
            wait_slot[message] = num_tasks + sender

    post_offset = np.empty(num_tasks + num_ranks + 1, np.int64)
    posts = np.empty(num_messages, np.int64)
    _group_by(post_slot, num_tasks + num_ranks, sent, post_offset, posts)
    wait_offset = np.empty(num_tasks + num_ranks + 1, np.int64)
    waits = np.empty(num_messages, np.int64)
    _group_by(wait_slot, num_tasks + num_ranks, sent, wait_offset, waits)

    a = 0
    for r in range(num_ranks):
        action_offset[r] = a
        for j in range(post_offset[num_tasks + r], post_offset[num_tasks + r + 1]):
            out[0, a], out[1, a], out[2, a], out[3, a] = IRECV, NONE, rank[producer[posts[j]]], posts[j]
            a += 1
        for i in range(order_offset[r], order_offset[r + 1]):
            task = order[i]
            for j in range(wait_offset[i], wait_offset[i + 1]):
                out[0, a], out[1, a], out[2, a], out[3, a] = WAIT_SEND, NONE, rank[consumer[waits[j]]], waits[j]
                a += 1
            for message in range(in_offset[task], in_offset[task + 1]):
                out[0, a], out[1, a], out[2, a], out[3, a] = WAIT_RECV, NONE, rank[producer[message]], message
                a += 1
            out[0, a], out[1, a], out[2, a], out[3, a] = kind[task], task, NONE, NONE
            a += 1
            for j in range(out_offset[task], out_offset[task + 1]):
                message = by_producer[j]
                out[0, a], out[1, a], out[2, a], out[3, a] = ISEND, NONE, rank[consumer[message]], message
                a += 1
            for j in range(post_offset[i], post_offset[i + 1]):
                out[0, a], out[1, a], out[2, a], out[3, a] = IRECV, NONE, rank[producer[posts[j]]], posts[j]
                a += 1
        for j in range(wait_offset[num_tasks + r], wait_offset[num_tasks + r + 1]):
            out[0, a], out[1, a], out[2, a], out[3, a] = WAIT_SEND, NONE, rank[consumer[waits[j]]], waits[j]
            a += 1
    action_offset[num_ranks] = a


def lower(
    graph: TaskGraph, order: Sequence[NDArray[np.int32]], *, lookahead: int = LOOKAHEAD, send_slack: int = SEND_SLACK
) -> Program:
    """Each rank's actions.

    Args:
        order: for each rank its tasks as executed, int32.
        lookahead: tasks by which a receive is posted before it is needed.
        send_slack: tasks by which the wait for a send follows the post of its receive.
    Raises:
        ProgramError: the orders do not hold every task once on its rank, or contradict the dependencies.
    """
    num_tasks = graph.num_tasks
    assert lookahead >= 0, lookahead
    assert send_slack >= 0, send_slack
    if len(order) != graph.num_ranks:
        raise ProgramError(f"{len(order)} orders for {graph.num_ranks} ranks")
    flat = np.concatenate([np.ascontiguousarray(tasks, np.int32) for tasks in order]) if num_tasks else np.empty(0, np.int32)
    offset = np.cumsum([0, *map(len, order)], dtype=np.int64)
    _check_order(graph, flat, offset)
    sequence = np.full(num_tasks, NONE, np.int64)
    next_index = np.empty(graph.num_ranks, np.int64)
    placed = _sequence(
        graph.rank, graph.duration_ns, graph.dep_offset, graph.dep_task, graph.dep_lag_ns, offset, flat, next_index, sequence
    )
    if placed < num_tasks:
        cells = [[f"{'FBW'[graph.kind[task]]}{task}" for task in tasks] for tasks in order]
        marks = (next_index - offset[:-1]).tolist()
        raise ProgramError(
            "the orders contradict the dependencies: every rank's next task waits for one that comes later\n" + format_grid(cells, marks)
        )
    num_messages = _count_messages(graph.rank, graph.dep_offset, graph.dep_task, graph.dep_is_data)
    producer = np.empty(num_messages, np.int32)
    consumer = np.empty(num_messages, np.int32)
    in_offset = np.empty(num_tasks + 1, np.int64)
    _number_messages(graph.rank, graph.dep_offset, graph.dep_task, graph.dep_is_data, producer, consumer, in_offset)
    action_offset = np.empty(graph.num_ranks + 1, np.int64)
    out = np.empty((4, num_tasks + 4 * num_messages), np.int32)
    _emit(
        graph.rank, graph.kind, offset, flat, sequence, in_offset, producer, consumer, (lookahead, send_slack), action_offset, out
    )
    after = np.repeat(np.arange(num_tasks, dtype=np.int32), np.diff(graph.dep_offset))
    local = graph.rank[graph.dep_task] == graph.rank[after]
    if not np.all(local | graph.dep_is_data):
        edge = int(np.flatnonzero(~local & ~graph.dep_is_data)[0])
        raise ProgramError(f"task {after[edge]} depends on task {graph.dep_task[edge]} of another rank without a tensor between them")
    return Program(
        num_ranks=graph.num_ranks,
        action_offset=action_offset,
        op=out[0].astype(np.int8),
        stage=out[1],
        peer=out[2],
        message=out[3],
        stage_rank=graph.rank,
        stage_kind=graph.kind,
        message_tag=np.arange(num_messages, dtype=np.int64),
        producer=producer,
        consumer=consumer,
        local_before=graph.dep_task[local],
        local_after=after[local],
        local_is_data=graph.dep_is_data[local],
    )


def _check_order(graph: TaskGraph, flat: NDArray[np.int32], offset: NDArray[np.int64]) -> None:
    """Raises ProgramError unless the orders hold each task exactly once, on its own rank."""
    if flat.size and (flat.min() < 0 or flat.max() >= graph.num_tasks):
        bad = flat[(flat < 0) | (flat >= graph.num_tasks)][0]
        raise ProgramError(f"an order names task {bad}; the graph has tasks 0..{graph.num_tasks - 1}")
    times = np.bincount(flat, minlength=graph.num_tasks)
    if np.any(times != 1):
        task = int(np.flatnonzero(times != 1)[0])
        raise ProgramError(f"task {task} ({KIND_NAMES[graph.kind[task]]}) stands {times[task]} times in the orders, must stand once")
    held = np.repeat(np.arange(graph.num_ranks), np.diff(offset))
    if np.any(graph.rank[flat] != held):
        index = int(np.flatnonzero(graph.rank[flat] != held)[0])
        raise ProgramError(f"task {flat[index]} of rank {graph.rank[flat[index]]} stands in the order of rank {held[index]}")
