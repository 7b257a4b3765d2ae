"""What people can do wrong with ``megatron-dip train``: one clear message, a non-zero exit, no hang, on every rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_dip.cli.main import main
from megatron_dip.spec.errors import EXIT_CODE

DIGITS = Path(__file__).parents[2] / "examples" / "vlm" / "digits"
COMMAND = [sys.executable, "-m", "megatron_dip.cli.main", "train"]


@pytest.mark.parametrize(
    ("options", "field", "problem"),
    [
        (["--pipeline", "0"], "--pipeline = 0", "at least 1"),
        (["--data", "3"], "--num-microbatches = 8", "3 replicas"),
        (["--threads", "0"], "--threads = 0", "at least 1"),
        (["--timeout", "0"], "--timeout = 0.0", "positive"),
        (["--plan-time", "-1"], "--plan-time = -1.0", "outside"),
        (["--pipeline-schedule", "interleaved", "--stock-layout", "scripts"], "--stock-layout = 'scripts'", "interleave"),
        (["--pipeline-schedule", "interleaved", "--pipeline", "1"], "--pipeline = 1", "several ranks"),
        (["--pipeline-schedule", "interleaved", "--num-microbatches", "7"], "--num-microbatches = 7", "multiple"),
        (["--pipeline-schedule", "1f1b", "--overlap-grad-reduce"], "--overlap-grad-reduce = True", "without images"),
        (["--partition", "absent.json"], "absent.json", "cannot be read"),
        (["--profile", "absent.json"], "absent.json", "cannot be read"),
        (["--pipeline-schedule", "1f1b", "--profile", "absent.json"], "--profile = 'absent.json'", "not planned"),
        (["--record", "absent/record.json"], "--record", "directory does not exist"),
    ],
)
def test_a_bad_option_is_named_before_any_rank_starts(
    capfd: pytest.CaptureFixture[str], options: list[str], field: str, problem: str
) -> None:
    assert main(["train", str(DIGITS), "--device", "cpu", *options]) == EXIT_CODE
    error = capfd.readouterr().err
    assert error.startswith("megatron-dip: error: ")
    assert error.count("\n") == 1
    assert field in error
    assert problem in error
    assert "Remedy: " in error


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), ("{", "broken JSON"), ('{"format": "megatron-dip/example/9"}', "not a known format"), ("{}", "not a known format")],
)
def test_an_unreadable_example_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert main(["train", str(tmp_path), "--device", "cpu"]) == EXIT_CODE
    error = capfd.readouterr().err
    assert problem in error
    assert "config.json" in error


@pytest.mark.parametrize(
    ("chunks", "problem"),
    [
        ({"2": {"vit": [[1, 3], [3, 2]], "lm": [[2, 2]]}}, "chunks.2.chunks.vit = [[1, 3], [3, 2]]: adds up to 9 layers, the module has 8"),
        ({"4": {"vit": [[4, 4]], "lm": [[1, 1, 1, 1]]}}, "has 2 entries for 4 pipeline ranks"),
        ({"2": {"vit": [[4, 4]]}}, "module 'lm' is missing"),
    ],
)
def test_chunks_that_do_not_fit_the_model_are_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], chunks: dict[str, object], problem: str
) -> None:
    config = json.loads((DIGITS / "config.json").read_text()) | {"chunks": chunks}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["train", str(tmp_path), "--device", "cpu"]) == EXIT_CODE
    assert problem in capfd.readouterr().err


def run_train(*options: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, str(DIGITS), "--device", "cpu", *options]
    return subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=240, check=False
    )


def errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("megatron-dip: error: ")]


@pytest.mark.distributed
def test_too_few_layers_end_every_rank_with_the_message(tmp_path: Path) -> None:
    config = json.loads((DIGITS / "config.json").read_text()) | {"chunks": {}, "virtual_pipeline": {"vit": 9, "lm": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "example.py").write_text((DIGITS / "example.py").read_text())
    result = subprocess.run(
        [*COMMAND, str(tmp_path), "--device", "cpu", "--pipeline", "2"], capture_output=True, text=True, timeout=240, check=False
    )
    assert result.returncode == EXIT_CODE
    assert {line.split(": ")[2] for line in errors(result)} == {"rank 0", "rank 1"}
    assert all("layers" in line and "Remedy: " in line for line in errors(result))


@pytest.mark.distributed
def test_bad_own_data_end_every_rank_with_the_message(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", images=np.zeros((4, 8, 8)), answers=np.array(["one", "", "two", "two"]))
    result = run_train("--data-file", str(tmp_path / "own.npz"))
    assert result.returncode == EXIT_CODE
    assert errors(result)
    assert all("answers[1] = '': an answer without text" in line for line in errors(result))


@pytest.mark.distributed
@pytest.mark.long
def test_a_wrong_number_of_ranks_is_said_by_each_of_them() -> None:
    """Ranks that torchrun started: as many as it says, not as the parallel sizes need."""
    for rank in ("0", "2"):
        result = run_train("--pipeline", "2", environment={"RANK": rank, "WORLD_SIZE": "3", "LOCAL_RANK": rank})
        assert result.returncode == EXIT_CODE
        assert len(errors(result)) == 1
        assert f"rank {rank}: " in errors(result)[0]
        assert "needs 2 ranks, 3 were started" in errors(result)[0]


@pytest.mark.distributed
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.long
def test_a_rank_that_dies_or_hangs_ends_the_run_within_the_time_limit(how: signal.Signals) -> None:
    command = [*COMMAND, str(DIGITS), "--device", "cpu", "--iterations", "200", "--log-interval", "1", "--timeout", "20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("iteration    2"):
                break
        ranks = {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()}
        ranks["1"].send_signal(how)
        struck = time.monotonic()
        _, stderr = process.communicate(timeout=150)
        assert process.returncode != 0
        # The limit, what an iteration takes at most on a busy machine, and the grace that other ranks get.
        assert time.monotonic() - struck < 120
        expected = "rank 1 was killed by SIGKILL" if how == signal.SIGKILL else "rank 0"
        assert any(expected in line for line in stderr.splitlines() if line.startswith("megatron-dip: error: "))
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in ranks.values())
    finally:
        process.kill()


@pytest.mark.distributed
def test_torchrun_starts_the_ranks(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "29641", "-m",
         "megatron_dip.cli.main", "train", str(DIGITS), "--device", "cpu", "--iterations", "1", "--num-microbatches", "2", "--record", str(record)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=240, check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "held out: " in result.stdout
    assert record.is_file()
