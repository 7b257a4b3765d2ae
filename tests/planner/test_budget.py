"""The search stops before an iteration does."""

from __future__ import annotations

import pytest

from megatron_dip.planner.budget import LOOKED_BACK, SHARE, SearchBudget


def test_what_was_asked_for_is_the_most() -> None:
    budget = SearchBudget(0.5)
    assert budget.seconds() == 0.5
    budget.observe(100.0)
    assert budget.seconds() == 0.5


def test_short_iterations_shorten_it_and_single_long_ones_do_not_count() -> None:
    budget = SearchBudget(3.0)
    for length in [0.1] * LOOKED_BACK + [60.0, 0.1, 60.0]:
        budget.observe(length)
    assert budget.seconds() == pytest.approx(SHARE * 0.1)


def test_plans_side_by_side_have_several_iterations_each() -> None:
    budget = SearchBudget(3.0, side_by_side=4)
    budget.observe(0.1)
    assert budget.seconds() == pytest.approx(4 * SHARE * 0.1)


def test_without_a_limit_plans_are_searched_for_until_they_are_needed() -> None:
    budget = SearchBudget(None)
    assert budget.seconds() == 1.0
    for _ in range(5):
        budget.observe(20.0)
    assert budget.seconds() == 16.0
    assert not budget.is_needed()
    budget.ask(lambda: True)
    assert budget.is_needed()
