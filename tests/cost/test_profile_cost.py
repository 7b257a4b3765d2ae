"""Costs off a profile follow the stated formula to the last bit that matters."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.cost.profile import ProfileCost
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.profile import ModuleProfile, ProfileGrid, ProfilePoint, Strategy
from tests.strategies import grid, profile


def point(instances: int, length: int, forward: float) -> ProfilePoint:
    return ProfilePoint(
        instances=instances, tokens=instances * length, forward_ns=forward, backward_input_ns=2 * forward, backward_weight_ns=0.0,
        activation_bytes=3 * forward, boundary_bytes=0.0,
    )


def costs_of(points: list[ProfilePoint]) -> ProfileCost:
    return ProfileCost(profile({"m": ModuleProfile(num_layers=1, layer=ProfileGrid(points=points))}))


def forward(costs: ProfileCost, *lengths: int) -> float:
    return costs.part("m", "layer", lengths).forward_ns


def naive_value(points: dict[tuple[int, int], float], n: float, length: float) -> float:
    """Bilinear interpolation written as the sum over four corners, on the nearest cell."""
    counts, lengths = sorted({key[0] for key in points}), sorted({key[1] for key in points})

    def cell(knots: list[int], at: float) -> tuple[int, int]:
        for low, high in pairwise(knots):
            if at <= high:
                return low, high
        return knots[-2], knots[-1]

    (n0, n1), (l0, l1) = cell(counts, n), cell(lengths, length)
    area = (n1 - n0) * (l1 - l0)
    return (
        points[n0, l0] * (n1 - n) * (l1 - length) + points[n1, l0] * (n - n0) * (l1 - length)
        + points[n0, l1] * (n1 - n) * (length - l0) + points[n1, l1] * (n - n0) * (length - l0)
    ) / area


@given(
    counts=st.lists(st.integers(1, 40), min_size=2, max_size=4, unique=True),
    lengths=st.lists(st.integers(1, 60), min_size=2, max_size=4, unique=True),
    values=st.lists(st.integers(0, 1000), min_size=16, max_size=16),
    stage=st.lists(st.integers(1, 90), min_size=1, max_size=6),
)
def test_equals_the_sum_over_corners_averaged_over_instances(
    counts: list[int], lengths: list[int], values: list[int], stage: list[int]
) -> None:
    table = {key: float(value) for key, value in zip(product(counts, lengths), values, strict=False)}
    costs = costs_of([point(count, length, value) for (count, length), value in table.items()])
    expected = sum(naive_value(table, len(stage), length) for length in stage) / len(stage)
    cost = costs.part("m", "layer", stage)
    assert cost.forward_ns == pytest.approx(max(0.0, expected), rel=1e-9, abs=1e-6)
    assert cost.activation_bytes == pytest.approx(3 * max(0.0, expected), rel=1e-9, abs=1e-6)


def test_points_are_met_exactly() -> None:
    costs = costs_of([point(1, 10, 7.0), point(4, 10, 13.0), point(1, 20, 11.0), point(4, 20, 31.0)])
    assert forward(costs, 10) == 7.0
    assert forward(costs, 20, 20, 20, 20) == 31.0
    assert forward(costs, 10, 20, 10, 20) == 22.0


def test_one_length_scales_with_tokens_and_one_count_with_instances() -> None:
    one_length = costs_of([point(2, 10, 8.0), point(4, 10, 12.0)])
    assert forward(one_length, 15, 15) == 12.0
    assert forward(one_length, *[10] * 6) == 16.0
    one_count = costs_of([point(2, 10, 8.0), point(2, 20, 20.0)])
    assert forward(one_count, 10) == 4.0
    assert forward(one_count, 15, 15, 15, 15) == 28.0
    assert forward(costs_of([point(2, 10, 8.0)]), 5) == 2.0


def test_costs_never_fall_below_zero() -> None:
    assert forward(costs_of([point(1, 10, 0.0), point(1, 20, 100.0)]), 5) == 0.0


def test_points_that_form_no_grid_are_refused() -> None:
    with pytest.raises(InputError, match=r"modules\.m\.layer\.points.*no point with 4 instances of 10 tokens"):
        costs_of([point(1, 10, 1.0), point(1, 20, 1.0), point(4, 20, 1.0)])


def test_lengths_are_compared_exactly() -> None:
    points = [ProfilePoint(instances=n, tokens=1000 * n // 3, forward_ns=1.0, backward_input_ns=0, backward_weight_ns=0, activation_bytes=0,
                           boundary_bytes=0) for n in (3, 6)]
    assert forward(costs_of(points), 333, 333, 333) == pytest.approx(333 / (1000 / 3))


def test_absent_parts_and_absent_instances_cost_nothing() -> None:
    costs = ProfileCost(profile({"m": ModuleProfile(num_layers=1, layer=grid(5, 5, 5), last=grid(7, 7, 7))}), memory_capacity_bytes=100)
    assert costs.part("m", "first", (3,)).forward_ns == 0.0
    assert costs.part("m", "last", (3,)).forward_ns == 21.0
    assert costs.part("m", "layer", ()).forward_ns == 0.0
    assert costs.static_bytes("m", 1, first=True, last=True) == 0
    assert costs.memory_capacity_bytes() == 100
    assert not costs.counts_all_memory()
    assert costs.strategies("m", (3,)) == {"none": Strategy()}
    with pytest.raises(InputError, match="module 'other' is missing"):
        costs.part("other", "layer", (1,))


def test_absurd_stages_far_outside_the_grid_are_refused() -> None:
    costs = costs_of([point(1, 10, 1e9)])
    assert forward(costs, 10_000) == 1e12
    with pytest.raises(InputError, match=r"profile\.modules\.m\.layer.*forward_ns of a stage with 2 instances of up to 1000000 tokens is absurd"):
        forward(costs, 1_000_000, 1_000_000)
