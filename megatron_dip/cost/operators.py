"""Operator graphs: what a part of a model computes, moves and sends, and how long that takes on a device.

A graph is a list of operators in an order in which they may be issued, and the tensors between them. Each operator runs on one
lane: the GPU's compute stream, one of its links, its path to host memory, or the CPU. A lane runs its operators one after another
in the graph's order; different lanes overlap. So an exposed collective and a hidden one come from the same pass.

Latency (source: DIP, arXiv 2504.14145, section on the training simulator):
``max(FLOPs / (a_f F), bytes / (a_m B_mem), traffic / (a_n B_net))`` plus the gap between kernels, where the shares a depend on the
operator's shape (:mod:`megatron_dip.cost.device`). An operator may have its own rule: see :class:`LatencyRules`.

Memory: a tensor lives from the start of the operator that makes it to the end of the last that takes it; one that is ``saved`` lives
until the part's backward. Units: ns, bytes, FLOPs; everything is for one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_dip.cost.device import DeviceDescription
from megatron_dip.spec.errors import InputError

Lane = Literal["gpu", "nvlink", "network", "host_link", "cpu"]
OperatorKind = Literal["gemm", "attention", "elementwise", "collective", "adam", "copy"]
Cause = Literal["compute", "tensor_parallel", "context_parallel", "data_parallel", "optimizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    name: str
    """``module.operator``, for rules and reports."""
    kind: OperatorKind
    lane: Lane = "gpu"
    cause: Cause = "compute"
    inputs: tuple[str, ...] = ()
    """Names of the tensors taken; those that no operator of the graph makes are there from the start."""
    outputs: tuple[str, ...] = ()
    flops: float = 0.0
    memory_bytes: float = 0.0
    """Read and written in the device's memory."""
    traffic_seconds: float = 0.0
    """Time on the link, from :mod:`megatron_dip.cost.collectives`."""
    beside_seconds: float = 0.0
    """Time of the collective that runs beside this operator and takes part of its processors and bandwidth."""
    rows: float = 0.0
    """gemm: m."""
    inner: float = 0.0
    """gemm: k."""
    attention_work: tuple[tuple[float, float], ...] = ()
    """attention: (sequence length, FLOPs) of each group of equal sequences; ``flops`` is their sum."""
    heads: float = 0.0
    """attention: heads of this shard times sequences."""
    causal: bool = False
    backward: bool = False
    weight_gradient: bool = False
    """Belongs to the weight part of a split backward."""
    recompute: bool = False
    """Run again in the backward under selective recompute."""


@dataclass(frozen=True, slots=True)
class Tensor:
    name: str
    bytes: float
    saved: bool = False
    """Kept for the backward."""
    dropped_by_selective: bool = False
    """Not kept under selective recompute."""


@dataclass(frozen=True, slots=True)
class OperatorGraph:
    operators: tuple[Operator, ...]
    tensors: Mapping[str, Tensor]

    def saved_bytes(self, *, selective: bool = False) -> float:
        """What the backward needs."""
        return sum(t.bytes for t in self.tensors.values() if t.saved and not (selective and t.dropped_by_selective))


@dataclass(frozen=True, slots=True)
class GraphTimes:
    """One pass over a graph: ``start_ns`` and ``end_ns`` [operators], the causes' exposed times, and the transient peak."""

    start_ns: tuple[float, ...]
    end_ns: tuple[float, ...]
    total_ns: float
    exposed_ns: Mapping[Cause, float]
    """Time in which the GPU computes (by its own causes) or waits for a link (by the link's cause); adds up to ``total_ns``."""
    peak_bytes: float
    """Largest sum of living tensors, saved ones included."""


Rule = Callable[[Operator, DeviceDescription], float]
"""Latency in ns of an operator on a device."""


@dataclass(slots=True)
class LatencyRules:
    """Latency rules by operator name (``lm.fc1``), else by kind, else the roofline of this module.

    Example: ``rules.register("vit.attention", lambda operator, device: 1e3)``.
    """

    rules: dict[str, Rule] = field(default_factory=dict)
    version: int = 0
    """Grows with every registration, so that caches notice."""

    def register(self, name_or_kind: str, rule: Rule) -> None:
        if not callable(rule):
            raise InputError("rule", rule, "is no function", "give a function of (operator, device) that returns ns")
        self.rules[name_or_kind] = rule
        self.version += 1

    def latency_ns(self, operator: Operator, device: DeviceDescription) -> float:
        rule = self.rules.get(operator.name) or self.rules.get(operator.kind) or roofline_ns
        return rule(operator, device)


