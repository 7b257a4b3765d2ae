"""Costs that follow the stages' measured times in Megatron's own training loop."""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from tests.megatron_lm.runs import NO_EVALUATION, P2, VARYING, VLM, finished, fresh, start, words

LEARNING = words("--pipeline-schedule dip --dip-device cpu --dip-log-interval 1 --dip-time-budget 0.05 --dip-chunks vit=1 lm=2")

ITERATIONS = 14


def planned_over_measured(output: str) -> list[float]:
    found = re.findall(r"\[DIP\] iteration +\d+ \| planned \(ms\): ([\d.]+).*?measured \(ms\): ([\d.]+)", output)
    return [float(planned) / float(measured) for planned, measured in found]


def test_costs_are_learned_kept_and_taken_up(patched_tree: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = [*VLM, *NO_EVALUATION, *LEARNING, *P2]
    save = ["--save", str(tmp_path), "--save-interval", str(ITERATIONS)]
    first = finished(start(patched_tree, VARYING, [*arguments, *fresh(checkpoint, ITERATIONS), *save], ranks=2), ITERATIONS)
    ratios = planned_over_measured(first.output)
    assert len(ratios) == ITERATIONS
    analytic, learned = ratios[0], statistics.median(ratios[6:])
    assert abs(learned - 1) < abs(analytic - 1) / 2, ratios
    kept = list((tmp_path / "dip").iterdir())
    assert len(kept) == 1
    # Zero to four images a sample, padded in the loader: forward_step alone knows, and every batch is seen ahead.
    seen = [int(count) for count in re.findall(r"batches not seen ahead: (\d+)", first.output)]
    assert seen == [0] * ITERATIONS
    assert first.output.count("cannot be read ahead") == 0

    more = ["--load", str(tmp_path), "--train-iters", str(ITERATIONS + 3)]
    resumed = finished(start(patched_tree, VARYING, [*arguments, *more], ranks=2), 3)
    assert f"plans begin with the costs that were measured before: {kept[0]}" in resumed.output
    later = planned_over_measured(resumed.output)
    assert abs(statistics.median(later) - 1) < abs(analytic - 1) / 2, later
