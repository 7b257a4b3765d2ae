"""examples/multimodal/train.py on an energon/WebDataset, read by the example's own task encoder and loader, under --pipeline-schedule dip."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_dip.partition.deal import deal
from megatron_dip.partition.second_pass import deal_by_plans
from tests.megatron_lm.runs import DIP, P2, ROOT, SCRIPTS, Run, finished, own_losses, start, words
from tests.megatron_lm.test_models import MULTIMODAL_ARGUMENTS, assert_equal_in_bf16

ENERGON = SCRIPTS / "multimodal_energon.py"
CUT = words("--dip-chunks vit=2 lm=2 --dip-sub-microbatch-size vit=2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zero to four pictures a sample, of one to three tiles each."""
    for package in ("megatron.energon", "torchvision"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"examples/multimodal reads WebDatasets with megatron-energon and torchvision, and there is no {package}")
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


DEALING = [*DIP, *P2, *CUT, *words("--dip-look-ahead 2 --dip-log-interval 1 --dip-balance exchange")]


@pytest.fixture(scope="module")
def compiled() -> None:
    """Kernels that are compiled while the first iterations train make their batches late."""
    work = np.arange(24).reshape(12, 2)
    deal_by_plans(work, deal(work, 4), max)


def num_dealt(run: Run) -> int:
    return int(re.findall(r"so far batches dealt: (\d+)", run.output)[-1])


@pytest.fixture(scope="module")
def stock_of_two(arguments: list[str], weights: Path, mended_tree: Path) -> Run:
    """Two replicas without a pipeline, each of which trains what its loader gives."""
    fresh = [*arguments, "--load", str(weights), "--finetune", "--train-iters", "10"]
    return finished(start(mended_tree, ENERGON, fresh, ranks=2, patched=False), 10)


def test_ten_iterations_dealt_to_two_replicas_and_resumed_in_the_middle(
    arguments: list[str], weights: Path, mended_tree: Path, stock_of_two: Run, compiled: None, tmp_path: Path
) -> None:
    """What a loader gave and another replica trained counts as read by its loader: a run that goes on sees every sample once."""
    common, folder, state = [*arguments, *words("--train-iters 10 --save-interval 5")], tmp_path / "saved", tmp_path / "loader"
    begin = ["--load", str(weights), "--finetune", "--save", str(folder), "--dataloader-save", str(state)]
    whole = finished(start(mended_tree, ENERGON, [*common, *begin, *DEALING], ranks=4), 10)
    assert num_dealt(whole) >= 5
    np.testing.assert_allclose(own_losses(whole), own_losses(stock_of_two), rtol=5e-3)
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    resumed = finished(start(mended_tree, ENERGON, [*common, "--load", str(folder), "--dataloader-save", str(state), *DEALING], ranks=4), 5)
    assert num_dealt(resumed) >= 2
    np.testing.assert_allclose(own_losses(resumed), own_losses(whole)[5:], rtol=5e-3)


@pytest.mark.parametrize(
    ("fault", "message", "least"),
    [("raises 17", "microbatch 17 cannot be read", 0), ("killed 17", "lost another rank|one of them may have ended", 0), ("ends 17", "data_iterator", 4)],
    ids=["raises", "killed", "ends early"],
)
def test_a_replica_whose_loader_fails_ends_all_ranks_with_the_cause(
    fault: str, message: str, least: int, arguments: list[str], weights: Path, mended_tree: Path, compiled: None
) -> None:
    """Four microbatches an iteration and replica: whoever has read less than all trains no further than the others."""
    fresh = [*arguments, "--load", str(weights), "--finetune", *words("--train-iters 10 --distributed-timeout-minutes 1")]
    run = start(mended_tree, ENERGON, [*fresh, *DEALING], ranks=4, environment={"FAULT": fault})
    assert run.exit_code != 0
    assert re.search(message, run.output), run.output[-6000:]
    assert least <= len(run.losses) < 10, run.output[-6000:]


def test_metadata_that_lie_lose_nothing(
    arguments: list[str], weights: Path, mended_tree: Path, stock_of_two: Run, compiled: None
) -> None:
    """Microbatches are dealt by them, badly; each is trained once, under a plan of what it turns out to be."""
    fresh = [*arguments, "--load", str(weights), "--finetune", "--train-iters", "10"]
    run = finished(start(mended_tree, ENERGON, [*fresh, *DEALING], ranks=4, environment={"LIES": "1"}), 10)
    assert num_dealt(run) >= 1
    np.testing.assert_allclose(own_losses(run), own_losses(stock_of_two), rtol=5e-3)
