"""One pass over an operator graph: times on lanes, exposed links, living tensors, rules."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.cost.device import load_device
from megatron_dip.cost.operators import (
    GraphBuilder,
    LatencyRules,
    Operator,
    OperatorGraph,
    Tensor,
    memory_timeline,
    roofline_ns,
    time_graph,
)
from megatron_dip.spec.errors import InputError

DEVICE = load_device("a100")
RULES = LatencyRules({"elementwise": lambda operator, device: operator.memory_bytes, "collective": lambda operator, device: operator.memory_bytes})
"""Latency in ns = memory_bytes: numbers that can be checked by hand."""


def op(name: str, time: float, inputs: tuple[str, ...] = (), outputs: tuple[str, ...] = (), lane: str = "gpu") -> Operator:
    return Operator(
        name=name, kind="elementwise" if lane == "gpu" else "collective", lane=lane, inputs=inputs, outputs=outputs, memory_bytes=time,  # type: ignore[arg-type]
        cause="compute" if lane == "gpu" else "tensor_parallel",
    )


def test_lanes_overlap_and_dependencies_wait() -> None:
    builder = GraphBuilder("m")
    a, gathered, b = (builder.tensor(name, 0.0) for name in ("a", "gathered", "b"))
    builder.add(op("first", 10, (), (a,)))
    builder.add(op("gather", 30, (a,), (gathered,), lane="nvlink"))
    builder.add(op("beside", 20, (a,), (b,)))
    builder.add(op("after", 5, (gathered, b)))
    times = time_graph(builder.graph(), DEVICE, RULES)
    assert times.start_ns == (0, 10, 10, 40)
    assert times.end_ns == (10, 40, 30, 45)
    # The link is hidden behind "beside" for 20 of its 30 ns.
    assert times.exposed_ns == {"compute": 35, "tensor_parallel": 10}


def test_a_collective_at_the_end_is_exposed() -> None:
    builder = GraphBuilder("m")
    a, b = builder.tensor("a", 0.0), builder.tensor("b", 0.0)
    builder.add(op("first", 10, (), (a,)))
    builder.add(op("sum", 7, (a,), (b,), lane="nvlink"))
    assert time_graph(builder.graph(), DEVICE, RULES).exposed_ns == {"compute": 10, "tensor_parallel": 7}


def test_tensors_live_until_their_last_use_and_saved_ones_stay() -> None:
    builder = GraphBuilder("m")
    x = builder.tensor("x", 100.0)
    a = builder.tensor("a", 40.0, saved=True)
    b = builder.tensor("b", 8.0)
    builder.add(op("one", 10, (x,), (a,)))
    builder.add(op("two", 10, (a,), (b,)))
    graph = builder.graph()
    times = time_graph(graph, DEVICE, RULES)
    # x is there from the start to the end of "one", where b is born (ends come before starts); a stays.
    assert memory_timeline(graph, times.start_ns, times.end_ns) == [(0.0, 140.0), (10.0, 48.0), (20.0, 40.0)]
    assert times.peak_bytes == 140.0
    assert graph.saved_bytes() == 40.0


def test_selective_recompute_drops_what_is_marked() -> None:
    graph = OperatorGraph((), {"a": Tensor("a", 5.0, True), "b": Tensor("b", 7.0, True, True), "c": Tensor("c", 9.0)})
    assert graph.saved_bytes() == 12.0
    assert graph.saved_bytes(selective=True) == 5.0


@st.composite
def graphs(draw: st.DrawFn) -> OperatorGraph:
    builder = GraphBuilder("m")
    names: list[str] = []
    for index in range(draw(st.integers(1, 12))):
        inputs = tuple(draw(st.lists(st.sampled_from(names), unique=True, max_size=3))) if names else ()
        lane = draw(st.sampled_from(["gpu", "gpu", "nvlink", "network"]))
        out = builder.tensor(f"t{index}", float(draw(st.integers(0, 50))), saved=draw(st.booleans()))
        builder.add(op(f"o{index}", float(draw(st.integers(0, 20))), inputs, (out,), lane))
        names.append(out)
    return builder.graph()


@given(graphs())
def test_exposed_times_add_up_and_nothing_starts_early(graph: OperatorGraph) -> None:
    times = time_graph(graph, DEVICE, RULES)
    assert sum(times.exposed_ns.values()) == pytest.approx(times.total_ns)
    made = {name: end for operator, end in zip(graph.operators, times.end_ns) for name in operator.outputs}
    for index, operator in enumerate(graph.operators):
        assert all(made[name] <= times.start_ns[index] for name in operator.inputs)
        before = [times.end_ns[i] for i in range(index) if graph.operators[i].lane == operator.lane]
        # As early as can be: at its lane's or at an input's end.
        assert times.start_ns[index] == max([0.0, *before, *(made[name] for name in operator.inputs)])


@given(graphs())
def test_the_peak_is_that_of_a_count_at_every_instant(graph: OperatorGraph) -> None:
    times = time_graph(graph, DEVICE, RULES)
    born = {name: times.start_ns[i] for i, operator in enumerate(graph.operators) for name in operator.outputs}
    died = {name: times.end_ns[i] for i, operator in enumerate(graph.operators) for name in operator.outputs}
    for i, operator in enumerate(graph.operators):
        for name in operator.inputs:
            died[name] = max(died[name], times.end_ns[i])
    peak = 0.0
    for instant in times.start_ns:
        living = [graph.tensors[n] for n in born if born[n] <= instant and (graph.tensors[n].saved or instant < died[n])]
        peak = max(peak, sum(tensor.bytes for tensor in living))
    assert times.peak_bytes == pytest.approx(peak)


def test_the_roofline_takes_the_largest_term() -> None:
    gap = DEVICE.efficiency.kernel_overhead_us * 1e3
    compute = Operator(name="m.x", kind="gemm", flops=1e12, rows=4096, inner=4096, memory_bytes=1.0)
    assert roofline_ns(compute, DEVICE) == pytest.approx(1e21 / DEVICE.gemm_rate(4096, 4096) + gap)
    memory = Operator(name="m.x", kind="gemm", flops=1.0, rows=4096, inner=4096, memory_bytes=1e10)
    assert roofline_ns(memory, DEVICE) == pytest.approx(1e19 / DEVICE.memory_rate() + gap)
    link = Operator(name="m.x", kind="collective", traffic_seconds=0.5, memory_bytes=1e3)
    assert roofline_ns(link, DEVICE) == pytest.approx(0.5e9 + gap)
    beside = Operator(name="m.x", kind="collective", traffic_seconds=0.5, beside_seconds=2.0)
    assert roofline_ns(beside, DEVICE) == pytest.approx(0.5e9 * (1 + DEVICE.efficiency.overlap_loss) + gap)


def test_a_registered_rule_stands_for_an_operator_or_for_its_kind() -> None:
    rules = LatencyRules()
    gemm = Operator(name="lm.fc1", kind="gemm", flops=1e9, rows=64, inner=64)
    rules.register("gemm", lambda operator, device: 3.0)
    assert rules.latency_ns(gemm, DEVICE) == 3.0
    rules.register("lm.fc1", lambda operator, device: operator.flops / 1e9)
    assert rules.latency_ns(gemm, DEVICE) == 1.0
    assert rules.version == 2
    with pytest.raises(InputError, match="no function"):
        rules.register("lm.fc2", 5)  # type: ignore[arg-type]
