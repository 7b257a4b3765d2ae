"""Times of a program on a device with one hardware queue, and on one without that limit.

In: any program that has passed the checks, durations and lags. Out: the end of the last stage. The device is that of
:mod:`megatron_dip.program.posting`, which chooses posts' places by it; here the places are given, so this also judges plans from elsewhere.

Without the limit a post waits for no message before it, and a receive starts at once. The makespan is then that of the orders alone
(``claimed_makespan``), unless sends or waits stand later than their data allow.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.program.program import IRECV, ISEND, NONE, WAIT_RECV, WAIT_SEND, Program, ProgramError, program_of
from megatron_dip.spec.plan import Plan


def one_queue_makespan(plan: Plan) -> int:
    """A plan's makespan in ns on a device with one hardware queue. Raises ProgramError where its ranks wait for each other there."""
    program = program_of(plan)
    lags = {(dep.stage, stage.id): dep.lag for stage in plan.stages for dep in stage.deps}
    ends = zip(program.producer.tolist(), program.consumer.tolist(), strict=True)
    return program_makespan(
        program, np.array([stage.duration for stage in plan.stages], np.int64), np.array([lags[edge] for edge in ends], np.int64),
        one_queue=True,
    )


def program_makespan(program: Program, duration_ns: NDArray[np.int64], lag_ns: NDArray[np.int64], *, one_queue: bool) -> int:
    """End of the last stage in ns.

    Args:
        duration_ns: [T] of each stage.
        lag_ns: [M] of each message.

    Raises:
        ProgramError: ranks wait for each other.
    """
    makespan = int(_makespan_kernel(program.action_offset, program.op, program.stage, program.peer, program.message, duration_ns, lag_ns, one_queue))
    if makespan < 0:
        raise ProgramError("ranks wait for each other" + (" on a device with one hardware queue" if one_queue else ""))
    return makespan


@numba.njit(nogil=True, cache=True)
def _makespan_kernel(action_offset, op, stage, peer, message, duration_ns, lag_ns, one_queue):
    """End of the last stage; -1 where ranks wait for each other."""
    num_ranks, num_messages = len(action_offset) - 1, len(lag_ns)
    counter = action_offset[:num_ranks].copy()
    queue_ns = np.zeros(num_ranks, np.int64)  # start of the rank's last launch; without the limit launches pass each other
    free_ns = np.zeros(num_ranks, np.int64)  # when the rank's compute stream is through with what was launched on it
    posted_ns = np.full((2, num_messages), -1, np.int64)
    over_ns = np.full(num_messages, -1, np.int64)
    last = np.full((2, num_ranks, num_ranks), NONE, np.int64)
    makespan = np.int64(0)
    moved = True
    while moved:
        moved = False
        for r in range(num_ranks):
            while counter[r] < action_offset[r + 1]:
                a = counter[r]
                m = message[a]
                start = queue_ns[r]
                if op[a] == WAIT_SEND or op[a] == WAIT_RECV:
                    if over_ns[m] < 0:
                        break
                    start = max(start, free_ns[r], over_ns[m])
                    free_ns[r] = max(free_ns[r], over_ns[m])
                elif op[a] == ISEND or op[a] == IRECV:
                    end = 0 if op[a] == ISEND else 1
                    before = last[end, r, peer[a]]
                    if end == 0:
                        start = max(start, free_ns[r])
                    if one_queue and before != NONE:
                        if over_ns[before] < 0:
                            break
                        start = max(start, over_ns[before])
                    posted_ns[end, m] = start
                    last[end, r, peer[a]] = m
                    if posted_ns[1 - end, m] >= 0:
                        over_ns[m] = max(posted_ns[0, m], posted_ns[1, m]) + lag_ns[m]
                else:
                    start = max(start, free_ns[r])
                    free_ns[r] = start + duration_ns[stage[a]]
                    makespan = max(makespan, free_ns[r])
                if one_queue:
                    queue_ns[r] = start
                counter[r] += 1
                moved = True
    for r in range(num_ranks):
        if counter[r] < action_offset[r + 1]:
            return np.int64(-1)
    return makespan
