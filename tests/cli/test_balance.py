"""A global batch of several replicas is dealt by ``plan`` and ``simulate`` as training deals it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from megatron_dip.cli.main import main
from megatron_dip.spec.codec import load_plan, load_workload, save
from megatron_dip.spec.simulation import SimulationResult
from megatron_dip.spec.workload import Parallel, Workload
from tests.strategies import vlm_case


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A workload whose first replica reads all images, and a cut."""
    case = vlm_case()
    workload, cut = tmp_path / "workload.json", tmp_path / "cut.json"
    save(workload, Workload(
        format="megatron-dip/workload/1", model=case.model, parallel=Parallel(pipeline=2, data=2), profile=case.profile,
        microbatches=[{"vit": [1] * (0 if number % 2 else 3), "lm": [10]} for number in range(8)],
    ))
    save(cut, case.partition)
    return workload, cut


def test_a_plan_is_for_what_the_replica_is_dealt(files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload, cut = files
    images: dict[tuple[str, int], int] = {}
    for balance in ("auto", "off"):
        for replica in (0, 1):
            plan = tmp_path / f"{balance}{replica}.json"
            words = ["plan", str(workload), "--partition", str(cut), "--evaluations", "5", "--no-baselines", "--output", str(plan)]
            assert main([*words, "--replica", str(replica), "--balance", balance]) == 0
            assert main(["check", str(plan), "--workload", str(workload), "--replica", str(replica)]) == 0
            stages = load_plan(plan).stages
            images[balance, replica] = sum(s.instances for s in stages if s.module == "vit" and s.kind == "fw" and s.rank == 0)
    assert (images["off", 0], images["off", 1]) == (12, 0)
    assert images["auto", 0] == images["auto", 1] == 6
    assert "4 of 8 microbatches change replicas" in capsys.readouterr().out
    # What is neither read nor dealt does not hold.
    assert main(["check", str(tmp_path / "off0.json"), "--workload", str(workload), "--replica", "1"]) == 1


@pytest.mark.parametrize("schedule", ["dip", "1f1b", "entrain"])
def test_simulated_replicas_are_dealt_as_asked_for(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], schedule: str
) -> None:
    workload, cut = files
    seconds: dict[str, float] = {}
    for balance in ("auto", "off", "all"):
        words = ["simulate", str(workload), "--schedule", schedule, "--balance", balance, "--evaluations", "20"]
        words += ["--partition", str(cut)] if schedule == "dip" else []
        assert main([*words, "--json"]) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert set(result) == set(SimulationResult.__struct_fields__)
        seconds[balance] = result["iteration_time_s"]
        assert main(words) == 0
        printed = capsys.readouterr().out
        assert ("change replicas" in printed) == (balance == "all" or (balance == "auto" and schedule != "1f1b"))
    assert seconds["all"] < 0.9 * seconds["off"]
    assert seconds["auto"] == (seconds["off"] if schedule == "1f1b" else seconds["all"])


def test_unequal_numbers_of_microbatches_stay_as_read(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    workload, cut = files
    read = load_workload(workload)
    save(workload, msgspec.structs.replace(read, microbatches=read.microbatches[:7]))
    assert main(["simulate", str(workload), "--partition", str(cut), "--evaluations", "5"]) == 0
    assert "replicas" not in capsys.readouterr().out
