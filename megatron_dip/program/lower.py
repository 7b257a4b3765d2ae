"""Lowering: a task graph and each rank's order of tasks become each rank's list of actions.

A rank's program is, for each of its tasks: waits for sends that must be over by now, waits for the task's messages, the task, the
sends of what it made, and the receives to be posted at this point.

* Where sends and receives stand says :mod:`megatron_dip.program.posting`: all of them and all tasks stand on one line, behind all that
  they wait for, whether a device has one hardware queue or many.
* A message is waited for right before the task that needs it, which stands on the line behind both its posts.
* A send is waited for ``send_slack`` tasks behind the first task that finds it over: late enough that a slow receiver does not hold the
  sender up, early enough that the buffer is not held all through the iteration.

So every action stands on the line behind all that it waits for, and a wait may hold up all that stands behind it on its rank: programs
cannot hang. Every post is waited for exactly once. Receives from one rank are posted in the order of that rank's sends, since a channel
(one for each directed pair of ranks) is first in, first out and NCCL knows no tags. DIP (arXiv 2504.14145), deployment. Not modelled:
batched posts (`group` stays absent; each directed pair has its own communicator).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.program.messages import Messages, group_by, make_messages
from megatron_dip.program.posting import SEND, TASK, Launches, run_orders
from megatron_dip.program.program import IRECV, ISEND, NONE, WAIT_RECV, WAIT_SEND, Program, ProgramError
from megatron_dip.program.text import format_grid
from megatron_dip.spec.tasks import KIND_NAMES, TaskGraph

SEND_SLACK = 8


@numba.njit(nogil=True, cache=True)
def _wait_kernel(rank, duration_ns, order_offset, order, messages, kind, item, start_ns, send_slack, wait_slot):
    """Fills ``wait_slot`` [M]: the flat index of the task before which the message's send is waited for; T + r = at the end of rank r.

    The first task that finds the send over stands on the line behind both posts and starts when the message has arrived. So much work
    must lie between that this holds on a device without the limit too, where tasks may start earlier.
    """
    num_tasks, num_messages = len(order), len(messages.producer)
    line = np.empty(num_tasks, np.int64)  # place on the line of each task, its start, and the work before it on its rank
    task_ns = np.empty(num_tasks, np.int64)
    work_ns = np.zeros(num_tasks + 1, np.int64)
    position = np.empty(num_tasks, np.int64)
    posted = np.zeros(num_messages, np.int64)  # place on the line of the later post, and its start
    posted_ns = np.zeros(num_messages, np.int64)
    for i in range(num_tasks):
        position[order[i]] = i
        work_ns[i + 1] = work_ns[i] + duration_ns[order[i]]
    for place in range(len(kind)):
        if kind[place] == TASK:
            line[item[place]], task_ns[item[place]] = place, start_ns[place]
        else:
            posted[item[place]], posted_ns[item[place]] = place, start_ns[place]
    for m in range(num_messages):
        sender = rank[messages.producer[m]]
        low, high = position[messages.producer[m]] + 1, order_offset[sender + 1]
        made_ns, over_ns = work_ns[low], posted_ns[m] + messages.lag_ns[m]
        while low < high:
            i = (low + high) // 2
            task = order[i]
            if line[task] > posted[m] and task_ns[task] >= over_ns and work_ns[i] - made_ns >= messages.lag_ns[m]:
                high = i
            else:
                low = i + 1
        slot = low + send_slack
        wait_slot[m] = slot if slot < order_offset[sender + 1] else num_tasks + sender


@numba.njit(nogil=True, cache=True)
def _emit_kernel(rank, task_kind, order_offset, messages, kind, item, wait_offset, waits, position, action_offset, out):
    """Writes all actions: the launches of the line with the waits before each task. ``out`` = [4, A] rows op, stage, peer, message."""
    num_ranks, num_tasks = len(order_offset) - 1, len(rank)
    size = np.zeros(num_ranks, np.int64)
    for place in range(len(kind)):
        if kind[place] == TASK:
            size[rank[item[place]]] += 1
        else:  # a post and its wait
            size[rank[messages.producer[item[place]] if kind[place] == SEND else messages.consumer[item[place]]]] += 2
    action_offset[0] = 0
    for r in range(num_ranks):
        action_offset[r + 1] = action_offset[r] + size[r]
    cursor = action_offset[:num_ranks].copy()
    for place in range(len(kind)):
        if kind[place] == TASK:
            task = item[place]
            r = rank[task]
            slot = position[task]
            for j in range(wait_offset[slot], wait_offset[slot + 1]):
                _write(out, cursor, r, WAIT_SEND, NONE, rank[messages.consumer[waits[j]]], waits[j])
            for m in range(messages.in_offset[task], messages.in_offset[task + 1]):
                _write(out, cursor, r, WAIT_RECV, NONE, rank[messages.producer[m]], m)
            _write(out, cursor, r, task_kind[task], task, NONE, NONE)
        else:
            m = item[place]
            sender, receiver = rank[messages.producer[m]], rank[messages.consumer[m]]
            if kind[place] == SEND:
                _write(out, cursor, sender, ISEND, NONE, receiver, m)
            else:
                _write(out, cursor, receiver, IRECV, NONE, sender, m)
    for r in range(num_ranks):
        for j in range(wait_offset[num_tasks + r], wait_offset[num_tasks + r + 1]):
            _write(out, cursor, r, WAIT_SEND, NONE, rank[messages.consumer[waits[j]]], waits[j])


@numba.njit(nogil=True, cache=True)
def _write(out, cursor, r, op, stage, peer, message):
    """Appends an action to rank r's."""
    a = cursor[r]
    out[0, a], out[1, a], out[2, a], out[3, a] = op, stage, peer, message
    cursor[r] += 1


