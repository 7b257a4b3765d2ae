"""Which cut a script's run gets: by hand, of the checkpoint, kept, or chosen by analytic costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_dip.checkouts.checkpoint_files import SavedCut
from megatron_dip.hooks import cut
from megatron_dip.hooks.arguments import add_dip_args, options_from_args
from megatron_dip.hooks.cut import RunCut, find_run_cut, run_key
from megatron_dip.iteration.cut_cache import keep_cut
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.tuned import Expected, TunedCut
from tests.iteration.cut_cases import BATCH, MODEL, RANKS

KEPT = Partition(chunks={"vit": [[4, 4]], "lm": [[5, 3]]}, sub_microbatch_size={"vit": 3, "lm": 1})
SAVED = SavedCut(chunks="{'vit': [[5, 3]], 'lm': [[4, 4]]}", sizes="{'vit': 2, 'lm': 1}", is_bound=False)
MEGATRON = {
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": RANKS, "data_parallel_size": 1, "context_parallel_size": 1,
    "sequence_parallel": False, "bf16": False, "fp16": False, "use_distributed_optimizer": False, "micro_batch_size": 1, "global_batch_size": 8,
    "seq_length": 64,
}
DESCRIPTION: Any = SimpleNamespace(
    model_spec=MODEL, undivided=("lm",), typical_microbatch=lambda sequences, length: {"vit": [16] * sequences, "lm": [length] * sequences}
)


def run_cut(*words: str) -> RunCut:
    args = arguments(*words)
    return find_run_cut(args, options_from_args(args), DESCRIPTION, RANKS)


def arguments(*words: str) -> argparse.Namespace:
    args = add_dip_args(argparse.ArgumentParser()).parse_args(["--dip-device", "cpu", *words])
    vars(args).update(MEGATRON)
    return args


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    args = arguments("--dip-cache", str(tmp_path))
    key = run_key(args, options_from_args(args), MODEL, RANKS)
    keep_cut(tmp_path, TunedCut(key=key, source="tune", partition=KEPT, profile=None, batches=[BATCH], expected=Expected(chosen_ns=1.0, today_ns=1.0)))
    return tmp_path


def test_a_kept_cut_is_taken(cache: Path) -> None:
    found = run_cut("--dip-cache", str(cache))
    assert found.partition == KEPT
    assert "megatron-dip tune" in found.origin


def test_flags_by_hand_win(cache: Path) -> None:
    assert run_cut("--dip-cache", str(cache), "--dip-chunks", "vit=2").partition.chunks == {"vit": [[2, 2], [2, 2]], "lm": [[4, 4]]}
    assert run_cut("--dip-cache", str(cache), "--dip-partition", "even").partition.chunks == {"vit": [[4, 4]], "lm": [[4, 4]]}


def test_another_device_has_another_cut(cache: Path) -> None:
    assert "analytic costs" in run_cut("--dip-cache", str(cache), "--dip-device", "h100").origin


def test_without_one_the_best_analytic_cut_is_taken(tmp_path: Path) -> None:
    found = run_cut("--dip-cache", str(tmp_path))
    assert "chosen by analytic costs" in found.origin
    assert found.partition.sub_microbatch_size["lm"] == cut.WHOLE  # its loss is the whole microbatch's
    assert run_cut("--dip-cache", str(tmp_path)) == found


def test_a_checkpoints_cut_is_kept_where_nothing_better_is_known(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut, "saved_cut", lambda args: SAVED)
    assert run_cut("--dip-cache", str(tmp_path / "empty")).partition == Partition(
        chunks={"vit": [[5, 3]], "lm": [[4, 4]]}, sub_microbatch_size={"vit": 2, "lm": 1}
    )
    assert run_cut("--dip-cache", str(cache)).partition == KEPT


def test_a_checkpoint_that_fits_no_other_cut_decides(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = SavedCut(chunks=SAVED.chunks, sizes=None, is_bound=True)
    monkeypatch.setattr(cut, "saved_cut", lambda args: bound)
    found = run_cut("--dip-cache", str(cache))
    assert found.partition.chunks["vit"] == [[5, 3]]
    assert "loads under no other" in found.origin
