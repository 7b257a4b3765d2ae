"""examples/vlm/train.py on a patched checkout: tiny twins of the setups, and a model for images of any size, under DIP equal one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.launcher import launch
from tests.megatron_lm.runs import DIP, P2, ROOT, finished, fresh, own_losses, start, words

SCRIPT = ROOT / "examples" / "vlm" / "train.py"
COMMON = words("""
--transformer-impl local --attention-backend unfused --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion
--no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm --distributed-backend gloo --use-cpu-initialization --num-workers 0
--attention-dropout 0 --hidden-dropout 0 --log-interval 1 --lr 1e-3 --lr-decay-iters 10 --global-batch-size 4
""")
NO_EVALUATION = words("--eval-iters 0 --eval-interval 1000")
CUT = words("--dip-chunks vit=2 lm=2 --dip-sub-microbatch-size vit=2")


@pytest.mark.parametrize("setup", ["vlm-s", "vlm-m", "vlm-l"])
def test_a_tiny_twin_trains_as_in_one_process(patched_tree: Path, setup: str) -> None:
    flags = [*COMMON, *NO_EVALUATION, "--mock-data", "--scale-down", "64", "--setup", setup, "--train-iters", "5"]
    cut = finished(start(patched_tree, SCRIPT, [*flags, *P2, *DIP, "--dip-chunks", "lm=1", "vit=1"], ranks=2), 5)
    if setup == "vlm-s":
        alone = finished(start(patched_tree, SCRIPT, flags), 5)
        assert cut.losses == pytest.approx(alone.losses, rel=2e-5)


ANY_SIZE = [*COMMON, "--model", str(ROOT / "examples/vlm/tiny/any_size.json")]
"""A tiny model of Qwen2.5-VL's kind."""


def test_images_of_any_size_train_resume_and_are_evaluated(patched_tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    flags = [*ANY_SIZE, "--mock-data", *words("--eval-iters 1 --eval-interval 2"), *DIP, "--dip-look-ahead", "2"]
    whole = finished(
        start(patched_tree, SCRIPT, [*flags, *P2, *CUT, "--train-iters", "4", "--save", str(folder), "--save-interval", "2"], ranks=2), 4
    )
    assert len(whole.validation) >= 2
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = finished(start(patched_tree, SCRIPT, [*flags, "--train-iters", "4", "--load", str(folder)]), 2)  # in one process, uncut
    np.testing.assert_allclose(own_losses(resumed), whole.losses[2:], rtol=1e-4)


def test_real_images_are_read_and_bad_ones_are_left_out(patched_tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("megatron.energon")
    pytest.importorskip("skimage")
    data = tmp_path / "data"
    subprocess.run(
        [sys.executable, str(ROOT / "scripts/write_images.py"), str(data), "--samples", "60", "--damaged", "16", "--max-side", "48"], check=True
    )
    flags = [*ANY_SIZE, "--data-path", str(data), *words("--eval-iters 1 --eval-interval 2 --train-iters 3"), *P2, *DIP, *CUT]
    run = finished(start(patched_tree, SCRIPT, flags, ranks=2), 3)
    assert "left out: sample" in run.output
    assert "is no image that can be read" in run.output
    assert "has no txt" in run.output


def write_hub(rank: int, ranks: int, family: str, folder: str) -> None:
    from tests.models import test_hugging_face, test_hugging_face_one_size

    made = test_hugging_face if family.startswith("qwen") else test_hugging_face_one_size
    made.oracle(family).save_pretrained(folder)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", pytest.param("llava", marks=pytest.mark.long)])
def test_weights_of_hugging_face_are_trained_from(family: str, patched_tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    hub, brought = tmp_path / "hub", tmp_path / "brought"
    launch(write_hub, 1, family, str(hub))
    subprocess.run([sys.executable, str(ROOT / "scripts/import_hf.py"), str(hub), str(brought), "--dtype", "fp32"], check=True)
    flags = [*COMMON, *NO_EVALUATION, "--model", str(hub / "config.json"), "--max-image-size", "64", "--packed-length", "256", "--mock-data"]
    chunks = ["vit=2", "lm=2"] if family.startswith("qwen") else ["lm=2"]
    run = finished(start(patched_tree, SCRIPT, [*flags, *fresh(brought, 2), *P2, *DIP, "--dip-chunks", *chunks], ranks=2), 2)
    alone = finished(start(patched_tree, SCRIPT, [*flags, *fresh(brought, 2)]), 2)
    assert run.losses == pytest.approx(alone.losses, rel=2e-5)
