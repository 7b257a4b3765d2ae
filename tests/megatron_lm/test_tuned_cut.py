"""The flag alone: a rehearsal's cut is found by the run after it, and a run says and keeps what it learned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from megatron_dip.iteration.cut_cache import load_tuned
from megatron_dip.spec.codec import load_partition, load_profile
from tests.megatron_lm.runs import NO_EVALUATION, P2, ROOT, SCRIPTS, TIME_LIMIT_S, VARYING, VLM, finished, fresh, start, words

ALONE = words("--pipeline-schedule dip --dip-device cpu --dip-log-interval 1 --dip-time-budget 0.05")


def test_a_rehearsal_is_found_by_the_run_after_it(patched_tree: Path, checkpoint: Path, tmp_path: Path) -> None:
    cache, output = tmp_path / "cache", tmp_path / "tuned"
    flags = [*VLM, *NO_EVALUATION, *ALONE, *P2, "--dip-cache", str(cache)]
    command = [
        sys.executable, "-W", "ignore", "-m", "megatron_dip.cli.main", "tune", "--device", "cpu", "--output", str(output), str(VARYING), *flags,
        "--train-iters", "100", "--save", str(tmp_path / "never"),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{patched_tree}", "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    tuning = subprocess.run(
        command, cwd=SCRIPTS, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIME_LIMIT_S, check=False
    )
    assert tuning.returncode == 0, tuning.stdout[-6000:]
    assert not (tmp_path / "never").exists()
    (kept,) = cache.iterdir()
    tuned = load_tuned(kept)
    assert tuned.source == "tune"
    assert sum(map(len, tuned.batches)) >= 256
    assert {len(microbatch.get("vit", [])) for batch in tuned.batches for microbatch in batch} == {0, 1, 2, 3, 4}
    assert load_partition(output / "partition.json") == tuned.partition
    assert set(load_profile(output / "profile.json").modules) == {"vit", "lm"}
    report = (output / "report.txt").read_text()
    assert all(word in report for word in ("chosen cut", "today's flags", "stock 1F1B"))
    assert tuned.expected.chosen_ns <= tuned.expected.today_ns

    run = finished(start(patched_tree, VARYING, [*flags, *fresh(checkpoint, 3)], ranks=2), 3)
    assert f"kept by megatron-dip tune in {kept}" in run.output
    assert str(tuned.partition.chunks) in run.output


def test_a_run_says_and_keeps_the_better_cut(patched_tree: Path, checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    flags = [*VLM, *NO_EVALUATION, *ALONE, *P2, "--dip-cache", str(cache)]
    # By hand the worst there is: single images, and as many chunks as layers allow.
    by_hand = words("--dip-chunks vit=2 lm=2 --dip-sub-microbatch-size vit=1")
    run = finished(start(patched_tree, VARYING, [*flags, *by_hand, *fresh(checkpoint, 12)], ranks=2), 12)
    assert "another cut would make iterations" in run.output
    (kept,) = cache.iterdir()
    assert load_tuned(kept).source == "training"
    again = finished(start(patched_tree, VARYING, [*flags, *fresh(checkpoint, 2)], ranks=2), 2)
    assert f"kept by an earlier run in {kept}" in again.output
