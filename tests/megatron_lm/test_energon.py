"""examples/multimodal/train.py on an energon/WebDataset, read by the example's own task encoder and loader, under --pipeline-schedule dip."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.megatron_lm.runs import DIP, P2, ROOT, SCRIPTS, finished, own_losses, start, words
from tests.megatron_lm.test_models import MULTIMODAL_ARGUMENTS, assert_equal_in_bf16

ENERGON = SCRIPTS / "multimodal_energon.py"
CUT = words("--dip-chunks vit=2 lm=2 --dip-sub-microbatch-size vit=2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zero to four pictures a sample, of one to three tiles each."""
    for package in ("megatron.energon", "torchvision"):
        try:
            __import__(package)
        except (ImportError, RuntimeError) as error:  # the latter: a torchvision for another torch
            pytest.skip(f"examples/multimodal reads WebDatasets with megatron-energon[av_decode] and torchvision: {error}")
    folder = tmp_path_factory.mktemp("webdataset") / "pictures"
    subprocess.run([sys.executable, str(ROOT / "scripts/write_webdataset.py"), str(folder), "--samples", "200"], check=True)
    return folder


@pytest.fixture(scope="module")
def arguments(dataset: Path, mended_tree: Path) -> list[str]:
    data = ["--data-path", str(dataset), "--prompt-path", str(mended_tree / "examples/multimodal/manual_prompts.json"), "--use-thumbnail"]
    return [*(word for word in MULTIMODAL_ARGUMENTS if word != "--mock-data"), *data]


@pytest.fixture(scope="module")
def weights(arguments: list[str], mended_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("energon") / "checkpoint"
    save = [*arguments, *words("--train-iters 1 --save-interval 1"), "--save", str(folder)]
    finished(start(mended_tree, ENERGON, save, patched=False), 1)
    return folder


@pytest.mark.parametrize(("replicas", "flags"), [(1, ""), (2, "--num-workers 1")], ids=["P 2", "P 2 x DP 2, loader in processes of its own"])
def test_the_multimodal_example_on_a_webdataset(replicas: int, flags: str, arguments: list[str], weights: Path, mended_tree: Path) -> None:
    fresh = [*arguments, "--load", str(weights), "--finetune", *words("--train-iters 3"), *flags.split()]
    stock = finished(start(mended_tree, ENERGON, fresh, ranks=replicas, patched=False), 3)
    dip = [*DIP, *P2, *CUT, "--dip-log-interval", "3"]
    run = finished(start(mended_tree, ENERGON, [*fresh, *dip], ranks=2 * replicas), 3)
    assert_equal_in_bf16(run, stock)
    assert "batches not seen ahead: 0" in run.output


@pytest.mark.parametrize("workers", ["0", "1"])
def test_the_loader_goes_on_behind_the_last_batch_trained_on(
    workers: str, arguments: list[str], weights: Path, mended_tree: Path, tmp_path: Path
) -> None:
    """With two iterations read ahead, the state that is saved is the one behind the batch before."""
    common = [*arguments, *words("--train-iters 4 --save-interval 2"), "--num-workers", workers, *DIP, *P2, *CUT, "--dip-look-ahead", "2"]
    folder, state = tmp_path / "saved", tmp_path / "loader"
    save = ["--load", str(weights), "--finetune", "--save", str(folder), "--dataloader-save", str(state)]
    whole = finished(start(mended_tree, ENERGON, [*common, *save], ranks=2), 4)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = finished(start(mended_tree, ENERGON, [*common, "--load", str(folder), "--dataloader-save", str(state)], ranks=2), 2)
    assert resumed.output.count("restored dataset state") == 2  # by the first pipeline rank and the last one
    np.testing.assert_allclose(own_losses(resumed), whole.losses[2:], rtol=1e-3)
    elsewhere = finished(start(mended_tree, ENERGON, [*common, "--load", str(folder)], ranks=2), 2)
    assert not np.allclose(own_losses(elsewhere), whole.losses[2:], rtol=1e-2)  # other samples tell
