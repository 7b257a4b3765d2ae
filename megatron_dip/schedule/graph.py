"""From sub-microbatches and costs to the task graph of one iteration, and to its variants under memory choices.

In: the model, the partition, the iteration's sub-microbatches, a cost model. Out: a :class:`StageProblem`, which gives a
:class:`~megatron_dip.spec.tasks.TaskGraph` for any choice of memory strategies. Source: DIP (arXiv 2504.14145), segments and stages.

Layout of task ids, on which the compiled kernels rely: a *segment* is one pass (forward, backward or weights) of one sub-microbatch
through one chunk on all P ranks, and task t is segment t // P on rank t % P. Forward segments come first, by sub-microbatch, then by
vp_stage; then backward segments in the same order, then weight segments.

Edges: a stage waits for the stage before it in its sub-microbatch's chain of K * P stages (backward: behind it); the first stage of a
module for the last stages of all sub-microbatches, of its microbatch, of the modules that feed it (backward mirrored); a backward for
its own forward; a weight stage for its backward. Rounding: times are summed over a stage's layers as floats, then rounded to ns.

Memory: a forward takes its stage's activation at its start; its backward gives it back at its end (split: floor of one half at the
end of the input part, the rest at the end of the weight part); without a backward it is given back at the forward's own end. Where
the cost model says so, what a module hands to the modules it feeds is held on rank 0, where they take it, once for each
sub-microbatch that takes it: from the start of the giving stage of rank 0 (somewhat before it arrives) to the end of the taking
stage's backward, or of its forward where the giving module has no backward. Not modelled: temporary buffers within a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import CostModel
from megatron_dip.schedule.candidates import Candidates, layer_options, pair_candidates
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition, SubMicrobatch
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
    candidates: tuple[Candidates, ...]
    """[C]"""
    class_layers: NDArray[np.int32]
    """[C] number of layers"""

    @property
    def num_pairs(self) -> int:
        return len(self.pair_forward)

    def leanest(self) -> NDArray[np.int32]:
        """[Q] the candidate of each pair that holds least."""
        return (self.num_candidates[self.pair_class] - 1).astype(np.int32)

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
        return self.candidates[self.pair_class[pair]].strategy_list(candidate)


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

    Args:
        split_backward: the backward is an input part and a weight part (W); a frozen module has no W.
        forward_only: no backward at all (evaluation).
        only_strategy: every layer takes this strategy (or ``none`` where a module lacks it) instead of having candidates.
    """
    assert sub_microbatches, "an iteration without a sub-microbatch has nothing to schedule"
    num_ranks = partition.num_ranks
    module_index = {module.name: index for index, module in enumerate(model.modules)}
    runs_backward = {name: needs and not forward_only for name, needs in model.backward_modules().items()}
    table = _ClassTable(model, partition, costs, runs_backward, split_backward, only_strategy)
    units = [table.unit(sub) for sub in sub_microbatches]
    num_chunks = np.array([partition.num_chunks(sub.module) for sub in sub_microbatches], dtype=np.int64)
    has_backward = np.array([runs_backward[sub.module] for sub in sub_microbatches])
    has_weight = np.array([split_backward and runs_backward[s.module] and model.module(s.module).trainable for s in sub_microbatches])

    # Segments: [U] first segment of each sub-microbatch in the forward, backward and weight blocks.
    forward_first = np.concatenate(([0], np.cumsum(num_chunks)))
    backward_first = forward_first[-1] + np.concatenate(([0], np.cumsum(num_chunks * has_backward)))
    weight_first = backward_first[-1] + np.concatenate(([0], np.cumsum(num_chunks * has_weight)))
    num_pairs = int(forward_first[-1]) * num_ranks
    num_tasks = int(weight_first[-1]) * num_ranks

    sub_index = np.repeat(np.arange(len(units)), num_chunks * num_ranks)
    position = np.arange(num_pairs) - forward_first[sub_index] * num_ranks
    pair_forward = np.arange(num_pairs, dtype=np.int32)
    pair_backward = np.where(has_backward[sub_index], backward_first[sub_index] * num_ranks + position, -1).astype(np.int32)
    pair_weight = np.where(has_weight[sub_index], weight_first[sub_index] * num_ranks + position, -1).astype(np.int32)
    pair_class = np.concatenate([unit.classes for unit in units]).astype(np.int32)

    pair_of_task = np.empty(num_tasks, dtype=np.int64)
    kind = np.empty(num_tasks, dtype=np.int8)
    for code, tasks in ((FORWARD, pair_forward), (BACKWARD, pair_backward), (WEIGHT, pair_weight)):
        pair_of_task[tasks[tasks >= 0]] = np.flatnonzero(tasks >= 0)
        kind[tasks[tasks >= 0]] = code
    duration = np.zeros(num_tasks, dtype=np.int64)
    mem_start, mem_end = np.zeros(num_tasks, dtype=np.int64), np.zeros(num_tasks, dtype=np.int64)
    arrays = table.arrays()
    held = arrays.held_bytes[pair_class, 0]
    duration[pair_forward] = arrays.forward_ns[pair_class, 0]
    mem_start[pair_forward] = held
    with_b, with_w = pair_backward >= 0, pair_weight >= 0
    duration[pair_backward[with_b]] = arrays.backward_ns[pair_class, 0][with_b]
    duration[pair_weight[with_w]] = arrays.weight_ns[pair_class][with_w]
    mem_end[pair_forward[~with_b]] = -held[~with_b]
    mem_end[pair_backward[with_b]] = -np.where(with_w, held // 2, held)[with_b]
    mem_end[pair_weight[with_w]] = -(held - held // 2)[with_w]

    edges = _Edges()
    lag = np.concatenate([unit.lags for unit in units]) if num_ranks > 1 else np.zeros(num_pairs, dtype=np.int64)
    last_position = (num_chunks[sub_index] * num_ranks) - 1
    inner = np.flatnonzero(position > 0)
    edges.add(pair_forward[inner], pair_forward[inner - 1], lag[inner - 1], data=True)
    inner = np.flatnonzero((position < last_position) & with_b)
    edges.add(pair_backward[inner], pair_backward[inner + 1], lag[inner + 1], data=True)
    first_pair = forward_first[:-1] * num_ranks
    last_pair = forward_first[1:] * num_ranks - 1
    by_place: dict[tuple[int, str], list[int]] = {}
    for index, sub in enumerate(sub_microbatches):
        by_place.setdefault((sub.microbatch, sub.module), []).append(index)
    holds = costs.holds_encoder_outputs()
    for (microbatch, name), takers in by_place.items():
        givers = [giver for source in model.inputs_of(name) for giver in by_place.get((microbatch, source), ())]
        for giver in givers:
            gives_back = bool(has_backward[giver])
            for taker in takers:
                edges.add(first_pair[taker], last_pair[giver], lag[last_pair[giver]], data=True)
                if gives_back:
                    taken, given = pair_backward[first_pair[taker]], pair_backward[last_pair[giver]]
                    edges.add(given, taken, lag[first_pair[taker]], data=True)
                if holds:
                    size = units[giver].output_bytes
                    # Rank 0 of the giver's last segment starts soonest of what is on rank 0 and belongs to the giver.
                    mem_start[pair_forward[last_pair[giver] - (num_ranks - 1)]] += size
                    release = pair_backward[first_pair[taker]] if gives_back else pair_forward[first_pair[taker]]
                    mem_end[release] -= size
    edges.add(pair_backward[with_b], pair_forward[with_b], 0, data=False)
    edges.add(pair_weight[with_w], pair_backward[with_w], 0, data=False)
    dep_offset, dep_task, dep_lag, dep_is_data = edges.rows(num_tasks)

    subs_of_task = sub_index[pair_of_task]
    graph = TaskGraph(
        num_ranks=num_ranks,
        module_names=tuple(module_index),
        rank=(np.arange(num_tasks) % num_ranks).astype(np.int32),
        kind=kind,
        module=np.array([module_index[sub.module] for sub in sub_microbatches], dtype=np.int16)[subs_of_task],
        vp_stage=(position[pair_of_task] // num_ranks).astype(np.int16),
        microbatch=np.array([sub.microbatch for sub in sub_microbatches], dtype=np.int32)[subs_of_task],
        sub_microbatch=np.array([sub.sub_microbatch for sub in sub_microbatches], dtype=np.int32)[subs_of_task],
        duration_ns=duration, mem_start_bytes=mem_start, mem_end_bytes=mem_end,
        dep_offset=dep_offset, dep_task=dep_task, dep_lag_ns=dep_lag, dep_is_data=dep_is_data,
    )
    return StageProblem(
        fastest=graph, sub_microbatches=tuple(sub_microbatches), pair_forward=pair_forward, pair_backward=pair_backward,
        pair_weight=pair_weight, pair_class=pair_class, pair_sub_microbatch=sub_index.astype(np.int32),
        num_candidates=arrays.num_candidates, forward_ns=arrays.forward_ns, backward_ns=arrays.backward_ns,
        held_bytes=arrays.held_bytes, candidates=tuple(table.candidates), class_layers=np.array(table.layers, dtype=np.int32),
    )


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
    """What all sub-microbatches of one module with the same lengths share."""

    classes: NDArray[np.int32]
    """[K * P]"""
    lags: NDArray[np.int64]
    """[K * P] of the message that the stage sends to another rank, ns"""
    output_bytes: int


@dataclass(frozen=True, slots=True)
class _ClassArrays:
    num_candidates: NDArray[np.int32]
    forward_ns: NDArray[np.int64]
    backward_ns: NDArray[np.int64]
    weight_ns: NDArray[np.int64]
    held_bytes: NDArray[np.int64]


class _ClassTable:
    """Collects classes of equal stage pairs: same module, lengths, number of layers and extras."""

    def __init__(
        self, model: ModelSpec, partition: Partition, costs: CostModel, runs_backward: dict[str, bool], split_backward: bool,
        only_strategy: str | None,
    ) -> None:
        self._model, self._partition, self._costs = model, partition, costs
        self._runs_backward, self._split, self._only = runs_backward, split_backward, only_strategy
        self._units: dict[tuple[str, tuple[int, ...]], _Unit] = {}
        self._rows: list[tuple[NDArray[np.int64], NDArray[np.int64], int, NDArray[np.int64]]] = []
        self.candidates: list[Candidates] = []
        self.layers: list[int] = []

    def unit(self, sub: SubMicrobatch) -> _Unit:
        # A stage costs the same whatever the order of its instances.
        key = (sub.module, tuple(sorted(sub.lengths)))
        unit = self._units.get(key)
        if unit is None:
            unit = self._units[key] = self._make_unit(*key)
        return unit

    def _make_unit(self, name: str, lengths: tuple[int, ...]) -> _Unit:
        costs, backward = self._costs, self._runs_backward[name]
        layer, first, last = (costs.part(name, part, lengths) for part in ("layer", "first", "last"))
        strategies = dict(costs.strategies(name, lengths))
        if self._only is not None:
            strategies = {"none": strategies["none"], self._only: strategies.get(self._only, strategies["none"])}
        options = layer_options(layer, strategies, has_backward=backward)
        if self._only is not None and backward:
            options = [option for option in options if option.label == self._only] or options[:1]
        sizes = [layers for row in self._partition.chunks[name] for layers in row]
        by_shape: dict[tuple[int, bool, bool], int] = {}
        classes = np.empty(len(sizes), dtype=np.int32)
        lags = np.empty(len(sizes), dtype=np.int64)
        trainable = self._model.module(name).trainable
        for index, num_layers in enumerate(sizes):
            at_first, at_last = index == 0, index == len(sizes) - 1
            extras = [part for part, present in ((first, at_first), (last, at_last)) if present]
            boundary = last.boundary_bytes if at_last and last.boundary_bytes > 0 else layer.boundary_bytes
            lags[index] = math.ceil(costs.p2p_latency_ns + boundary * 1e9 / costs.p2p_bytes_per_second)
            shape = (num_layers, at_first, at_last)
            if shape not in by_shape:
                by_shape[shape] = len(self._rows)
                mixes = pair_candidates(options, num_layers)
                weight = num_layers * layer.backward_weight_ns + sum(part.backward_weight_ns for part in extras)
                weight = weight if trainable and backward else 0.0
                backward_ns = mixes.backward_input_ns + sum(part.backward_input_ns for part in extras)
                if not self._split:
                    backward_ns = backward_ns + weight
                self._rows.append((
                    _whole(mixes.forward_ns + sum(part.forward_ns for part in extras)),
                    _whole(backward_ns) if backward else np.zeros(len(mixes.forward_ns), dtype=np.int64),
                    round(weight) if self._split else 0,
                    _whole(mixes.activation_bytes + sum(part.activation_bytes for part in extras)),
                ))
                self.candidates.append(mixes)
                self.layers.append(num_layers)
            classes[index] = by_shape[shape]
        output = last.boundary_bytes if last.boundary_bytes > 0 else layer.boundary_bytes
        return _Unit(classes=classes, lags=lags, output_bytes=round(output))

    def arrays(self) -> _ClassArrays:
        width = max(len(row[0]) for row in self._rows)

        def padded(column: int) -> NDArray[np.int64]:
            return np.array([np.pad(row[column], (0, width - len(row[column])), mode="edge") for row in self._rows], dtype=np.int64)  # type: ignore[arg-type]

        return _ClassArrays(
            num_candidates=np.array([len(row[0]) for row in self._rows], dtype=np.int32), forward_ns=padded(0), backward_ns=padded(1),
            weight_ns=np.array([row[2] for row in self._rows], dtype=np.int64), held_bytes=padded(3),
        )


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