def lower(graph: TaskGraph, order: Sequence[NDArray[np.int32]], *, send_slack: int = SEND_SLACK) -> Program:
    """Each rank's actions.

    Args:
        order: for each rank its tasks as executed, int32.
        send_slack: tasks by which the wait for a send follows its arrival.
    Raises:
        ProgramError: the orders do not hold every task once on its rank, or contradict the dependencies.
    """
    assert send_slack >= 0, send_slack
    if len(order) != graph.num_ranks:
        raise ProgramError(f"{len(order)} orders for {graph.num_ranks} ranks")
    num_tasks = graph.num_tasks
    flat = np.concatenate([np.ascontiguousarray(tasks, np.int32) for tasks in order]) if num_tasks else np.empty(0, np.int32)
    offset = np.cumsum([0, *map(len, order)], dtype=np.int64)
    _check_order(graph, flat, offset)
    after = np.repeat(np.arange(num_tasks, dtype=np.int32), np.diff(graph.dep_offset))
    local = graph.rank[graph.dep_task] == graph.rank[after]
    if not np.all(local | graph.dep_is_data):
        edge = int(np.flatnonzero(~local & ~graph.dep_is_data)[0])
        raise ProgramError(f"task {after[edge]} depends on task {graph.dep_task[edge]} of another rank without a tensor between them")
    messages = make_messages(graph, flat)
    launches = run_orders(graph, offset, flat, messages)
    if launches.num_launches < len(launches.kind):
        raise _contradiction(graph, order, (launches.next_index - offset[:-1]).tolist())
    return Program(
        num_ranks=graph.num_ranks,
        **_actions(graph, offset, flat, messages, launches, send_slack),
        stage_rank=graph.rank,
        stage_kind=graph.kind,
        message_tag=np.arange(len(messages.producer), dtype=np.int64),
        producer=messages.producer,
        consumer=messages.consumer,
        local_before=graph.dep_task[local],
        local_after=after[local],
        local_is_data=graph.dep_is_data[local],
    )


def _actions(
    graph: TaskGraph, offset: NDArray[np.int64], flat: NDArray[np.int32], messages: Messages, launches: Launches, send_slack: int
) -> dict[str, NDArray[Any]]:
    """The program's arrays of actions by their names."""
    num_messages = len(messages.producer)
    wait_slot = np.empty(num_messages, np.int64)
    _wait_kernel(
        graph.rank, graph.duration_ns, offset, flat, messages, launches.kind, launches.item, launches.start_ns, send_slack, wait_slot
    )
    wait_offset, waits = group_by(wait_slot, graph.num_tasks + graph.num_ranks, messages.by_channel)
    position = np.empty(graph.num_tasks, np.int64)
    position[flat] = np.arange(graph.num_tasks)
    action_offset = np.empty(graph.num_ranks + 1, np.int64)
    out = np.empty((4, graph.num_tasks + 4 * num_messages), np.int32)
    _emit_kernel(
        graph.rank, graph.kind, offset, messages, launches.kind, launches.item, wait_offset, waits, position, action_offset, out
    )
    return {"action_offset": action_offset, "op": out[0].astype(np.int8), "stage": out[1], "peer": out[2], "message": out[3]}


def _contradiction(graph: TaskGraph, order: Sequence[NDArray[np.int32]], stands: list[int]) -> ProgramError:
    """``stands``: for each rank the index of the task at which it stands."""
    cells = [[f"{'FBW'[graph.kind[task]]}{task}" for task in tasks] for tasks in order]
    return ProgramError(
        "the orders contradict the dependencies: every rank's next task waits for one that comes later\n" + format_grid(cells, stands)
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
