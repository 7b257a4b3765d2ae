"""The judge of a program: static checks, then a dry run of all ranks together. Every plan passes both before it runs.

:func:`check_program` looks at each action's place: each stage once on its rank, each message posted and waited for exactly once at both
ends, sends behind the stage that makes them, waits before the stage that needs them, and both ends of each channel (one for each
directed pair of ranks, first in, first out) in one order.
:func:`dry_run` runs all ranks with rendezvous sends (a send is over only when its receive is posted) and reports ranks that wait for
each other. It pairs sends and receives by message, which is what the channels do only in a program that has passed the first check.
What passes both cannot hang the executor, unless a process dies or the machine does.
"""

from __future__ import annotations

import itertools

import numba
import numpy as np

from megatron_dip.program.program import IRECV, ISEND, NONE, OP_NAMES, WAIT_RECV, WAIT_SEND, Program, ProgramError
from megatron_dip.program.text import format_grid
from megatron_dip.spec.action_text import format_action

_PROBLEMS = {
    1: "a stage stands on a rank that is not its own, under another kind, or twice",
    2: "a message is posted twice at one end, or by a rank that is not at that end, or with the wrong peer",
    3: "a message is waited for twice or before it is posted",
    4: "a message is sent before the stage that makes it has run",
    5: "a stage runs before a message that it awaits has arrived",
    6: "a stage runs before a stage of its own rank on which it depends",
    7: "a receive stands in another order than the sends of its channel",
    8: "the program ends with a stage that never ran",
    9: "the program ends with a message that was not posted and waited for at both ends",
}


@numba.njit(nogil=True, cache=True)
def _check(action_offset, op, stage, peer, message, stage_rank, stage_kind, producer, consumer, local_before, local_after, where):
    """Returns a key of _PROBLEMS or 0; ``where`` [3] gets rank, index within the rank (or -1), and the stage or message."""
    num_ranks = len(action_offset) - 1
    num_stages = len(stage_rank)
    num_messages = len(producer)
    ran = np.zeros(num_stages, np.bool_)
    # Bits of what each end has done: 1 posted, 2 waited.
    sent = np.zeros(num_messages, np.int8)
    received = np.zeros(num_messages, np.int8)
    in_offset = np.zeros(num_stages + 1, np.int64)
    for m in range(num_messages):
        in_offset[consumer[m] + 1] += 1
    local_offset = np.zeros(num_stages + 1, np.int64)
    for i in range(len(local_after)):
        local_offset[local_after[i] + 1] += 1
    for t in range(num_stages):
        in_offset[t + 1] += in_offset[t]
        local_offset[t + 1] += local_offset[t]
    cursor = in_offset[:num_stages].copy()
    awaited = np.empty(num_messages, np.int64)
    for m in range(num_messages):
        awaited[cursor[consumer[m]]] = m
        cursor[consumer[m]] += 1
    cursor = local_offset[:num_stages].copy()
    before = np.empty(len(local_after), np.int64)
    for i in range(len(local_after)):
        before[cursor[local_after[i]]] = local_before[i]
        cursor[local_after[i]] += 1

    # Place of each message among the sends of its channel.
    send_place = np.full(num_messages, -1, np.int64)
    next_send = np.zeros((num_ranks, num_ranks), np.int64)
    for r in range(num_ranks):
        for a in range(action_offset[r], action_offset[r + 1]):
            if op[a] == ISEND:
                send_place[message[a]] = next_send[r, peer[a]]
                next_send[r, peer[a]] += 1
    next_receive = np.zeros((num_ranks, num_ranks), np.int64)

    for r in range(num_ranks):
        for a in range(action_offset[r], action_offset[r + 1]):
            where[0], where[1] = r, a - action_offset[r]
            if op[a] < ISEND:
                t = stage[a]
                where[2] = t
                if stage_rank[t] != r or stage_kind[t] != op[a] or ran[t]:
                    return 1
                for i in range(in_offset[t], in_offset[t + 1]):
                    if received[awaited[i]] != 3:
                        where[2] = awaited[i]
                        return 5
                for i in range(local_offset[t], local_offset[t + 1]):
                    if not ran[before[i]]:
                        where[2] = before[i]
                        return 6
                ran[t] = True
                continue
            m = message[a]
            where[2] = m
            at_sender = op[a] == ISEND or op[a] == WAIT_SEND
            mine = stage_rank[producer[m]] if at_sender else stage_rank[consumer[m]]
            other = stage_rank[consumer[m]] if at_sender else stage_rank[producer[m]]
            if mine != r or other != peer[a]:
                return 2
            done = sent if at_sender else received
            if op[a] == ISEND or op[a] == IRECV:
                if done[m] != 0:
                    return 2
                done[m] = 1
            else:
                if done[m] != 1:
                    return 3
                done[m] = 3
            if op[a] == ISEND and not ran[producer[m]]:
                return 4
            if op[a] == IRECV:
                if send_place[m] != next_receive[peer[a], r]:
                    return 7
                next_receive[peer[a], r] += 1
    where[1] = -1
    for t in range(num_stages):
        if not ran[t]:
            where[0], where[2] = stage_rank[t], t
            return 8
    for m in range(num_messages):
        if sent[m] != 3 or received[m] != 3:
            where[0], where[2] = stage_rank[producer[m] if sent[m] != 3 else consumer[m]], m
            return 9
    return 0


