"""The judge of a program: static checks, then dry runs of all ranks together. Every plan passes all of them before it runs.

:func:`check_program` looks at each action's place: each stage once on its rank, each message posted and waited for exactly once at both
ends, sends behind the stage that makes them, waits before the stage that needs them, and both ends of each channel (one for each
directed pair of ranks, first in, first out) in one order.
:func:`dry_run` runs all ranks and reports ranks that wait for each other, on two devices:

* one on which a post never waits. A wait holds up all that stands behind it on its rank, and sends are rendezvous: a message is over
  only when both its ends are posted;
* one with one hardware queue (``CUDA_DEVICE_MAX_CONNECTIONS=1``), on which besides a post waits until the message before it in its
  channel is over, and holds up all that stands behind it on its rank.

Which launch waits for what on CUDA, and where the second rule stands for it: a stage's kernels wait for those before them in the compute
stream, which waits for the receives that the stage needs (``wait_recv`` makes it wait for an event, as ``wait_send`` does for a send);
a send's kernel waits for all of the compute stream that was launched before it, and both a send's and a receive's for the kernel before
them in the stream that NCCL has for the channel. On one queue each of these launches holds up all later ones of its device. That a stage
or a send holds up what stands behind it needs no rule: the stage waits only for what a wait in front of it has waited for. A device with
several queues lets some launches pass others, so it waits for less than one of the two devices.

:func:`joint_dry_run` runs the programs of replicas that share experts together: at a shared stage every replica waits for all others.

The runs pair sends and receives by message, which is what channels do only in a program that has passed the first check. What passes
everything cannot hang on these devices, unless a process dies or the machine does. Not modelled: NCCL communicators that several channels
share (:mod:`megatron_dip.runtime.startup` refuses them), kernels that are loaded when they are first launched, cudaMalloc and cudaFree
that wait for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.program.messages import group_by
from megatron_dip.program.program import IRECV, ISEND, NONE, WAIT_RECV, WAIT_SEND, Program, ProgramError, side_by_side
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
    num_ranks, num_stages, num_messages = len(action_offset) - 1, len(stage_rank), len(producer)
    ran = np.zeros(num_stages, np.bool_)
    done = np.zeros((2, num_messages), np.int8)  # at the sender, at the receiver: bits of what was done, 1 posted, 2 waited
    in_offset, awaited = group_by(consumer, num_stages, np.arange(num_messages))
    local_offset, before = group_by(local_after, num_stages, np.arange(len(local_after)))
    send_place = _send_places(action_offset, op, peer, message, num_messages)
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
                    if done[1, awaited[i]] != 3:
                        where[2] = awaited[i]
                        return 5
                for i in range(local_offset[t], local_offset[t + 1]):
                    if not ran[local_before[before[i]]]:
                        where[2] = local_before[before[i]]
                        return 6
                ran[t] = True
            else:
                m = message[a]
                where[2] = m
                problem = _check_message(op[a], r, peer[a], m, stage_rank[producer[m]], stage_rank[consumer[m]], done, ran[producer[m]])
                if problem:
                    return problem
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
        if done[0, m] != 3 or done[1, m] != 3:
            where[0], where[2] = stage_rank[producer[m] if done[0, m] != 3 else consumer[m]], m
            return 9
    return 0


@numba.njit(nogil=True, cache=True)
def _send_places(action_offset, op, peer, message, num_messages):
    """[M] place of each message among the sends of its channel, -1 = never sent."""
    num_ranks = len(action_offset) - 1
    places = np.full(num_messages, -1, np.int64)
    count = np.zeros((num_ranks, num_ranks), np.int64)
    for r in range(num_ranks):
        for a in range(action_offset[r], action_offset[r + 1]):
            if op[a] == ISEND:
                places[message[a]] = count[r, peer[a]]
                count[r, peer[a]] += 1
    return places


@numba.njit(nogil=True, cache=True)
def _check_message(op, r, peer, m, sender, receiver, done, is_made):
    """Returns a key of _PROBLEMS or 0 for one message action of rank r, and notes in ``done`` what it does."""
    end = 0 if op in (ISEND, WAIT_SEND) else 1
    if r != (sender if end == 0 else receiver) or peer != (receiver if end == 0 else sender):
        return 2
    if op in (ISEND, IRECV):
        if done[end, m] != 0:
            return 2
        done[end, m] = 1
    else:
        if done[end, m] != 1:
            return 3
        done[end, m] = 3
    return 4 if op == ISEND and not is_made else 0


@numba.njit(nogil=True, cache=True)
def _run(action_offset, op, peer, message, num_messages, one_queue, meeting, num_parties, counter):
    """Advances every rank as far as it gets; ``counter`` [P] ends at the action (flat index) where each rank stands.

    Args:
        one_queue: posts wait for the message before them in their channel.
        meeting: [A] number of the meeting at an action, NONE = none. A rank gets past one when ``num_parties`` ranks have come to it.
    """
    num_ranks = len(action_offset) - 1
    posted = np.zeros((2, num_messages), np.bool_)  # at the sender, at the receiver
    last = np.full((2, num_ranks, num_ranks), NONE, np.int64)  # message that rank r posted last to or from a peer
    came = np.zeros(meeting.max() + 1 if len(meeting) else 0, np.int64)
    is_there = np.zeros(num_ranks, np.bool_)  # whether the rank has come to the meeting at which it stands
    counter[:] = action_offset[:num_ranks]
    moved = True
    while moved:
        moved = False
        for r in range(num_ranks):
            while counter[r] < action_offset[r + 1]:
                a = counter[r]
                m = message[a]
                if op[a] == WAIT_SEND or op[a] == WAIT_RECV:
                    if not (posted[0, m] and posted[1, m]):
                        break
                elif op[a] == ISEND or op[a] == IRECV:
                    end = 0 if op[a] == ISEND else 1
                    before = last[end, r, peer[a]]
                    if one_queue and before != NONE and not (posted[0, before] and posted[1, before]):
                        break
                    posted[end, m] = True
                    last[end, r, peer[a]] = m
                elif meeting[a] != NONE:
                    if not is_there[r]:
                        is_there[r] = True
                        came[meeting[a]] += 1
                        moved = True
                    if came[meeting[a]] < num_parties:
                        break
                    is_there[r] = False
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
    """Runs all ranks of a checked program on both devices. Raises ProgramError when ranks wait for each other, the action at which each
    stands marked."""
    _dry_run(program, np.full(len(program.op), NONE, np.int64), 1)


def joint_dry_run(parts: Sequence[Program], meetings: Sequence[NDArray[np.int64]]) -> None:
    """Runs checked programs of several replicas together, on both devices; replicas wait for each other at the stages that they share.

    Args:
        parts: the replicas' programs, of as many ranks each.
        meetings: for each replica [its stages] the number of the meeting that a stage is, NONE = none. A stage starts once every replica
            has come to its meeting.

    Raises:
        ProgramError: ranks wait for each other; rank r of replica i is shown as rank i * P + r.
    """
    joint = side_by_side(parts)
    of_stage = np.concatenate([np.asarray(of_part, np.int64) for of_part in meetings])
    of_action = np.full(len(joint.op), NONE, np.int64)
    stages = joint.stage != NONE
    of_action[stages] = of_stage[joint.stage[stages]]
    _dry_run(joint, of_action, len(parts))


def _dry_run(program: Program, meeting: NDArray[np.int64], num_parties: int) -> None:
    for one_queue in (False, True):
        counter = np.empty(program.num_ranks, np.int64)
        _run(
            program.action_offset, program.op, program.peer, program.message, program.num_messages, one_queue, meeting, num_parties, counter
        )
        stuck = np.flatnonzero(counter < program.action_offset[1:])
        if len(stuck):
            marked = (counter - program.action_offset[:-1]).tolist()
            rank = int(stuck[0])
            action = program.action(int(counter[rank]))
            what = f"stage {action.stage}" if isinstance(action.stage, int) else f"tag {action.tag}"
            where = " on a device with one hardware queue" if one_queue else ""
            raise ProgramError(
                f"deadlock{where}: ranks {stuck.tolist()} wait for each other (rank {rank} at {action.op} of {what})\n" + _grid(program, marked)
            )
