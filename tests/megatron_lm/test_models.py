"""The models of Megatron-LM's scripts beyond pretrain_vlm.py's and pretrain_gpt.py's, under --pipeline-schedule dip on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_dip.checkouts.patching import read_version
from tests.megatron_lm.runs import COMMON, DIP, NO_EVALUATION, ROOT, SCRIPTS, Run, finished, start, words

MULTIMODAL = SCRIPTS / "multimodal_varying.py"
MULTIMODAL_ARGUMENTS = [
    word.replace("NullTokenizer", "NullMultimodalTokenizer") for word in COMMON
] + words("""
--num-layers 4 --seq-length 64 --decoder-seq-length 128 --max-position-embeddings 128 --img-h 28 --img-w 28 --patch-dim 14 --micro-batch-size 1
--language-model-type mistral_7b --vision-model-type clip --disable-vision-class-token --use-tiling --max-num-tiles 3
--tokenizer-prompt-format mistral --dataloader-type external --position-embedding-type rope --bf16
""") + NO_EVALUATION


@pytest.fixture(scope="module")
def example_tree(checkout: Path, mended_tree: Path) -> Path:
    """Where the example runs under DIP: as released, or mended from 0.18 on, which call pretrain() in a form of older releases."""
    return checkout if tuple(map(int, read_version(checkout).split("."))) < (0, 18, 0) else mended_tree


@pytest.fixture(scope="module")
def checkpoint(mended_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("multimodal") / "checkpoint"
    save = [*MULTIMODAL_ARGUMENTS, "--train-iters", "1", "--save", str(folder), "--save-interval", "1"]
    finished(start(mended_tree, MULTIMODAL, save, patched=False), 1)
    return folder


def fresh(checkpoint: Path, *flags: str) -> list[str]:
    return [*MULTIMODAL_ARGUMENTS, "--load", str(checkpoint), "--finetune", "--train-iters", "3", *flags]


@pytest.fixture(scope="module")
def stock(mended_tree: Path, checkpoint: Path) -> Run:
    return finished(start(mended_tree, MULTIMODAL, fresh(checkpoint), patched=False), 3)


def assert_equal_in_bf16(run: Run, stock: Run, first: float = 1e-6) -> None:
    """The script takes no other number format (its forward_step looks through Megatron's half-precision wrapper). The first losses come
    from equal weights; later ones from weights that were rounded after sums in another order."""
    np.testing.assert_allclose(run.losses[0], stock.losses[0], rtol=first)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-3)


@pytest.mark.parametrize(("ranks", "flags", "first"), [
    (2, "--pipeline-model-parallel-size 2 --dip-chunks vit=2 lm=2 --dip-sub-microbatch-size vit=2", 1e-6),
    (4, "--pipeline-model-parallel-size 4", 1e-6),
    (2, "--tensor-model-parallel-size 2", 1e-4),
    (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", 1e-6),
], ids=lambda value: value if isinstance(value, str) else "")
def test_the_multimodal_example(ranks: int, flags: str, first: float, example_tree: Path, checkpoint: Path, stock: Run) -> None:
    """Several images of several tiles and text alone; ranks in the middle read no data, the last one no images."""
    run = finished(start(example_tree, MULTIMODAL, fresh(checkpoint, *DIP, *flags.split()), ranks=ranks), 3)
    assert_equal_in_bf16(run, stock, first)


@pytest.mark.parametrize("flags", ["--freeze-ViT", "--freeze-LM", "--use-loss-scaling"])
def test_variants_of_the_multimodal_example(flags: str, mended_tree: Path, example_tree: Path, checkpoint: Path) -> None:
    stock = finished(start(mended_tree, MULTIMODAL, fresh(checkpoint, flags), patched=False), 3)
    dip = [*DIP, *words("--pipeline-model-parallel-size 2 --dip-chunks vit=2")]
    run = finished(start(example_tree, MULTIMODAL, fresh(checkpoint, flags, *dip), ranks=2), 3)
    assert_equal_in_bf16(run, stock)


def test_adapters_on_the_checkout() -> None:
    """Chunks of LLaVAModel, MimoModel and GPTModel with the checkout's Megatron-Core instead of the installed one."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([os.environ["MEGATRON_LM"], str(SCRIPTS / "older_python")]), "PYTHONDONTWRITEBYTECODE": "1",
    }
    tests = ["tests/hooks/test_adapters.py", "tests/hooks/test_context_parallel.py", "-k", "not refused_with_a_remedy and not other_models"]
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-6000:]
