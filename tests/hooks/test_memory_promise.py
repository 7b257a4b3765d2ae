"""What a plan says of a rank's memory, held against what autograd keeps while the plan runs.

Needs an installed megatron-core and no checkout.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from scripts.bench_frozen import IMAGES, TEXT, KeptBytes, batch, forward_step, provide
from scripts.bench_memory import sweep
from tests.distributed.launcher import launch
from tests.hooks.test_adapters import prepare

pytestmark = pytest.mark.distributed


@dataclass(frozen=True, slots=True)
class Promise:
    planned: int
    """Peak of the plan on this rank, without what is held all the time and captured inputs"""
    measured: int
    """Most that autograd kept"""


def run(rank: int, ranks: int, frozen: tuple[str, ...]) -> Promise:
    prepare(1, ranks, 1)
    from megatron.core import tensor_parallel

    from megatron_dip.hooks import build
    from megatron_dip.hooks.arguments import add_dip_args
    from megatron_dip.hooks.megatron_lm import dip_schedule
    from megatron_dip.without_cuda.core import CpuDeviceMode

    args = add_dip_args(argparse.ArgumentParser()).parse_args(
        ["--dip-evaluations", "20", "--dip-device", "cpu", "--dip-chunks", "vit=2", "lm=2", "--dip-sub-microbatch-size", "vit=2", "--dip-split-backward", "off"]
    )
    for name, value in {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": ranks, "data_parallel_size": 1, "context_parallel_size": 1,
        "sequence_parallel": False, "bf16": False, "fp16": False, "use_distributed_optimizer": False,
    }.items():
        setattr(args, name, value)
    with CpuDeviceMode():
        torch.manual_seed(1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        chunks = build.build_chunks(args, partial(provide, frozen, ranks))
        kept = KeptBytes({weight.untyped_storage().data_ptr() for chunk in chunks for weight in chunk.parameters()})
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda packed: packed.tensor):
            dip_schedule(lambda **_: [])(
                forward_step_func=forward_step, data_iterator=iter(batch()), model=chunks, num_microbatches=len(IMAGES), seq_length=TEXT,
                micro_batch_size=1, forward_only=False,
            )
    (built,) = build._built.values()
    assert built.forward_backward is not None
    plan = built.forward_backward.plan
    assert plan is not None
    return Promise(plan.peak_memory[rank] - plan.memory_initial[rank], kept.peak)


@pytest.mark.parametrize("frozen", [(), ("vision",)])
def test_a_plans_peak_is_what_autograd_keeps(frozen: tuple[str, ...]) -> None:
    for promise in launch(run, 2, frozen, timeout_s=240):
        assert 0.95 <= promise.measured / promise.planned <= 1.03, promise


@pytest.mark.long
def test_limits_hold_from_the_first_iteration_on_where_layers_are_offloaded() -> None:
    for outcome in launch(sweep, 2, (0.7, 0.4, 0.3), ("--dip-host-memory", "0.5"), 1, timeout_s=280):
        assert len(outcome.rows) == 4
        for row in outcome.rows[1:]:
            assert row.strategies["offload"] > 0
            assert row.limit is not None
            assert row.measured <= row.limit, row
            assert 0.94 <= (row.measured - row.static) / (row.planned - row.static) <= 1.05, row
            assert row.loss == outcome.rows[0].loss


@pytest.mark.long
def test_under_a_limit_layers_are_not_all_kept_and_losses_are_equal() -> None:
    for outcome in launch(sweep, 2, (0.6,), (), 3, timeout_s=280):
        free, limited = outcome.rows
        assert limited.loss == free.loss
        assert set(limited.strategies) != {"none"}
