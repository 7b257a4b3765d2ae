"""Text-to-video under DIP gives the losses and gradients of one process: at every cut, with the clips of a microbatch run in parts, with
a language model that is trained, frozen or absent. Every DiT chunk attends to the text, so the language model's gradient is their sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch
from tests.distributed.tiny_t2v import VideoCase, plans_of, references, run_pipeline
from tests.distributed.tiny_vlm import largest_move, losses_of, merge_ranks, worst_difference

pytestmark = pytest.mark.distributed

TWO = Parallel(pipeline=2)


def check(cases: Sequence[VideoCase], tolerance: float) -> None:
    """Runs all cases in one spawn and compares each with one process."""
    expected = references(cases)
    plans = [[] if case.layout is not None else plans_of(case) for case in cases]
    by_rank = launch(run_pipeline, cases[0].parallel.num_gpus, cases, plans)
    for index, case in enumerate(cases):
        results, alone = [results[index] for results in by_rank], [expected[index]]
        np.testing.assert_allclose(losses_of(results), losses_of(alone), rtol=tolerance, err_msg=str(case))
        if case.steps:
            assert largest_move(merge_ranks(results, "weights"), merge_ranks(alone, "weights")) <= 2e-2, case
        else:
            gradients = merge_ranks(alone, "gradients")
            if case.text == "trained":
                assert np.abs(gradients["language_model.embedding.word_embeddings.weight"]).max() > 0
            assert worst_difference(merge_ranks(results, "gradients"), gradients) <= tolerance, case


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_cut(ranks: int) -> None:
    check([VideoCase(parallel=Parallel(pipeline=ranks), chunks=chunks) for chunks in ((1, 1), (1, 2), (2, 1), (2, 2))], 1e-6)


def test_clips_and_captions_in_parts() -> None:
    base = VideoCase(parallel=TWO, chunks=(1, 2), sub_microbatch_size=(8, 2))
    plan = plans_of(base)[0][0]
    assert {stage.sub_microbatch for stage in plan.stages if stage.module == "dit"} == {0, 1}
    check(
        [
            base,
            replace(base, sub_microbatch_size=(2, 1), seed=1),
            replace(base, sub_microbatch_size=(2, 1), per_token=True, chunks=(2, 2), seed=2),
            replace(base, sub_microbatch_size=(1, 2), split_backward=True, seed=3),
            replace(base, steps=3),
            replace(base, pooled_text=True, absolute_positions=True),
        ],
        3e-6,  # weights' gradients are summed over parts in another order: rounding
    )


def test_frozen_and_precomputed_text() -> None:
    frozen = VideoCase(parallel=TWO, chunks=(2, 2), text="frozen", sub_microbatch_size=(8, 2))
    assert not any(stage.module == "lm" and stage.kind != "fw" for stage in plans_of(frozen)[0][0].stages)
    check([frozen, VideoCase(parallel=TWO, chunks=(1, 2), text="precomputed", sub_microbatch_size=(8, 1))], 3e-6)


@pytest.mark.parametrize("strategy", ["selective", "full"])
def test_recomputed_layers(strategy: str) -> None:
    check([VideoCase(parallel=TWO, chunks=(1, 2), strategy=strategy)], 3e-6)


def test_tensor_parallel() -> None:
    two = Parallel(pipeline=2, tensor=2, sequence=False)
    check([VideoCase(parallel=two, chunks=(1, 2), sub_microbatch_size=(8, 2)), VideoCase(parallel=two, text="frozen")], 5e-6)


def test_data_parallel() -> None:
    check([VideoCase(parallel=Parallel(pipeline=2, data=2), chunks=(1, 2), clips=((3, 1), (2, 4)), sub_microbatch_size=(8, 2), steps=2)], 5e-6)


def test_stock_layouts_do_the_same_work() -> None:
    check(
        [
            VideoCase(parallel=TWO, layout="scripts"),
            VideoCase(parallel=TWO, layout="parameters"),
            VideoCase(parallel=TWO, layout="parameters", chunks=(2, 2)),
        ],
        1e-6,
    )
