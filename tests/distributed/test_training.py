"""The training loop end to end on a tiny copy of the digits example: schedules agree, runs resume, evaluation counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from megatron_dip.spec.codec import load_example
from megatron_dip.spec.training import RunRecord, RunSettings, SchedulePlan
from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch

pytestmark = pytest.mark.distributed

DIGITS = Path(__file__).parents[2] / "examples" / "vlm" / "digits"
SCHEDULES = {
    "dip": SchedulePlan(name="dip", plan_s=0.01),
    "1f1b": SchedulePlan(name="1f1b"),
    "interleaved": SchedulePlan(name="interleaved", layout="parameters", virtual=2),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with a model of a few thousand weights and 12 scans to score."""
    folder = tmp_path_factory.mktemp("tiny")
    shutil.copy(DIGITS / "example.py", folder)
    config = msgspec.to_builtins(load_example(DIGITS / "config.json"))
    for module in config["model"]["modules"]["modules"]:
        module |= {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    config |= {"num_microbatches": 4, "virtual_pipeline": {"vit": 2, "lm": 1}, "chunks": {}}
    config["data"] |= {"image_counts": [[0, 3], [0, 0], [2, 4]], "held_out": 12}
    config["optimizer"] |= {"warmup_iterations": 2, "lr": 1e-3}
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    return folder


def train_rank(rank: int, num_ranks: int, folder: Path, settings: RunSettings) -> list[str]:
    from megatron_dip.trainer.loop import train

    lines: list[str] = []
    train(folder, settings, lines.append)
    return lines


def run(folder: Path, record: Path, schedule: SchedulePlan, parallel: Parallel, **changes: Any) -> RunRecord:
    config = load_example(folder / "config.json")
    settings = RunSettings(
        **{
            "schedule": schedule, "parallel": parallel, "device": "cpu", "seed": 3, "iterations": 4, "data": config.data,
            "num_microbatches": config.num_microbatches, "timeout_s": 60.0, "record": str(record), "log_interval": 1, **changes,
        }
    )
    settings.validate()
    lines = launch(train_rank, parallel.num_gpus, folder, settings, timeout_s=120)
    assert any("held out" in line for line in lines[0])
    assert not any(lines[1:])
    return msgspec.json.decode(record.read_bytes(), type=RunRecord)


def losses(record: RunRecord) -> list[float]:
    return [figures.loss for figures in record.iterations]


def test_schedules_train_alike(folder: Path, tmp_path: Path) -> None:
    """Same weights, data and optimizer: four steps under DIP, 1F1B, interleaving, and DIP on two replicas and on two tensor ranks."""
    records = {name: run(folder, tmp_path / f"{name}.json", schedule, Parallel(pipeline=2)) for name, schedule in SCHEDULES.items()}
    records["replicas"] = run(
        folder, tmp_path / "replicas.json", SCHEDULES["dip"], Parallel(pipeline=1, data=2), distributed_optimizer=True, overlap_grad_reduce=True
    )
    records["tensor"] = run(folder, tmp_path / "tensor.json", SCHEDULES["dip"], Parallel(pipeline=1, tensor=2))
    for name, record in records.items():
        assert losses(record) == pytest.approx(losses(records["1f1b"]), rel=2e-4), name
        assert [figures.asked for figures in record.evaluations] == [12]
        assert abs(record.evaluations[0].right - records["1f1b"].evaluations[0].right) <= 1, name
        assert losses(record)[-1] < losses(record)[0]
    assert records["dip"].iterations[-1].planned_ns is not None
    assert records["1f1b"].iterations[-1].planned_ns is None


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(folder: Path, tmp_path: Path) -> None:
    whole = run(
        folder, tmp_path / "whole.json", SCHEDULES["dip"], Parallel(pipeline=2), save=str(tmp_path / "saved"), save_interval=2,
        timelines=str(tmp_path / "timelines"),
    )
    for name in ("plan", "planned", "measured", "profile"):
        assert (tmp_path / "timelines" / f"{name}.json").is_file()
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("2")
    # On another cut: what was saved from DIP's two ranks goes on in one process.
    rest = run(folder, tmp_path / "rest.json", SCHEDULES["1f1b"], Parallel(pipeline=1), load=str(tmp_path / "saved"))
    assert [figures.iteration for figures in rest.iterations] == [3, 4]
    assert losses(rest) == pytest.approx(losses(whole)[2:], rel=1e-4)
    assert rest.evaluations[-1].right == whole.evaluations[-1].right
