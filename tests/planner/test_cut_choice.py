"""A run's cut against the best one that is found, here and in a process of its own."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_dip.planner.cut_choice import CutOutcome, CutProcess, choose_cut
from tests.iteration.cut_cases import LOPSIDED, task


@pytest.fixture(scope="module")
def outcome() -> CutOutcome:
    return choose_cut(task())


def test_a_lopsided_cut_is_found_wanting(outcome: CutOutcome) -> None:
    assert outcome.partition != LOPSIDED
    assert outcome.gain > 0.3


def test_what_was_found_is_not_found_wanting_again(outcome: CutOutcome) -> None:
    again = choose_cut(task(outcome.partition))
    assert again.partition == outcome.partition
    assert again.gain == 0.0


def test_another_process_finds_the_same(outcome: CutOutcome) -> None:
    assert CutProcess(task()).outcome(timeout_s=120.0) == outcome


def test_what_goes_wrong_there_is_told() -> None:
    process = CutProcess(dataclasses.replace(task(), chunks={"vit": 0}))
    assert isinstance(process.outcome(timeout_s=120.0), Exception)


def test_a_process_can_be_stopped() -> None:
    process = CutProcess(task())
    process.stop()
    assert process._process.poll() is not None
