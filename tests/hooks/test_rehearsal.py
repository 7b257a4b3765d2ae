"""A rehearsal measures a script's data and layers, chooses a cut that the run after it finds, and ends every rank's process; no checkout is needed."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_dip.hooks.arguments import add_dip_args, options_from_args
from megatron_dip.iteration.cut_cache import load_tuned
from megatron_dip.spec.codec import load_partition, load_profile
from megatron_dip.spec.errors import InputError
from tests.distributed.launcher import launch
from tests.hooks.test_adapters import Case, batches, forward_step_llava, prepare, provide_llava

pytestmark = pytest.mark.distributed

CASE = Case(model="clip", images=(2, 0, 3, 1))
RANKS = 2


def rehearse(rank: int, ranks: int, folder: str, flags: Sequence[str] | None = ()) -> tuple[int | None, str]:
    """Exit status of a rehearsal with these flags (None: there is none), and origin of the cut of the run after it on as many ranks."""
    prepare(1, ranks, 1)
    from megatron.core import tensor_parallel

    from megatron_dip.hooks.build import build_chunks, built_model
    from megatron_dip.hooks.megatron_lm import dip_schedule
    from megatron_dip.without_cuda.core import CpuDeviceMode

    def arguments(*words: str) -> argparse.Namespace:
        args = add_dip_args(argparse.ArgumentParser()).parse_args(["--dip-time-budget", "0.01", "--dip-cache", f"{folder}/cache", "--dip-device", "cpu", *words])
        vars(args).update({
            "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": ranks, "data_parallel_size": 1, "context_parallel_size": 1,
            "sequence_parallel": False, "bf16": False, "fp16": False, "use_distributed_optimizer": False, "micro_batch_size": 1,
        })
        return args

    def stock(**arguments: Any) -> None:
        raise AssertionError("the stock schedule was chosen")

    with CpuDeviceMode():
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        provider = partial(provide_llava, CASE, ranks)
        status = None
        if flags is not None:
            chunks = build_chunks(arguments("--dip-rehearse", f"{folder}/tuned", *flags), provider)
            items = batches(CASE)
            data = itertools.cycle(items)
            try:
                for _ in range(200):
                    dip_schedule(stock)(
                        forward_step_func=forward_step_llava, data_iterator=data, model=chunks, num_microbatches=len(items), seq_length=1,
                        micro_batch_size=1, forward_only=False,
                    )
            except SystemExit as end:
                status = int(end.code or 0)
        found = built_model(build_chunks(arguments(), provider))
        assert found is not None
        return status, found.cut.origin


def test_what_a_rehearsal_writes_the_run_after_it_finds(tmp_path: Path) -> None:
    results = launch(rehearse, RANKS, str(tmp_path), timeout_s=240)
    assert [status for status, _ in results] == [0] * RANKS
    assert all("kept by megatron-dip tune" in origin for _, origin in results)
    (kept,) = (tmp_path / "cache").iterdir()
    tuned = load_tuned(kept)
    assert sum(map(len, tuned.batches)) >= 256
    assert load_partition(tmp_path / "tuned" / "partition.json") == tuned.partition
    profile = load_profile(tmp_path / "tuned" / "profile.json")
    # Whole microbatches, halves and single images.
    assert {point.instances for point in profile.modules["vit"].layer.points} >= {1, 2, 3}
    report = (tmp_path / "tuned" / "report.txt").read_text()
    assert f"{tuned.expected.chosen_ns / 1e6:.1f} ms" in report
    assert "stock 1F1B" in report


def test_one_rank_stands_for_the_ranks_of_the_run(tmp_path: Path) -> None:
    """Layers, embedding and head are told apart there too, and the run on two ranks finds the cut."""
    ((status, origin),) = launch(rehearse, 1, str(tmp_path), ("--dip-rehearse-ranks", "2"), timeout_s=240)
    assert status == 0
    assert "kept by" not in origin  # for another number of ranks
    (kept,) = (tmp_path / "cache").iterdir()
    tuned = load_tuned(kept)
    assert (tuned.key.pipeline, tuned.partition.num_ranks) == (2, 2)
    assert load_partition(tmp_path / "tuned" / "partition.json") == tuned.partition
    profile = load_profile(tmp_path / "tuned" / "profile.json")
    assert {point.instances for point in profile.modules["vit"].layer.points} >= {1, 2, 3}
    assert all("kept by megatron-dip tune" in origin for _, origin in launch(rehearse, RANKS, str(tmp_path), None, timeout_s=120))


def test_one_rank_is_meant_where_one_stands_for_several() -> None:
    parser = add_dip_args(argparse.ArgumentParser())
    args = parser.parse_args(["--dip-rehearse", "x", "--dip-rehearse-ranks", "4"])
    args.pipeline_model_parallel_size = 4
    with pytest.raises(InputError, match="on one pipeline rank"):
        options_from_args(args)
