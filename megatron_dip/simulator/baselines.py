"""What others would do with the same batch: seven schedules in one task graph form and under one judge, the order's replay.

In: model, ranks, microbatches, costs. Out: for each baseline its best setting: task graph, order, makespan, peaks. Each is given more
than its authors claim where that is simpler: transfers overlap with compute, orders wait for nothing but their own rule, and where
memory binds every *rank* takes the fastest of the memory strategies that fits (Megatron sets one level for all).

========== ============================================================================================================ =============
name       layout and order                                                                                             settings tried
========== ============================================================================================================ =============
1f1b       Megatron-LM: one chain of all modules' layers, P parts of equal parameters; 1F1B                             -
interleaved Megatron-LM with V chunks a rank, P * V parts of equal parameters; its interleaved 1F1B                     V
nnscaler   nnScaler*: one static chain, P parts balanced by the batch's mean cost; 1F1B                                 -
optimus    Optimus, coarse: all forwards of the modules before the last one, its 1F1B, all their backwards              V
three-phase as Megatron's open proposal: whole encoders on every rank, microbatches dealt out by load; then as above    V
bigmac     BigMac (arXiv 2605.25451): encoders nested into the backbone's 1F1B, microbatches in flight bounded          bound, V
entrain    Entrain (arXiv 2605.27918): static split by mean load, encoder work evened over microbatches, a microbatch's
           backbone work deferred until its encoder work is there                                                       bound
========== ============================================================================================================ =============

"Encoders" are all modules before the last in topological order, "backbone" is that last one. Not modelled for baselines: encoder
outputs held for the backbone (in their favour), sub-microbatches, mixed strategies within a rank.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.online import equal_parts, instance_cost
from megatron_dip.schedule.result import Schedule, time_order
from megatron_dip.schedule.rules import Cell, ListedTask, in_flight_bounds, interleaved_rows, listed_order
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.tasks import BACKWARD, FORWARD, TaskGraph
from megatron_dip.spec.workload import Microbatch

_VIRTUAL = (1, 2, 3, 4)
"""Chunks a rank that are tried where a baseline may choose."""
_MINIMAX_POWER = 24.0
"""Of :func:`equal_parts`, where the largest part decides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineResult:
    """A baseline at its best setting."""

    name: str
    setting: str
    schedule: Schedule
    chunks: dict[str, list[list[int]]]
    """Module -> for each stage number on a rank, its layers on each rank; a replicated module has them all on every rank."""
    makespan_ns: int
    peak_bytes: tuple[int, ...]
    """[P] with what the rank holds all the time"""
    strategies: tuple[str, ...]
    """[P] memory strategy of every layer on the rank"""
    fits: bool
    """Whether memory suffices on every rank."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive layers of one module within a stage."""

    module: str
    num_layers: int
    first: bool
    last: bool


_Stage = tuple[_Piece, ...]


@dataclass(slots=True)
class _Node:
    """A task before it is an array row. Per strategy s: duration_ns[s], held_bytes[s]."""

    rank: int
    kind: int
    module: int
    vp_stage: int
    microbatch: int
    duration_ns: tuple[int, ...]
    held_bytes: tuple[int, ...]
    deps: list[tuple[int, int, bool]] = field(default_factory=list)
    """(node, lag in ns, a tensor travels)"""
    has_backward: bool = False


