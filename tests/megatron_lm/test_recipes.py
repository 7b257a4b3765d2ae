"""The recipes' own run.sh with --scale-down, on the CPU: each setup equals one process under Megatron's schedule, and what runs of people
need works in both scripts: checkpoints, going on from them, evaluation, look-ahead, balance, data sets with samples that are spoiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_dip.partition.deal import deal
from megatron_dip.partition.second_pass import deal_by_plans
from tests.megatron_lm.runs import ROOT, TIME_LIMIT_S, words

pytestmark = pytest.mark.long

FAMILIES = ["vlm/vlm_s", "t2v/t2v_s"]
RECIPES = [*FAMILIES, "vlm/vlm_m", "vlm/vlm_l", "t2v/t2v_l"]
MOCK = ["--mock-data"]
EVEN = words("--dip-partition even --dip-evaluations 20")
"""Plans that are the same whatever the machine does beside."""


def start_recipe(tree: Path, recipe: str, work: Path, flags: Sequence[str], ranks: int = 2) -> str:
    """Output of a scaled-down run that comes to its end."""
    variables = {
        **os.environ, "MEGATRON_LM": str(tree), "PYTHONPATH": str(ROOT), "RANKS": str(ranks), "WORK": str(work), "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    result = subprocess.run(
        ["bash", str(ROOT / "examples" / recipe / "run.sh"), "--scale-down", *flags], cwd=work, env=variables, text=True, check=False,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=TIME_LIMIT_S,
    )
    assert result.returncode == 0, result.stdout[-6000:]
    return result.stdout


def losses_of(output: str) -> list[float]:
    """Of each iteration alone: as the second loss since its start Megatron logs the mean of the first two."""
    logged = [float(loss) for loss in re.findall(r"lm loss: (\S+) \|", output)]
    assert logged, output[-6000:]
    assert np.isfinite(logged).all()
    return logged


def validation_of(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"validation loss at .*?lm loss value: (\S+)", output)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_scaled_down_recipe_trains_as_one_process_does(recipe: str, patched_tree: Path, tmp_path: Path) -> None:
    cut = start_recipe(patched_tree, recipe, tmp_path, MOCK)
    stock = start_recipe(patched_tree, recipe, tmp_path, [*MOCK, "--pipeline-schedule", "default"], ranks=1)
    assert len(losses_of(cut)) == 5
    assert losses_of(cut) == pytest.approx(losses_of(stock), rel=2e-5)


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_run_is_saved_evaluated_and_gone_on_with_in_one_process(recipe: str, patched_tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    flags = [*MOCK, *EVEN, *words("--train-iters 4 --lr-decay-iters 10 --eval-iters 1 --eval-interval 2 --dip-look-ahead 2 --dip-log-interval 1")]
    whole = start_recipe(patched_tree, recipe, tmp_path, [*flags, "--save", str(folder), "--save-interval", "2"])
    assert "batches not seen ahead: 0" in whole
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = start_recipe(patched_tree, recipe, tmp_path, [*flags, "--load", str(folder)], ranks=1)
    np.testing.assert_allclose(own(losses_of(resumed)), own(losses_of(whole))[2:], rtol=1e-4)
    np.testing.assert_allclose(validation_of(resumed)[0], validation_of(whole)[1], rtol=1e-4)


def own(logged: Sequence[float]) -> list[float]:
    return [2 * loss - logged[0] if index == 1 else loss for index, loss in enumerate(logged)]


@pytest.mark.parametrize("recipe", FAMILIES)
def test_microbatches_are_dealt_to_two_replicas(recipe: str, patched_tree: Path, tmp_path: Path) -> None:
    work = np.arange(24).reshape(12, 2)
    deal_by_plans(work, deal(work, 4), max)  # kernels that are compiled while the first iterations train make their batches late
    flags = [*MOCK, *EVEN, *words("--global-batch-size 8 --dip-look-ahead 2 --dip-log-interval 1 --train-iters 8")]
    replicas = [*flags, "--pipeline-model-parallel-size", "1"]
    dealt = start_recipe(patched_tree, recipe, tmp_path, [*replicas, "--dip-balance", "exchange"])
    read = start_recipe(patched_tree, recipe, tmp_path, [*replicas, "--dip-balance", "off"])
    assert int(re.findall(r"so far batches dealt: (\d+)", dealt)[-1]) >= 2
    np.testing.assert_allclose(losses_of(dealt), losses_of(read), rtol=1e-3)
    np.testing.assert_allclose(losses_of(dealt)[:3], losses_of(read)[:3], rtol=1e-5)


WRITERS = {
    "vlm/vlm_s": ("write_images.py", words("--max-side 48 --max-images 2"), ["is no image that can be read", "has no txt"]),
    "t2v/t2v_s": (
        "write_clips.py", [], ["has no frames", "is no shape [16", "are no latents that can be read", "has no txt or caption.txt"]
    ),
}


@pytest.mark.parametrize("recipe", FAMILIES)
def test_a_data_set_is_read_saved_and_gone_on_with(recipe: str, patched_tree: Path, tmp_path: Path) -> None:
    """Each spoiled sample is left out with one message of one rank, and a run that goes on reads what the whole one did."""
    pytest.importorskip("megatron.energon")
    pytest.importorskip("skimage")
    script, options, messages = WRITERS[recipe]
    data, folder = tmp_path / "data", tmp_path / "saved"
    write = [sys.executable, str(ROOT / "scripts" / script), str(data), "--samples", "80", "--damaged", "24", *options]
    subprocess.run(write, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    keep = ["--dataloader-save", str(tmp_path / "loader")]
    flags = ["--data-path", str(data), *EVEN, *keep, *words("--train-iters 4 --lr-decay-iters 10 --eval-iters 1 --eval-interval 2")]
    whole = start_recipe(patched_tree, recipe, tmp_path, [*flags, "--save", str(folder), "--save-interval", "2"])
    said = re.findall(r"left out: sample (\S+?/\d+)", whole)
    assert len(said) == len(set(said))
    for message in messages:
        assert message in whole
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = start_recipe(patched_tree, recipe, tmp_path, [*flags, "--load", str(folder)])
    np.testing.assert_allclose(own(losses_of(resumed)), own(losses_of(whole))[2:], rtol=1e-3)