@numba.njit(nogil=True, cache=True)
def _run(action_offset, op, message, num_messages, counter):
    """Advances every rank as far as it gets; ``counter`` [P] ends at the action (flat index) where each rank stands."""
    num_ranks = len(action_offset) - 1
    send_posted = np.zeros(num_messages, np.bool_)
    receive_posted = np.zeros(num_messages, np.bool_)
    for r in range(num_ranks):
        counter[r] = action_offset[r]
    moved = True
    while moved:
        moved = False
        for r in range(num_ranks):
            while counter[r] < action_offset[r + 1]:
                a = counter[r]
                if op[a] == WAIT_SEND and not receive_posted[message[a]]:
                    break
                if op[a] == WAIT_RECV and not send_posted[message[a]]:
                    break
                if op[a] == ISEND:
                    send_posted[message[a]] = True
                elif op[a] == IRECV:
                    receive_posted[message[a]] = True
                counter[r] += 1
                moved = True


def _grid(program: Program, marked: list[int]) -> str:
    bounds = program.action_offset.tolist()
    cells = [[format_action(program.action(a)) for a in range(first, last)] for first, last in itertools.pairwise(bounds)]
    return format_grid(cells, marked)


def check_program(program: Program) -> None:
    """Static checks. Raises ProgramError with the grid and the bad cell marked."""
    where = np.full(3, NONE, np.int64)
    problem = _check(
        program.action_offset, program.op, program.stage, program.peer, program.message, program.stage_rank, program.stage_kind,
        program.producer, program.consumer, program.local_before, program.local_after, where,
    )
    if problem:
        rank, index, subject = where.tolist()
        what = f"stage {subject}" if problem in (1, 6, 8) else f"tag {program.message_tag[subject]}"
        marked = [-1] * program.num_ranks
        if index >= 0:
            marked[rank] = index
        raise ProgramError(f"rank {rank}, {what}: {_PROBLEMS[problem]}\n{_grid(program, marked)}")


def dry_run(program: Program) -> None:
    """Runs all ranks of a checked program. Raises ProgramError when ranks wait for each other, the action at which each stands marked."""
    counter = np.empty(program.num_ranks, np.int64)
    _run(program.action_offset, program.op, program.message, program.num_messages, counter)
    stuck = np.flatnonzero(counter < program.action_offset[1:])
    if len(stuck):
        marked = (counter - program.action_offset[:-1]).tolist()
        rank = int(stuck[0])
        action = program.action(int(counter[rank]))
        raise ProgramError(
            f"deadlock: ranks {stuck.tolist()} wait for each other (rank {rank} at {OP_NAMES[program.op[counter[rank]]]} of tag {action.tag})\n"
            + _grid(program, marked)
        )
