"""The clips example end to end in a tiny form: schedules agree, clips run in parts, runs resume on another cut, scoring makes clips."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from megatron_dip.spec.codec import load_example
from megatron_dip.spec.workload import Parallel
from tests.distributed.test_training import SCHEDULES, losses, run

pytestmark = pytest.mark.distributed

CLIPS = Path(__file__).parents[2] / "examples" / "t2v" / "digits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_clips")
    shutil.copy(CLIPS / "example.py", folder)
    config = msgspec.to_builtins(load_example(CLIPS / "config.json"))
    for module in config["model"]["modules"]["modules"]:
        module |= {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    config |= {
        "num_microbatches": 4, "virtual_pipeline": {"lm": 1, "dit": 2}, "chunks": {}, "sub_microbatch_size": {"lm": 8, "dit": 2},
    }
    config["data"] |= {"clips": [[1, 4]], "sampled": 6, "steps": 2}
    config["optimizer"] |= {"warmup_iterations": 2, "lr": 1e-3}
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    return folder


@pytest.mark.long
def test_schedules_train_and_score_alike_and_runs_resume(folder: Path, tmp_path: Path) -> None:
    records = {
        name: run(folder, tmp_path / f"{name}.json", schedule, Parallel(pipeline=2), save=str(tmp_path / name), save_interval=2)
        for name, schedule in SCHEDULES.items()
    }
    for name, record in records.items():
        assert losses(record) == pytest.approx(losses(records["1f1b"]), rel=2e-4), name
        scores = record.evaluations[0].scores
        assert list(scores) == ["digits", "motions", "control: digits", "control: motions"]
        assert {asked for _, asked in scores.values()} == {6}
    (tmp_path / "dip" / "latest_checkpointed_iteration.txt").write_text("2")
    rest = run(folder, tmp_path / "rest.json", SCHEDULES["1f1b"], Parallel(pipeline=1), load=str(tmp_path / "dip"))
    assert losses(rest) == pytest.approx(losses(records["dip"])[2:], rel=1e-4)
