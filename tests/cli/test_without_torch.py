"""Planning, simulating and drawing need neither torch nor Megatron."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden"

# None in sys.modules makes an import fail as if the package were not installed.
WITHOUT = """
import sys
sys.modules["torch"] = sys.modules["megatron"] = sys.modules["megatron.core"] = None
from megatron_dip.cli.main import main
golden, folder = sys.argv[1:]
for command in (
    ["workload", "vlm-s", "--microbatches", "2", "--output", folder + "/drawn.json"],
    ["plan", golden + "/workload.json", "--partition", golden + "/partition.json", "--output", folder + "/plan.json", "--evaluations", "5"],
    ["check", folder + "/plan.json", "--workload", golden + "/workload.json"],
    ["simulate", folder + "/drawn.json", "--schedule", "1f1b"],
    ["simulate", golden + "/workload.json", "--partition", golden + "/partition.json", "--evaluations", "5"],
    ["trace", folder + "/plan.json", "--output", folder + "/trace.json"],
    ["report", folder + "/plan.json", "--output", folder + "/plan.svg"],
):
    assert main(command) == 0, command
"""


def test_the_planning_commands_run_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT, str(GOLDEN), str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"drawn.json", "plan.json", "trace.json", "plan.svg"}
