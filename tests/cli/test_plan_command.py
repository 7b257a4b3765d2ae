"""``megatron-dip plan``, ``workload`` and ``check`` end to end."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from megatron_dip.cli.main import main
from megatron_dip.cost.fixed import FixedStrategyCost
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.schedule.checker import check_plan
from megatron_dip.schedule.grid import parse_grid, plan_cells
from megatron_dip.simulator.baselines import BASELINES, run_baseline
from megatron_dip.spec.codec import load_partition, load_plan, load_workload, save
from megatron_dip.spec.workload import Parallel, Training, Workload
from tests.strategies import vlm_case


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    case = vlm_case(num_microbatches=8)
    path = tmp_path / "workload.json"
    save(path, Workload(
        format="megatron-dip/workload/1", model=case.model, parallel=Parallel(pipeline=2), profile=case.profile, microbatches=case.microbatches,
    ))
    return path


def plan(workload: Path, *more: str) -> int:
    return main(["plan", str(workload), "--output", str(workload.parent / "plan.json"), "--evaluations", "40", *more])


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_workload_with_a_profile_is_planned_and_the_plan_holds(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(workload) == 0
    made = load_plan(workload.parent / "plan.json")
    microbatches = load_workload(workload).microbatches
    assert check_plan(made, microbatches).makespan == made.claimed_makespan
    assert made.memory_capacity is None
    text = capsys.readouterr().out
    for word in ("iteration time", "bound of the partition", "bound free of the partition", "bubbles", "peak memory", "interleaved", "entrain"):
        assert word in text
    assert main(["check", str(workload.parent / "plan.json"), "--workload", str(workload)]) == 0
    assert "holds" in capsys.readouterr().out


def test_the_profile_is_used_as_it_is(workload: Path) -> None:
    assert plan(workload, "--chunks", "vit=1,lm=1", "--sub-microbatch", "vit=2,lm=1", "--no-baselines") == 0
    made = load_plan(workload.parent / "plan.json")
    layers = {(s.module, s.rank): s.layers[1] for s in made.stages}
    for stage in made.stages:
        # vlm_case: a vit layer takes 1000 ns an image forward, 2000 ns backward; an lm layer 300 and 600, its head 200 and 400.
        forward = 1000 * stage.tokens * layers["vit", stage.rank] if stage.module == "vit" else 300 * layers["lm", stage.rank]
        head = 200 if stage.module == "lm" and stage.rank == 1 else 0
        assert stage.duration == (forward + head) * (1 if stage.kind == "fw" else 2)


def test_equal_evaluations_give_equal_plans_and_the_partition_comes_back_by_file(workload: Path, tmp_path: Path) -> None:
    saved = str(tmp_path / "partition.json")
    assert plan(workload, "--save-partition", saved, "--grid", str(tmp_path / "grid.txt"), "--no-baselines") == 0
    one = load_plan(tmp_path / "plan.json")
    assert load_partition(saved).chunks == one.chunks
    assert parse_grid((tmp_path / "grid.txt").read_text()) == plan_cells(one)
    assert plan(workload, "--partition", saved, "--no-baselines") == 0
    two = load_plan(tmp_path / "plan.json")
    assert msgspec.structs.replace(one, planning_ns=0) == msgspec.structs.replace(two, planning_ns=0)


def test_a_process_of_its_own_makes_the_same_plan(workload: Path) -> None:
    """The command line goes without collections and without numba's look for BLAS, which a caller in a longer process keeps."""
    assert plan(workload, "--no-baselines") == 0
    before = load_plan(workload.parent / "plan.json")
    command = [sys.executable, "-m", "megatron_dip.cli.main", "plan", str(workload), "--output", str(workload.parent / "plan.json"),
               "--evaluations", "40", "--no-baselines"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert msgspec.structs.replace(load_plan(workload.parent / "plan.json"), planning_ns=before.planning_ns) == before
    assert gc.isenabled()
    assert sys.modules.get("scipy.linalg.cython_blas", gc) is not None


def test_the_command_line_beats_the_file(workload: Path) -> None:
    change(workload, training={"split_backward": True})
    assert plan(workload, "--no-baselines") == 0
    assert any(stage.kind == "w" for stage in load_plan(workload.parent / "plan.json").stages)
    assert plan(workload, "--no-split-backward", "--no-baselines") == 0
    assert not any(stage.kind == "w" for stage in load_plan(workload.parent / "plan.json").stages)


def test_the_recompute_setting_is_kept_and_auto_is_free(workload: Path) -> None:
    change(workload, training={"recompute": "full"})
    assert plan(workload, "--no-baselines") == 0
    assert {label for stage in load_plan(workload.parent / "plan.json").stages for label in stage.strategy} == {"full"}
    change(workload, training={"recompute": "auto"})
    assert plan(workload, "--no-baselines") == 0
    assert {label for stage in load_plan(workload.parent / "plan.json").stages for label in stage.strategy} == {"none"}


def test_a_replica_gets_its_own_microbatches(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(workload, parallel={"pipeline": 2, "data": 2})
    assert plan(workload, "--replica", "1", "--balance", "off") == 0
    made = load_plan(workload.parent / "plan.json")
    check_plan(made, load_workload(workload).replica_microbatches(1))
    assert "replica 1 of 2" in capsys.readouterr().out


def test_a_sample_chooses_the_partition(workload: Path, tmp_path: Path) -> None:
    other = tmp_path / "sample" / "other.json"
    other.parent.mkdir()
    other.write_text(workload.read_text())
    change(other, microbatches=[{"lm": [10]}, {"vit": [1], "lm": [10]}])
    assert plan(workload, "--sample", str(other.parent), str(workload), "--no-baselines") == 0
    other.unlink()
    assert plan(workload, "--sample", str(other.parent), "--no-baselines") == 2


def test_the_memory_choice_may_be_exact(workload: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    change(workload, memory_capacity_bytes=300)
    fixed = ("--chunks", "vit=1,lm=1", "--sub-microbatch", "vit=1,lm=1", "--no-baselines")
    times = []
    for memory in ("relaxation", "exact"):
        assert plan(workload, "--memory", memory, *fixed) == 0
        made = load_plan(workload.parent / "plan.json")
        assert any("full" in stage.strategy for stage in made.stages)
        assert max(made.peak_memory) <= 300
        times.append(made.claimed_makespan)
    assert times[1] <= times[0]
    (workload.parent / "plan.json").unlink()
    monkeypatch.setitem(sys.modules, "highspy", None)
    assert plan(workload, "--memory", "exact", *fixed) == 2
    assert "highspy is not installed" in capsys.readouterr().err
    assert not (workload.parent / "plan.json").exists()


def test_the_papers_partitioner_is_there_too(workload: Path) -> None:
    assert plan(workload, "--partitioner", "paper", "--search", "fifo", "--no-baselines") == 0


BAD: list[tuple[dict[str, Any], list[str], str]] = [
    ({}, ["--time-budget", "inf"], "--time-budget"),
    ({}, ["--time-budget", "nan"], "--time-budget"),
    ({}, ["--time-budget", "-1"], "--time-budget"),
    ({}, ["--evaluations", "0"], "--evaluations"),
    ({}, ["--threads", "0"], "--threads"),
    ({}, ["--seed", "-1"], "--seed"),
    ({}, ["--chunks", "vit"], "--chunks"),
    ({}, ["--chunks", "audio=2"], "--chunks"),
    ({}, ["--chunks", "vit=1,vit=2"], "--chunks"),
    ({}, ["--chunks", "vit=999"], "--chunks"),
    ({}, ["--sub-microbatch", "vit=0"], "--sub-microbatch"),
    ({}, ["--replica", "1"], "--replica"),
    ({}, ["--partition", "nowhere.json"], "nowhere.json"),
    ({}, ["--sample", "nowhere.json"], "nowhere.json"),
    ({"memory_capacity_bytes": 3}, [], "memory_capacity_bytes"),
    ({"microbatches": []}, [], "microbatches"),
    ({"format": "megatron-dip/workload/9"}, [], "format"),
    ({"surprise": 1}, [], "surprise"),
    ({"parallel": {"pipeline": -2}}, [], "parallel.pipeline"),
]


@pytest.mark.parametrize(("fields", "more", "field"), BAD, ids=lambda value: str(value)[:40])
def test_a_mistake_exits_with_2_and_writes_nothing(
    workload: Path, fields: dict[str, Any], more: list[str], field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(workload, **fields)
    assert plan(workload, *more) == 2
    message = capsys.readouterr().err
    assert field in message
    assert "Remedy:" in message
    assert os.listdir(workload.parent) == ["workload.json"]


def test_wrong_partitions_are_refused(workload: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for chunks in ({"vit": [[2, 2]]}, {"vit": [[2, 2]], "lm": [[1, 2]]}, {"vit": [[4]], "lm": [[4]]}, {"vit": [[5, -1]], "lm": [[2, 2]]}):
        path.write_text(json.dumps({"format": "megatron-dip/partition/1", "chunks": chunks, "sub_microbatch_size": {"vit": 1, "lm": 1}}))
        assert plan(workload, "--partition", str(path)) == 2


def test_check_tells_a_spoiled_plan_from_an_unreadable_one(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(workload, "--no-baselines") == 0
    path = workload.parent / "plan.json"
    change(path, claimed_makespan=1)
    assert main(["check", str(path)]) == 1
    assert "claimed_makespan is 1 ns" in capsys.readouterr().err
    path.write_text("{")
    assert main(["check", str(path)]) == 2


def test_workloads_are_written_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workload", "vlm-s", "--seed", "5", "--microbatches", "4", "--pipeline", "2", "--output", str(tmp_path / "w.json")]) == 0
    made = load_workload(tmp_path / "w.json")
    assert (made.parallel.pipeline, made.parallel.tensor, len(made.microbatches)) == (2, 4, 4)
    assert made.training == Training()
    assert main(["workload", "vlm-s", "--data", "dynamic", "--iterations", "3", "--microbatches", "2", "--output", str(tmp_path / "run")]) == 0
    assert sorted(os.listdir(tmp_path / "run")) == ["vlm-s-00001.json", "vlm-s-00002.json", "vlm-s-00003.json"]
    capsys.readouterr()
    assert main(["workload", "t2v-s", "--microbatches", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "t2v-s"
    assert main(["workload", "vlm-xxl"]) == 2
    assert main(["workload", "vlm-s", "--iterations", "3"]) == 2
    assert main(["workload", "vlm-s", "--tensor", "0"]) == 2


def test_baselines_obey_a_fixed_strategy(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of the table of baselines, as (name, time): under full recomputation every one of them takes longer."""

    def table() -> dict[str, str]:
        assert plan(workload, "--chunks", "vit=1,lm=1", "--sub-microbatch", "vit=2,lm=1") == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        return {words[0]: " ".join(words[1:3]) for words in lines if words and words[0] in BASELINES}

    free = table()
    change(workload, training={"recompute": "full"})
    full = table()
    made, costs = load_workload(workload), FixedStrategyCost(ProfileCost(vlm_case().profile), "full")
    for name in free:
        found = run_baseline(name, made.model_spec, 2, made.microbatches, costs)
        assert found is not None
        assert full[name] != free[name]
        assert full[name] == f"{found.makespan_ns / 1e3:.4f} µs"
