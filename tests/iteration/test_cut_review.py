"""What a run says and keeps of better cuts, and which kept cut fits a run."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from megatron_dip.cost.profile import ProfileCost
from megatron_dip.iteration import cut_review
from megatron_dip.iteration.cut_cache import cut_file, find_cut, keep_cut
from megatron_dip.iteration.cut_review import CutReview
from megatron_dip.spec.tuned import Expected, TunedCut
from tests.iteration.cut_cases import BATCH, KEY, LOPSIDED, MODEL, PROFILE

TUNED = TunedCut(key=KEY, source="tune", partition=LOPSIDED, profile=PROFILE, batches=[BATCH], expected=Expected(chosen_ns=1.0, today_ns=2.0))


def review(folder: Path) -> CutReview:
    return CutReview(
        model=MODEL, partition=LOPSIDED, costs=lambda: ProfileCost(PROFILE, None), profile=lambda: PROFILE, key=KEY, folder=folder
    )


def test_a_run_says_and_keeps_the_better_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cut_review, "LEAST_ITERATIONS", 3)
    running = review(tmp_path)
    for _ in range(3):
        running.after_iteration(BATCH)
    running.begin_last()
    with caplog.at_level(logging.WARNING):
        outcome = running.finish()
    assert outcome is not None
    assert outcome.gain > 0.3
    assert "another cut would make iterations" in caplog.text
    kept = find_cut(tmp_path, KEY)
    assert kept is not None
    assert (kept.partition, kept.source, kept.profile) == (outcome.partition, "training", PROFILE)


def test_a_short_run_says_nothing(tmp_path: Path) -> None:
    running = review(tmp_path)
    running.after_iteration(BATCH)
    running.begin_last()
    assert running.finish() is None
    assert not list(tmp_path.iterdir())


def test_the_sample_does_not_grow_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_review, "REVIEWED_AT", ())
    running = review(tmp_path)
    for _ in range(500):
        running.after_iteration(BATCH)
    assert sum(map(len, running._sample)) == cut_review.SAMPLED_MICROBATCHES


def test_a_kept_cut_fits_an_equal_key_alone(tmp_path: Path) -> None:
    keep_cut(tmp_path, TUNED)
    assert find_cut(tmp_path, KEY) == TUNED
    for change in ({"pipeline": 4}, {"device": "h100"}, {"data": ["train.py"]}, {"memory_limit_bytes": 1}):
        assert find_cut(tmp_path, msgspec.structs.replace(KEY, **change)) is None


@pytest.mark.parametrize("content", ["", "{", '{"format": "megatron-dip/tuned/2"}', '{"format": "megatron-dip/tuned/1", "more": 1}'])
def test_a_damaged_file_is_said_and_left(content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut_file(tmp_path, KEY).write_text(content)
    assert find_cut(tmp_path, KEY) is None
    assert "a kept cut is not taken" in caplog.text
