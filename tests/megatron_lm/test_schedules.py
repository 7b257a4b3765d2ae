"""Other schedules' orders under DIP's executor in Megatron's own scripts: the same losses, and one look at the trace for the order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_dip.spec.codec import load_plan
from tests.megatron_lm.runs import DIP, GPT, NO_EVALUATION, P2, VARYING, VLM, finished, fresh, start


def test_1f1b_on_a_language_model(checkout: Path, patched_tree: Path, tmp_path: Path) -> None:
    script, folder = "pretrain_gpt.py", tmp_path / "checkpoint"
    finished(start(checkout, checkout / script, [*GPT, *NO_EVALUATION, "--train-iters", "1", "--save", str(folder), "--save-interval", "1"], patched=False), 1)
    arguments = [*GPT, *NO_EVALUATION, *fresh(folder, 2)]
    stock = finished(start(checkout, checkout / script, arguments, patched=False), 2)
    traces = tmp_path / "traces"
    run = start(patched_tree, patched_tree / script, [*arguments, *DIP, *P2, "--dip-schedule", "1f1b", "--dip-trace-dir", str(traces)], ranks=2)
    np.testing.assert_allclose(finished(run, 2).losses, stock.losses, rtol=1e-5)
    plan = load_plan(next(traces.glob("*_plan.json")))
    assert [plan.stages[stage].kind for stage in plan.order[0]] == ["fw", "fw", "bw", "fw", "bw", "fw", "bw", "bw"]
    assert [plan.stages[stage].kind for stage in plan.order[1]] == ["fw", "bw"] * 4


def test_interleaved_on_a_vision_language_model(checkout: Path, patched_tree: Path, checkpoint: Path) -> None:
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, 2)]
    stock = finished(start(checkout, VARYING, arguments, patched=False), 2)
    run = start(patched_tree, VARYING, [*arguments, *DIP, *P2, "--dip-chunks", "vit=1", "lm=2", "--dip-schedule", "interleaved"], ranks=2)
    np.testing.assert_allclose(finished(run, 2).losses, stock.losses, rtol=1e-5)
