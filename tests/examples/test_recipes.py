"""The recipes' run scripts: what --dry-run calls and prints, and what they refuse. The planner behind is tested on its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from megatron_dip.spec.named import named_setup

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = ["vlm/vlm_s", "vlm/vlm_m", "vlm/vlm_l", "t2v/t2v_s", "t2v/t2v_l"]

STANDIN = """#!/bin/sh
echo "megatron-dip $*" >> "$CALLS"
echo "summary of $1"
"""


def run(recipe: str, folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a recipe with a stand-in for megatron-dip that notes its calls in folder/calls."""
    command = folder / "bin/megatron-dip"
    command.parent.mkdir(exist_ok=True)
    command.write_text(STANDIN)
    command.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if name not in ("MEGATRON_LM", "TRAIN_SCRIPT")}
    paths = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(EXAMPLES / recipe / "run.sh"), *words], cwd=folder, capture_output=True, text=True, check=False, timeout=60,
        env={**inherited, "PATH": paths, "CALLS": str(folder / "calls"), **environment},
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_dry_run_plans_simulates_and_says_what_would_run(recipe: str, tmp_path: Path) -> None:
    result = run(recipe, tmp_path, "--dry-run", "--train-iters", "7")
    assert result.returncode == 0, result.stderr
    name = recipe.split("/")[1].replace("_", "-")
    setup = named_setup(name, "name")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[1] for call in calls] == ["workload", "plan", "simulate"]
    assert f"workload {name} --tensor {setup.tensor} --pipeline {setup.pipeline}" in calls[0]
    command = result.stdout.splitlines()[-1].strip()
    family = recipe.split("/")[0]
    assert f"{family}/train.py" in command.replace(f"/{recipe.split('/')[1]}/../", "/")
    assert f"--setup {name}" in command
    assert ("--sequence-parallel" in command) == (family == "vlm")
    assert f"--pipeline-model-parallel-size {setup.pipeline}" in command
    assert "--pipeline-schedule dip" in command
    assert command.endswith("--train-iters 7")


@pytest.mark.parametrize("recipe", RECIPES)
def test_scaled_down_all_sizes_of_the_run_are_one_machines(recipe: str, tmp_path: Path) -> None:
    result = run(recipe, tmp_path, "--dry-run", "--mock-data", "--scale-down", "--train-iters", "7")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "calls").exists()  # the setup's own plan is of no use
    command = result.stdout.splitlines()[-1].strip()
    for words in ("--nproc-per-node 2", "--device cpu", "--tensor-model-parallel-size 1", "--pipeline-model-parallel-size 2",
                  "--distributed-backend gloo", "--transformer-impl local", "--mock-data --scale-down --train-iters 7"):
        assert words in command
    for word in ("--sequence-parallel", "--bf16", "--dip-partition"):
        assert word not in command


def test_samples_take_the_place_of_iterations(tmp_path: Path) -> None:
    result = run("vlm/vlm_s", tmp_path, "--dry-run", "--mock-data", "--scale-down=8", "--train-samples", "7")
    assert "--train-iters" not in result.stdout
    assert "--tensor-model-parallel-size 1" in result.stdout


@pytest.mark.parametrize("recipe", RECIPES)
def test_training_without_a_checkout_or_data_is_refused(recipe: str, tmp_path: Path) -> None:
    result = run(recipe, tmp_path, "--mock-data")
    assert result.returncode == 2
    assert "MEGATRON_LM is not set. Remedy" in result.stderr
    result = run(recipe, tmp_path, MEGATRON_LM=str(tmp_path))
    assert result.returncode == 2
    assert "--mock-data, or --data-path" in result.stderr
