"""``megatron-dip profile EXAMPLE``, its profile in ``plan`` and ``simulate``, and ``megatron-dip train --profile`` on it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from megatron_dip.cli.main import main
from megatron_dip.spec.codec import load_example, load_plan, load_profile, load_workload, save
from megatron_dip.spec.errors import EXIT_CODE
from megatron_dip.spec.partition import Partition
from megatron_dip.trainer.rehearsal import Chooser

DIGITS = Path(__file__).parents[2] / "examples" / "vlm" / "digits"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    shutil.copy(DIGITS / "example.py", folder)
    config = msgspec.to_builtins(load_example(DIGITS / "config.json"))
    for module in config["model"]["modules"]["modules"]:
        module |= {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2}
    config |= {"num_microbatches": 4, "sub_microbatch_size": {"vit": 2, "lm": 1}, "chunks": {}}
    config["data"] |= {"image_counts": [[0, 4]], "held_out": 12}
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    return folder


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "megatron_dip.cli.main", *arguments]
    return subprocess.run(command, check=True, timeout=240, capture_output=True, text=True).stdout


@pytest.mark.distributed
@pytest.mark.long
def test_profile_plan_train(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, workload = tmp_path / "profile.json", tmp_path / "workload.json"
    text = run("profile", str(tiny), "--device", "cpu", "--output", str(profile), "--workload", str(workload), "--seconds", "0.1")
    assert "stages measured" in text
    vit, lm = (load_profile(profile).modules[name] for name in ("vit", "lm"))
    assert [(point.instances, point.tokens) for point in vit.layer.points] == [(n, 144 * n) for n in (1, 2, 3, 4)]
    assert [(point.instances, point.tokens) for point in lm.layer.points] == [(1, 256)]
    for module in (vit, lm):
        assert all(point.forward_ns > 0 and point.backward_input_ns > 0 for point in module.layer.points)
    # 16 tokens of the language model an image, 4 bytes a number.
    assert vit.last is not None
    assert vit.last.points[0].boundary_bytes == 16 * 32 * 4

    assert load_workload(workload).parallel.pipeline == 2
    plan, partition = tmp_path / "plan.json", tmp_path / "partition.json"
    save(partition, Partition(chunks={"vit": [[2, 2]], "lm": [[2, 2]]}, sub_microbatch_size={"vit": 2, "lm": 1}))
    assert main(["plan", str(workload), "--output", str(plan), "--partition", str(partition)]) == 0
    capsys.readouterr()
    assert main(["simulate", str(workload), "--json", "--partition", str(partition)]) == 0
    simulated = json.loads(capsys.readouterr().out)["iteration_time_s"]
    assert simulated == pytest.approx(load_plan(plan).claimed_makespan / 1e9, rel=0.1)

    record = tmp_path / "record.json"
    text = run("train", str(tiny), "--device", "cpu", "--profile", str(profile), "--iterations", "3", "--record", str(record), "--timelines", str(tmp_path / "made"))
    assert "warning" not in text
    # Training plans with the profile as it is, the first iteration too.
    assert (tmp_path / "made" / "profile.json").read_bytes() == profile.read_bytes()
    planned = [iteration["planned_ns"] for iteration in json.loads(record.read_bytes())["iterations"]]
    # The same costs and cut, hence the same bound; training searches for less time.
    assert load_plan(plan).lower_bound <= planned[0] < 1.3 * load_plan(plan).claimed_makespan


def test_every_shape_comes_equally_often() -> None:
    shapes = [Counter({("lm", 1, 256): 1}), Counter({("lm", 1, 256): 1, ("vit", 6, 6): 2}), Counter({("lm", 1, 256): 1, ("vit", 1, 1): 1})]
    chooser = Chooser(shapes)
    chosen = Counter(chooser.choose(8) + chooser.choose(4))
    # Every shape of the language model's comes anyway; two stages of the second shape are as many as two microbatches of the third.
    assert abs(chosen[2] - 2 * chosen[1]) <= 1


@pytest.mark.parametrize(("options", "problem"), [
    (["--counts", "vit=1"], "--counts = 'vit=1'"), (["--busy", "0"], "--busy = 0"), (["--seconds", "0"], "--seconds = 0.0"),
    (["--pipeline", "0"], "--pipeline = 0"),
])
def test_bad_options_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], problem: str) -> None:
    assert main(["profile", str(DIGITS), "--device", "cpu", "--output", str(tmp_path / "p.json"), *options]) == EXIT_CODE
    assert problem in capfd.readouterr().err


def test_a_profile_of_another_model_is_refused(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    point = {"instances": 1, "tokens": 1, "forward_ns": 1, "backward_input_ns": 1, "backward_weight_ns": 1, "activation_bytes": 0, "boundary_bytes": 0}
    profile = {"format": "megatron-dip/profile/1", "p2p": {"latency_ns": 0, "bytes_per_second": 1e9},
               "modules": {name: {"num_layers": 3, "layer": {"points": [point]}} for name in ("vit", "lm")}}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile))
    assert main(["train", str(tiny), "--device", "cpu", "--profile", str(path)]) == EXIT_CODE
    assert "--profile.modules.vit.num_layers = 3" in capfd.readouterr().err
