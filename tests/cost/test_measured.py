"""Profiles fitted to measured stages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.cost.measured import (
    PartBytes,
    SlowedCost,
    StageSample,
    expected_time,
    fit_profile,
    message_excess_ns,
    slowdown,
    waiting,
)
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.spec.plan import Dep, Plan, PlanStage
from megatron_dip.spec.profile import PointToPoint, Profile

TIMES = {"layer": 10.0, "first": 2.0, "last": 5.0}
SIZES = {"vit": PartBytes(activation=8.0, boundary=4.0, output=2.0)}
P2P = PointToPoint(latency_ns=0.0, bytes_per_second=1e9)


def chunk_ns(layers: int, first: bool, last: bool, times: dict[str, float]) -> int:
    return round(1000 * (layers * times["layer"] + first * times["first"] + last * times["last"]))


def samples(chunks: list[tuple[int, bool, bool]], times: dict[str, float], instances: int = 2, *, split: bool = False) -> list[StageSample]:
    kinds = (("fw", 1.0), ("bw", 2.0), ("w", 3.0)) if split else (("fw", 1.0), ("bw", 2.0))
    return [
        StageSample(
            module="vit", kind=kind, num_layers=layers, has_first=first, has_last=last, instances=instances, tokens=144 * instances,
            split=split, duration_ns=round(factor * chunk_ns(layers, first, last, times)),
        )
        for layers, first, last in chunks
        for kind, factor in kinds
    ]


def predicted(profile: Profile, layers: int, first: bool, last: bool, instances: int = 2) -> tuple[float, float]:
    costs = ProfileCost(profile)
    parts = [(costs.part("vit", "layer", [144] * instances), layers), (costs.part("vit", "first", [144] * instances), int(first)),
             (costs.part("vit", "last", [144] * instances), int(last))]
    forward = sum(part.forward_ns * count for part, count in parts)
    backward = sum((part.backward_input_ns + part.backward_weight_ns) * count for part, count in parts)
    return forward, backward


def test_parts_are_told_apart_where_chunks_allow() -> None:
    profile = fit_profile(samples([(2, True, False), (2, False, False), (2, False, True)], TIMES), {"vit": 6}, SIZES, P2P)
    module = profile.modules["vit"]
    assert module.num_layers == 6
    assert module.layer.points[0].forward_ns == pytest.approx(10_000)
    assert module.first is not None
    assert module.first.points[0].forward_ns == pytest.approx(2_000)
    assert module.last is not None
    assert module.last.points[0].forward_ns == pytest.approx(5_000)
    assert module.layer.points[0].boundary_bytes == 4.0 * 288


@pytest.mark.parametrize("split", [False, True])
def test_a_slower_machine_is_seen_and_taken_into_costs(split: bool) -> None:
    chunks = [(2, True, False), (2, False, False), (2, False, True)]
    costs = ProfileCost(fit_profile(samples(chunks, TIMES, split=split), {"vit": 6}, SIZES, P2P))
    slower = samples(chunks, {part: 1.3 * time for part, time in TIMES.items()}, split=split)
    assert slowdown(samples(chunks, TIMES, split=split), costs) == pytest.approx(1.0)
    assert slowdown(slower, costs) == pytest.approx(1.3)
    assert slowdown(slower, SlowedCost(costs, 1.3)) == pytest.approx(1.0)
    assert slowdown([], costs) == 1.0


def test_one_long_interruption_counts_as_twice_the_stage() -> None:
    costs = ProfileCost(fit_profile(samples([(2, False, False)], TIMES), {"vit": 2}, SIZES, P2P))
    forward, backward = samples([(2, False, False)], TIMES)
    stuck = StageSample(
        module="vit", kind="fw", num_layers=2, has_first=False, has_last=False, instances=2, tokens=288, split=False, duration_ns=10**9
    )
    assert slowdown([stuck, backward], costs) == pytest.approx((2 * forward.duration_ns + backward.duration_ns) / (forward.duration_ns + backward.duration_ns))


@given(
    layer=st.floats(0.1, 100), first=st.floats(0, 50), last=st.floats(0, 50), rows=st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_measured_chunks_are_predicted_as_measured(layer: float, first: float, last: float, rows: list[int]) -> None:
    times = {"layer": layer, "first": first, "last": last}
    chunks = [(count, index == 0, index == len(rows) - 1) for index, count in enumerate(rows)]
    profile = fit_profile(samples(chunks, times), {"vit": sum(rows)}, SIZES, P2P)
    if len({(count, has_first, has_last) for count, has_first, has_last in chunks}) <= 3:
        for chunk in chunks:
            wanted = chunk_ns(*chunk, times)
            forward, backward = predicted(profile, *chunk)
            assert forward == pytest.approx(wanted, rel=1e-6, abs=2)
            assert backward == pytest.approx(2 * wanted, rel=1e-6, abs=4)


def test_no_part_becomes_negative() -> None:
    """A last chunk faster than the others by noise must not give a negative head."""
    noisy = samples([(4, True, False)], TIMES) + samples([(4, False, True)], {**TIMES, "last": -3.0})
    module = fit_profile(noisy, {"vit": 8}, SIZES, P2P).modules["vit"]
    for grid in (module.layer, module.first, module.last):
        assert grid is not None
        assert all(min(point.forward_ns, point.backward_input_ns, point.backward_weight_ns) >= 0 for point in grid.points)


def test_a_stray_measurement_counts_as_twice_the_median_at_most() -> None:
    stray = samples([(2, True, True)], TIMES) * 5 + samples([(2, True, True)], {"layer": 999.0, "first": 0.0, "last": 0.0})
    forward, _ = predicted(fit_profile(stray, {"vit": 2}, SIZES, P2P), 2, True, True)
    assert forward == pytest.approx((5 * 27_000 + 54_000) / 6)


def test_what_a_stage_takes_in_the_mean_is_expected() -> None:
    assert expected_time([10, 10, 16]) == pytest.approx(12)


def test_split_backward_keeps_its_parts() -> None:
    profile = fit_profile(samples([(1, True, True)], {"layer": 10.0, "first": 0.0, "last": 0.0}, split=True), {"vit": 1}, SIZES, P2P)
    cost = [getattr(profile.modules["vit"], part).points[0] for part in ("layer", "first", "last")]
    assert sum(point.backward_input_ns for point in cost) == pytest.approx(20_000)
    assert sum(point.backward_weight_ns for point in cost) == pytest.approx(30_000)


@given(shapes=st.sets(st.tuples(st.integers(1, 6), st.integers(16, 200)), min_size=2, max_size=8))
def test_lengths_that_form_no_grid_still_make_a_profile(shapes: set[tuple[int, int]]) -> None:
    """Stages of several lengths, whose times are linear in instances and tokens: every one of them is predicted."""
    def forward_ns(instances: int, tokens: int) -> float:
        return 5000.0 + 300.0 * instances + 40.0 * tokens

    measured = [
        StageSample(
            module="vit", kind=kind, num_layers=1, has_first=False, has_last=False, instances=instances, tokens=instances * length, split=False,
            duration_ns=round(factor * forward_ns(instances, instances * length)),
        )
        for instances, length in shapes
        for kind, factor in (("fw", 1.0), ("bw", 2.0))
    ]
    costs = ProfileCost(fit_profile(measured, {"vit": 1}, SIZES, P2P))
    for instances, length in shapes:
        assert costs.part("vit", "layer", [length] * instances).forward_ns == pytest.approx(forward_ns(instances, instances * length), rel=0.01)


def plan_of_two_ranks() -> Plan:
    """Two microbatches' forwards of 100 ns on each rank; messages take 10 ns."""
    def forward(stage: int, rank: int, deps: list[Dep]) -> PlanStage:
        return PlanStage(
            id=stage, rank=rank, kind="fw", duration=100, mem_delta_start=0, mem_delta_end=0, deps=deps, module="lm", vp_stage=0, layers=(rank, 1),
            microbatch=stage // 2, sub_microbatch=0, tokens=8, instances=1, strategy=["none"],
        )

    stages = [forward(0, 0, []), forward(1, 1, [Dep(0, 10)]), forward(2, 0, []), forward(3, 1, [Dep(2, 10)])]
    return Plan(
        format="megatron-dip/plan/1", ranks=2, memory_capacity=None, memory_initial=[0, 0], stages=stages, order=[[0, 2], [1, 3]], claimed_makespan=0,
        lower_bound=0, bubble_fraction=0.0, peak_memory=[0, 0], planning_ns=0, evaluations=0, seed=0, chunks={}, sub_microbatch_size={},
        actions=[[], []], inputs={}, local_inputs={}, outputs={},
    )


def test_messages_that_ranks_wait_for_are_compared_with_their_plan() -> None:
    """Rank 1 waits for rank 0's first forward (50 ns over the planned lag) and is still busy when the second one arrives."""
    plan = plan_of_two_ranks()
    assert message_excess_ns(plan, {0: (0, 100), 1: (160, 260), 2: (100, 200), 3: (260, 360)}) == 50
    assert message_excess_ns(plan, {0: (0, 100), 1: (90, 190), 2: (100, 110), 3: (190, 290)}) == -20


def test_waiting_beyond_the_plan_is_told_from_slower_stages() -> None:
    plan = plan_of_two_ranks()
    assert waiting(plan, 1, {1: (110, 210), 3: (210, 310)}) == pytest.approx(1.0)
    assert waiting(plan, 1, {1: (110, 260), 3: (260, 410)}) == pytest.approx(1.0)  # half as fast again, no pause
    assert waiting(plan, 1, {1: (110, 210), 3: (230, 330)}) == pytest.approx(1.1)
    assert waiting(plan, 1, {}) == 1.0