def roofline_ns(operator: Operator, device: DeviceDescription) -> float:
    """The largest of the three terms, and the gap between kernels."""
    compute = 0.0
    if operator.kind == "gemm":
        compute = operator.flops / device.gemm_rate(operator.rows, operator.inner)
    elif operator.kind == "attention":
        for length, flops in operator.attention_work:
            compute += flops / device.attention_rate(length, operator.heads, causal=operator.causal, backward=operator.backward)
    elif operator.flops:
        compute = operator.flops / (device.peak_tflops * 1e12)
    memory = operator.memory_bytes / device.memory_rate()
    alone = max(compute, memory, operator.traffic_seconds)
    slowed = alone + device.efficiency.overlap_loss * min(alone, operator.beside_seconds)
    return slowed * 1e9 + device.efficiency.kernel_overhead_us * 1e3


def time_graph(graph: OperatorGraph, device: DeviceDescription, rules: LatencyRules) -> GraphTimes:
    """Runs the graph once: each operator starts when its lane is free and its inputs are there."""
    made: dict[str, float] = {}
    lane_free: dict[str, float] = {}
    start: list[float] = []
    end: list[float] = []
    for operator in graph.operators:
        ready = max((made.get(name, 0.0) for name in operator.inputs), default=0.0)
        begin = max(ready, lane_free.get(operator.lane, 0.0))
        finish = begin + rules.latency_ns(operator, device)
        lane_free[operator.lane] = finish
        for name in operator.outputs:
            assert name in graph.tensors, f"{operator.name} makes {name}, which is no tensor of the graph"
            made[name] = finish
        start.append(begin)
        end.append(finish)
    total = max(end, default=0.0)
    return GraphTimes(tuple(start), tuple(end), total, _exposed(graph.operators, start, end), _peak(graph, start, end))


def _exposed(operators: Sequence[Operator], start: Sequence[float], end: Sequence[float]) -> dict[Cause, float]:
    """Busy GPU time by cause; the rest of the time by the link operator that runs then."""
    exposed: dict[Cause, float] = {}
    clock = 0.0
    links = [i for i, operator in enumerate(operators) if operator.lane != "gpu"]
    spans: list[tuple[float, float]] = []
    for index, operator in enumerate(operators):
        if operator.lane == "gpu":
            if start[index] > clock:
                spans.append((clock, start[index]))
            exposed[operator.cause] = exposed.get(operator.cause, 0.0) + end[index] - start[index]
            clock = end[index]
    total = max(end, default=0.0)
    if total > clock:
        spans.append((clock, total))
    for low, high in spans:
        left = high - low
        for index in links:
            overlap = min(high, end[index]) - max(low, start[index])
            if overlap > 0.0 and left > 0.0:
                part = min(overlap, left)
                cause = operators[index].cause
                exposed[cause] = exposed.get(cause, 0.0) + part
                left -= part
    return exposed


def _peak(graph: OperatorGraph, start: Sequence[float], end: Sequence[float]) -> float:
    return max((size for _, size in memory_timeline(graph, start, end)), default=0.0)


def memory_timeline(graph: OperatorGraph, start: Sequence[float], end: Sequence[float]) -> list[tuple[float, float]]:
    """(ns, living bytes) after each instant at which that changes, ends before starts."""
    birth: dict[str, float] = {}
    death: dict[str, float] = {}
    for index, operator in enumerate(graph.operators):
        for name in operator.outputs:
            birth.setdefault(name, start[index])
            death[name] = max(death.get(name, 0.0), end[index])
        for name in operator.inputs:
            if name in graph.tensors:
                birth.setdefault(name, 0.0)
                death[name] = max(death.get(name, 0.0), end[index])
    changes: dict[float, float] = {}
    for name, born in birth.items():
        tensor = graph.tensors[name]
        changes[born] = changes.get(born, 0.0) + tensor.bytes
        if not tensor.saved:
            changes[death[name]] = changes.get(death[name], 0.0) - tensor.bytes
    living, timeline = 0.0, []
    for instant in sorted(changes):
        living += changes[instant]
        timeline.append((instant, living))
    return timeline


class GraphBuilder:
    """Collects operators and tensors; a name that comes twice is an error of ours."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.within = ""
        """Before the names of what is added now: repeated parts tell theirs apart by it."""
        self.operators: list[Operator] = []
        self.tensors: dict[str, Tensor] = {}

    def tensor(self, name: str, size: float, *, saved: bool = False, dropped_by_selective: bool = False) -> str:
        name = self.within + name
        assert name not in self.tensors, name
        self.tensors[name] = Tensor(name, size, saved, dropped_by_selective)
        return name

    def save(self, name: str, *, dropped_by_selective: bool = False) -> None:
        """Keeps a tensor made earlier for the backward."""
        self.tensors[name] = Tensor(name, self.tensors[name].bytes, True, dropped_by_selective)

    def add(self, operator: Operator) -> None:
        self.operators.append(operator)

    def graph(self) -> OperatorGraph:
        return OperatorGraph(tuple(self.operators), self.tensors)
