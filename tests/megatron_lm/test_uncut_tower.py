"""pretrain_vlm.py with a vision model of transformers in its LLaVAModel, which runs whole on one rank under --pipeline-schedule dip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.megatron_lm.runs import DIP, NO_EVALUATION, P2, VARYING, VLM, Run, finished, fresh, own_losses, start, words

HIDES = {"HIDES_LAYERS": "1"}
ARGUMENTS = [*VLM, *NO_EVALUATION]


@pytest.fixture(scope="module")
def weights(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hidden") / "checkpoint"
    save = ["--train-iters", "1", "--save", str(folder), "--save-interval", "1"]
    finished(start(checkout, VARYING, [*ARGUMENTS, *save], patched=False, environment=HIDES), 1)
    return folder


@pytest.fixture(scope="module")
def stock(checkout: Path, weights: Path) -> Run:
    return finished(start(checkout, VARYING, [*ARGUMENTS, *fresh(weights, 4)], patched=False, environment=HIDES), 4)


@pytest.mark.parametrize(("ranks", "flags"), [
    (2, "--dip-sub-microbatch-size vit=1 --dip-chunks lm=2"),
    pytest.param(4, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", marks=pytest.mark.long),
], ids=["P 2", "P 2 x DP 2"])
def test_losses_are_those_of_one_process(ranks: int, flags: str, checkout: Path, weights: Path, stock: Run) -> None:
    run = finished(start(checkout, VARYING, [*ARGUMENTS, *fresh(weights, 4), *DIP, *P2, *words(flags)], ranks=ranks, environment=HIDES), 4)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-5)


@pytest.mark.long
def test_a_frozen_tower_in_bf16(checkout: Path, weights: Path) -> None:
    arguments = [*ARGUMENTS, *fresh(weights, 3), "--bf16", "--freeze-ViT"]
    stock = finished(start(checkout, VARYING, arguments, patched=False, environment=HIDES), 3)
    run = finished(start(checkout, VARYING, [*arguments, *DIP, *P2], ranks=2, environment=HIDES), 3)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-2)


@pytest.mark.long
def test_saved_under_dip_and_resumed_under_stock(checkout: Path, weights: Path, stock: Run, tmp_path: Path) -> None:
    common = [*ARGUMENTS, *words("--train-iters 4 --save-interval 2")]
    begin = ["--load", str(weights), "--finetune", "--exit-interval", "2", "--save", str(tmp_path)]
    finished(start(checkout, VARYING, [*common, *DIP, *P2, *begin], ranks=2, environment=HIDES), 2)
    resumed = finished(start(checkout, VARYING, [*common, "--load", str(tmp_path)], patched=False, environment=HIDES), 2)
    np.testing.assert_allclose(own_losses(resumed), stock.losses[2:], rtol=1e-5)
