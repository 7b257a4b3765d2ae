"""Megatron-LM's own scripts under --pipeline-schedule dip, on the CPU: losses equal to the stock script in one process.

All runs start from one checkpoint, which the unpatched script wrote, since stock weights depend on the pipeline rank's seed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.megatron_lm.runs import DIP, GPT, NO_EVALUATION, P2, VARYING, VLM, Run, finished, fresh, start, words

LONG = 10


@pytest.fixture(scope="module")
def stock(checkout: Path, checkpoint: Path) -> Run:
    return finished(start(checkout, VARYING, [*VLM, *NO_EVALUATION, *fresh(checkpoint, LONG)], patched=False), LONG)


def test_without_the_flag_the_patched_tree_is_the_stock_one(patched_tree: Path, checkpoint: Path, stock: Run) -> None:
    run = finished(start(patched_tree, VARYING, [*VLM, *NO_EVALUATION, *fresh(checkpoint, LONG)]), LONG)
    assert run.loss_lines == stock.loss_lines


def test_vlm_ten_iterations(patched_tree: Path, checkpoint: Path, stock: Run) -> None:
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, LONG), *DIP, *P2, "--dip-chunks", "vit=2", "lm=2", "--dip-sub-microbatch-size", "vit=2"]
    run = finished(start(patched_tree, VARYING, arguments, ranks=2), LONG)
    np.testing.assert_allclose(run.losses[:3], stock.losses[:3], rtol=1e-5)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-3)


@pytest.mark.parametrize(("ranks", "flags"), [
    (1, ""),
    (4, "--pipeline-model-parallel-size 4"),
    (2, "--tensor-model-parallel-size 2"),
    (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --dip-chunks vit=2"),
    (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"),
    (4, "--pipeline-model-parallel-size 2 --overlap-grad-reduce --dip-chunks vit=2"),
    (2, "--pipeline-model-parallel-size 2 --dip-split-backward --dip-look-ahead 0"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_vlm_three_iterations(ranks: int, flags: str, patched_tree: Path, checkpoint: Path, stock: Run) -> None:
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, 3), *DIP, *flags.split()]
    run = finished(start(patched_tree, VARYING, arguments, ranks=ranks), 3)
    np.testing.assert_allclose(run.losses, stock.losses[:3], rtol=1e-5)


def test_the_launcher_alone_does_the_same(checkout: Path, checkpoint: Path, stock: Run) -> None:
    run = finished(start(checkout, VARYING, [*VLM, *NO_EVALUATION, *fresh(checkpoint, 2), *DIP, *P2], ranks=2), 2)
    np.testing.assert_allclose(run.losses, stock.losses[:2], rtol=1e-5)


@pytest.mark.parametrize(("flags", "tolerance"), [
    ("--calculate-per-token-loss", 1e-5),
    ("--freeze-ViT", 1e-5),
    ("--freeze-LM", 1e-5),
    ("--bf16", 1e-2),
])
def test_vlm_variants(flags: str, tolerance: float, checkout: Path, patched_tree: Path, checkpoint: Path) -> None:
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, 3), *flags.split()]
    stock = finished(start(checkout, VARYING, arguments, patched=False), 3)
    run = finished(start(patched_tree, VARYING, [*arguments, *DIP, *P2, "--dip-chunks", "vit=2"], ranks=2), 3)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=tolerance)


def test_evaluation(checkout: Path, patched_tree: Path, checkpoint: Path) -> None:
    arguments = [*VLM, *words("--eval-iters 2 --eval-interval 2 --split 90,5,5"), *fresh(checkpoint, 3)]
    stock = finished(start(checkout, VARYING, arguments, patched=False), 3)
    run = finished(start(patched_tree, VARYING, [*arguments, *DIP, *P2, "--dip-chunks", "vit=2"], ranks=2), 3)
    assert len(stock.validation) == 3
    np.testing.assert_allclose(run.validation, stock.validation, rtol=1e-5)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer", ["", "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"], ids=["plain optimizer", "distributed optimizer"]
)
def test_resuming_under_the_other_schedule(
    optimizer: str, checkout: Path, patched_tree: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Saved under DIP and resumed under stock, and the reverse: weights, optimizer and learning rate go on as if nothing had been."""
    common = [*VLM, *NO_EVALUATION, *optimizer.split(), "--train-iters", "4", "--save-interval", "2"]
    dip = [*DIP, *P2, "--dip-chunks", "vit=2", "lm=2"]
    begin = ["--load", str(checkpoint), "--finetune", "--exit-interval", "2"]

    saved = {"stock": tmp_path / "stock", "dip": tmp_path / "dip"}
    finished(start(checkout, VARYING, [*common, *begin, "--save", str(saved["stock"])], patched=False), 2)
    finished(start(patched_tree, VARYING, [*common, *dip, *begin, "--save", str(saved["dip"])], ranks=2), 2)
    expected = finished(start(checkout, VARYING, [*common, "--load", str(saved["stock"])], patched=False), 2)
    stock_resumes = finished(start(checkout, VARYING, [*common, "--load", str(saved["dip"])], patched=False), 2)
    dip_resumes = finished(start(patched_tree, VARYING, [*common, *DIP, *P2, "--load", str(saved["stock"])], ranks=2), 2)
    np.testing.assert_allclose(stock_resumes.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(dip_resumes.losses, expected.losses, rtol=1e-5)


def test_gpt_with_one_module(checkout: Path, patched_tree: Path, tmp_path: Path) -> None:
    script, folder = "pretrain_gpt.py", tmp_path / "checkpoint"
    save = [*GPT, *NO_EVALUATION, "--train-iters", "1", "--save", str(folder), "--save-interval", "1"]
    finished(start(checkout, checkout / script, save, patched=False), 1)
    arguments = [*GPT, *NO_EVALUATION, *fresh(folder, 3)]
    stock = finished(start(checkout, checkout / script, arguments, patched=False), 3)
    # Six layers do not divide into four chunks: DIP cuts them unevenly.
    run = finished(start(patched_tree, patched_tree / script, [*arguments, *DIP, *P2, "--dip-chunks", "lm=2"], ranks=2), 3)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-5)
    shutil.rmtree(folder)


@pytest.mark.parametrize(("flags", "message"), [
    ("--num-virtual-stages-per-pipeline-rank 2", "--num-virtual-stages-per-pipeline-rank = 2: DIP cuts the modules itself"),
    ("--dip-chunks dit=2", "the model has no such module"),
    ("--dip-chunks vit=9", "layers cannot fill"),
    ("--dip-device abacus", "--dip-device = 'abacus': unknown device. Remedy: use one of a100"),
])
def test_mistakes_end_at_start_up_with_the_remedy(flags: str, message: str, patched_tree: Path) -> None:
    run = start(patched_tree, VARYING, [*VLM, *NO_EVALUATION, "--train-iters", "1", *DIP, *flags.split()])
    assert run.exit_code != 0
    assert message in run.output
    assert "Remedy" in run.output
