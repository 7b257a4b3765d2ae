"""From sub-microbatches and costs to the task graph of one iteration, and to its variants under memory choices.

In: the model, the partition, the iteration's sub-microbatches, a cost model. Out: a :class:`StageProblem`, which gives a
:class:`~megatron_dip.spec.tasks.TaskGraph` for any choice of memory strategies. Source: DIP (arXiv 2504.14145), segments and stages.

Layout of task ids, on which the compiled kernels rely: a *segment* is one pass (forward, backward or weights) of one sub-microbatch
through one chunk on all P ranks, and task t is segment t // P on rank t % P. Forward segments come first, by sub-microbatch, then by
vp_stage; then backward segments in the same order, then weight segments.

Few layers: a stage with neither a layer nor the module's first or last part is *absent*, and the stage before it hands on to the next one that
is there. Absent tasks take no time and no memory and nobody waits for them: they are there for the layout alone, and
:meth:`StageProblem.present` takes them out.

Frozen parts: a stage has a backward only if something trained stands in it or before it. Segments without any are left out; in one
that some ranks have (a frozen vision model's last chunk, whose projector is trained) the others' places are absent tasks too.

Edges: a stage waits for the stage before it in its sub-microbatch's chain of at most K * P stages (backward: behind it); the first stage of a
module for the last stages of all sub-microbatches, of its microbatch, of the modules that feed it (backward mirrored); a backward for
its own forward; a weight stage for its backward. Rounding: times are summed over a stage's layers as floats, then rounded to ns.

Memory: a forward takes its stage's activation at its start; its backward gives it back at its end (split: floor of one half at the
end of the input part, the rest at the end of the weight part). A forward without a backward has one layer's activation at a time, and
gives it back at its own end; so do the layers of a stage below its first trained one. Where
the cost model says so, what a module hands to the modules it feeds is held on rank 0, where they take it, once for each
sub-microbatch that takes it: from the start of rank 0's stage in the giver's last segment (somewhat before it arrives; where that is absent, of the
taking stage) to the end of the taking stage's backward, or of its forward where the giving module has no backward. Not modelled: temporary buffers within a stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import CostModel, PartCost
from megatron_dip.schedule.candidates import Candidates, layer_options, pair_candidates
from megatron_dip.schedule.result import Schedule
from megatron_dip.schedule.rooms import Rooms, layer_rooms
from megatron_dip.spec.model import ModelSpec, StageBackward
from megatron_dip.spec.partition import Partition, SubMicrobatch
from megatron_dip.spec.profile import Strategy
from megatron_dip.spec.tasks import BACKWARD, FORWARD, WEIGHT, TaskGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProblem:
    """One iteration, ready to be scheduled. Letters: Q stage pairs, C classes of equal pairs, S candidates, U sub-microbatches."""

    fastest: TaskGraph
    """The graph in which every pair takes its fastest candidate."""
    sub_microbatches: tuple[SubMicrobatch, ...]
    """[U]"""
    pair_forward: NDArray[np.int32]
    """[Q] task id of the pair's forward (equal to the pair's number: forwards come first)"""
    pair_backward: NDArray[np.int32]
    """[Q] task id, -1 = none"""
    pair_weight: NDArray[np.int32]
    """[Q] task id, -1 = none"""
    pair_class: NDArray[np.int32]
    """[Q]"""
    pair_sub_microbatch: NDArray[np.int32]
    """[Q] index into sub_microbatches"""
    num_candidates: NDArray[np.int32]
    """[C]"""
    forward_ns: NDArray[np.int64]
    """[C, S] duration of the forward; rows are padded with their last candidate"""
    backward_ns: NDArray[np.int64]
    """[C, S] duration of the backward (its input part when split); 0 without one"""
    held_bytes: NDArray[np.int64]
    """[C, S] activation from forward to backward"""
    rooms: Rooms
    """[C, S] what layers need for a moment where not all is kept; in no task's bytes"""
    message_bytes: NDArray[np.int64]
    """[Q] what the pair's forward sends, and its backward gets"""
    candidates: tuple[Candidates, ...]
    """[C]"""
    class_layers: NDArray[np.int32]
    """[C] number of layers; those below the first trained one have no place in the candidates"""
    pair_of_task: NDArray[np.int32]
    """[T] the pair that a task belongs to, -1 = the task is absent"""

    @property
    def num_pairs(self) -> int:
        return len(self.pair_forward)

    def leanest(self) -> NDArray[np.int32]:
        """[Q] the candidate of each pair that holds least."""
        return (self.num_candidates[self.pair_class] - 1).astype(np.int32)

    def nearest_choice(self, other: StageProblem, choice: NDArray[np.int32]) -> NDArray[np.int32]:
        """What is nearest here to a choice in another problem of the same pairs: the same strategies where they are a candidate here too,
        else the fastest that holds no more, else the leanest. Fronts differ where strategies or the form of the backward do.

        Args:
            choice: [Q] a candidate of each pair of ``other``.
        """
        pairs = np.stack((self.pair_class, other.pair_class, choice), axis=1)
        cells, cell_of_pair = np.unique(pairs, axis=0, return_inverse=True)
        nearest = np.empty(len(cells), dtype=np.int32)
        for number, (here, there, chosen) in enumerate(cells.tolist()):
            counts, wanted = self.candidates[here].counts, other.candidates[there].counts[chosen]
            if wanted in counts:
                nearest[number] = counts.index(wanted)
                continue
            lean_enough = np.flatnonzero(self.held_bytes[here, : len(counts)] <= other.held_bytes[there, chosen])
            nearest[number] = lean_enough[0] if len(lean_enough) else len(counts) - 1
        return nearest[cell_of_pair.reshape(-1)]

    def graph(self, choice: NDArray[np.int32]) -> TaskGraph:
        """The task graph in which pair q takes candidate ``choice[q]``."""
        base = self.fastest
        duration, start, end = base.duration_ns.copy(), base.mem_start_bytes.copy(), base.mem_end_bytes.copy()
        held = self.held_bytes[self.pair_class, choice]
        change = held - self.held_bytes[self.pair_class, 0]
        duration[self.pair_forward] = self.forward_ns[self.pair_class, choice]
        start[self.pair_forward] += change
        has_backward, has_weight = self.pair_backward >= 0, self.pair_weight >= 0
        backward = self.pair_backward[has_backward]
        duration[backward] = self.backward_ns[self.pair_class, choice][has_backward]
        end[self.pair_forward[~has_backward]] -= change[~has_backward]
        # Of a split pair's bytes the input part gives back floor(half).
        held_before = self.held_bytes[self.pair_class, 0]
        by_input = np.where(has_weight, held // 2 - held_before // 2, change)
        end[backward] -= by_input[has_backward]
        end[self.pair_weight[has_weight]] -= (change - by_input)[has_weight]
        return TaskGraph(
            num_ranks=base.num_ranks, module_names=base.module_names, rank=base.rank, kind=base.kind, module=base.module,
            vp_stage=base.vp_stage, microbatch=base.microbatch, sub_microbatch=base.sub_microbatch, duration_ns=duration,
            mem_start_bytes=start, mem_end_bytes=end, dep_offset=base.dep_offset, dep_task=base.dep_task,
            dep_lag_ns=base.dep_lag_ns, dep_is_data=base.dep_is_data,
        )

    def strategies(self, pair: int, candidate: int) -> list[str]:
        """Memory strategy of each layer of the pair."""
        kind = self.pair_class[pair]
        chosen = self.candidates[kind].strategy_list(candidate)
        return ["none"] * (int(self.class_layers[kind]) - len(chosen)) + chosen

    def present(self, schedule: Schedule) -> tuple[Schedule, NDArray[np.int64]]:
        """The schedule without absent tasks, and for each of its tasks the number that it has here."""
        kept = np.flatnonzero(self.pair_of_task >= 0)
        if len(kept) == len(self.pair_of_task):
            return schedule, kept
        graph = schedule.graph
        number = np.full(graph.num_tasks, -1, dtype=np.int32)
        number[kept] = np.arange(len(kept), dtype=np.int32)
        waiting = np.repeat(np.arange(graph.num_tasks), np.diff(graph.dep_offset))
        edges = number[waiting] >= 0
        assert (number[graph.dep_task[edges]] >= 0).all(), "a task waits for an absent one"
        tasks = {
            name: getattr(graph, name)[kept]
            for name in ("rank", "kind", "module", "vp_stage", "microbatch", "sub_microbatch", "duration_ns", "mem_start_bytes", "mem_end_bytes")
        }
        counts = np.bincount(number[waiting[edges]], minlength=len(kept))
        compact = TaskGraph(
            num_ranks=graph.num_ranks, module_names=graph.module_names, **tasks,
            dep_offset=np.concatenate(([0], np.cumsum(counts))).astype(np.int32), dep_task=number[graph.dep_task[edges]],
            dep_lag_ns=graph.dep_lag_ns[edges], dep_is_data=graph.dep_is_data[edges],
        )
        orders = tuple(number[order][number[order] >= 0] for order in schedule.order)
        return Schedule(graph=compact, order=orders, start_ns=schedule.start_ns[kept]), kept


def build_task_graph(
    model: ModelSpec,
    partition: Partition,
    sub_microbatches: Sequence[SubMicrobatch],
    costs: CostModel,
    *,
    split_backward: bool = False,
    forward_only: bool = False,
    strategy: str = "none",
) -> TaskGraph:
    """The iteration's task graph with one memory strategy for every layer (for what chooses them see :func:`build_problem`).

    Args:
        strategy: label of a strategy; layers of modules that do not have it take ``none``.
    """
    return build_problem(
        model, partition, sub_microbatches, costs, split_backward=split_backward, forward_only=forward_only, only_strategy=strategy
    ).fastest


def build_problem(
    model: ModelSpec,
    partition: Partition,
    sub_microbatches: Sequence[SubMicrobatch],
    costs: CostModel,
    *,
    split_backward: bool = False,
    forward_only: bool = False,
    only_strategy: str | None = None,
) -> StageProblem:
    """Builds the iteration's stages, edges, costs and memory candidates.

    Long since all of it fills arrays of one layout, each from those before it.

    Args:
        split_backward: the backward is an input part and a weight part (W); a frozen module has no W.
        forward_only: no backward at all (evaluation).
        only_strategy: every layer takes this strategy (or ``none`` where a module lacks it) instead of having candidates.
    """
    assert sub_microbatches, "an iteration without a sub-microbatch has nothing to schedule"
    num_ranks = partition.num_ranks
    module_index = {module.name: index for index, module in enumerate(model.modules)}
    table = _ClassTable(model, partition, costs, split_backward, only_strategy)
    present: dict[int, set[str]] = {}
    for sub in sub_microbatches:
        present.setdefault(sub.microbatch, set()).add(sub.module)
    below = {microbatch: model.gradients_into(modules) for microbatch, modules in present.items()}
    units = [table.unit(sub, None if forward_only else below[sub.microbatch][sub.module]) for sub in sub_microbatches]
    num_chunks = np.array([partition.num_chunks(sub.module) for sub in sub_microbatches], dtype=np.int64)
    is_there = np.concatenate([unit.has_stage for unit in units])
    with_b = np.concatenate([unit.has_backward for unit in units])
    with_w = np.concatenate([unit.has_weight for unit in units])

    # Segments: [U] first segment of each sub-microbatch in the forward, backward and weight blocks, and the first chunk that has one.
    forward_first = np.concatenate(([0], np.cumsum(num_chunks)))
    backward_chunk = num_chunks - np.array([unit.backward_chunks for unit in units], dtype=np.int64)
    backward_first = forward_first[-1] + np.concatenate(([0], np.cumsum(num_chunks - backward_chunk)))
    weight_chunk = num_chunks - np.array([unit.weight_chunks for unit in units], dtype=np.int64)
    weight_first = backward_first[-1] + np.concatenate(([0], np.cumsum(num_chunks - weight_chunk)))
    num_pairs = int(forward_first[-1]) * num_ranks
    num_tasks = int(weight_first[-1]) * num_ranks

    sub_index = np.repeat(np.arange(len(units)), num_chunks * num_ranks)
    position = np.arange(num_pairs) - forward_first[sub_index] * num_ranks
    # In segments of their own, all ranks' tasks; in pair_*, those that are there.
    backward = _segment_tasks(position, sub_index, backward_first, backward_chunk, num_ranks)
    weight = _segment_tasks(position, sub_index, weight_first, weight_chunk, num_ranks)
    pair_forward = np.arange(num_pairs, dtype=np.int32)
    pair_backward, pair_weight = np.where(with_b, backward, -1).astype(np.int32), np.where(with_w, weight, -1).astype(np.int32)
    pair_class = np.concatenate([unit.classes for unit in units]).astype(np.int32)

    place_of_task = np.empty(num_tasks, dtype=np.int64)
    kind = np.empty(num_tasks, dtype=np.int8)
    for code, tasks in ((FORWARD, pair_forward), (BACKWARD, backward), (WEIGHT, weight)):
        place_of_task[tasks[tasks >= 0]] = np.flatnonzero(tasks >= 0)
        kind[tasks[tasks >= 0]] = code
    pair_of_task = np.full(num_tasks, -1, dtype=np.int32)
    for tasks in (np.where(is_there, pair_forward, -1), pair_backward, pair_weight):
        pair_of_task[tasks[tasks >= 0]] = np.flatnonzero(tasks >= 0)
    duration = np.zeros(num_tasks, dtype=np.int64)
    mem_start, mem_end = np.zeros(num_tasks, dtype=np.int64), np.zeros(num_tasks, dtype=np.int64)
    arrays = table.arrays()
    held = arrays.held_bytes[pair_class, 0]
    duration[pair_forward] = arrays.forward_ns[pair_class, 0]
    passing = arrays.passing_bytes[pair_class]
    mem_start[pair_forward] = held + passing
    duration[pair_backward[with_b]] = arrays.backward_ns[pair_class, 0][with_b]
    duration[pair_weight[with_w]] = arrays.weight_ns[pair_class][with_w]
    mem_end[pair_forward] = -passing
    mem_end[pair_forward[~with_b]] -= held[~with_b]
    mem_end[pair_backward[with_b]] = -np.where(with_w, held // 2, held)[with_b]
    mem_end[pair_weight[with_w]] = -(held - held // 2)[with_w]

    edges = _Edges()
    lag = np.concatenate([unit.lags for unit in units]) if num_ranks > 1 else np.zeros(num_pairs, dtype=np.int64)
    # In each sub-microbatch's chain: a stage and the next one that is there, on this rank where the others hold no layer.
    there = np.flatnonzero(is_there)
    in_chain = sub_index[there[:-1]] == sub_index[there[1:]]
    before, after = there[:-1][in_chain], there[1:][in_chain]
    hop = np.where((before - after) % num_ranks == 0, 0, lag[before])
    edges.add(pair_forward[after], pair_forward[before], hop, data=True)
    # A gradient is as large as the message that it answers.
    answers = with_b[before]
    edges.add(pair_backward[before[answers]], pair_backward[after[answers]], hop[answers], data=True)
    first_pair = forward_first[:-1] * num_ranks
    last_pair = forward_first[1:] * num_ranks - 1
    by_place: dict[tuple[int, str], list[int]] = {}
    for index, sub in enumerate(sub_microbatches):
        by_place.setdefault((sub.microbatch, sub.module), []).append(index)
    holds = costs.counts_all_memory()
    for (microbatch, name), takers in by_place.items():
        givers = [giver for source in model.inputs_of(name) for giver in by_place.get((microbatch, source), ())]
        for giver in givers:
            gives_back = pair_backward[last_pair[giver]] >= 0
            for taker in takers:
                edges.add(first_pair[taker], last_pair[giver], lag[last_pair[giver]], data=True)
                if gives_back:
                    taken, given = pair_backward[first_pair[taker]], pair_backward[last_pair[giver]]
                    edges.add(given, taken, lag[last_pair[giver]], data=True)
                if holds:
                    size = units[giver].output_bytes
                    # Rank 0 of the giver's last segment starts soonest of what is on rank 0 and belongs to the giver.
                    soonest = last_pair[giver] - (num_ranks - 1)
                    mem_start[pair_forward[soonest if is_there[soonest] else first_pair[taker]]] += size
                    release = pair_backward[first_pair[taker]] if gives_back else pair_forward[first_pair[taker]]
                    mem_end[release] -= size
    edges.add(backward[backward >= 0], pair_forward[backward >= 0], 0, data=False)
    edges.add(weight[weight >= 0], backward[weight >= 0], 0, data=False)
    dep_offset, dep_task, dep_lag, dep_is_data = edges.rows(num_tasks)

    subs_of_task = sub_index[place_of_task]
    graph = TaskGraph(
        num_ranks=num_ranks,
        module_names=tuple(module_index),
        rank=(np.arange(num_tasks) % num_ranks).astype(np.int32),
        kind=kind,
        module=np.array([module_index[sub.module] for sub in sub_microbatches], dtype=np.int16)[subs_of_task],
        vp_stage=(position[place_of_task] // num_ranks).astype(np.int16),
        microbatch=np.array([sub.microbatch for sub in sub_microbatches], dtype=np.int32)[subs_of_task],
        sub_microbatch=np.array([sub.sub_microbatch for sub in sub_microbatches], dtype=np.int32)[subs_of_task],
        duration_ns=duration, mem_start_bytes=mem_start, mem_end_bytes=mem_end,
        dep_offset=dep_offset, dep_task=dep_task, dep_lag_ns=dep_lag, dep_is_data=dep_is_data,
    )
    return StageProblem(
        fastest=graph, sub_microbatches=tuple(sub_microbatches), pair_forward=pair_forward, pair_backward=pair_backward,
        pair_weight=pair_weight, pair_class=pair_class, pair_sub_microbatch=sub_index.astype(np.int32),
        num_candidates=arrays.num_candidates, forward_ns=arrays.forward_ns, backward_ns=arrays.backward_ns,
        held_bytes=arrays.held_bytes, rooms=arrays.rooms,
        message_bytes=np.concatenate([unit.message_bytes for unit in units]), candidates=tuple(table.candidates), class_layers=np.array(table.layers, dtype=np.int32),
        pair_of_task=pair_of_task,
    )


def _segment_tasks(
    position: NDArray[np.int64], sub_index: NDArray[np.int64], first_segment: NDArray[np.int64], first_chunk: NDArray[np.int64], num_ranks: int
) -> NDArray[np.int64]:
    """[Q] the task of each pair in its sub-microbatch's segments of one kind; -1 in chunks before the first one that has a segment."""
    inside = position - first_chunk[sub_index] * num_ranks
    return np.where(inside >= 0, first_segment[sub_index] * num_ranks + inside, -1)


def static_bytes(model: ModelSpec, partition: Partition, costs: CostModel) -> list[int]:
    """Bytes that each rank holds all the time: the sum over its chunks."""
    totals = [0] * partition.num_ranks
    for module in model.modules:
        num_chunks = partition.num_chunks(module.name)
        for vp_stage in range(num_chunks):
            for rank in range(partition.num_ranks):
                totals[rank] += costs.static_bytes(
                    module.name, partition.chunks[module.name][vp_stage][rank],
                    first=vp_stage == 0 and rank == 0,
                    last=vp_stage == num_chunks - 1 and rank == partition.num_ranks - 1,
                )
    return totals


@dataclass(frozen=True, slots=True)
class _Unit:
    """What all sub-microbatches of one module with the same lengths share, where they need the same gradients."""

    classes: NDArray[np.int32]
    """[K * P]"""
    lags: NDArray[np.int64]
    """[K * P] of the message that the stage sends to another rank, ns"""
    message_bytes: NDArray[np.int64]
    """[K * P]"""
    output_bytes: int
    has_stage: NDArray[np.bool_]
    """[K * P]"""
    has_backward: NDArray[np.bool_]
    """[K * P]"""
    has_weight: NDArray[np.bool_]
    """[K * P] a weight stage of its own"""
    backward_chunks: int
    """Last chunks that have backward segments"""
    weight_chunks: int


@dataclass(frozen=True, slots=True)
class _ClassArrays:
    num_candidates: NDArray[np.int32]
    forward_ns: NDArray[np.int64]
    backward_ns: NDArray[np.int64]
    weight_ns: NDArray[np.int64]
    held_bytes: NDArray[np.int64]
    passing_bytes: NDArray[np.int64]
    rooms: Rooms


@dataclass(frozen=True, slots=True)
class _StageShape:
    """What stages of one module and one batch size must have in common to cost the same."""

    num_layers: int
    at_first: bool
    at_last: bool
    backward: StageBackward


@dataclass(frozen=True, slots=True)
class _ClassRow:
    forward_ns: NDArray[np.int64]
    """[candidates]; likewise below"""
    backward_ns: NDArray[np.int64]
    held_bytes: NDArray[np.int64]
    rooms: Rooms
    weight_ns: int
    passing_bytes: int
    """What layers without a graph need for a moment beyond ``held_bytes``, whatever the candidate"""


class _ClassTable:
    """Collects classes of equal stage pairs: same module, lengths, number of layers, extras and backward."""

    def __init__(
        self, model: ModelSpec, partition: Partition, costs: CostModel, split_backward: bool, only_strategy: str | None,
    ) -> None:
        self._model, self._partition, self._costs = model, partition, costs
        self._split, self._only = split_backward, only_strategy
        self._units: dict[tuple[str, tuple[int, ...], bool | None], _Unit] = {}
        self._rows: list[_ClassRow] = []
        self.candidates: list[Candidates] = []
        self.layers: list[int] = []

    def unit(self, sub: SubMicrobatch, below: bool | None) -> _Unit:
        """Args:
        below: whether what feeds the module needs a gradient; None: no backward at all.
        """
        # A stage costs the same whatever the order of its instances.
        key = (sub.module, tuple(sorted(sub.lengths)), below)
        unit = self._units.get(key)
        if unit is None:
            unit = self._units[key] = self._make_unit(*key)
        return unit

    def _make_unit(self, name: str, lengths: tuple[int, ...], below: bool | None) -> _Unit:
        costs, parts = self._costs, self._model.trainable_parts(name)
        layer, first, last = (costs.part(name, part, lengths) for part in ("layer", "first", "last"))
        strategies = dict(costs.strategies(name, lengths))
        if self._only is not None:
            strategies = {"none": strategies["none"], self._only: strategies.get(self._only, strategies["none"])}
        sizes = [layers for row in self._partition.chunks[name] for layers in row]
        by_shape: dict[_StageShape, int] = {}
        classes = np.empty(len(sizes), dtype=np.int32)
        lags, messages = np.empty(len(sizes), dtype=np.int64), np.empty(len(sizes), dtype=np.int64)
        has_stage, has_backward, has_weight = (np.zeros(len(sizes), dtype=np.bool_) for _ in range(3))
        first_layer = 0
        for index, num_layers in enumerate(sizes):
            at_first, at_last = index == 0, index == len(sizes) - 1
            backward = _NO_BACKWARD if below is None else parts.stage(
                first_layer, num_layers, at_first=at_first, at_last=at_last, below=below
            )
            first_layer += num_layers
            boundary = last.boundary_bytes if at_last and last.boundary_bytes > 0 else layer.boundary_bytes
            messages[index] = round(boundary)
            lags[index] = math.ceil(costs.p2p_latency_ns + boundary * 1e9 / costs.p2p_bytes_per_second)
            has_stage[index] = num_layers > 0 or at_first or at_last
            has_backward[index] = has_stage[index] and backward.needed
            has_weight[index] = has_stage[index] and self._split and backward.has_weights
            shape = _StageShape(num_layers, at_first, at_last, backward)
            if shape not in by_shape:
                by_shape[shape] = len(self._rows)
                self._add_class(shape, layer, first, last, strategies)
            classes[index] = by_shape[shape]
        output = last.boundary_bytes if last.boundary_bytes > 0 else layer.boundary_bytes
        return _Unit(
            classes=classes, lags=lags, message_bytes=messages, output_bytes=round(output), has_stage=has_stage,
            has_backward=has_backward, has_weight=has_weight,
            backward_chunks=self._chunks_from_first(has_backward), weight_chunks=self._chunks_from_first(has_weight),
        )

    def _chunks_from_first(self, stages: NDArray[np.bool_]) -> int:
        """Number of chunks from the first one with a marked stage on."""
        return -(-(len(stages) - int(np.argmax(stages))) // self._partition.num_ranks) if stages.any() else 0

    def _add_class(self, shape: _StageShape, layer: PartCost, first: PartCost, last: PartCost, strategies: dict[str, Strategy]) -> None:
        backward = shape.backward
        spread = self._costs.counts_all_memory()
        options = layer_options(layer, strategies, has_backward=backward.needed, spread=spread)
        if self._only is not None and backward.needed:
            options = [option for option in options if option.label == self._only] or options[:1]
        runs_weights = not self._split and backward.weight_layers == backward.layers
        mixes = pair_candidates(options, backward.layers, weight_ns=layer.backward_weight_ns if spread and runs_weights else 0.0)
        frozen_layers = shape.num_layers - backward.layers
        # (cost, whether it is there, whether a gradient passes it, whether its weights are trained)
        extras = [
            (part, passed, trained) for part, present, passed, trained in (
                (first, shape.at_first, backward.first, backward.weight_first), (last, shape.at_last, backward.last, backward.weight_last),
            ) if present
        ]
        weight = backward.weight_layers * layer.backward_weight_ns + sum(part.backward_weight_ns for part, _, trained in extras if trained)
        backward_ns = mixes.backward_input_ns + sum(part.backward_input_ns for part, passed, _ in extras if passed)
        if not self._split:
            backward_ns = backward_ns + weight
        held = _whole(mixes.activation_bytes + sum(part.activation_bytes for part, passed, _ in extras if passed))
        # Without a graph one layer's activation lives at a time.
        moment = [layer.activation_bytes] if frozen_layers else []
        moment += [part.activation_bytes for part, passed, _ in extras if not passed]
        passing = round(max(moment, default=0.0))
        self._rows.append(_ClassRow(
            forward_ns=_whole(mixes.forward_ns + frozen_layers * layer.forward_ns + sum(part.forward_ns for part, _, _ in extras)),
            backward_ns=_whole(backward_ns) if backward.needed else np.zeros(len(mixes.forward_ns), dtype=np.int64),
            held_bytes=held, rooms=layer_rooms(layer, strategies, mixes.counts, split=self._split and backward.has_weights),
            weight_ns=round(weight) if self._split else 0, passing_bytes=max(0, passing - int(held.min())),
        ))
        self.candidates.append(mixes)
        self.layers.append(shape.num_layers)

    def arrays(self) -> _ClassArrays:
        counts = np.array([len(row.forward_ns) for row in self._rows])
        # Of all rows one behind another: where each row's values stand, its last one again where it has no more.
        places = (np.cumsum(counts) - counts)[:, None] + np.minimum(np.arange(counts.max()), counts[:, None] - 1)

        def padded(rows: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
            return np.concatenate(list(rows))[places]

        return _ClassArrays(
            num_candidates=counts.astype(np.int32),
            forward_ns=padded(row.forward_ns for row in self._rows), backward_ns=padded(row.backward_ns for row in self._rows),
            weight_ns=np.array([row.weight_ns for row in self._rows], dtype=np.int64),
            held_bytes=padded(row.held_bytes for row in self._rows),
            rooms=Rooms(**{
                name: padded(getattr(row.rooms, name) for row in self._rows) for name in ("forward", "backward", "ahead", "between", "weight")
            }),
            passing_bytes=np.array([row.passing_bytes for row in self._rows], dtype=np.int64),
        )


_NO_BACKWARD = StageBackward(needed=False, first=False, layers=0, last=False, weight_first=False, weight_layers=0, weight_last=False)


def _whole(values: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.rint(values).astype(np.int64)


class _Edges:
    """Collects dependency edges in any order and gives them by waiting task."""

    def __init__(self) -> None:
        self._parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], bool]] = []

    def add(self, waiting: object, waited_for: object, lag: object, *, data: bool) -> None:
        tasks = np.atleast_1d(np.asarray(waiting, dtype=np.int64))
        self._parts.append((
            tasks, np.atleast_1d(np.asarray(waited_for, dtype=np.int64)), np.broadcast_to(np.asarray(lag, dtype=np.int64), tasks.shape), data,
        ))

    def rows(self, num_tasks: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int64], NDArray[np.bool_]]:
        waiting, waited_for, lag = (np.concatenate([part[column] for part in self._parts]) for column in range(3))
        data = np.concatenate([np.full(len(part[0]), part[3]) for part in self._parts])
        order = np.argsort(waiting, kind="stable")
        offset = np.concatenate(([0], np.cumsum(np.bincount(waiting, minlength=num_tasks))))
        return (
            offset.astype(np.int32), np.ascontiguousarray(waited_for[order].astype(np.int32)), np.ascontiguousarray(lag[order]),
            np.ascontiguousarray(data[order]),
        )
