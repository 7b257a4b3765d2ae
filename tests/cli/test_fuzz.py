"""A short run of scripts/fuzz_commands.py: mutated files and arguments end in one line, in time, and leave nothing behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def fuzz(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "fuzz_commands.py"), *flags], capture_output=True, text=True, timeout=400, check=False, cwd=ROOT
    )


def test_mutated_files_and_arguments_end_in_one_line() -> None:
    result = fuzz("--cases", "68", "--seed", "2026")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "68 cases" in result.stdout
    assert "0 faults" in result.stdout


def test_the_fuzzer_sees_a_traceback_a_hang_and_a_file_left(tmp_path: Path) -> None:
    """Its judge, on commands that do each of these."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
import fuzz_commands, multiprocessing, pathlib, time
import megatron_dip.cli.main as entry
from megatron_dip.spec.errors import EXIT_CODE

def traceback(arguments): raise KeyError("x")
def hang(arguments): time.sleep(60)
def leave(arguments):
    pathlib.Path("left").write_text("x")
    print("megatron-dip: error: x", file=sys.stderr)
    return EXIT_CODE
def silent(arguments): return EXIT_CODE
def fine(arguments):
    print("megatron-dip: error: x", file=sys.stderr)
    return EXIT_CODE

for fake in (traceback, hang, leave, silent, fine):
    entry.main = fake
    folder = pathlib.Path({str(tmp_path)!r}) / fake.__name__
    folder.mkdir()
    print(fake.__name__, fuzz_commands.judge(fuzz_commands.targets()[0], ["x"], folder, set(), multiprocessing.get_context("fork"), 3.0))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    said = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert said["traceback"].startswith("traceback: KeyError"), result.stderr
    assert said["hang"] == "hangs for 3 s"
    assert "left ['left']" in said["leave"]
    assert "without a message" in said["silent"]
    assert said["fine"] == "None"
