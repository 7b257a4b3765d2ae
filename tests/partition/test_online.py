"""Sub-microbatches: contiguous, complete, of equal cost."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.partition.online import _least_power_cut, equal_parts, split
from tests.strategies import Case, cases, vlm_case


@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=8), data=st.data())
def test_parts_have_the_least_sum_of_squares(weights: list[int], data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, len(weights)))
    bounds = equal_parts(np.array(weights, dtype=np.float64), num_parts).tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(weights)
    assert all(low < high for low, high in pairwise(bounds))

    def squares(cut: list[int]) -> int:
        return sum(sum(weights[low:high]) ** 2 for low, high in pairwise(cut))

    best = min(squares([0, *middle, len(weights)]) for middle in combinations(range(1, len(weights)), num_parts - 1))
    assert squares(bounds) == best


@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=8), data=st.data())
def test_a_high_power_makes_the_largest_part_smallest(weights: list[int], data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, len(weights)))
    bounds = equal_parts(np.array(weights, dtype=np.float64), num_parts, 64.0).tolist()
    largest = max(sum(weights[low:high]) for low, high in pairwise(bounds))
    best = min(
        max(sum(weights[low:high]) for low, high in pairwise([0, *middle, len(weights)]))
        for middle in combinations(range(1, len(weights)), num_parts - 1)
    )
    assert largest <= best * 1.04


@given(weights=st.lists(st.integers(0, 6), min_size=1, max_size=9), power=st.sampled_from([1, 2, 3]), data=st.data())
def test_the_cut_is_the_one_that_looking_at_all_cuts_gives(weights: list[int], power: int, data: st.DataObject) -> None:
    """Whole numbers add up exactly, so that equal cuts are equal: the last part is as short as can be, then the one before it, ..."""
    num_parts = data.draw(st.integers(1, len(weights)))
    bounds = np.empty(num_parts + 1, dtype=np.int64)
    _least_power_cut(np.array(weights, dtype=np.float64), num_parts, float(power), bounds)
    cuts = [[0, *middle, len(weights)] for middle in combinations(range(1, len(weights)), num_parts - 1)]
    assert bounds.tolist() == min(
        cuts, key=lambda cut: (sum(sum(weights[low:high]) ** power for low, high in pairwise(cut)), [-bound for bound in reversed(cut)])
    )


def test_equal_weights_give_the_larger_parts_first() -> None:
    assert equal_parts(np.ones(10), 3).tolist() == [0, 4, 7, 10]


def test_long_instances_stand_alone_and_short_ones_share() -> None:
    assert equal_parts(np.array([9.0, 3.0, 3.0, 3.0]), 2).tolist() == [0, 1, 4]


@given(case=cases())
def test_every_instance_is_in_one_part_and_in_order(case: Case) -> None:
    parts = split(case.microbatches, case.model, case.partition, case.costs())
    seen: dict[tuple[int, str], list[int]] = {}
    for part in parts:
        held = seen.setdefault((part.microbatch, part.module), [])
        assert part.first_instance == len(held)
        assert part.lengths
        held.extend(part.lengths)
    assert seen == {
        (index, name): lengths for index, microbatch in enumerate(case.microbatches) for name, lengths in microbatch.items() if lengths
    }
    for (index, name), lengths in seen.items():
        own = [part.sub_microbatch for part in parts if (part.microbatch, part.module) == (index, name)]
        assert own == list(range(-(-len(lengths) // case.partition.sub_microbatch_size[name])))


def test_equal_instances_are_cut_by_count_and_a_missing_module_has_no_part() -> None:
    case = vlm_case(num_microbatches=4)
    parts = [(part.microbatch, part.module, len(part.lengths)) for part in split(case.microbatches, case.model, case.partition, case.costs())]
    assert parts == [(0, "lm", 1), (1, "vit", 1), (1, "lm", 1), (2, "vit", 2), (2, "lm", 1), (3, "vit", 2), (3, "vit", 1), (3, "lm", 1)]
