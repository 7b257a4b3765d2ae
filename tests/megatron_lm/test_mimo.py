"""examples/mimo/train.py under --pipeline-schedule dip on several pipeline ranks, which the stock schedules cannot: its model is whole there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dip.checkouts.patching import read_version
from tests.megatron_lm.runs import COMMON, DIP, NO_EVALUATION, P2, SCRIPTS, Run, finished, fresh, start, words

MIMO = SCRIPTS / "mimo_varying.py"
ARGUMENTS = [*COMMON, *NO_EVALUATION, *words("""
--num-layers 4 --seq-length 40 --total-seq-length 40 --max-position-embeddings 40 --micro-batch-size 1 --dataloader-type external
--dataset-provider mock --model-provider llava_vlm --calculate-per-token-loss
""")]
CUT = words("--dip-chunks images=2 lm=2 --dip-sub-microbatch-size images=1")


def numbers_layers_anew(checkout: Path) -> bool:
    """Whether the release gives the layers of a MimoModel's encoder the same names in every chunk."""
    return tuple(map(int, read_version(checkout).split("."))) < (0, 17, 0)


def saved_by_stock(tree: Path, folder: Path) -> Path:
    finished(start(tree, MIMO, [*ARGUMENTS, *words("--train-iters 1 --save-interval 1"), "--save", str(folder)], patched=False), 1)
    return folder


@pytest.fixture(scope="module")
def weights(checkout: Path, mended_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if numbers_layers_anew(checkout):
        pytest.skip("this release's MimoModel has checkpoints of its whole only, and stock weights depend on the number of ranks")
    return saved_by_stock(mended_tree, tmp_path_factory.mktemp("mimo") / "checkpoint")


@pytest.fixture(scope="module")
def stock(mended_tree: Path, weights: Path) -> Run:
    return finished(start(mended_tree, MIMO, [*ARGUMENTS, *fresh(weights, 3)], patched=False), 3)


@pytest.mark.parametrize(("ranks", "flags"), [
    (2, ["--pipeline-model-parallel-size", "2", *CUT]),
    (4, ["--pipeline-model-parallel-size", "4"]),
    (4, words("--pipeline-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --dip-chunks images=2")),
], ids=["P 2", "P 4", "P 2 x DP 2"])
def test_the_mimo_example(ranks: int, flags: list[str], mended_tree: Path, weights: Path, stock: Run) -> None:
    run = finished(start(mended_tree, MIMO, [*ARGUMENTS, *fresh(weights, 3), *DIP, *flags], ranks=ranks), 3)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer", ["", "--use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"], ids=["plain optimizer", "distributed optimizer"]
)
def test_resuming_at_another_cut_and_under_stock(optimizer: str, mended_tree: Path, weights: Path, tmp_path: Path) -> None:
    common = [*ARGUMENTS, *optimizer.split(), *words("--train-iters 4 --save-interval 2")]
    begin = ["--load", str(weights), "--finetune", "--exit-interval", "2"]
    saved = {"stock": tmp_path / "stock", "dip": tmp_path / "dip"}
    finished(start(mended_tree, MIMO, [*common, *begin, *DIP, *P2, *CUT, "--save", str(saved["dip"])], ranks=2), 2)
    finished(start(mended_tree, MIMO, [*common, *begin, "--save", str(saved["stock"])], patched=False), 2)
    expected = finished(start(mended_tree, MIMO, [*common, "--load", str(saved["stock"])], patched=False), 2)
    another_cut = words("--dip-chunks lm=2")
    for what, run in {
        "DIP's under stock": start(mended_tree, MIMO, [*common, "--load", str(saved["dip"])], patched=False),
        "DIP's at another cut": start(mended_tree, MIMO, [*common, *DIP, *P2, *another_cut, "--load", str(saved["dip"])], ranks=2),
        "stock's under DIP": start(mended_tree, MIMO, [*common, *DIP, *P2, *CUT, "--load", str(saved["stock"])], ranks=2),
    }.items():
        np.testing.assert_allclose(finished(run, 2).losses, expected.losses, rtol=1e-5, err_msg=what)


def test_checkpoints_of_a_release_that_cannot_are_refused(checkout: Path, mended_tree: Path, tmp_path: Path) -> None:
    if not numbers_layers_anew(checkout):
        pytest.skip("this release names every layer by its place in the whole model")
    folder = saved_by_stock(mended_tree, tmp_path)
    run = start(mended_tree, MIMO, [*ARGUMENTS, *fresh(folder, 1), *DIP, *P2, *CUT], ranks=2)
    assert run.exit_code != 0
    assert "use Megatron-LM 0.17 or later" in run.output
