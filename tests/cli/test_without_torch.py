"""The planner's commands run where neither torch nor Megatron is installed, and the package brings all its files."""

from __future__ import annotations

import subprocess
import sys
import zipfile
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
    assert "not installed" in result.stderr
    assert "megatron-dip[train]" in result.stderr


def test_the_wheel_carries_patches_and_data(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("megatron_dip", "patches", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
        check=True, capture_output=True, timeout=240,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in [
        "megatron_dip/py.typed",
        *(f"megatron_dip/patches/{path.name}" for path in (ROOT / "patches").iterdir() if path.suffix in (".patch", ".json")),
        *(f"megatron_dip/cost/devices/{path.name}" for path in (ROOT / "megatron_dip" / "cost" / "devices").glob("*.json")),
        *(str(path.relative_to(ROOT)) for path in (ROOT / "megatron_dip").rglob("*.py")),
    ]:
        assert wanted in names
