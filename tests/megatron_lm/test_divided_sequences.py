"""Context and sequence parallelism in Megatron-LM's own scripts: losses equal to the unpatched script in one process, and divided alike.

Layers are local ones with the attention of tests/distributed/context_attention.py, since Megatron's own local attention knows no context
parallelism and LLaVAModel asks for Transformer Engine's under both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.megatron_lm.runs import DIP, GPT, NO_EVALUATION, VARYING, VLM, Run, finished, fresh, start, words
from tests.megatron_lm.test_experts import EXPERTS as SPARSE
from tests.megatron_lm.test_experts import saved_by_stock

SPEC = words("--spec gathering LAYER")
GPT_ARGUMENTS = [*GPT, *NO_EVALUATION, *SPEC]
# Without a class token an image makes four tokens: sequences divide by four as they are. Padded ones would be packed, which needs
# Transformer Engine.
VLM_ARGUMENTS = [*VLM, *NO_EVALUATION, *SPEC, *words("--disable-vision-class-token --seq-length 4")]
DIVIDED = words("--context-parallel-size 2 --pipeline-model-parallel-size 2")


@pytest.fixture(scope="module")
def gpt_weights(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_by_stock(checkout, checkout / "pretrain_gpt.py", GPT_ARGUMENTS, tmp_path_factory.mktemp("divided") / "gpt")


@pytest.fixture(scope="module")
def gpt_alone(checkout: Path, gpt_weights: Path) -> Run:
    return finished(start(checkout, checkout / "pretrain_gpt.py", [*GPT_ARGUMENTS, *fresh(gpt_weights, 3)], patched=False), 3)


@pytest.fixture(scope="module")
def vlm_weights(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_by_stock(checkout, VARYING, VLM_ARGUMENTS, tmp_path_factory.mktemp("divided") / "vlm")


def test_gpt_under_context_parallelism(checkout: Path, patched_tree: Path, gpt_weights: Path, gpt_alone: Run) -> None:
    script, arguments = "pretrain_gpt.py", [*GPT_ARGUMENTS, *fresh(gpt_weights, 3), *DIVIDED]
    stock = finished(start(checkout, checkout / script, arguments, ranks=4, patched=False), 3)
    log = words("--dip-chunks lm=2 --dip-log-interval 1")
    run = finished(start(patched_tree, patched_tree / script, [*arguments, *DIP, *log], ranks=4), 3)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-5)
    np.testing.assert_allclose(run.losses, gpt_alone.losses, rtol=1e-5)
    assert run.output.count("[DIP] iteration        3 ") == 1, "one rank speaks for its replica"
    assert "batches not seen ahead: 0" in run.output


@pytest.mark.parametrize("flags", [
    "--context-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "--context-parallel-size 2 --tensor-model-parallel-size 2 --sequence-parallel",
    "--context-parallel-size 2 --dip-split-backward",
])
def test_gpt_divided_in_other_ways(flags: str, patched_tree: Path, gpt_weights: Path, gpt_alone: Run) -> None:
    arguments = [*GPT_ARGUMENTS, *fresh(gpt_weights, 3), *DIP, *flags.split()]
    run = finished(start(patched_tree, patched_tree / "pretrain_gpt.py", arguments, ranks=4), 3)
    np.testing.assert_allclose(run.losses, gpt_alone.losses, rtol=1e-5)


def test_divided_ranks_evaluate_and_save_for_one_process(checkout: Path, patched_tree: Path, gpt_weights: Path, tmp_path: Path) -> None:
    common = [*GPT, *SPEC, *words("--eval-iters 2 --eval-interval 2 --split 90,5,5 --train-iters 4")]
    folders = {"stock": tmp_path / "stock", "dip": tmp_path / "dip"}
    begin = [*common, *fresh(gpt_weights), *words("--exit-interval 2 --save-interval 2 --save")]
    stock = finished(start(checkout, checkout / "pretrain_gpt.py", [*begin, str(folders["stock"])], patched=False), 2)
    dip = finished(start(patched_tree, patched_tree / "pretrain_gpt.py", [*begin, str(folders["dip"]), *DIVIDED, *DIP], ranks=4), 2)
    np.testing.assert_allclose(dip.losses, stock.losses, rtol=1e-5)
    assert stock.validation
    np.testing.assert_allclose(dip.validation, stock.validation, rtol=1e-5)
    expected, resumed = (
        finished(start(checkout, checkout / "pretrain_gpt.py", [*common, "--load", str(folder)], patched=False), 2) for folder in folders.values()
    )
    np.testing.assert_allclose(resumed.losses, expected.losses, rtol=1e-5)


def test_experts_over_context_parallel_ranks(checkout: Path, patched_tree: Path, tmp_path: Path) -> None:
    """Expert-parallel ranks are first the context-parallel ranks of one replica, which run one plan, then those of others, which are linked."""
    arguments = [*GPT, *NO_EVALUATION, *words("--spec gathering EXPERTS"), *SPARSE]
    weights = saved_by_stock(checkout, checkout / "pretrain_gpt.py", arguments, tmp_path / "weights")
    alone = finished(start(checkout, checkout / "pretrain_gpt.py", [*arguments, *fresh(weights, 3)], patched=False), 3)
    for flags in (
        "--context-parallel-size 2 --expert-model-parallel-size 2 --pipeline-model-parallel-size 2 --dip-chunks lm=2",
        "--context-parallel-size 2 --expert-model-parallel-size 4",
    ):
        run = finished(start(patched_tree, patched_tree / "pretrain_gpt.py", [*arguments, *fresh(weights, 3), *DIP, *flags.split()], ranks=4), 3)
        np.testing.assert_allclose(run.losses, alone.losses, rtol=1e-5, err_msg=flags)


@pytest.mark.parametrize(("divided", "dip", "ranks"), [
    ("--tensor-model-parallel-size 2 --sequence-parallel", "--pipeline-model-parallel-size 2 --dip-chunks vit=2", 4),
    ("--context-parallel-size 2", "--dip-sub-microbatch-size vit=2", 2),  # the script asserts P 1
])
def test_vlm_divided(divided: str, dip: str, ranks: int, checkout: Path, patched_tree: Path, vlm_weights: Path) -> None:
    """The script's loss function averages over a rank's own tokens, so its losses depend on how sequences are divided."""
    arguments = [*VLM_ARGUMENTS, *fresh(vlm_weights, 3), *divided.split()]
    stock = finished(start(checkout, VARYING, arguments, ranks=2, patched=False), 3)
    run = finished(start(patched_tree, VARYING, [*arguments, *DIP, *dip.split()], ranks=ranks), 3)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-5)
