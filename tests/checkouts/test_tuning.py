"""How a rehearsal is started: the run's flags, less what a rehearsal goes without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from megatron_dip.checkouts.tuning import rehearse, without_flags
from megatron_dip.spec.errors import InputError

FLAGS = ["--pipeline-model-parallel-size", "2", "--tensor-model-parallel-size=3", "--global-batch-size", "16", "--save", "x", "--load=y", "--lr", "1"]


class Starter:
    def __init__(self, output: Path, status: int = 0) -> None:
        self.output, self.status = output, status
        self.command: list[str] = []

    def __call__(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        self.command = list(command)
        if self.status == 0:
            self.output.mkdir(exist_ok=True)
            (self.output / "report.txt").write_text("report")
        return self.status


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "pretrain.py"
    file.touch()
    return file


def test_the_ranks_of_one_replica_run_its_share(script: Path, tmp_path: Path) -> None:
    start = Starter(tmp_path / "tuned")
    rehearse(script, FLAGS, tmp_path / "tuned", "cpu", data_parallel=4, start=start)
    after = start.command[start.command.index(str(script)) + 1 :]
    assert start.command[start.command.index("--nproc-per-node") + 1] == "6"
    assert not {"--save", "x", "--load=y", "--load"} & set(after)
    assert after[after.index("--lr") + 1] == "1"
    assert after[len(after) - 1 - after[::-1].index("--global-batch-size") + 1] == "4"
    assert after[after.index("--dip-rehearse") + 1] == str(tmp_path / "tuned")


def test_one_rank_stands_for_a_pipeline(script: Path, tmp_path: Path) -> None:
    start = Starter(tmp_path / "tuned")
    rehearse(script, FLAGS, tmp_path / "tuned", "cpu", one_rank=True, start=start)
    after = start.command[start.command.index(str(script)) + 1 :]
    assert start.command[start.command.index("--nproc-per-node") + 1] == "3"
    assert after[len(after) - 1 - after[::-1].index("--pipeline-model-parallel-size") + 1] == "1"
    assert after[after.index("--dip-rehearse-ranks") + 1] == "2"


def test_a_script_that_does_not_get_through_is_said(script: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ended with status 1"):
        rehearse(script, FLAGS, tmp_path / "tuned", "cpu", start=Starter(tmp_path / "tuned", status=1))


@pytest.mark.parametrize(("flags", "replicas", "problem"), [
    (["--global-batch-size", "6"], 4, "cannot be shared"), (["--pipeline-model-parallel-size", "two"], 1, "is not a number"), ([], 0, "at least 1"),
])
def test_flags_that_cannot_be(flags: list[str], replicas: int, problem: str, script: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem):
        rehearse(script, flags, tmp_path / "tuned", "cpu", replicas, start=Starter(tmp_path / "tuned"))


def test_flags_are_left_out_with_their_values() -> None:
    assert without_flags(["a", "--save", "x", "--save=y", "--saved", "z"], ["--save"]) == ["a", "--saved", "z"]
