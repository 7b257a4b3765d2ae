"""Checkpoints: saved from one cut, loaded into every other with exactly equal weights, and trained on with the same losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_dip.spec.plan import Plan
from megatron_dip.spec.workload import Parallel
from tests.distributed.dip_runs import build as build_dip
from tests.distributed.launcher import launch, launch_all
from tests.distributed.test_parity_dip import dip_forward_backward
from tests.distributed.test_parity_stock import build as build_stock
from tests.distributed.test_parity_stock import forward_backward as stock_forward_backward
from tests.distributed.tiny_vlm import (
    OPTIMIZER,
    Case,
    Result,
    losses_of,
    merge_ranks,
    microbatches,
    result_of,
    tiny_model,
    worst_difference,
)
from tests.distributed.vlm_plans import plans_of

pytestmark = pytest.mark.distributed

SAVED_AT = 2
"""Iterations before the checkpoint; as many follow it."""


class Run:
    """One rank's model and optimizer, and the function that runs an iteration."""

    def __init__(self, case: Case, plans: list[list[Plan]], seed: int = 1234) -> None:
        from megatron_dip.models.vlm import VlmConfig
        from megatron_dip.trainer.build import build_optimizer, initialize_parallel

        initialize_parallel(case.parallel, device="cpu", seed=1, timeout_s=60)
        self.case = case
        config = VlmConfig(model=tiny_model(case), parallel=case.parallel, init_method_std=0.2, seed=seed)
        self.model = (build_stock if case.option("layout") else build_dip)(case, config)
        self.optimizer = build_optimizer(self.model, OPTIMIZER, distributed_optimizer=case.distributed_optimizer)
        self.forward_backward: Any = stock_forward_backward if case.option("layout") else dip_forward_backward(plans)

    def train(self, steps: Sequence[int]) -> list[list[float]]:
        """Losses of each step's microbatches (empty but on the last pipeline rank)."""
        from megatron.core import parallel_state

        losses = []
        for step in steps:
            self.model.zero_grad()
            self.optimizer.zero_grad()
            replica = parallel_state.get_data_parallel_rank()
            reports = self.forward_backward(self.case, self.model, microbatches(self.case, replica, step), replica)
            losses.append([float(report["lm loss"][0]) for report in reports])
            self.optimizer.step()
        return losses


def save_and_go_on(rank: int, num_ranks: int, case: Case, plans: list[list[Plan]], folder: Path) -> tuple[Result, Result]:
    from megatron_dip.trainer.checkpoint import save_checkpoint

    run = Run(case, plans)
    run.train(range(SAVED_AT))
    save_checkpoint(folder, run.model, run.optimizer, iteration=SAVED_AT, extra={"consumed": 12})
    saved = result_of(run.model, [])
    return saved, result_of(run.model, run.train(range(SAVED_AT, 2 * SAVED_AT)))


def load_and_go_on(rank: int, num_ranks: int, case: Case, plans: list[list[Plan]], folder: Path) -> tuple[Result, Result]:
    from megatron_dip.trainer.checkpoint import load_checkpoint

    # Plans of the steps before the checkpoint are not run; another seed makes other weights, all of which must be overwritten.
    run = Run(case, [steps[SAVED_AT:] for steps in plans], seed=99)
    assert load_checkpoint(folder, run.model, run.optimizer) == (SAVED_AT, {"consumed": 12})
    loaded = result_of(run.model, [])
    return loaded, result_of(run.model, run.train(range(SAVED_AT, 2 * SAVED_AT)))


def go_on_elsewhere(saver: Case, loaders: Sequence[Case], folder: Path) -> None:
    """Saves with ``saver``; every loader must find equal weights and go on to equal losses."""
    saved = launch(save_and_go_on, saver.parallel.num_gpus, saver, plans_of(saver), folder)
    weights, losses = merge_ranks([first for first, _ in saved], "weights"), losses_of([second for _, second in saved])
    for loader in loaders:
        plans = [] if loader.option("layout") else plans_of(loader)
        loaded = launch(load_and_go_on, loader.parallel.num_gpus, loader, plans, folder)
        assert worst_difference(merge_ranks([first for first, _ in loaded], "weights"), weights) == 0.0, loader
        np.testing.assert_allclose(losses_of([second for _, second in loaded]), losses, rtol=2e-6, err_msg=str(loader))


def test_any_cut_loads_any_other(tmp_path: Path) -> None:
    saver = Case(parallel=Parallel(pipeline=2), chunks=(2, 2), steps=2 * SAVED_AT, gated=True)
    loaders = [
        replace(saver, parallel=Parallel(), chunks=(1, 1)),
        replace(saver, parallel=Parallel(), chunks=(2, 4)),
        replace(saver, chunks=(1, 4)),
        replace(saver, parallel=Parallel(tensor=2), chunks=(1, 2)),
        replace(saver, parallel=Parallel(pipeline=2), chunks=(1, 1), options=(("layout", "scripts"),)),
    ]
    go_on_elsewhere(saver, loaders, tmp_path)


@pytest.mark.long
def test_distributed_optimizer_and_tied_embeddings(tmp_path: Path) -> None:
    saver = Case(
        parallel=Parallel(pipeline=2, data=2), chunks=(1, 2), steps=2 * SAVED_AT, tied=True, distributed_optimizer=True,
        overlap_grad_reduce=True, image_counts=((3, 0, 5, 1), (0, 2, 0, 4)),
    )
    same = replace(saver, chunks=(2, 1), overlap_grad_reduce=False)
    go_on_elsewhere(saver, [same, replace(same, parallel=Parallel(data=2), chunks=(1, 2))], tmp_path)


def load_wrong(rank: int, num_ranks: int, case: Case, folder: Path) -> None:
    from megatron_dip.trainer.checkpoint import load_checkpoint

    run = Run(case, [])
    load_checkpoint(folder, run.model, run.optimizer)


def save_only(rank: int, num_ranks: int, case: Case, folder: Path) -> None:
    from megatron_dip.trainer.checkpoint import save_checkpoint

    run = Run(case, [])
    save_checkpoint(folder, run.model, run.optimizer, iteration=0)


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    case = Case()
    (nothing,) = launch_all(load_wrong, 1, case, tmp_path)
    assert nothing.error_message is not None
    assert "InputError" in nothing.error_message
    assert "holds no checkpoint" in nothing.error_message
    launch(save_only, 1, case, tmp_path)
    (other,) = launch_all(load_wrong, 1, replace(case, num_layers=(8, 10)), tmp_path)
    assert other.error_message is not None
    assert "InputError" in other.error_message
    assert "cannot be loaded: " in other.error_message
    assert "use the configuration that it was saved with" in other.error_message
