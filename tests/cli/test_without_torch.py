"""The planner's commands run where neither torch nor Megatron is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
for name in ("torch", "megatron", "megatron.core", "sklearn"):
    sys.modules[name] = None
from megatron_dip.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_planner_commands_need_no_torch(tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-c", WITHOUT, *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run("workload", "vlm-s", "--seed", "1", "--microbatches", "2", "--output", "workload.json")
    run("plan", "workload.json", "--output", "plan.json", "--evaluations", "4", "--chunks", "vit=1,lm=1", "--sub-microbatch", "vit=12")
    run("check", "plan.json", "--workload", "workload.json")
    run("simulate", "workload.json", "--json")
    run("report", "plan.json", "--output", "plan.png")
    run("trace", "plan.json", "--output", "trace.json")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_train_without_torch_says_what_is_missing() -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT, "train", str(ROOT / "examples" / "vlm" / "digits"), "--device", "cpu", "--pipeline", "1"],
        env={"PATH": "", "RANK": "0", "WORLD_SIZE": "1"}, capture_output=True, text=True, timeout=120, check=False,
    )
    assert result.returncode == 2
    assert "torch = cannot be imported" in result.stderr
    assert "megatron-dip[train]" in result.stderr
