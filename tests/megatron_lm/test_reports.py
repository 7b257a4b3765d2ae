"""Situations of public bug reports against Megatron-LM and its relatives, made with Megatron-LM's own scripts under DIP.

Each test names the report. Losses are held against the unpatched script in one process, from the same weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dip.spec.codec import load_plan
from tests.megatron_lm.runs import DIP, GPT, NO_EVALUATION, P2, SCRIPTS, VARYING, VLM, finished, fresh, start, words

CUT = ["--dip-chunks", "vit=2", "lm=2"]


def _compare(
    trees: tuple[Path, Path], checkpoint: Path, flags: list[str], *, ranks: int, dip: list[str], environment: dict[str, str] | None = None,
    iterations: int = 3, tolerance: float = 1e-5,
) -> None:
    """DIP on ``ranks`` processes against the stock script in one: losses and gradient norms."""
    checkout, patched = trees
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, iterations), *flags]
    stock = finished(start(checkout, VARYING, arguments, patched=False, environment=environment), iterations)
    run = finished(start(patched, VARYING, [*arguments, *DIP, *dip], ranks=ranks, environment=environment), iterations)
    assert np.isfinite(stock.losses).all()
    np.testing.assert_allclose(run.losses, stock.losses, rtol=tolerance)


@pytest.fixture
def trees(checkout: Path, patched_tree: Path) -> tuple[Path, Path]:
    return checkout, patched_tree


def test_a_frozen_vision_tower_has_no_backward(trees: tuple[Path, Path], checkpoint: Path, tmp_path: Path) -> None:
    """modelscope/ms-swift#10214, Megatron-LM#5833: frozen towers kept activations and ran an input backward."""
    _compare(trees, checkpoint, ["--freeze-ViT"], ranks=2, dip=[*P2, *CUT, "--dip-trace-dir", str(tmp_path)])
    plan = load_plan(next(tmp_path.glob("*_plan.json")))
    vision = [stage for stage in plan.stages if stage.module == "vit"]
    assert any(stage.kind == "fw" for stage in vision)
    # Only the chunk with the projector, the last one of the last rank, has anything to train.
    assert {(stage.rank, stage.vp_stage) for stage in vision if stage.kind != "fw"} == {(1, 1)}
    gradients = {tag for tag, producer in plan.outputs.items() if plan.stages[producer].kind == "bw" and plan.stages[producer].module == "vit"}
    assert not gradients


@pytest.mark.parametrize("flags", [[], ["--calculate-per-token-loss"]], ids=["mean", "per token"])
def test_microbatches_without_supervised_tokens(flags: list[str], trees: tuple[Path, Path], checkpoint: Path) -> None:
    """NVIDIA-NeMo/Automodel#3796, Megatron-LM#1765: NaN went into all weights."""
    _compare(trees, checkpoint, flags, ranks=2, dip=[*P2, *CUT], environment={"UNSUPERVISED_EVERY": "5"})


def test_replicas_of_which_one_never_sees_an_image(trees: tuple[Path, Path], checkpoint: Path) -> None:
    """Megatron-LM#6260, Megatron-Bridge#4784: encoder gradients diluted, or a hang."""
    flags = words("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --pipeline-model-parallel-size 2")
    _compare(trees, checkpoint, [], ranks=4, dip=[*flags, "--dip-chunks", "vit=2"], environment={"IMAGES_AT": "even"}, iterations=4)


def test_lengths_that_change_in_every_microbatch(trees: tuple[Path, Path], checkpoint: Path) -> None:
    """Megatron-LM#1485, #5271: with virtual stages and varying shapes receives were crossed."""
    _compare(trees, checkpoint, [], ranks=2, dip=[*P2, *CUT], environment={"TEXT_LENGTHS": "vary"}, iterations=10, tolerance=1e-4)


@pytest.mark.parametrize("microbatches", [1, 3, 5])
def test_microbatches_that_ranks_do_not_divide(microbatches: int, trees: tuple[Path, Path], checkpoint: Path) -> None:
    """verl#1617, nanotron#419: Megatron's interleaved schedule takes multiples of the pipeline size only."""
    flags = ["--global-batch-size", str(microbatches)]
    _compare(trees, checkpoint, flags, ranks=4, dip=words("--pipeline-model-parallel-size 4"))


def test_forty_images_in_one_microbatch(trees: tuple[Path, Path], checkpoint: Path) -> None:
    _compare(trees, checkpoint, [], ranks=2, dip=[*P2, *CUT, "--dip-sub-microbatch-size", "vit=8"], environment={"IMAGES_AT": "one"}, iterations=2)


def test_forward_step_draws_the_same_noise_on_all_ranks(patched_tree: Path, checkpoint: Path) -> None:
    """Megatron-Bridge's flow matching draws in forward_step, and Megatron seeds pipeline ranks apart: middle ranks would hold other noise."""
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, 3), *DIP]
    one = finished(start(patched_tree, VARYING, arguments, environment={"NOISE": "1"}), 3)
    two = finished(start(patched_tree, VARYING, [*arguments, *P2, *CUT], ranks=2, environment={"NOISE": "1"}), 3)
    plain = finished(start(patched_tree, VARYING, [*arguments, *P2, *CUT], ranks=2), 3)
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-5)
    assert abs(two.losses[0] - plain.losses[0]) > 1e-4, "the noise changes nothing, so the test could not fail"


