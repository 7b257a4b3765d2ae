"""What a run holds besides the activations that a schedule is made for: messages under way, inputs, the layer that is being recomputed.

In: a schedule and its program. Out: the same task graph with these bytes counted, for the plan. Where they stand on the line of a rank:

- what a stage sends lives from the stage's start until its send was waited for;
- a receive's buffer lives from its post until the stage that takes it: until the stage's start where it is kept as an activation, until
  its end else (a gradient, or an input of a stage without a backward). What modules hand to others is counted from its making on
  already (:mod:`megatron_dip.schedule.graph`);
- the inputs of all microbatches are there from the first stage on, and go with a microbatch's last forward on the rank; what stems read
  (images, on rank 0) goes with the last stem stage and is there from the first one on, or from the start within a small budget
  (:class:`megatron_dip.cost.memory.StemBudget`);
- layers that are recomputed or offloaded are there whole while they run (:mod:`megatron_dip.schedule.rooms`).

Not counted: what operators need for themselves, the allocator's unused blocks, the libraries' own buffers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.memory import StemBudget
from megatron_dip.program.program import IRECV, ISEND, WAIT_SEND, Program
from megatron_dip.schedule.graph import StageProblem
from megatron_dip.schedule.result import Schedule
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.tasks import BACKWARD, FORWARD, WEIGHT
from megatron_dip.spec.workload import Microbatch


def recomputing_room(problem: StageProblem) -> NDArray[np.int64]:
    """[P] the most that a backward on each rank would need besides what is held, where nothing is offloaded."""
    rooms = problem.rooms
    needed = np.where(rooms.ahead > 0, 0, rooms.backward + rooms.weight)
    most = np.zeros(problem.fastest.num_ranks, dtype=np.int64)
    ranks = problem.fastest.rank[problem.pair_forward]
    np.maximum.at(most, ranks, needed[problem.pair_class].max(axis=1))
    return most


def with_all_memory(
    problem: StageProblem, schedule: Schedule, tasks: NDArray[np.int64], choice: NDArray[np.int32], program: Program,
    inputs: CapturedInputs,
) -> Schedule:
    """The schedule with everything that its rank programs hold.

    Args:
        schedule, tasks: without absent tasks, from :meth:`StageProblem.present`.
        choice: [Q] candidate of each pair.
        inputs: what microbatches bring.
    """
    graph = schedule.graph
    pair = problem.pair_of_task[tasks]
    start, end = graph.mem_start_bytes.copy(), graph.mem_end_bytes.copy()
    _add_rooms(problem, schedule, pair, choice, start, end)

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
        _, last = _first_and_last(forwards, graph.microbatch, len(inputs.held))
        held = inputs.held[:, rank] * (last >= 0)
        start[row[0]] += held.sum()
        np.subtract.at(end, last[last >= 0], held[last >= 0])
        if rank == 0:
            stems = forwards[(graph.vp_stage[forwards] == 0) & np.isin(graph.module[forwards], [
                graph.module_names.index(name) for name in inputs.stem_modules if name in graph.module_names
            ])]
            first, last = _first_and_last(stems, graph.microbatch, len(inputs.held))
            there = last >= 0
            np.add.at(start, np.where(inputs.is_late, first, row[0])[there], inputs.stem[there])
            np.subtract.at(end, last[there], inputs.stem[there])
    return replace(schedule, graph=replace(graph, mem_start_bytes=start, mem_end_bytes=end))


def _add_rooms(
    problem: StageProblem, schedule: Schedule, pair: NDArray[np.int32], choice: NDArray[np.int32], start: NDArray[np.int64],
    end: NDArray[np.int64],
) -> None:
    """Args:
    pair: [tasks of the schedule] each one's pair.
    """
    graph, rooms = schedule.graph, problem.rooms
    cell = (problem.pair_class[pair], choice[pair])
    has_backward, has_weight = problem.pair_backward[pair] >= 0, problem.pair_weight[pair] >= 0
    forward = (graph.kind == FORWARD) & has_backward
    backward, weight = graph.kind == BACKWARD, graph.kind == WEIGHT
    between, until_weight = rooms.between[cell], np.where(has_weight, rooms.weight[cell], 0)
    start[forward] += (rooms.forward[cell] + between)[forward]
    end[forward] -= rooms.forward[cell][forward]
    start[backward] += (rooms.backward[cell] + until_weight)[backward]
    ahead = rooms.ahead[cell]
    end[backward] -= (rooms.backward[cell] + ahead + between)[backward]
    end[weight] -= until_weight[weight]
    for row in schedule.order:
        if not len(row):
            continue
        before = np.concatenate((row[:1], row[:-1]))
        # Behind its own forward nothing is fetched ahead: what is needed first has not gone yet.
        since = np.where(pair[before] == pair[row], row, before)
        fetches = backward[row]
        np.add.at(start, since[fetches], ahead[row[fetches]])


def _first_and_last(stages: NDArray[np.int64], microbatch: NDArray[np.int32], num_microbatches: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each microbatch's first and last one of ``stages``, which stand in their order; -1: none."""
    first, last = np.full(num_microbatches, -1, dtype=np.int64), np.full(num_microbatches, -1, dtype=np.int64)
    last[microbatch[stages]] = stages  # the last one stays
    first[microbatch[stages[::-1]]] = stages[::-1]
    return first, last


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedInputs:
    """Bytes that microbatches bring."""

    held: NDArray[np.int64]
    """[microbatches, P] from the iteration's start until the microbatch's last forward on the rank"""
    stem: NDArray[np.int64]
    """[microbatches] beside them on rank 0, until the microbatch's last stem stage"""
    is_late: NDArray[np.bool_]
    """[microbatches] whether ``stem`` is there from the first stem stage on, and not from the start"""
    stem_modules: tuple[str, ...]
    """Modules whose first chunk reads them."""

    def room(self) -> NDArray[np.int64]:
        """[P] bytes to keep free for them at least: all that is there from the start, and one microbatch that is late."""
        room = self.held.sum(axis=0)
        room[0] += self.stem[~self.is_late].sum() + self.stem[self.is_late].max(initial=0)
        return room


def captured_inputs(model: ModelSpec, microbatches: Sequence[Microbatch], costs: CostModel, num_ranks: int) -> CapturedInputs:
    held = np.zeros((len(microbatches), num_ranks), dtype=np.int64)
    stem = np.zeros(len(microbatches), dtype=np.int64)
    stem_modules = set()
    for index, microbatch in enumerate(microbatches):
        for module in model.modules:
            lengths = microbatch.get(module.name, ())
            if lengths:
                everywhere = costs.input_bytes(module.name, lengths, at_first=False)
                of_stem = costs.input_bytes(module.name, lengths, at_first=True) - everywhere
                held[index] += everywhere
                stem[index] += of_stem
                if of_stem:
                    stem_modules.add(module.name)
    budget = StemBudget()
    is_late = np.array([not budget.keeps(int(size)) for size in stem], dtype=np.bool_)
    return CapturedInputs(held=held, stem=stem, is_late=is_late, stem_modules=tuple(sorted(stem_modules)))
