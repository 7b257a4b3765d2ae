"""What a run holds besides the activations that a schedule is made for: messages under way, inputs, the layer that is being recomputed.

In: a schedule and its program. Out: the same task graph with these bytes counted, for the plan. Where they stand on the line of a rank:

- what a stage sends lives from the stage's start until its send was waited for;
- a receive's buffer lives from its post until the stage that takes it: until the stage's start where it is kept as an activation, until
  its end else (a gradient, or an input of a stage without a backward). What modules hand to others is counted from its making on
  already (:mod:`megatron_dip.schedule.graph`);
- the inputs of all microbatches are there from the first stage on, and go with a microbatch's last forward on the rank;
- a backward that recomputes needs one whole layer's activation for its time.

Not counted: what operators need for themselves, the allocator's unused blocks, the libraries' own buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import CostModel
from megatron_dip.program.program import IRECV, ISEND, WAIT_SEND, Program
from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.result import Schedule
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.tasks import BACKWARD, FORWARD, WEIGHT
from megatron_dip.spec.workload import Microbatch


def recomputing_room(problem: StageProblem) -> NDArray[np.int64]:
    """[P] the most that a backward on each rank would need to recompute one layer."""
    most = np.zeros(problem.fastest.num_ranks, dtype=np.int64)
    ranks = problem.fastest.rank[problem.pair_forward]
    np.maximum.at(most, ranks, problem.recompute_bytes[problem.pair_class].max(axis=1))
    return most


def with_all_memory(
    problem: StageProblem, schedule: Schedule, tasks: NDArray[np.int64], choice: NDArray[np.int32], program: Program,
    inputs: NDArray[np.int64],
) -> Schedule:
    """The schedule with everything that its rank programs hold.

    Args:
        schedule, tasks: without absent tasks, from :meth:`StageProblem.present`.
        choice: [Q] candidate of each pair.
        inputs: [microbatches, P] bytes of captured inputs.
    """
    graph = schedule.graph
    pair = problem.pair_of_task[tasks]
    start, end = graph.mem_start_bytes.copy(), graph.mem_end_bytes.copy()
    backward = np.flatnonzero(graph.kind == BACKWARD)
    again = problem.recompute_bytes[problem.pair_class[pair[backward]], choice[pair[backward]]]
    start[backward] += again
    end[backward] -= again

    has_backward = problem.pair_backward[pair] >= 0
    producer, consumer = program.producer, program.consumer
    # A gradient is as large as the message that it answers, which the taking stage's forward had sent.
    answered = np.where(graph.kind[producer] == FORWARD, pair[producer], pair[consumer])
    size = problem.message_bytes[answered]
    kept = (graph.kind[consumer] == FORWARD) & has_backward[consumer]
    between_modules = (graph.kind[producer] == FORWARD) & (graph.module[producer] != graph.module[consumer])
    received = np.where(between_modules, 0, size)
    _add_messages(program.action_offset, program.op, program.stage, program.message, producer, size, received, start, end)
    np.subtract.at(start, consumer[kept], received[kept])
    np.subtract.at(end, consumer[~kept], received[~kept])

    for rank, row in enumerate(schedule.order):
        if not len(row):
            continue
        forwards = row[graph.kind[row] == FORWARD]
        last = np.full(len(inputs), -1, dtype=np.int64)
        last[graph.microbatch[forwards]] = forwards  # the last one stays
        held = inputs[:, rank] * (last >= 0)
        start[row[0]] += held.sum()
        np.subtract.at(end, last[last >= 0], held[last >= 0])
    return replace(schedule, graph=replace(graph, mem_start_bytes=start, mem_end_bytes=end))


@numba.njit(nogil=True, cache=True)
def _add_messages(action_offset, op, stage, message, producer, sent_bytes, received_bytes, start, end):  # type: ignore[no-untyped-def]
    """Adds send buffers whole, and receive buffers' beginnings: taken at the start of the next stage on the rank."""
    for rank in range(len(action_offset) - 1):
        before = np.int64(-1)
        posted = np.int64(0)
        for action in range(action_offset[rank], action_offset[rank + 1]):
            code, number = op[action], message[action]
            if code <= WEIGHT:
                before = np.int64(stage[action])
                start[before] += posted
                posted = np.int64(0)
            elif code == ISEND:
                start[producer[number]] += sent_bytes[number]
            elif code == WAIT_SEND:
                end[before] -= sent_bytes[number]
            elif code == IRECV:
                posted += received_bytes[number]


def captured_inputs(model: ModelSpec, microbatches: Sequence[Microbatch], costs: CostModel, num_ranks: int) -> NDArray[np.int64]:
    """[microbatches, P] bytes."""
    held = np.zeros((len(microbatches), num_ranks), dtype=np.int64)
    for index, microbatch in enumerate(microbatches):
        for module in model.modules:
            lengths = microbatch.get(module.name, ())
            if lengths:
                held[index, 0] += costs.input_bytes(module.name, lengths, at_first=True)
                held[index, 1:] += costs.input_bytes(module.name, lengths, at_first=False)
    return held