class _Builder:
    """Collects the tasks of one baseline's layout, and prices them."""

    def __init__(
        self, model: ModelSpec, num_ranks: int, microbatches: Sequence[Microbatch], costs: CostModel, layout_batch: Sequence[Microbatch]
    ) -> None:
        self.model, self.num_ranks, self.microbatches, self.costs = model, num_ranks, microbatches, costs
        self.layout_batch = layout_batch
        self.runs_backward = model.backward_modules()
        labels: dict[str, None] = {"none": None}
        for module in model.modules:
            lengths = next((microbatch[module.name] for microbatch in microbatches if microbatch.get(module.name)), None)
            if lengths:
                labels.update(dict.fromkeys(label for label, s in costs.strategies(module.name, lengths).items() if s.offload is None))
        self.labels = tuple(labels)
        self.nodes: list[_Node] = []
        self.static = [0] * num_ranks
        self.chunks: dict[str, list[list[int]]] = {}
        self._prices: dict[tuple[_Piece, tuple[int, ...]], tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]] = {}

    def price(self, piece: _Piece, lengths: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Forward ns, backward ns and held bytes of a piece, each [strategies]."""
        key = (piece, tuple(sorted(lengths)))
        if key not in self._prices:
            zero = np.zeros(len(self.labels))
            self._prices[key] = (zero, zero, zero) if not lengths else self._price(piece, lengths)
        return self._prices[key]

    def _price(self, piece: _Piece, lengths: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        layer = self.costs.part(piece.module, "layer", lengths)
        extras = [self.costs.part(piece.module, part, lengths) for part, has in (("first", piece.first), ("last", piece.last)) if has]  # type: ignore[arg-type]
        strategies = self.costs.strategies(piece.module, lengths)
        weight = 1.0 if self.model.module(piece.module).trainable else 0.0
        forward, backward, held = [], [], []
        for label in self.labels:
            strategy = strategies.get(label, strategies["none"])
            forward.append(piece.num_layers * layer.forward_ns + sum(extra.forward_ns for extra in extras))
            per_layer = layer.backward_input_ns + weight * layer.backward_weight_ns + strategy.extra_forward * layer.forward_ns
            rest = sum(extra.backward_input_ns + weight * extra.backward_weight_ns for extra in extras)
            backward.append(piece.num_layers * per_layer + rest)
            held.append(piece.num_layers * strategy.activation * layer.activation_bytes + sum(extra.activation_bytes for extra in extras))
        return np.array(forward), np.array(backward), np.array(held)

    def lag(self, piece: _Piece | None, lengths: Sequence[int]) -> int:
        """Of the message behind a piece; None = a stage without layers, which passes on what it got."""
        bytes_sent = 0.0
        if piece is not None and lengths:
            last = self.costs.part(piece.module, "last", lengths).boundary_bytes if piece.last else 0.0
            bytes_sent = last or self.costs.part(piece.module, "layer", lengths).boundary_bytes
        return math.ceil(self.costs.p2p_latency_ns + bytes_sent * 1e9 / self.costs.p2p_bytes_per_second)

    def hold(self, rank: int, vp_stage: int, stage: _Stage) -> None:
        """Counts the stage's weights on the rank, where it is stage ``vp_stage``."""
        for piece in stage:
            rows = self.chunks.setdefault(piece.module, [])
            while len(rows) <= vp_stage:
                rows.append([0] * self.num_ranks)
            rows[vp_stage][rank] += piece.num_layers
            self.static[rank] += self.costs.static_bytes(piece.module, piece.num_layers, first=piece.first, last=piece.last)

    def chain(
        self, stages: Sequence[_Stage], ranks: Sequence[int], unit: int, lengths: Microbatch, module: int = 0
    ) -> tuple[list[int], list[int]]:
        """Adds one work unit's passage through stages, forwards and (mirrored) backwards. Returns the node ids by stage.

        Backward ids are -1 for stages in front of which nothing is trainable: no gradient goes there.
        """
        backward_from = next(
            (index for index, stage in enumerate(stages) if any(self.runs_backward[piece.module] for piece in stage)), len(stages)
        )
        forwards: list[int] = []
        backwards = [-1] * len(stages)
        rows = []
        for index, stage in enumerate(stages):
            forward, backward, held = np.zeros((3, len(self.labels)))
            for piece in stage:
                f, b, h = self.price(piece, lengths.get(piece.module, ()))
                forward = forward + f
                if self.runs_backward[piece.module]:
                    backward, held = backward + b, held + h
            rows.append((backward, held))
            keeps = held if index >= backward_from else np.zeros_like(held)
            node = _Node(ranks[index], FORWARD, module, index // self.num_ranks, unit, _ints(forward), _ints(keeps))
            node.has_backward = index >= backward_from
            if index:
                node.deps.append((forwards[-1], self._hop(stages[index - 1], ranks[index - 1], ranks[index], lengths), True))
            forwards.append(self._add(node))
        for index in range(len(stages) - 1, backward_from - 1, -1):
            backward, held = rows[index]
            node = _Node(ranks[index], BACKWARD, module, index // self.num_ranks, unit, _ints(backward), _ints(held))
            if index + 1 < len(stages):
                node.deps.append((backwards[index + 1], self._hop(stages[index], ranks[index + 1], ranks[index], lengths), True))
            node.deps.append((forwards[index], 0, False))
            backwards[index] = self._add(node)
        return forwards, backwards

    def link(self, giver: tuple[list[int], list[int]], taker: tuple[list[int], list[int]], lag: int) -> None:
        """The taker's first stage waits for the giver's last; gradients come back."""
        source, target = giver[0][-1], taker[0][0]
        self.nodes[target].deps.append((source, lag if self.nodes[source].rank != self.nodes[target].rank else 0, True))
        if giver[1][-1] >= 0 and taker[1][0] >= 0:
            back, front = giver[1][-1], taker[1][0]
            self.nodes[back].deps.append((front, lag if self.nodes[back].rank != self.nodes[front].rank else 0, True))

    def _hop(self, stage: _Stage, from_rank: int, to_rank: int, lengths: Microbatch) -> int:
        if from_rank == to_rank:
            return 0
        pieces = [piece for piece in stage if lengths.get(piece.module)]
        return self.lag(pieces[-1], lengths[pieces[-1].module]) if pieces else self.lag(None, ())

    def _add(self, node: _Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def finish(self, name: str, setting: str, order: Sequence[Sequence[int]], with_memory: bool) -> BaselineResult | None:
        """Chooses memory strategies, replays the order. None where the order waits in a circle."""
        capacity = self.costs.memory_capacity_bytes() if with_memory else None
        chosen, peaks, fits = [0] * self.num_ranks, [0] * self.num_ranks, True
        for rank, row in enumerate(order):
            options = [(self._time(row, s), s, self._peak(rank, row, s)) for s in range(len(self.labels))]
            fitting = [option for option in options if capacity is None or option[2] <= capacity]
            _, chosen[rank], peaks[rank] = min(fitting) if fitting else min(options, key=lambda option: option[2])
            fits = fits and bool(fitting)
        graph = self._graph(chosen)
        schedule = time_order(graph, [np.array(row, dtype=np.int32) for row in order])
        if schedule is None:
            return None
        return BaselineResult(
            name=name, setting=setting, schedule=schedule, chunks=self.chunks, makespan_ns=schedule.makespan_ns,
            peak_bytes=tuple(peaks), strategies=tuple(self.labels[s] for s in chosen), fits=fits,
        )

    def _time(self, row: Sequence[int], strategy: int) -> int:
        return sum(self.nodes[node].duration_ns[strategy] for node in row)

    def _peak(self, rank: int, row: Sequence[int], strategy: int) -> int:
        held = peak = self.static[rank]
        for node_id in row:
            node = self.nodes[node_id]
            if node.kind == FORWARD:
                held += node.held_bytes[strategy]
                peak = max(peak, held)
            else:
                held -= node.held_bytes[strategy]
        return peak

    def _graph(self, chosen: Sequence[int]) -> TaskGraph:
        nodes = self.nodes
        held = np.array([node.held_bytes[chosen[node.rank]] for node in nodes], dtype=np.int64)
        kind = np.array([node.kind for node in nodes], dtype=np.int8)
        edges = list(itertools.chain.from_iterable(node.deps for node in nodes))
        return TaskGraph(
            num_ranks=self.num_ranks,
            module_names=tuple(module.name for module in self.model.modules),
            rank=np.array([node.rank for node in nodes], dtype=np.int32),
            kind=kind,
            module=np.array([node.module for node in nodes], dtype=np.int16),
            vp_stage=np.array([node.vp_stage for node in nodes], dtype=np.int16),
            microbatch=np.array([node.microbatch for node in nodes], dtype=np.int32),
            sub_microbatch=np.zeros(len(nodes), dtype=np.int32),
            duration_ns=np.array([node.duration_ns[chosen[node.rank]] for node in nodes], dtype=np.int64),
            mem_start_bytes=np.where(kind == FORWARD, held, 0),
            mem_end_bytes=np.where(kind == FORWARD, 0, -held),
            dep_offset=np.concatenate(([0], np.cumsum([len(node.deps) for node in nodes]))).astype(np.int32),
            dep_task=np.array([edge[0] for edge in edges], dtype=np.int32),
            dep_lag_ns=np.array([edge[1] for edge in edges], dtype=np.int64),
            dep_is_data=np.array([edge[2] for edge in edges], dtype=np.bool_),
        )


def _ints(values: NDArray[np.float64]) -> tuple[int, ...]:
    return tuple(int(value) for value in np.rint(values))


# --- layouts ---------------------------------------------------------------------------------------------------------------------


def layer_parameters(module: ModuleSpec) -> int:
    """Weights of one transformer layer (norms and biases left out)."""
    hidden = module.hidden_size
    attention = 2 * hidden * hidden + 2 * hidden * hidden * module.query_groups // module.num_attention_heads
    mlp = (3 if module.has_gated_mlp else 2) * hidden * module.ffn_hidden_size
    return attention * (2 if module.cross_attention else 1) + mlp


def _chain_weights(model: ModelSpec, by_parameters: bool, builder: _Builder) -> list[tuple[str, float]]:
    """(module, weight) of every layer of the chain; embeddings and heads weigh on their module's first and last layer."""
    weights: list[tuple[str, float]] = []
    for name in model.topological():
        module = model.module(name)
        if by_parameters:
            layer, table = float(layer_parameters(module)), float((module.vocab_size or 0) * module.hidden_size)
            first, last = table, table if not model.consumers_of(name) else 0.0
        else:
            layer, first, last = _mean_costs(module, builder)
        row = [layer] * module.num_layers
        row[0] += first
        row[-1] += last
        weights.extend((name, weight) for weight in row)
    return weights


def _mean_costs(module: ModuleSpec, builder: _Builder) -> tuple[float, float, float]:
    """ns that the layout's batch spends in one layer, in the first and in the last extra of a module, forward and backward."""
    totals = [0.0, 0.0, 0.0]
    for microbatch in builder.layout_batch:
        lengths = microbatch.get(module.name, ())
        for index, (layers, first, last) in enumerate(((1, False, False), (0, True, False), (0, False, True))):
            forward, backward, _ = builder.price(_Piece(module.name, layers, first, last), lengths)
            totals[index] += forward[0] + (backward[0] if builder.runs_backward[module.name] else 0.0)
    return totals[0], totals[1], totals[2]


def _cut_chain(weights: Sequence[tuple[str, float]], num_parts: int, model: ModelSpec) -> list[_Stage]:
    """Cuts a chain of layers into contiguous parts, the heaviest as light as can be. Parts beyond the layers are empty."""
    filled = min(num_parts, len(weights))
    bounds = equal_parts(np.array([max(weight, 1e-9) for _, weight in weights]), filled, _MINIMAX_POWER)
    left = {module.name: module.num_layers for module in model.modules}
    stages: list[_Stage] = []
    for part in range(filled):
        names = [name for name, _ in weights[int(bounds[part]) : int(bounds[part + 1])]]
        pieces = []
        for name in dict.fromkeys(names):
            count = names.count(name)
            pieces.append(_Piece(name, count, left[name] == model.module(name).num_layers, left[name] == count))
            left[name] -= count
        stages.append(tuple(pieces))
    return stages + [()] * (num_parts - filled)


def _module_stages(module: ModuleSpec, num_parts: int, builder: _Builder) -> list[_Stage]:
    """One module alone, cut by its cost on this batch."""
    layer, first, last = _mean_costs(module, builder)
    row = [(module.name, max(layer, 1e-9))] * module.num_layers
    row[0] = (module.name, row[0][1] + first)
    row[-1] = (module.name, row[-1][1] + last)
    return _cut_chain(row, num_parts, ModelSpec(modules=[module]))


# --- orders ----------------------------------------------------------------------------------------------------------------------


def _order_of(
    rows: Sequence[Sequence[Cell]], chains: Sequence[tuple[list[int], list[int]]]
) -> list[list[int]]:
    """Node ids of an order by (chunk, microbatch); stages without a backward drop out."""
    num_ranks = len(rows)
    result = []
    for rank, row in enumerate(rows):
        ids = [chains[microbatch][0 if forward else 1][chunk * num_ranks + rank] for forward, chunk, microbatch in row]
        result.append([node for node in ids if node >= 0])
    return result


def _listed(nodes: Sequence[_Node], num_ranks: int, owner: Sequence[int], in_flight: int) -> list[list[int]]:
    """A list schedule, backwards first; ``owner[node]`` numbers the microbatch whose admission lets the node start. Tasks are timed without
    recomputation."""
    tasks = [
        ListedTask(
            rank=node.rank, duration_ns=node.duration_ns[0], deps=[(source, lag) for source, lag, _ in node.deps], owner=group,
            priority=_backward_first(node),
        )
        for node, group in zip(nodes, owner, strict=True)
    ]
    return listed_order(tasks, num_ranks, in_flight)


# --- the baselines ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Case:
    model: ModelSpec
    num_ranks: int
    microbatches: Sequence[Microbatch]
    costs: CostModel
    with_memory: bool
    virtual_pipeline: int | None
    layout_batch: Sequence[Microbatch]

    def virtual(self, module: str | None = None) -> list[int]:
        """Chunks a rank to try for a module, or for the chain of all."""
        layers = self.num_layers if module is None else self.model.module(module).num_layers
        wanted = _VIRTUAL if self.virtual_pipeline is None else (self.virtual_pipeline,)
        return [chunks for chunks in wanted if chunks == 1 or chunks * self.num_ranks <= layers]

    def builder(self) -> _Builder:
        return _Builder(self.model, self.num_ranks, self.microbatches, self.costs, self.layout_batch)

    @property
    def num_layers(self) -> int:
        return sum(module.num_layers for module in self.model.modules)


def _mixed_chain(case: _Case, name: str, num_chunks: int, by_parameters: bool) -> BaselineResult | None:
    builder = case.builder()
    stages = _cut_chain(_chain_weights(case.model, by_parameters, builder), case.num_ranks * num_chunks, case.model)
    ranks = [index % case.num_ranks for index in range(len(stages))]
    for index, stage in enumerate(stages):
        builder.hold(ranks[index], index // case.num_ranks, stage)
    chains = [builder.chain(stages, ranks, index, microbatch) for index, microbatch in enumerate(case.microbatches)]
    order = _order_of(interleaved_rows(case.num_ranks, num_chunks, len(chains)), chains)
    return builder.finish(name, f"V = {num_chunks}", order, case.with_memory)


def _megatron(case: _Case) -> list[BaselineResult | None]:
    return [_mixed_chain(case, "1f1b", 1, by_parameters=True)]


def _interleaved(case: _Case) -> list[BaselineResult | None]:
    chunks = case.virtual() if case.virtual_pipeline is not None else case.virtual()[1:]
    return [_mixed_chain(case, "interleaved", count, by_parameters=True) for count in chunks]


def _nnscaler(case: _Case) -> list[BaselineResult | None]:
    return [_mixed_chain(case, "nnscaler", 1, by_parameters=False)]


def _separated(case: _Case, builder: _Builder, num_chunks: int) -> tuple[dict[str, list[_Stage]], list[int]]:
    """Each module in P stages of its own (the last one in P * num_chunks), held on their ranks; and the ranks of the longest chain."""
    *_, last = case.model.topological()
    stages = {
        module.name: _module_stages(module, case.num_ranks * (num_chunks if module.name == last else 1), builder)
        for module in case.model.modules
    }
    for parts in stages.values():
        for index, stage in enumerate(parts):
            builder.hold(index % case.num_ranks, index // case.num_ranks, stage)
    return stages, [index % case.num_ranks for index in range(case.num_ranks * num_chunks)]


def _nested_graph(case: _Case, num_chunks: int) -> tuple[_Builder, list[dict[str, tuple[list[int], list[int]]]]]:
    """Separated modules, whole microbatches; for each microbatch its chain of each module that it has."""
    builder = case.builder()
    stages, ranks = _separated(case, builder, num_chunks)
    *_, last = case.model.topological()
    chains: list[dict[str, tuple[list[int], list[int]]]] = []
    for unit, microbatch in enumerate(case.microbatches):
        own: dict[str, tuple[list[int], list[int]]] = {}
        for index, name in enumerate(case.model.topological()):
            if not microbatch.get(name) and name != last:
                continue
            own[name] = builder.chain(stages[name], ranks, unit, microbatch, index)
            for source in case.model.inputs_of(name):
                if source in own:
                    builder.link(own[source], own[name], _output_lag(builder, source, microbatch))
        chains.append(own)
    return builder, chains


def _output_lag(builder: _Builder, module: str, microbatch: Microbatch) -> int:
    return builder.lag(_Piece(module, 1, False, True), microbatch[module])


def _optimus(case: _Case) -> list[BaselineResult | None]:
    *before, last = case.model.topological()
    results = []
    for num_chunks in case.virtual(last):
        builder, chains = _nested_graph(case, num_chunks)
        order: list[list[int]] = [[] for _ in range(case.num_ranks)]
        for name in before:
            for own in chains:
                for rank, node in enumerate(own[name][0] if name in own else ()):
                    order[rank].append(node)
        middle = _order_of(interleaved_rows(case.num_ranks, num_chunks, len(chains)), [own[last] for own in chains])
        for rank, row in enumerate(middle):
            order[rank].extend(row)
        for name in reversed(before):
            for own in chains:
                for rank, node in enumerate(own[name][1] if name in own else ()):
                    if node >= 0:
                        order[rank].append(node)
        results.append(builder.finish("optimus", f"V = {num_chunks}", order, case.with_memory))
    return results


def _three_phase(case: _Case) -> list[BaselineResult | None]:
    *before, last = case.model.topological()
    results = []
    for num_chunks in case.virtual(last):
        builder = case.builder()
        whole: _Stage = tuple(_Piece(name, case.model.module(name).num_layers, True, True) for name in before)
        stages = _module_stages(case.model.module(last), case.num_ranks * num_chunks, builder)
        ranks = [index % case.num_ranks for index in range(len(stages))]
        for index, stage in enumerate(stages):
            builder.hold(ranks[index], index // case.num_ranks, stage)
        for rank in range(case.num_ranks):
            builder.hold(rank, 0, whole)
        work = [sum(float(builder.price(piece, m.get(piece.module, ()))[0][0]) for piece in whole) for m in case.microbatches]
        # The heaviest first to the rank with the least work.
        load, place = [0.0] * case.num_ranks, [0] * len(work)
        for unit in sorted(range(len(work)), key=lambda unit: (-work[unit], unit)):
            place[unit] = min(range(case.num_ranks), key=lambda rank: (load[rank], rank))
            load[place[unit]] += work[unit]
        order: list[list[int]] = [[] for _ in range(case.num_ranks)]
        chains, closing = [], []
        for unit, microbatch in enumerate(case.microbatches):
            backbone = builder.chain(stages, ranks, unit, microbatch, len(before))
            chains.append(backbone)
            if any(microbatch.get(name) for name in before):
                encoders = builder.chain([whole], [place[unit]], unit, microbatch)
                order[place[unit]].append(encoders[0][0])
                closing.append((place[unit], encoders[1][0]))
                name = [name for name in before if microbatch.get(name)][-1]
                builder.link(encoders, backbone, _output_lag(builder, name, microbatch))
        for rank, row in enumerate(_order_of(interleaved_rows(case.num_ranks, num_chunks, len(chains)), chains)):
            order[rank].extend(row)
        for rank, node in closing:
            if node >= 0:
                order[rank].append(node)
        results.append(builder.finish("three-phase", f"V = {num_chunks}", order, case.with_memory))
    return results


def _backward_first(node: _Node) -> tuple[int, ...]:
    """Backward before forward, earlier microbatches first, and of a microbatch what is nearest to its end."""
    return (0 if node.kind == BACKWARD else 1, node.microbatch, -node.module, -node.vp_stage)


def _bigmac(case: _Case) -> list[BaselineResult | None]:
    *_, last = case.model.topological()
    results = []
    for num_chunks in case.virtual(last)[:2]:
        builder, _ = _nested_graph(case, num_chunks)
        owner = [node.microbatch for node in builder.nodes]
        for bound in in_flight_bounds(case.num_ranks):
            order = _listed(builder.nodes, case.num_ranks, owner, bound)
            results.append(builder.finish("bigmac", f"{bound} microbatches in flight, V = {num_chunks}", order, case.with_memory))
    return results


def _entrain(case: _Case) -> list[BaselineResult | None]:
    builder = case.builder()
    *_, last = case.model.topological()
    stages = _cut_chain(_chain_weights(case.model, False, builder), case.num_ranks, case.model)
    for rank, stage in enumerate(stages):
        builder.hold(rank, 0, stage)
    count = len(case.microbatches)
    givers: list[list[tuple[tuple[list[int], list[int]], int, str]]] = [[] for _ in range(count)]
    owner_of_node: list[int] = []
    units: dict[str, list[tuple[int, int, tuple[list[int], list[int]]]]] = {}
    for index, name in enumerate(case.model.topological()):
        own_stages, own_ranks = _stages_with(stages, name)
        if name == last:
            for unit, microbatch in enumerate(case.microbatches):
                chain = builder.chain(own_stages, own_ranks, unit, {name: microbatch.get(name, [])}, index)
                owner_of_node.extend([unit] * (len(builder.nodes) - len(owner_of_node)))
                for giver, lag, source in givers[unit]:
                    if source in case.model.inputs_of(name):
                        builder.link(giver, chain, lag)
            continue
        instances = [(unit, length) for unit, microbatch in enumerate(case.microbatches) for length in microbatch.get(name, ())]
        if not instances:
            continue
        prices = {length: instance_cost(name, length, 1, case.costs) for _, length in instances}
        weights = np.array([prices[length] for _, length in instances])
        bounds = equal_parts(weights, min(count, len(instances)))
        units[name] = []
        for number, (start, end) in enumerate(itertools.pairwise(bounds.tolist())):
            part = instances[start:end]
            takers = sorted({unit for unit, _ in part})
            lengths = {name: [length for _, length in part]}
            chain = builder.chain(own_stages, own_ranks, number, lengths, index)
            owner_of_node.extend([takers[0]] * (len(builder.nodes) - len(owner_of_node)))
            for source in case.model.inputs_of(name):
                for first, final, giver in units.get(source, ()):
                    if first <= takers[-1] and takers[0] <= final:
                        builder.link(giver, chain, _output_lag(builder, source, {source: [1]}))
            units[name].append((takers[0], takers[-1], chain))
            for unit in takers:
                givers[unit].append((chain, _output_lag(builder, name, lengths), name))
    results = []
    # An encoder unit ends only with the last microbatch that it feeds: too tight a bound waits for ever and is passed over.
    for bound in [*in_flight_bounds(case.num_ranks), count]:
        order = _listed(builder.nodes, case.num_ranks, owner_of_node, bound)
        if sum(map(len, order)) == len(builder.nodes):
            results.append(builder.finish("entrain", f"{bound} microbatches in flight", order, case.with_memory))
    return results


def _stages_with(stages: Sequence[_Stage], module: str) -> tuple[list[_Stage], list[int]]:
    """The parts of a mixed chain that hold layers of one module, and their ranks."""
    found = [(tuple(piece for piece in stage if piece.module == module), rank) for rank, stage in enumerate(stages)]
    kept = [(stage, rank) for stage, rank in found if stage]
    return [stage for stage, _ in kept], [rank for _, rank in kept]


_MAKERS: dict[str, Callable[[_Case], list[BaselineResult | None]]] = {
    "1f1b": _megatron,
    "interleaved": _interleaved,
    "nnscaler": _nnscaler,
    "optimus": _optimus,
    "three-phase": _three_phase,
    "bigmac": _bigmac,
    "entrain": _entrain,
}

BASELINES = tuple(_MAKERS)


def run_baseline(
    name: str,
    model: ModelSpec,
    num_ranks: int,
    microbatches: Sequence[Microbatch],
    costs: CostModel,
    *,
    with_memory: bool = True,
    virtual_pipeline: int | None = None,
    layout_batch: Sequence[Microbatch] | None = None,
) -> BaselineResult | None:
    """A baseline at the best of its settings: one that fits before one that does not, then the shortest makespan.

    Args:
        with_memory: recompute where the capacity demands it; False compares schedules alone, with the same durations for all.
        virtual_pipeline: only this number of chunks a rank, where the baseline has one to choose.
        layout_batch: what layouts by cost are level for, since weights stay where they are during a run; None = these very microbatches,
            in the baselines' favour.

    Returns:
        None where no setting of the baseline runs at all (fewer layers than stages).
    """
    if name not in _MAKERS:
        raise InputError("baseline", name, "no such baseline", f"use one of {', '.join(BASELINES)}")
    case = _Case(model, num_ranks, microbatches, costs, with_memory, virtual_pipeline, microbatches if layout_batch is None else layout_batch)
    results = [result for result in _MAKERS[name](case) if result is not None]
    return min(results, key=lambda result: (not result.fits, result.makespan_ns), default=None)


def run_chunks_interleaved(
    model: ModelSpec, num_ranks: int, microbatches: Sequence[Microbatch], costs: CostModel, chunks: Mapping[str, Sequence[Sequence[int]]]
) -> BaselineResult | None:
    """DIP's cut without its schedule: every module in chunks of its own over all ranks, whole microbatches in Megatron's interleaved order.

    Args:
        chunks: module -> for each stage number on a rank, its layers on each rank, as a partition has them.

    Returns:
        None where the order waits in a circle.
    """
    builder = _Builder(model, num_ranks, microbatches, costs, microbatches)
    stages: list[_Stage] = []
    for name in model.topological():
        passed, total = 0, model.module(name).num_layers
        for row in chunks[name]:
            for layers in row:
                stages.append((_Piece(name, layers, passed == 0, passed + layers == total),) if layers else ())
                passed += layers
    for index, stage in enumerate(stages):
        builder.hold(index % num_ranks, index // num_ranks, stage)
    ranks = [index % num_ranks for index in range(len(stages))]
    chains = [builder.chain(stages, ranks, unit, microbatch) for unit, microbatch in enumerate(microbatches)]
    rows = interleaved_rows(num_ranks, len(stages) // num_ranks, len(microbatches))
    return builder.finish("chunks interleaved", "", _order_of(rows, chains), True)
