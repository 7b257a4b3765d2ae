"""examples/t2v/train.py on a patched checkout: a tiny twin of the setups under DIP equals one process; with the language model trained and frozen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.megatron_lm.runs import DIP, P2, ROOT, finished, start, words

SCRIPT = ROOT / "examples" / "t2v" / "train.py"
TINY = words("""
--mock-data --scale-down 64 --transformer-impl local --attention-backend unfused --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
--distributed-backend gloo --use-cpu-initialization --num-workers 0 --attention-dropout 0 --hidden-dropout 0 --log-interval 1 --lr 1e-3
--lr-decay-iters 10 --global-batch-size 4 --eval-iters 0 --eval-interval 1000 --train-iters 3
""")


@pytest.mark.parametrize("setup", ["t2v-s", "t2v-l"])
def test_a_tiny_twin_trains_as_in_one_process(patched_tree: Path, setup: str) -> None:
    flags = [*TINY, "--setup", setup]
    alone = finished(start(patched_tree, SCRIPT, flags), 3)
    cut = finished(start(patched_tree, SCRIPT, [*flags, *P2, *DIP, "--dip-chunks", "lm=1", "dit=2", "--dip-sub-microbatch-size", "dit=2"], ranks=2), 3)
    assert cut.losses == pytest.approx(alone.losses, rel=2e-5)


def test_a_frozen_text_encoder_trains_too(patched_tree: Path) -> None:
    flags = [*TINY, "--freeze-text-encoder", *P2, *DIP]
    assert finished(start(patched_tree, SCRIPT, flags, ranks=2), 3).losses[0] > 0
