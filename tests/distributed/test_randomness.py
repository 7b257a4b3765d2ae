"""Noise that forward_step draws is one and the same on all ranks of a replica, though Megatron seeds ranks apart."""

# ruff: noqa: NPY002  (the global states that user code draws from are what is tested)

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.spec.workload import Parallel
from tests.distributed import dip_runs
from tests.distributed.launcher import launch
from tests.distributed.tiny_vlm import Case, loss_func, make_microbatch, tiny_model

pytestmark = pytest.mark.distributed


def noisy_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """The first rank embeds the noised images, the last one weighs the loss with the same draws."""
    item = next(data_iterator)
    noise = torch.rand(()) + float(np.random.rand()) + random.random()
    output = model(
        images=item["images"] * noise, tokens=item["tokens"], position_ids=item["position_ids"], cu_lengths=item["cu_lengths"],
        labels=item["labels"],
    )
    return output, partial(loss_func, item["loss_mask"] * noise)


def losses(rank: int, num_ranks: int, pipeline: int) -> dict[str, Any]:
    from megatron_dip.models.vlm import VlmConfig
    from megatron_dip.trainer.build import initialize_parallel

    case = Case(parallel=Parallel(pipeline=pipeline, data=num_ranks // pipeline), chunks=(1, 1), num_layers=(4, 4))
    initialize_parallel(case.parallel, device="cpu", seed=1, timeout_s=60)
    model = dip_runs.build(case, VlmConfig(model=tiny_model(case), parallel=case.parallel, init_method_std=0.2))
    dip = dip_runs.dip_of(case, model)
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(1234 + 100 * rank)  # as Megatron does
    state = torch.get_rng_state()
    found = []
    for forward_only in (False, True, True, False):
        model.zero_grad()
        items = [make_microbatch(seed, images) for seed, images in ((1, 2), (2, 0), (1, 2))]
        reports = dip(
            forward_step_func=noisy_step, data_iterator=iter(items), model=model.chunks, num_microbatches=3, seq_length=48, micro_batch_size=1,
            forward_only=forward_only,
        )
        found.append([float(report["lm loss"][0]) for report in reports])
    assert torch.equal(torch.get_rng_state(), state), "layers would draw other numbers"
    return {"losses": found, "replica": rank // pipeline if pipeline > 1 else rank}


def test_two_pipeline_ranks_draw_what_one_draws_and_places_draw_differently() -> None:
    (alone,) = launch(losses, 1, 1)
    first, last = launch(losses, 2, 2)
    assert first["losses"] == [[]] * 4
    for one, two in zip(alone["losses"], last["losses"], strict=True):
        assert one == pytest.approx(two, rel=1e-6)
    every = [loss for step in last["losses"] for loss in (step[0], step[2])]  # of one and the same item
    assert len({round(loss, 3) for loss in every}) == len(every)


def test_replicas_draw_differently() -> None:
    one, other = launch(losses, 2, 1)
    assert one["losses"][0][0] != pytest.approx(other["losses"][0][0], rel=1e-3)
