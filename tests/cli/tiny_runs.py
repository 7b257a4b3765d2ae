"""Runs ``megatron-dip train`` on examples/vlm/tiny, with what a test adds to its example.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TINY = Path(__file__).parents[2] / "examples" / "vlm" / "tiny"
COMMAND = [sys.executable, "-m", "megatron_dip.cli.main", "train"]
TIME_LIMIT_S = 400
"""Of a run on a busy machine whose kernels are not compiled yet."""


def write_example(folder: Path, code: str = "") -> Path:
    """A folder with the tiny example, ``code`` added behind it: there ``tiny`` is its module."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text((TINY / "config.json").read_text())
    (folder / "example.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('tiny_example', {str(TINY / 'example.py')!r})\n"
        "tiny = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(tiny)\n"
        "Dataset, forward_step, evaluation_step = tiny.Dataset, tiny.forward_step, tiny.evaluation_step\n" + code
    )
    return folder


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [*COMMAND, str(folder), "--device", "cpu", "--log-interval", "1", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})


def train(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The run when it has ended and nobody holds its output any more."""
    process = start(folder, *options)
    try:
        stdout, stderr = process.communicate(timeout=TIME_LIMIT_S)
    finally:
        process.terminate()  # it takes its ranks along
        process.wait()
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("megatron-dip: error: ")]