@pytest.mark.parametrize("limit_mib", [4000, 60, 45])
def test_recomputation_under_a_memory_limit_changes_nothing(limit_mib: int, trees: tuple[Path, Path], checkpoint: Path) -> None:
    """NVIDIA-NeMo/Automodel#2840: recomputation of trained towers gave other numbers."""
    _compare(trees, checkpoint, [], ranks=2, dip=[*P2, *CUT, "--dip-memory-limit", str(limit_mib / 1024)])


@pytest.mark.parametrize("modules", [[], ["--recompute-modules", "mlp"]], ids=["core attention", "mlp"])
def test_selective_recomputation_happens_or_is_refused(modules: list[str], checkout: Path, patched_tree: Path, tmp_path: Path) -> None:
    """Megatron-LM#1487: asked-for recomputation must not be undone in silence."""
    script, folder = "pretrain_gpt.py", tmp_path / "checkpoint"
    finished(start(checkout, checkout / script, [*GPT, *NO_EVALUATION, "--train-iters", "1", "--save", str(folder), "--save-interval", "1"], patched=False), 1)
    arguments = [*GPT, *NO_EVALUATION, *fresh(folder, 2), "--recompute-granularity", "selective", *modules]
    run = start(patched_tree, patched_tree / script, [*arguments, *DIP, *P2], ranks=2)
    if run.exit_code:
        assert "--recompute" in run.output
        assert "Remedy" in run.output
        return
    stock = finished(start(checkout, checkout / script, arguments, patched=False), 2)
    np.testing.assert_allclose(finished(run, 2).losses, stock.losses, rtol=1e-5)


EXTERNAL = ["--dataloader-type", "external"]


def test_a_loader_that_ends(patched_tree: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Energon#146, torchrec#1778: the end of the data hung, or cut the last batches."""
    arguments = [
        *VLM, *NO_EVALUATION, *EXTERNAL, *DIP, *P2, *CUT, "--dip-look-ahead", "3", "--load", str(checkpoint), "--finetune", "--save", str(tmp_path),
        "--save-interval", "4",
    ]
    finished(start(patched_tree, VARYING, [*arguments, "--train-iters", "4"], ranks=2, environment={"SAMPLES": "32"}), 4)
    short = start(patched_tree, VARYING, [*arguments, "--train-iters", "5"], ranks=2, environment={"SAMPLES": "32"})
    assert short.exit_code
    assert len(short.losses) == 4
    assert "ended before it gave this many microbatches" in short.output
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "4"
    resumed = [*VLM, *NO_EVALUATION, *DIP, *P2, *CUT, "--load", str(tmp_path), "--train-iters", "5"]
    finished(start(patched_tree, VARYING, resumed, ranks=2), 1)


def test_a_loader_that_ends_in_one_replica_first(patched_tree: Path, checkpoint: Path) -> None:
    arguments = [*VLM, *NO_EVALUATION, *EXTERNAL, *DIP, *P2, *CUT, *fresh(checkpoint, 4)]
    run = start(patched_tree, VARYING, arguments, ranks=4, environment={"SAMPLES": "16,15"})
    assert run.exit_code
    assert len(run.losses) == 3
    assert "ended before it gave this many microbatches" in run.output


def test_a_rotary_base_is_taken_or_left_as_the_release_does(trees: tuple[Path, Path], tmp_path: Path) -> None:
    """Megatron-LM#6585: pretrain_vlm.py ignores the flag up to 0.19."""
    flags = words("--position-embedding-type rope --rotary-base 500000")
    save = ["--train-iters", "1", "--save", str(tmp_path), "--save-interval", "1"]
    finished(start(trees[0], VARYING, [*VLM, *NO_EVALUATION, *flags, *save], patched=False), 1)
    _compare(trees, tmp_path, flags, ranks=2, dip=[*P2, *CUT])


@pytest.mark.parametrize("ranks", [2, 4])
def test_microbatches_shorter_than_the_longest(ranks: int, trees: tuple[Path, Path], tmp_path: Path) -> None:
    """Megatron-LM#6081, #1066: stock schedules receive into buffers of --seq-length."""
    script = SCRIPTS / "pretrain_gpt_varying.py"
    save = ["--train-iters", "1", "--save", str(tmp_path), "--save-interval", "1"]
    finished(start(trees[0], script, [*GPT, *NO_EVALUATION, *save], patched=False), 1)
    arguments = [*GPT, *NO_EVALUATION, *fresh(tmp_path, 3)]
    stock = finished(start(trees[0], script, arguments, patched=False), 3)
    run = finished(start(trees[1], script, [*arguments, *DIP, "--pipeline-model-parallel-size", str(ranks)], ranks=ranks), 3)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-5)


def test_samples_of_a_microbatch_with_other_numbers_of_images(trees: tuple[Path, Path], checkpoint: Path) -> None:
    """huggingface-llama-recipes#37, TRL#5785. Parts of two images straddle the samples."""
    flags = [*EXTERNAL, "--micro-batch-size", "2"]
    _compare(
        trees, checkpoint, flags, ranks=2, dip=[*P2, *CUT, "--dip-sub-microbatch-size", "vit=2"],
        environment={"SAMPLES": "24", "IMAGES_AT": "pairs"},
    )
