"""Language models with experts that are spread over replicas, in Megatron-LM's own scripts: Megatron's DDP, optimizers, look-ahead and
checkpoints. Losses equal those of the unpatched scripts in one process, which has all experts.

Every replica has other images. The reference is ``pretrain_vlm.py`` with a dense projector (``--repair``): as released the script gives
the projector the experts' layer, which has none of the parts that it asks for.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_dip.cli.main import main
from tests.megatron_lm.runs import DIP, GPT, NO_EVALUATION, P2, ROOT, VARYING, VLM, Run, finished, fresh, start, words

EXPERTS = words("""
--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 64 --moe-aux-loss-coeff 0.01 --moe-router-load-balancing-type aux_loss
--moe-token-dispatcher-type alltoall --disable-bias-linear
""")
SPREAD = words("--expert-model-parallel-size 2")
DISTRIBUTED = words("--use-distributed-optimizer")
VLM_EXPERTS = [*VLM, *EXPERTS]
GPT_EXPERTS = [*GPT, *EXPERTS, *NO_EVALUATION]
LONG = 10


def saved_by_stock(tree: Path, script: Path, arguments: list[str], folder: Path) -> Path:
    """The weights that runs start from."""
    finished(start(tree, script, [*arguments, *words("--train-iters 1 --save-interval 1"), "--save", str(folder)], patched=False), 1)
    return folder


@pytest.fixture(scope="module")
def weights(mended_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_by_stock(mended_tree, VARYING, [*VLM_EXPERTS, *NO_EVALUATION], tmp_path_factory.mktemp("experts") / "vlm")


@pytest.fixture(scope="module")
def gpt_weights(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_by_stock(checkout, checkout / "pretrain_gpt.py", GPT_EXPERTS, tmp_path_factory.mktemp("experts") / "gpt")


@pytest.fixture(scope="module")
def stock(mended_tree: Path, weights: Path) -> Run:
    return finished(start(mended_tree, VARYING, [*VLM_EXPERTS, *NO_EVALUATION, *fresh(weights, LONG)], patched=False), LONG)


@pytest.fixture(scope="module")
def gpt_stock(checkout: Path, gpt_weights: Path) -> Run:
    return finished(start(checkout, checkout / "pretrain_gpt.py", [*GPT_EXPERTS, *fresh(gpt_weights, 3)], patched=False), 3)


def test_vlm_with_experts_over_replicas_ten_iterations(mended_tree: Path, weights: Path, stock: Run) -> None:
    cut = words("--dip-chunks vit=2 lm=2 --dip-sub-microbatch-size vit=2 --dip-look-ahead 2")
    arguments = [*VLM_EXPERTS, *NO_EVALUATION, *fresh(weights, LONG), *DIP, *P2, *SPREAD, *cut]
    run = finished(start(mended_tree, VARYING, arguments, ranks=4), LONG)
    np.testing.assert_allclose(run.losses[:3], stock.losses[:3], rtol=1e-5)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-3)


@pytest.mark.parametrize("flags", [
    "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --dip-chunks vit=2 --use-distributed-optimizer "
    "--overlap-grad-reduce --overlap-param-gather",
    "--expert-model-parallel-size 4 --use-distributed-optimizer",
    "--expert-model-parallel-size 2 --dip-split-backward --dip-chunks vit=2",
])
def test_vlm_with_experts_over_replicas(flags: str, mended_tree: Path, weights: Path, stock: Run) -> None:
    run = finished(start(mended_tree, VARYING, [*VLM_EXPERTS, *NO_EVALUATION, *fresh(weights, 3), *DIP, *flags.split()], ranks=4), 3)
    np.testing.assert_allclose(run.losses, stock.losses[:3], rtol=1e-5)


@pytest.mark.parametrize("flags", [
    "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --dip-chunks lm=2 --use-distributed-optimizer --overlap-grad-reduce",
    "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 "
    "--use-distributed-optimizer",
    "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 "
    "--expert-tensor-parallel-size 1 --dip-chunks lm=2",
])
def test_gpt_with_experts_over_replicas_and_tensor_ranks(flags: str, patched_tree: Path, gpt_weights: Path, gpt_stock: Run) -> None:
    """With tensor parallelism Megatron asks for sequence parallelism; experts then lie on the tensor ranks of a replica, or of two."""
    run = start(patched_tree, patched_tree / "pretrain_gpt.py", [*GPT_EXPERTS, *fresh(gpt_weights, 3), *DIP, *flags.split()], ranks=4)
    np.testing.assert_allclose(finished(run, 3).losses, gpt_stock.losses, rtol=1e-5)


def test_evaluation_with_experts_over_replicas(mended_tree: Path, weights: Path) -> None:
    arguments = [*VLM_EXPERTS, *words("--eval-iters 2 --eval-interval 2 --split 90,5,5"), *fresh(weights, 3)]
    stock = finished(start(mended_tree, VARYING, arguments, patched=False), 3)
    run = finished(start(mended_tree, VARYING, [*arguments, *DIP, *P2, *SPREAD, "--dip-chunks", "vit=2"], ranks=4), 3)
    assert len(stock.validation) == 3
    np.testing.assert_allclose(run.validation, stock.validation, rtol=1e-5)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-5)


@pytest.mark.parametrize(
    "optimizer", [[], [*DISTRIBUTED, "--dist-ckpt-optim-fully-reshardable"]], ids=["plain optimizer", "distributed optimizer"]
)
def test_resuming_with_experts_over_replicas(optimizer: list[str], mended_tree: Path, weights: Path, tmp_path: Path) -> None:
    """Saved under DIP and resumed under stock, the reverse, and under DIP with experts over more replicas. (From one rank that has all
    experts to several Megatron's optimizer state does not go, under any schedule.)"""
    common = [*VLM_EXPERTS, *NO_EVALUATION, *optimizer, "--train-iters", "4", "--save-interval", "2"]
    begin = ["--load", str(weights), "--finetune", "--exit-interval", "2"]
    dip = [*DIP, *P2, *SPREAD]
    saved = {"stock": tmp_path / "stock", "dip": tmp_path / "dip"}
    finished(start(mended_tree, VARYING, [*common, *SPREAD, *begin, "--save", str(saved["stock"])], ranks=2, patched=False), 2)
    save = [*common, *dip, "--dip-chunks", "vit=2", "lm=2", *begin, "--save", str(saved["dip"])]
    finished(start(mended_tree, VARYING, save, ranks=4), 2)
    expected = finished(start(mended_tree, VARYING, [*common, *SPREAD, "--load", str(saved["stock"])], ranks=2, patched=False), 2)
    for what, run in {
        "stock": start(mended_tree, VARYING, [*common, *SPREAD, "--load", str(saved["dip"])], ranks=2, patched=False),
        "another cut": start(mended_tree, VARYING, [*common, *dip, "--load", str(saved["stock"])], ranks=4),
        "more replicas": start(mended_tree, VARYING, [*common, *DIP, *words("--expert-model-parallel-size 4"), "--load", str(saved["dip"])], ranks=4),
    }.items():
        np.testing.assert_allclose(finished(run, 2).losses, expected.losses, rtol=1e-5, err_msg=what)


def test_optimizer_state_from_one_rank_with_all_experts_is_refused(mended_tree: Path, weights: Path) -> None:
    arguments = [*VLM_EXPERTS, *NO_EVALUATION, "--load", str(weights), "--train-iters", "2", *DIP, *SPREAD]
    run = start(mended_tree, VARYING, arguments, ranks=2)
    assert run.exit_code != 0
    assert "was saved with expert parallel size 1, 2 this run" in run.output
    assert "--no-load-optim" in run.output


@pytest.mark.parametrize("optimizer", [[], DISTRIBUTED], ids=["plain optimizer", "distributed optimizer"])
def test_old_checkpoints_with_experts_over_replicas_train_on_under_dip(
    optimizer: list[str], checkout: Path, patched_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{checkout}")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    script, saved, new = checkout / "pretrain_gpt.py", tmp_path / "saved", tmp_path / "new"
    common = [*GPT_EXPERTS, *optimizer, "--train-iters", "4"]
    old = ["torch" if word == "torch_dist" else word for word in common]
    finished(start(checkout, script, [*old, *SPREAD, "--save", str(saved), *words("--save-interval 100 --exit-interval 2")], ranks=2, patched=False), 2)
    expected = finished(start(checkout, script, [*old, *SPREAD, "--load", str(saved)], ranks=2, patched=False), 2)
    assert main(["checkpoint", "convert", "--device", "cpu", str(saved), str(new), str(script), *old]) == 0
    resumed = start(patched_tree, patched_tree / "pretrain_gpt.py", [*common, *DIP, *P2, *SPREAD, "--dip-chunks", "lm=2", "--load", str(new)], ranks=4)
    np.testing.assert_allclose(finished(resumed, 2).losses, expected.losses, rtol=1e-5)
