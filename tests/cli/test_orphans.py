"""Behind a run there is no process of it and nobody who holds its output, however it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cli.tiny_runs import TIME_LIMIT_S, start, train, write_example

pytestmark = pytest.mark.distributed


def of_run(mark: str) -> list[psutil.Process]:
    """Processes whose environment holds ``mark``: a run's, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RUN_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_nothing_is_left_of_a_run_that_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's writer of checkpoints starts processes, which would hold the pipe open: ``train`` waits for its end."""
    monkeypatch.setenv("RUN_MARK", str(tmp_path))
    result = train(write_example(tmp_path / "example"), "--iterations", "1", "--save", str(tmp_path / "saved"))
    assert result.returncode == 0, result.stderr
    assert "saved iteration 1" in result.stdout
    assert of_run(str(tmp_path)) == []


@pytest.mark.long
def test_ranks_that_torchrun_started_leave_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_MARK", str(tmp_path))
    folder = write_example(tmp_path / "example")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "29643", "-m",
         "megatron_dip.cli.main", "train", str(folder), "--device", "cpu", "--iterations", "1", "--save", str(tmp_path / "saved")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "saved" / "iter_0000001").is_dir()
    deadline = time.monotonic() + 20  # multiprocessing's resource tracker ends when it sees that nobody is left
    while of_run(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert of_run(str(tmp_path)) == []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
@pytest.mark.long
def test_ranks_end_with_a_parent_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals) -> None:
    monkeypatch.setenv("RUN_MARK", str(tmp_path))
    process = start(
        write_example(tmp_path / "example"), "--iterations", "100000", "--save", str(tmp_path / "saved"), "--save-interval", "1"
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("saved iteration 1 "):
                break
        assert len(of_run(str(tmp_path))) > 3  # parent, two ranks, what they started
        os.kill(process.pid, how)
        process.communicate(timeout=60)  # ends when nobody holds the pipes any more
        deadline = time.monotonic() + 20
        while of_run(str(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert of_run(str(tmp_path)) == []
    finally:
        process.kill()
        for left in of_run(str(tmp_path)):
            left.kill()
