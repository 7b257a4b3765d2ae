"""Checkpoints of the old format, which pretrain_vlm.py insists on, converted for DIP, and back for stock at another size."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_dip.cli.main import main
from tests.megatron_lm.runs import DIP, NO_EVALUATION, P2, ROOT, VARYING, VLM, finished, start, words

OLD = ["torch" if word == "torch_dist" else word for word in VLM]


@pytest.mark.parametrize("optimizer", [[], ["--use-distributed-optimizer"]], ids=["plain optimizer", "distributed optimizer"])
def test_old_checkpoints_train_on_under_dip_and_back_under_stock(
    optimizer: list[str], checkout: Path, patched_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{checkout}")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    common = [*optimizer, *NO_EVALUATION, "--train-iters", "4"]
    saved, new, back = tmp_path / "saved", tmp_path / "new", tmp_path / "back"
    save = [*OLD, *common, *P2, "--save", str(saved), *words("--save-interval 100 --exit-interval 2")]
    finished(start(checkout, VARYING, save, ranks=2, patched=False), 2)
    expected = finished(start(checkout, VARYING, [*OLD, *common, *P2, "--load", str(saved)], ranks=2, patched=False), 2)

    convert = ["checkpoint", "convert", "--device", "cpu"]
    assert main([*convert, str(saved), str(new), str(VARYING), *OLD, *common]) == 0
    load = ["--load", str(new), "--dip-chunks", "vit=2", "lm=2"]
    resumed = finished(start(patched_tree, VARYING, [*VLM, *common, *DIP, *P2, *load], ranks=2), 2)
    np.testing.assert_allclose(resumed.losses, expected.losses, rtol=1e-5)

    assert main([*convert, str(new), str(back), str(VARYING), *VLM, *common]) == 0
    alone = finished(start(checkout, VARYING, [*OLD, *common, "--load", str(back)], patched=False), 2)
    np.testing.assert_allclose(alone.losses, expected.losses, rtol=1e-5)


def test_an_old_checkpoint_fits_its_own_cut_alone(patched_tree: Path, tmp_path: Path) -> None:
    common = [*OLD, *NO_EVALUATION, *DIP, *P2, "--train-iters", "3"]
    folder, cut = tmp_path / "saved", words("--dip-chunks vit=2 lm=2")
    whole = finished(start(patched_tree, VARYING, [*common, *cut, "--save", str(folder), *words("--save-interval 2")], ranks=2), 3)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = finished(start(patched_tree, VARYING, [*common, *cut, "--load", str(folder)], ranks=2), 1)
    np.testing.assert_allclose(resumed.losses, whole.losses[2:], rtol=1e-5)
    refused = start(patched_tree, VARYING, [*common, "--load", str(folder)], ranks=2)
    assert refused.exit_code != 0
    assert "it fits no other cut" in refused.output
    assert "megatron-dip checkpoint convert" in refused.output
