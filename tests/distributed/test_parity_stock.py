"""Stock Megatron's schedules over the same model give the losses and gradients of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch
from tests.distributed.tiny_vlm import Case, Result, forward_step, losses_of, merge_ranks, references, run_case, worst_difference

pytestmark = pytest.mark.distributed


def build(case: Case, config: Any) -> Any:
    from megatron_dip.models.built_in import ChainCost
    from megatron_dip.trainer.stock_layouts import build_stock_model

    times = {"vit": ChainCost(layer=1.0, first=0.5), "lm": ChainCost(layer=2.0, last=3.0)}
    return build_stock_model(config, case.option("layout"), virtual=case.option("virtual", 1), layer_times=times)


def forward_backward(case: Case, model: Any, items: Sequence[dict[str, torch.Tensor]], replica: int) -> list[dict[str, Any]]:
    from megatron_dip.trainer.stock_layouts import stock_forward_backward

    virtual = case.option("virtual", 1)
    iterators: Any = [iter(items) for _ in range(virtual)]
    chunks: Any = model.chunks
    return stock_forward_backward(virtual=virtual)(
        forward_step_func=forward_step, data_iterator=iterators if virtual > 1 else iterators[0], model=chunks,
        num_microbatches=len(items), seq_length=48, micro_batch_size=1, decoder_seq_length=48, forward_only=False,
    )


def run_stock(rank: int, num_ranks: int, cases: Sequence[Case]) -> list[Result]:
    return [run_case(case, build, forward_backward) for case in cases]


def stock(layout: str, virtual: int = 1, **changes: Any) -> Case:
    return Case(options=(("layout", layout), ("virtual", virtual)), **changes)


def check(cases: Sequence[Case], tolerance: float) -> None:
    expected = references(cases)
    by_rank = launch(run_stock, cases[0].parallel.num_gpus, cases)
    for index, case in enumerate(cases):
        results, alone = [results[index] for results in by_rank], [expected[index]]
        np.testing.assert_allclose(losses_of(results), losses_of(alone), rtol=tolerance, err_msg=str(case))
        assert worst_difference(merge_ranks(results, "gradients"), merge_ranks(alone, "gradients")) <= tolerance, case


def test_two_ranks() -> None:
    two = Parallel(pipeline=2)
    check(
        [
            stock("scripts", parallel=two),
            stock("scripts", parallel=two, tied=True),
            stock("scripts", parallel=two, per_token=True),
            stock("scripts", parallel=two, image_counts=((0, 0),)),
            stock("parameters", parallel=two),
            stock("parameters", virtual=2, parallel=two),
            stock("parameters", virtual=4, parallel=two, trainable=(False, True)),
            stock("parameters", virtual=2, parallel=two, image_counts=((0, 0),)),
            stock("measured", parallel=two),
            stock("measured", virtual=2, parallel=two, trainable=(True, False)),
        ],
        1e-6,
    )


def test_four_ranks() -> None:
    four = Parallel(pipeline=4)
    check([stock("scripts", parallel=four), stock("parameters", parallel=four), stock("parameters", virtual=2, parallel=four,
          image_counts=((3, 0, 5, 1, 0, 2, 0, 0),))], 1e-6)


def test_tensor_parallel() -> None:
    both = Parallel(pipeline=2, tensor=2)
    check([stock("scripts", parallel=both, tied=True), stock("parameters", virtual=2, parallel=both)], 5e-6)


def test_data_parallel() -> None:
    both = Parallel(pipeline=2, data=2)
    counts = ((3, 0, 5, 1), (0, 2, 0, 4))
    check([stock("scripts", parallel=both, image_counts=counts), stock("parameters", parallel=both, image_counts=counts)], 5e-6)
