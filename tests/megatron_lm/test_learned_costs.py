"""Costs that follow the stages' measured times in Megatron's own training loop, over batches that forward_step alone can read."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_dip.spec.codec import load_profile
from tests.megatron_lm.runs import NO_EVALUATION, P2, VARYING, VLM, finished, fresh, start, words

LEARNING = words("--pipeline-schedule dip --dip-device cpu --dip-log-interval 1 --dip-time-budget 0.05 --dip-chunks vit=1 lm=2")

ITERATIONS = 4


def test_costs_are_learned_kept_and_taken_up(patched_tree: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = [*VLM, *NO_EVALUATION, *LEARNING, *P2]
    save = ["--save", str(tmp_path), "--save-interval", str(ITERATIONS)]
    first = finished(start(patched_tree, VARYING, [*arguments, *fresh(checkpoint, ITERATIONS), *save], ranks=2), ITERATIONS)
    kept = list((tmp_path / "dip").iterdir())
    assert len(kept) == 1
    profile = load_profile(kept[0])
    assert set(profile.modules) == {"vit", "lm"}
    # Zero to four images a sample, padded in the loader: every batch is seen ahead.
    assert [int(count) for count in re.findall(r"batches not seen ahead: (\d+)", first.output)] == [0] * ITERATIONS
    assert "cannot be read ahead" not in first.output

    more = ["--load", str(tmp_path), "--train-iters", str(ITERATIONS + 2), "--override-opt_param-scheduler"]
    resumed = finished(start(patched_tree, VARYING, [*arguments, *more], ranks=2), 2)
    assert f"plans begin with the costs that were measured before: {kept[0]}" in resumed.output
