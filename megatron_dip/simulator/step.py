"""A training step of a workload under any schedule: time, utilisation, memory and where the time goes.

In: a resolved workload, the name of a schedule, and how the modules are cut. Out: a
:class:`~megatron_dip.spec.simulation.SimulationResult`. The pipeline part goes through the task graphs and schedulers that training
uses; :mod:`megatron_dip.cost.step` adds optimizer and data-parallel collectives. Source of the parts: DIP (arXiv 2504.14145), training
simulator.

How the parts come together: ``iteration = parameter gather that nothing hides + makespan + gradient sync that nothing hides +
optimizer``. A chunk's gradients travel by Megatron's buckets while its last backward makes them; its parameters arrive by buckets before
and within its first forward. The global gradient norm makes all ranks wait for the slowest. Of the data-parallel replicas those with
the most work are simulated, and the slowest sets the pace.

Peak memory of a rank: what it holds all the time, live activations (and encoder outputs kept for the backbone), the largest transient
working set of its parts, a whole layer's activations where a layer is recomputed, and two message buffers. The margin for
fragmentation is taken from the capacity (:meth:`megatron_dip.cost.device.DeviceDescription.memory_bytes`), not added here.
Not modelled: data loading, logging, checkpoints, and contention between pipeline messages.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from megatron_dip.cost.analytic import AnalyticCost, KnownParts, PartDetail
from megatron_dip.cost.collectives import Group, collective_seconds
from megatron_dip.cost.fixed import FixedStrategyCost
from megatron_dip.cost.interface import CostModel, Part
from megatron_dip.cost.memory import bytes_per_parameter
from megatron_dip.cost.modules import Kernels
from megatron_dip.cost.operators import Cause, LatencyRules
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.cost.step import bucket_parameters, gradient_seconds, optimizer_seconds, parameter_seconds
from megatron_dip.partition.deal import Deal
from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.online import split
from megatron_dip.partition.work import deal_batch
from megatron_dip.schedule.backward import search_forms
from megatron_dip.schedule.graph import build_problem, static_bytes
from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.result import Schedule, time_order
from megatron_dip.schedule.search import DoesNotFit, SearchOptions
from megatron_dip.simulator.baselines import BASELINES, run_baseline
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import Profile
from megatron_dip.spec.simulation import Breakdown, SimulationResult
from megatron_dip.spec.tasks import FORWARD
from megatron_dip.spec.workload import Device, Microbatch, ScheduleName, Workload

SCHEDULES: tuple[ScheduleName, ...] = ("dip", *BASELINES, "fsdp2")  # type: ignore[arg-type]
"""What :func:`simulate` knows."""
FLOPS_DEVICE = "h100"
"""Whose description counts FLOPs under a profile without a device; FLOPs do not depend on it."""


Balance = Literal["auto", "off", "all"]
BALANCED: tuple[ScheduleName, ...] = ("dip", "entrain")


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """What of an implementation to assume, and how hard ``dip`` searches."""

    evaluations: int = 500
    """Schedules that ``dip`` tries for each replica."""
    seed: int = 0
    threads: int = 1
    replicas: int = 2
    """Data-parallel replicas to simulate, those with the most work first."""
    balance: Balance = "auto"
    """Whose replicas deal the microbatches of the global batch by work: ``auto`` = those of ``dip`` and of ``entrain``, whose authors do."""
    overlap_data_parallel: bool = True
    """Gradient and parameter collectives run beside the pipeline."""
    blocking_messages: bool = False
    """A rank that sends waits for its message (Megatron's interleaved schedule before overlapped P2P)."""
    kernels: Kernels = dataclasses.field(default_factory=Kernels)
    rules: LatencyRules | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A result with what it was made of."""

    result: SimulationResult
    schedule: Schedule | None
    """Of the slowest replica; None without a pipeline (fsdp2)."""
    initial_bytes: tuple[int, ...]
    """What each rank holds all the time."""
    dealt: Deal | None = None
    """The global batch as its replicas were dealt it, by estimated work; None with one replica, or other numbers of microbatches."""

    def memory_timeline(self, rank: int) -> list[tuple[int, int]]:
        """(ns, bytes that the rank holds) after each instant at which that changes, ends before starts; working sets are not in it."""
        assert self.schedule is not None
        graph, tasks = self.schedule.graph, self.schedule.order[rank]
        changes: dict[int, int] = {0: self.initial_bytes[rank]}
        for instants, deltas in ((self.schedule.start_ns, graph.mem_start_bytes), (self.schedule.end_ns, graph.mem_end_bytes)):
            for instant, delta in zip(instants[tasks].tolist(), deltas[tasks].tolist(), strict=True):
                changes[instant] = changes.get(instant, 0) + delta
        held, timeline = 0, []
        for instant in sorted(changes):
            held += changes[instant]
            timeline.append((instant, held))
        return timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pipeline:
    """One replica's pipeline part, whichever scheduler made it."""

    schedule: Schedule
    chunks: dict[str, list[list[int]]]
    sub_microbatch_size: dict[str, int]
    peak_bytes: tuple[int, ...]
    units: Counter[tuple[str, tuple[int, ...]]]
    """(module, lengths) of every pass through a whole module -> how many"""
    recomputed: Counter[tuple[str, tuple[int, ...], str]]
    """(module, lengths, strategy) -> passes through one layer under it"""
    recomputing_ranks: frozenset[int]
    """Ranks with a layer that is recomputed as a whole."""


def make_costs(workload: Workload, options: SimulateOptions, *, known: KnownParts | None = None) -> CostModel:
    """The profile's costs where there is a profile, else the device's; under the workload's recompute setting.

    Args:
        known: shares what parts cost on a device between layouts.
    """
    costs: CostModel
    if isinstance(workload.profile, Profile):
        costs = ProfileCost(workload.profile, workload.memory_capacity_bytes)
    else:
        costs = _analytic(workload, workload.device, options, known)
    if workload.training.recompute != "auto":
        costs = FixedStrategyCost(costs, workload.training.recompute)
    return costs


def simulate(
    workload: Workload, schedule: ScheduleName | None = None, *, partition: Partition | None = None, options: SimulateOptions | None = None,
    costs: CostModel | None = None,
) -> SimulationResult:
    """The result of :func:`simulate_whole` alone."""
    return simulate_whole(workload, schedule, partition=partition, options=options, costs=costs).result


def simulate_whole(
    workload: Workload, schedule: ScheduleName | None = None, *, partition: Partition | None = None, options: SimulateOptions | None = None,
    costs: CostModel | None = None,
) -> Simulation:
    """Simulates one iteration of a resolved workload.

    Args:
        schedule: absent = the workload's.
        partition: how ``dip`` cuts the modules; required for it, other schedules cut as their authors say.
        costs: from :func:`make_costs`, to be shared between calls.

    Raises:
        InputError: sizes that cannot be, or memory that does not suffice.
    """
    options = SimulateOptions() if options is None else options
    name = workload.training.schedule if schedule is None else schedule
    if name not in SCHEDULES:
        raise InputError("training.schedule", name, "cannot be simulated", f"use one of {', '.join(SCHEDULES)}")
    if name == "fsdp2":
        return Simulation(result=_simulate_fsdp(workload, options), schedule=None, initial_bytes=())
    costs = make_costs(workload, options) if costs is None else costs
    counting = _counting_costs(workload, options, costs)
    slowest: tuple[SimulationResult, _Pipeline] | None = None
    dealt = _dealt(workload, name, partition, costs, options)
    for microbatches in _heaviest_replicas(workload, dealt, costs, options.replicas):
        if name == "dip":
            if partition is None:
                raise InputError("partition", None, "missing for schedule 'dip'", "give chunks and sub-microbatch sizes")
            pipeline = _dip_pipeline(workload, partition, microbatches, costs, options)
        else:
            pipeline = _baseline_pipeline(workload, name, microbatches, costs)
        if isinstance(costs, FixedStrategyCost):
            pipeline = _recomputing_everywhere(pipeline, workload, costs)
        if options.blocking_messages:
            pipeline = dataclasses.replace(pipeline, schedule=_block_on_messages(pipeline.schedule))
        result = _assemble(workload, name, pipeline, costs, counting, options)
        if slowest is None or result.iteration_time_s > slowest[0].iteration_time_s:
            slowest = (result, pipeline)
    assert slowest is not None
    result, pipeline = slowest
    live = pipeline.schedule.peak_memory([0] * pipeline.schedule.graph.num_ranks)
    return Simulation(
        # Utilisation counts the whole global batch, not the slowest replica's share of it.
        result=_with_utilisation(result, workload, counting, workload.parallel.data * _recomputed_flops(pipeline, counting)),
        schedule=pipeline.schedule,
        initial_bytes=tuple(peak - own for peak, own in zip(pipeline.peak_bytes, live, strict=True)),
        dealt=dealt,
    )


# --- the pipeline part -------------------------------------------------------------------------------------------------------------


def _dip_pipeline(
    workload: Workload, partition: Partition, microbatches: Sequence[Microbatch], costs: CostModel, options: SimulateOptions
) -> _Pipeline:
    model = workload.model_spec
    partition.validate({module.name: module.num_layers for module in model.modules}, workload.parallel.pipeline)
    subs = split(microbatches, model, partition, costs)
    initial = static_bytes(model, partition, costs)
    capacity = costs.memory_capacity_bytes()
    limit = np.full(partition.num_ranks, UNLIMITED, dtype=np.int64)
    if capacity is not None:
        limit = np.array([capacity - held for held in initial], dtype=np.int64)
    try:
        settings = SearchOptions(evaluations=options.evaluations, threads=options.threads, seed=options.seed)
        solved = search_forms(
            lambda split_backward: build_problem(model, partition, subs, costs, split_backward=split_backward), limit, settings,
            workload.training.split_backward,
        )
    except DoesNotFit as error:
        rank = int(np.argmax(error.missing))
        raise _does_not_fit("dip", rank, int(error.missing[rank]), capacity) from error
    problem, found = solved.problem, solved.result
    recomputed: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    recomputing = set()
    pairs = np.stack((problem.pair_class, found.choice, problem.pair_sub_microbatch), axis=1)
    rank_of_pair = problem.fastest.rank[problem.pair_forward]
    kinds, first, count = np.unique(pairs[:, :2], axis=0, return_index=True, return_counts=True)
    for (pair_class, choice), index, times in zip(kinds.tolist(), first.tolist(), count.tolist()):
        sub = subs[int(problem.pair_sub_microbatch[index])]
        for label, layers in problem.candidates[pair_class].counts[choice]:
            if label != "none":
                recomputed[sub.module, tuple(sorted(sub.lengths)), label] += layers * times
            if label == "full":
                taken = (problem.pair_class == pair_class) & (found.choice == choice)
                recomputing.update(rank_of_pair[taken].tolist())
    return _Pipeline(
        schedule=found.schedule, chunks=partition.chunks, sub_microbatch_size=partition.sub_microbatch_size,
        peak_bytes=tuple(found.schedule.peak_memory(initial)),
        units=Counter((sub.module, tuple(sorted(sub.lengths))) for sub in subs), recomputed=recomputed,
        recomputing_ranks=frozenset(recomputing),
    )


def _baseline_pipeline(workload: Workload, name: str, microbatches: Sequence[Microbatch], costs: CostModel) -> _Pipeline:
    virtual = workload.training.virtual_pipeline if name == "interleaved" and workload.training.virtual_pipeline > 1 else None
    found = run_baseline(name, workload.model_spec, workload.parallel.pipeline, microbatches, costs, virtual_pipeline=virtual)
    if found is None:
        raise InputError("parallel.pipeline", workload.parallel.pipeline, f"schedule {name!r} has fewer layers than stages", "use fewer ranks")
    capacity = costs.memory_capacity_bytes()
    if not found.fits:
        assert capacity is not None
        missing = [peak - capacity for peak in found.peak_bytes]
        raise _does_not_fit(name, int(np.argmax(missing)), max(missing), capacity)
    units: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for microbatch in microbatches:
        for module, lengths in microbatch.items():
            if lengths:
                units[module, tuple(sorted(lengths))] += 1
    recomputed: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    for rank, label in enumerate(found.strategies):
        if label == "none":
            continue
        for (module, key), times in units.items():
            rows = found.chunks[module]
            # Where every rank holds the whole module, each runs its share of the microbatches.
            copies = sum(map(sum, rows)) // workload.model_spec.module(module).num_layers
            recomputed[module, key, label] += times * sum(row[rank] for row in rows) // copies
    size = {module.name: max((len(m.get(module.name, ())) for m in microbatches), default=1) or 1 for module in workload.model_spec.modules}
    return _Pipeline(
        schedule=found.schedule, chunks=found.chunks, sub_microbatch_size=size, peak_bytes=found.peak_bytes, units=units, recomputed=recomputed,
        recomputing_ranks=frozenset(rank for rank, label in enumerate(found.strategies) if label == "full"),
    )


def _recomputing_everywhere(pipeline: _Pipeline, workload: Workload, costs: FixedStrategyCost) -> _Pipeline:
    """The pipeline with the one strategy, which its scheduler did not see, counted in."""
    recomputed: Counter[tuple[str, tuple[int, ...], str]] = Counter()
    runs_backward = workload.model_spec.backward_modules()
    for (module, lengths), times in pipeline.units.items():
        if runs_backward[module] and costs.part(module, "layer", lengths).activation_bytes:
            recomputed[module, lengths, costs.label] += times * workload.model_spec.module(module).num_layers
    everywhere = frozenset(range(pipeline.schedule.graph.num_ranks)) if costs.label == "full" else frozenset()
    return dataclasses.replace(pipeline, recomputed=recomputed, recomputing_ranks=everywhere)


def _does_not_fit(schedule: str, rank: int, missing: int, capacity: int | None) -> InputError:
    return InputError(
        "memory_capacity_bytes", capacity, f"schedule {schedule!r} needs {missing} bytes more on pipeline rank {rank}",
        "use more tensor or pipeline ranks, smaller microbatches, or a device with more memory",
    )


def _block_on_messages(schedule: Schedule) -> Schedule:
    """The same order where a message's time is spent on the sending rank instead of between the ranks."""
    graph = schedule.graph
    sent = np.zeros(graph.num_tasks, dtype=np.int64)
    np.maximum.at(sent, graph.dep_task, np.where(graph.dep_is_data, graph.dep_lag_ns, 0))
    blocked = dataclasses.replace(graph, duration_ns=graph.duration_ns + sent, dep_lag_ns=np.zeros_like(graph.dep_lag_ns))
    timed = time_order(blocked, schedule.order)
    assert timed is not None
    return timed


def _dealt(
    workload: Workload, name: ScheduleName, partition: Partition | None, costs: CostModel, options: SimulateOptions
) -> Deal | None:
    if workload.parallel.data == 1:
        return None
    if name != "dip" or partition is None:
        # However the modules are cut, the whole work of a microbatch is shared by all ranks.
        partition = even_partition(workload.model_spec, 1, {}, {module.name: _WHOLE for module in workload.model_spec.modules})
    deals = options.balance == "all" or (options.balance == "auto" and name in BALANCED)
    return deal_batch(workload.microbatches, workload.parallel.data, workload.model_spec, partition, costs, as_read=not deals)


_WHOLE = 1 << 20
"""Sub-microbatch size: a microbatch's instances, however many."""


def _heaviest_replicas(workload: Workload, dealt: Deal | None, costs: CostModel, count: int) -> list[list[Microbatch]]:
    """Microbatches of the ``count`` replicas with the most work, each distinct share once."""
    model = workload.model_spec
    work: dict[tuple[str, tuple[int, ...]], float] = {}

    def of(name: str, lengths: Sequence[int]) -> float:
        key = (name, tuple(lengths))
        if key not in work:
            cost = costs.part(name, "layer", lengths)
            work[key] = model.module(name).num_layers * (cost.forward_ns + cost.backward_input_ns + cost.backward_weight_ns)
        return work[key]

    if dealt is None:
        shares = [workload.replica_microbatches(replica) for replica in range(workload.parallel.data)]
    else:
        shares = [[workload.microbatches[number] for number in share] for share in dealt.shares()]
    weights = [sum(of(name, lengths) for m in share for name, lengths in m.items() if lengths) for share in shares]
    kept: list[list[Microbatch]] = []
    for index in sorted(range(len(shares)), key=lambda replica: (-weights[replica], replica)):
        if len(kept) < count and shares[index] not in kept:
            kept.append(shares[index])
    return kept


# --- the step around it ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Chunk:
    rank: int
    vp_stage: int
    parameters: float
    """Trainable ones of one tensor-parallel rank."""


def _assemble(
    workload: Workload, name: ScheduleName, pipeline: _Pipeline, costs: CostModel, counting: AnalyticCost, options: SimulateOptions
) -> SimulationResult:
    schedule = pipeline.schedule
    graph = schedule.graph
    makespan = schedule.makespan_ns / 1e9
    num_ranks = graph.num_ranks
    instant = time_order(dataclasses.replace(graph, dep_lag_ns=np.zeros_like(graph.dep_lag_ns)), schedule.order)
    assert instant is not None
    busy = int(graph.duration_ns.sum()) / 1e9 / num_ranks
    waiting = max(0.0, min(makespan - instant.makespan_ns / 1e9, makespan - busy))
    tensor_parallel = _tensor_parallel_seconds(workload, pipeline, counting) / num_ranks if isinstance(_base(costs), AnalyticCost) else 0.0
    chunks = _chunks(workload, pipeline, counting)
    before, after = _data_parallel_seconds(workload, schedule, chunks, counting, options)
    per_rank = [sum(chunk.parameters for chunk in chunks if chunk.rank == rank) for rank in range(num_ranks)]
    optimizer = max(
        optimizer_seconds(parameters, workload.training, counting.groups.data.size, counting.device, counting.rules) for parameters in per_rank
    ) if isinstance(_base(costs), AnalyticCost) else 0.0
    blocked = 0.0
    if options.blocking_messages:
        # Message times stand in the durations: take them back out of the busy time.
        compute_only = _busy_without_messages(pipeline, schedule, workload, counting) / num_ranks
        blocked, busy = max(0.0, busy - compute_only), min(busy, compute_only)
    return SimulationResult(
        iteration_time_s=before + makespan + after + optimizer, mfu=None, hfu=None,
        bubble_fraction=schedule.bubble_fraction, peak_memory_bytes=_peaks(workload, pipeline, costs),
        breakdown_s=Breakdown(
            compute=busy - tensor_parallel, tensor_parallel=tensor_parallel, data_parallel=before + after, p2p=waiting + blocked,
            bubble=max(0.0, makespan - busy - waiting - blocked), optimizer=optimizer,
        ),
        schedule=name, chunks=pipeline.chunks, sub_microbatch_size=pipeline.sub_microbatch_size,
    )


def _base(costs: CostModel) -> CostModel:
    return costs.costs if isinstance(costs, FixedStrategyCost) else costs


def _counting_costs(workload: Workload, options: SimulateOptions, costs: CostModel) -> AnalyticCost:
    """An analytic model for what a profile does not tell: FLOPs, parameters, data-parallel traffic."""
    base = _base(costs)
    if isinstance(base, AnalyticCost):
        return base
    return _analytic(workload, FLOPS_DEVICE if workload.device is None else workload.device, options)


def _analytic(workload: Workload, device: str | Device | None, options: SimulateOptions, known: KnownParts | None = None) -> AnalyticCost:
    return AnalyticCost(
        workload.model_spec, workload.parallel, workload.training, device, memory_capacity_bytes=workload.memory_capacity_bytes,
        microbatches=workload.microbatches, kernels=options.kernels, rules=options.rules, known=known,
    )


def _busy_without_messages(pipeline: _Pipeline, schedule: Schedule, workload: Workload, counting: AnalyticCost) -> float:
    """Seconds of all ranks' tasks without the messages that :func:`_block_on_messages` put into them."""
    total = 0.0
    for (module, lengths), times in pipeline.units.items():
        for detail, layers in _parts(counting, workload, module, lengths):
            cost = detail.cost
            total += times * layers * (cost.forward_ns + cost.backward_input_ns + cost.backward_weight_ns)
    for (module, lengths, label), layers in pipeline.recomputed.items():
        strategy = counting.strategies(module, lengths).get(label)  # None: a layer that the setting leaves as it is
        extra = 0.0 if strategy is None else strategy.extra_forward
        total += layers * extra * counting.part(module, "layer", lengths).forward_ns
    return total / 1e9


def _parts(counting: AnalyticCost, workload: Workload, module: str, lengths: Sequence[int]) -> list[tuple[PartDetail, int]]:
    """The parts of one pass through a whole module, with how often each comes."""
    num_layers = workload.model_spec.module(module).num_layers
    counts: list[tuple[Part, int]] = [("layer", num_layers), ("first", 1), ("last", 1)]
    return [(counting.detail(module, part, lengths), times) for part, times in counts]


def _tensor_parallel_seconds(workload: Workload, pipeline: _Pipeline, counting: AnalyticCost) -> float:
    """Exposed tensor- and context-parallel time of all ranks together."""
    total = 0.0
    for (module, lengths), times in pipeline.units.items():
        for detail, layers in _parts(counting, workload, module, lengths):
            total += times * layers * (_links(detail.forward_exposed_ns) + _links(detail.backward_exposed_ns))
    for (module, lengths, label), layers in pipeline.recomputed.items():
        if label == "full":
            total += layers * _links(counting.detail(module, "layer", lengths).forward_exposed_ns)
    return total / 1e9


def _links(exposed: Mapping[Cause, float]) -> float:
    return exposed.get("tensor_parallel", 0.0) + exposed.get("context_parallel", 0.0)


def _recomputed_flops(pipeline: _Pipeline, counting: AnalyticCost) -> float:
    """FLOPs that one replica's recomputation adds, of all its ranks."""
    total = 0.0
    for (module, lengths, label), layers in pipeline.recomputed.items():
        detail = counting.detail(module, "layer", lengths)
        total += layers * (detail.forward_flops if label == "full" else detail.selective_flops if label == "selective" else 0.0)
    return total * counting.parallel.tensor * counting.parallel.context


def _with_utilisation(result: SimulationResult, workload: Workload, counting: AnalyticCost, recomputed_flops: float) -> SimulationResult:
    """Fills in MFU and HFU where the device, hence its peak, is known."""
    if workload.device is None:
        return result
    flops = model_flops(workload, counting)
    available = result.iteration_time_s * workload.parallel.num_gpus * counting.device.peak_tflops * 1e12
    return msgspec.structs.replace(result, mfu=flops / available, hfu=(flops + recomputed_flops) / available)


def model_flops(workload: Workload, counting: AnalyticCost) -> float:
    """FLOPs of the global batch, forward and backward, all ranks together, nothing recomputed."""
    total = 0.0
    passes = Counter((name, tuple(lengths)) for microbatch in workload.microbatches for name, lengths in microbatch.items() if lengths)
    for (name, lengths), times in passes.items():
        total += times * sum(n * (d.forward_flops + d.backward_flops) for d, n in _parts(counting, workload, name, lengths))
    return total * counting.parallel.tensor * counting.parallel.context


def _chunks(workload: Workload, pipeline: _Pipeline, counting: AnalyticCost) -> list[_Chunk]:
    found = []
    for module in workload.model_spec.modules:
        if not module.trainable:
            continue
        passed = 0
        for vp_stage, row in enumerate(pipeline.chunks[module.name]):
            for rank, layers in enumerate(row):
                # Where every rank holds the whole module, layers start again at each rank.
                first = passed % module.num_layers == 0 and layers > 0
                last = (passed + layers) % module.num_layers == 0 and layers > 0
                parameters = counting.chunk_parameters(module.name, layers, first=first, last=last)
                found.append(_Chunk(rank, vp_stage, parameters))
                passed += layers
    return found


@dataclass(frozen=True, slots=True, order=True)
class _Bucket:
    """Parameters whose gradients, or whose new values, travel together."""

    instant: float
    """Seconds into the pipeline at which the gradients are there, or the values are needed."""
    seconds: float


def _first_and_last_pass(schedule: Schedule, chunk: _Chunk) -> tuple[tuple[float, float], tuple[float, float]]:
    """Seconds of (start, end) of a chunk's first forward and of its last backward; zeros where it runs neither."""
    graph = schedule.graph
    tasks = (graph.rank == chunk.rank) & (graph.vp_stage == chunk.vp_stage)
    forwards, backwards = np.flatnonzero(tasks & (graph.kind == FORWARD)), np.flatnonzero(tasks & (graph.kind != FORWARD))
    first = last = (0.0, 0.0)
    if len(forwards):
        task = forwards[np.argmin(schedule.start_ns[forwards])]
        first = (int(schedule.start_ns[task]) / 1e9, int(schedule.end_ns[task]) / 1e9)
    if len(backwards):
        task = backwards[np.argmax(schedule.end_ns[backwards])]
        last = (int(schedule.start_ns[task]) / 1e9, int(schedule.end_ns[task]) / 1e9)
    return first, last


def _data_parallel_seconds(
    workload: Workload, schedule: Schedule, chunks: Sequence[_Chunk], counting: AnalyticCost, options: SimulateOptions
) -> tuple[float, float]:
    """Seconds before the pipeline (parameters) and after it (gradients) that nothing hides."""
    group, device, training = counting.groups.data, counting.device, workload.training
    if group.size == 1:
        return 0.0, 0.0
    before = after = 0.0
    for rank in range(schedule.graph.num_ranks):
        gradients: list[_Bucket] = []
        parameters: list[_Bucket] = []
        for chunk in chunks:
            if chunk.rank != rank or not chunk.parameters:
                continue
            first, last = _first_and_last_pass(schedule, chunk)
            if not options.overlap_data_parallel:
                first, last = (0.0, 0.0), (schedule.makespan_ns / 1e9,) * 2
            # A pass goes through the buckets one after another, as many parameters in each.
            count = max(1, math.ceil(chunk.parameters / bucket_parameters(group.size)))
            share = chunk.parameters / count
            for index in range(count):
                ready = last[0] + (last[1] - last[0]) * (index + 1) / count
                needed = first[0] + (first[1] - first[0]) * index / count
                gradients.append(_Bucket(ready, gradient_seconds(share, training, group, device)))
                parameters.append(_Bucket(needed, parameter_seconds(share, training, group, device)))
        clock = 0.0
        for bucket in sorted(gradients):
            clock = max(clock, bucket.instant) + bucket.seconds
        after = max(after, clock - schedule.makespan_ns / 1e9)
        clock = 0.0
        for bucket in sorted(parameters):
            clock += bucket.seconds
            before = max(before, clock - bucket.instant)
    return max(0.0, before), max(0.0, after)


def _peaks(workload: Workload, pipeline: _Pipeline, costs: CostModel) -> list[int]:
    base = _base(costs)
    if not isinstance(base, AnalyticCost):
        return list(pipeline.peak_bytes)
    largest: dict[str, tuple[int, ...]] = {}
    for module, lengths in pipeline.units:
        if sum(lengths) > sum(largest.get(module, ())):
            largest[module] = lengths
    peaks = []
    for rank, peak in enumerate(pipeline.peak_bytes):
        transient = buffers = 0.0
        for module, lengths in largest.items():
            rows = pipeline.chunks[module]
            if not sum(row[rank] for row in rows):
                continue
            layer = base.detail(module, "layer", lengths)
            working = layer.workspace_bytes + (layer.cost.activation_bytes if rank in pipeline.recomputing_ranks else 0.0)
            for part, there in (("first", rows[0][0] and rank == 0), ("last", rows[-1][-1] and rank == len(rows[-1]) - 1)):
                if there:
                    working = max(working, base.detail(module, part, lengths).workspace_bytes)  # type: ignore[arg-type]
            transient = max(transient, working)
            buffers = max(buffers, layer.cost.boundary_bytes)
        peaks.append(int(peak + transient + 2.0 * buffers))
    return peaks


# --- FSDP2 -------------------------------------------------------------------------------------------------------------------------


def _simulate_fsdp(workload: Workload, options: SimulateOptions) -> SimulationResult:
    """ZeRO-3 for each transformer block, without pipeline and tensor parallel: all GPUs are data-parallel replicas.

    Number i of the microbatches goes to GPU i mod (number of GPUs). A block's parameters are gathered before its forward and its
    backward and its gradients scattered after it, beside the neighbouring blocks' compute: a block takes the longer of the two. Its
    collectives hold all GPUs in step, so each block waits for the GPU with the most work.
    """
    if isinstance(workload.profile, Profile):
        raise InputError("profile", "...", "schedule 'fsdp2' has no pipeline and needs other shapes than the profile's", "give a device instead")
    parallel = workload.parallel
    gpus = parallel.num_gpus
    flat = msgspec.structs.replace(parallel, tensor=1, pipeline=1, context=1, data=gpus, sequence=None)
    training = msgspec.structs.replace(workload.training, distributed_optimizer=True)
    inner = msgspec.structs.replace(workload, parallel=flat, training=training)
    base = _analytic(inner, workload.device, options)
    capacity = base.memory_capacity_bytes()
    model = workload.model_spec
    width = 4.0 if training.dtype == "fp32" else 2.0
    group = Group(gpus, 1)
    parameters = sum(base.chunk_parameters(m.name, m.num_layers, first=True, last=True) for m in model.modules)
    static = sum(
        base.chunk_parameters(m.name, m.num_layers, first=True, last=True) * bytes_per_parameter(training, trainable=m.trainable, replicas=1)
        for m in model.modules
    ) / gpus
    largest_block = max(base.chunk_parameters(m.name, 1, first=False, last=False) for m in model.modules)
    runs_backward = model.backward_modules()
    rounds = [workload.microbatches[start : start + gpus] for start in range(0, len(workload.microbatches), gpus)]
    choices = [workload.training.recompute] if workload.training.recompute != "auto" else ["none", "selective", "full"]
    best: SimulationResult | None = None
    least: int | None = None
    for label in choices:
        costs = FixedStrategyCost(base, label)
        held = max(
            sum(_held_bytes(costs, model.module(name).num_layers, name, lengths) for name, lengths in m.items() if lengths and runs_backward[name])
            for m in workload.microbatches
        )
        working = max(
            (base.detail(name, "layer", lengths).workspace_bytes + (base.part(name, "layer", lengths).activation_bytes if label == "full" else 0)
             for m in workload.microbatches for name, lengths in m.items() if lengths), default=0.0)
        # Two gathered blocks at a time, and the fp32 gradients of one.
        peak = int(static + held + working + largest_block * (2.0 * width + 4.0))
        least = peak if least is None else min(least, peak)
        if capacity is not None and peak > capacity:
            continue
        result = _fsdp_time(inner, costs, base, rounds, group, width, peak, parameters)
        if best is None or result.iteration_time_s < best.iteration_time_s:
            best = result
    if best is None:
        assert least is not None
        assert capacity is not None
        raise _does_not_fit("fsdp2", 0, least - capacity, capacity)
    return best


def _held_bytes(costs: CostModel, num_layers: int, name: str, lengths: Sequence[int]) -> float:
    parts: list[tuple[Part, int]] = [("layer", num_layers), ("first", 1), ("last", 1)]
    return sum(times * costs.part(name, part, lengths).activation_bytes for part, times in parts)


def _fsdp_time(
    workload: Workload, costs: FixedStrategyCost, base: AnalyticCost, rounds: Sequence[Sequence[Microbatch]], group: Group, width: float,
    peak: int, parameters: float,
) -> SimulationResult:
    total = in_step = busy = recomputed = 0.0
    for microbatches in rounds:
        for module in workload.model_spec.modules:
            runs = [microbatch[module.name] for microbatch in microbatches if microbatch.get(module.name)]
            blocks: list[tuple[Part, int]] = [("layer", module.num_layers), ("first", 1), ("last", 1)]
            for part, times in blocks if runs else ():
                size = base.chunk_parameters(module.name, 1 if part == "layer" else 0, first=part == "first", last=part == "last")
                gather = collective_seconds("all_gather", width * size, group, base.device)
                scatter = collective_seconds("reduce_scatter", 4.0 * size, group, base.device) if module.trainable else 0.0
                parts = [costs.part(module.name, part, lengths) for lengths in runs]
                forward = [cost.forward_ns / 1e9 for cost in parts]
                backward = [(cost.backward_input_ns + cost.backward_weight_ns) / 1e9 for cost in parts]
                total += times * (max(*forward, gather) + (max(*backward, gather + scatter) if any(backward) else 0.0))
                in_step += times * (max(forward) + max(backward))
                busy += times * (sum(forward) + sum(backward)) / group.size
            for lengths in runs:
                detail = base.detail(module.name, "layer", lengths)
                recomputed += module.num_layers * {"full": detail.forward_flops, "selective": detail.selective_flops}.get(costs.label, 0.0)
    optimizer = optimizer_seconds(parameters, workload.training, group.size, base.device, base.rules)
    result = SimulationResult(
        iteration_time_s=total + optimizer, mfu=None, hfu=None, bubble_fraction=max(0.0, 1.0 - busy / total),
        peak_memory_bytes=[peak],
        # Waiting for the heaviest GPU is the bubble; what collectives add to being in step is data parallelism's.
        breakdown_s=Breakdown(compute=busy, tensor_parallel=0.0, data_parallel=total - in_step, p2p=0.0, bubble=in_step - busy, optimizer=optimizer),
        schedule="fsdp2", chunks={module.name: [[module.num_layers]] for module in workload.model_spec.modules},
        sub_microbatch_size={m.name: max(len(b.get(m.name, ())) for b in workload.microbatches) or 1 for m in workload.model_spec.modules},
    )
    return _with_utilisation(result, workload, base, recomputed)
