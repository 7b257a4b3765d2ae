"""Scalars about planning in Megatron's own TensorBoard writer, which stands on the last rank and not on the one that plans."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron_lm.runs import DIP, NO_EVALUATION, P2, VARYING, VLM, finished, fresh, start

ITERATIONS = 4
NAMES = {
    "planned-time", "measured-time", "planned-bubbles", "measured-bubbles", "planning-time", "evaluations", "waited-time", "late-plans",
    "replaced-plans", "unseen-batches", "batches-foreseen-otherwise", "searches-won-elsewhere", "drift",
}


@pytest.mark.parametrize("flags", [P2, []], ids=["two pipeline ranks", "two replicas"])
def test_scalars_stand_beside_megatrons_own(flags: list[str], patched_tree: Path, checkpoint: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, ITERATIONS), *DIP, *flags, "--tensorboard-dir", str(tmp_path)]
    finished(start(patched_tree, VARYING, [*arguments, "--tensorboard-log-interval", "2"], ranks=2), ITERATIONS)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert "lm loss" in tags, tags
    assert {f"dip/{name}" for name in NAMES} <= tags
    for name in NAMES:
        assert [event.step for event in events.Scalars(f"dip/{name}")] == [2, 4]
    assert all(0 < event.value < 60 for event in events.Scalars("dip/measured-time"))
    # Every plan but one that reaches its bound takes all of DIP's --dip-evaluations.
    assert all(1 <= event.value <= 20 for event in events.Scalars("dip/evaluations"))
    assert all(0 <= event.value < 1 for event in events.Scalars("dip/measured-bubbles"))
