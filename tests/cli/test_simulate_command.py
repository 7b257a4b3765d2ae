"""``megatron-dip simulate``, ``calibrate`` and ``profile`` end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from megatron_dip.cli.main import main
from megatron_dip.cli.profile_command import grid_shapes
from megatron_dip.cli.simulate_command import grid_parallels
from megatron_dip.cost.analytic import DEFAULT_RULES
from megatron_dip.cost.device import load_device
from megatron_dip.spec.codec import load_profile, load_workload, save
from megatron_dip.spec.profile import ProfileGrid, ProfilePoint
from megatron_dip.spec.workload import Parallel, Training, Workload
from tests.strategies import vlm_case

STEPS = Path(__file__).parents[2] / "docs" / "results" / "measured" / "korthikanti_2022.json"


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    path = tmp_path / "workload.json"
    save(path, Workload(
        format="megatron-dip/workload/1", model="vlm-s", parallel=Parallel(tensor=4, pipeline=4), training=Training(), device="h800",
        microbatches=[{"vit": [2704] * n, "lm": [8192]} for n in (6, 2, 0, 4)],
    ))
    return path


@pytest.fixture
def profiled(tmp_path: Path) -> Path:
    case = vlm_case(num_microbatches=8)
    path = tmp_path / "profiled.json"
    save(path, Workload(
        format="megatron-dip/workload/1", model=case.model, parallel=Parallel(pipeline=2), profile=case.profile, microbatches=case.microbatches,
    ))
    return path


def simulate(path: Path, *more: str) -> int:
    return main(["simulate", str(path), "--evaluations", "20", *more])


def test_json_is_one_object_with_the_documented_fields(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(workload, "--json") == 0
    first = capsys.readouterr().out
    result = json.loads(first)
    assert set(result) == {
        "iteration_time_s", "mfu", "hfu", "bubble_fraction", "peak_memory_bytes", "breakdown_s", "schedule", "chunks", "sub_microbatch_size",
    }
    assert result["schedule"] == "dip"
    assert sum(result["breakdown_s"].values()) == pytest.approx(result["iteration_time_s"])
    assert simulate(workload, "--json") == 0
    assert capsys.readouterr().out == first, "the same input gives the same bytes"


def test_a_schedule_can_be_asked_for(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(workload, "--schedule", "nnscaler") == 0
    text = capsys.readouterr().out
    for word in ("nnscaler", "MFU", "bubbles", "peak memory", "tensor parallel", "optimizer"):
        assert word in text


def test_the_memory_timeline_peaks_where_the_result_does(workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "memory.csv"
    assert simulate(workload, "--json", "--schedule", "nnscaler", "--memory-timeline", str(path)) == 0
    result = json.loads(capsys.readouterr().out)
    header, *lines = path.read_text().splitlines()
    assert header == "rank,seconds,bytes"
    rows = [(int(rank), float(seconds), int(held)) for rank, seconds, held in (line.split(",") for line in lines)]
    for rank, peak in enumerate(result["peak_memory_bytes"]):
        own = [row for row in rows if row[0] == rank]
        assert own[0][1] == 0
        assert max(seconds for _, seconds, _ in own) <= result["iteration_time_s"]
        # The peak adds working sets and message buffers.
        assert 0.8 * peak < max(held for *_, held in own) <= peak
        # All activations are given back: what is left is what the rank holds all the time.
        assert own[-1][2] == min(held for *_, held in own)
    assert simulate(workload, "--compare", "--memory-timeline", str(path)) == 2


def test_all_schedules_side_by_side(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(workload, "--compare", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {result["schedule"] for result in found["results"]} | set(found["problems"]) == {
        "dip", "1f1b", "interleaved", "nnscaler", "optimus", "three-phase", "bigmac", "entrain", "fsdp2",
    }
    assert simulate(workload, "--compare") == 0
    assert "three-phase" in capsys.readouterr().out


def test_another_device_is_slower_or_faster(workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times = []
    for device in ("h20", "h100"):
        assert simulate(workload, "--json", "--schedule", "nnscaler", "--device", device) == 0
        times.append(json.loads(capsys.readouterr().out)["iteration_time_s"])
    assert times[0] > 2 * times[1]


@pytest.mark.parametrize(("arguments", "field"), [
    (["--device", "abacus"], "--device"), (["--evaluations", "0"], "--evaluations"), (["--grid", "--gpus", "-4"], "--gpus"),
    (["--grid", "--gpus", "7001"], "--gpus"),
])
def test_bad_arguments_end_with_exit_code_2(workload: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], field: str) -> None:
    assert simulate(workload, *arguments) == 2
    captured = capsys.readouterr()
    assert f"error: {field}" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(("changes", "words"), [
    ({"parallel": {"tensor": 3, "pipeline": 4}}, "parallel.tensor"),
    ({"parallel": {"tensor": 4, "pipeline": 200}}, "parallel.pipeline = 200: the model has only 95 layers"),
    ({"parallel": {"tensor": 4, "pipeline": 4, "data": 5}}, "too few for 5 data-parallel replicas"),
    ({"parallel": {"tensor": 4, "pipeline": 4, "context": 0}}, "parallel.context"),
    ({"device": {"peak_tflops": 1, "memory_gib": 1, "memory_tbs": 1, "nvlink_gbs": -200, "network_gbs": 1}}, "device.nvlink_gbs"),
    ({"memory_capacity_bytes": 1000}, "memory_capacity_bytes"),
])
def test_bad_workloads_end_with_exit_code_2(workload: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str) -> None:
    workload.write_text(json.dumps({**json.loads(workload.read_text()), **changes}))
    assert simulate(workload, "--json") == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.out == ""


def test_a_profile_warns_how_far_it_is_left(profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(profiled, "--json", "--schedule", "nnscaler") == 0
    captured = capsys.readouterr()
    assert "warning: profile.modules.vit.layer: 3 instances in a stage lie 3 times above the measured range 1 to 1" in captured.err
    assert json.loads(captured.out)["mfu"] is None
    assert simulate(profiled, "--device", "h100") == 2


RULES = """
from megatron_dip.cost.analytic import DEFAULT_RULES
DEFAULT_RULES.register("lm.attention", lambda operator, device: 5e8)
"""


@pytest.mark.long
def test_own_rules_count_everywhere(workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DEFAULT_RULES, "rules", {})
    assert simulate(workload, "--json", "--schedule", "nnscaler") == 0
    before = json.loads(capsys.readouterr().out)["iteration_time_s"]
    rules = tmp_path / "rules.py"
    for text, problem in (("1 / 0", "ZeroDivisionError"), ("pass", "registers no rule")):
        rules.write_text(text)
        assert simulate(workload, "--json", "--rules", str(rules)) == 2
        assert problem in capsys.readouterr().err
    rules.write_text(RULES)
    assert simulate(workload, "--json", "--schedule", "nnscaler", "--rules", str(rules)) == 0
    # Half a second for each of 32 attentions of 4 microbatches, on 4 ranks.
    assert json.loads(capsys.readouterr().out)["iteration_time_s"] > before + 32 * 4 * 0.5 / 4
    DEFAULT_RULES.version += 1
    # Processes of the grid execute the file themselves.
    assert simulate(workload, "--grid", "--gpus", "4", "--workers", "1", "--json", "--rules", str(rules)) == 0
    assert min(plan["result"]["iteration_time_s"] for plan in json.loads(capsys.readouterr().out)["plans"]) > 32 * 4 * 0.5 / 4


def test_what_an_implementation_lacks_costs_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "workload.json"
    save(path, Workload(
        format="megatron-dip/workload/1", model="vlm-s", parallel=Parallel(tensor=4, pipeline=4, data=2), training=Training(), device="h800",
        microbatches=[{"vit": [2704] * n, "lm": [8192]} for n in (6, 2, 1, 4)],
    ))
    times = []
    for more in ([], ["--no-data-parallel-overlap"], ["--attention", "unfused"]):
        assert simulate(path, "--json", "--schedule", "nnscaler", *more) == 0
        times.append(json.loads(capsys.readouterr().out)["iteration_time_s"])
    assert times[0] < times[1]
    assert times[0] < times[2]


@pytest.mark.long
def test_the_grid_ranks_what_fits(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(workload, "--grid", "--gpus", "8", "--workers", "2", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    times = [plan["result"]["iteration_time_s"] for plan in found["plans"]]
    assert times
    assert times == sorted(times)
    for plan in [*found["plans"], *found["infeasible"]]:
        sizes = plan["parallel"]
        assert sizes["data"] * sizes["tensor"] * sizes["pipeline"] * sizes["context"] == 8


def test_the_grid_has_every_way_to_share_the_gpus(workload: Path) -> None:
    found = {(p.data, p.tensor, p.pipeline) for p in grid_parallels(load_workload(workload), 8)}
    # Four microbatches: at most four replicas.
    assert found == {(d, t, 8 // d // t) for d in (1, 2, 4) for t in (1, 2, 4, 8) if 8 % (d * t) == 0}


def test_calibration_writes_a_device_and_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads(STEPS.read_text())
    raw["steps"] = [step for step in raw["steps"] if step["name"].startswith("22B")]
    raw["steps"][1]["held_out"] = True
    measured = tmp_path / "steps.json"
    measured.write_text(json.dumps(raw))
    output = tmp_path / "mine.json"
    assert main(["calibrate", str(measured), "--device", "h100", "--output", str(output), "--freedom", "20", "--parameters", "training"]) == 0
    text = capsys.readouterr().out
    assert "held out" in text
    fitted = load_device(str(output))
    assert "steps.json" in fitted.source
    # An H100 would be far faster than what was measured on an A100.
    assert fitted.efficiency.training < 0.6 * load_device("h100").efficiency.training


def test_calibration_on_a_profile(profiled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "profile.json"
    save(profile, vlm_case().profile)
    output = tmp_path / "mine.json"
    arguments = ["calibrate", str(profile), "--device", "cpu", "--output", str(output), "--parameters", "kernel_overhead_us", "--freedom", "50"]
    assert main(arguments) == 2
    assert "--workload" in capsys.readouterr().err
    assert main([*arguments, "--workload", str(profiled)]) == 0
    capsys.readouterr()
    layer = ProfileGrid(points=[
        ProfilePoint(instances=n, tokens=n, forward_ns=1e3, backward_input_ns=1e3, backward_weight_ns=1e3, activation_bytes=0, boundary_bytes=0)
        for n in (1, 2, 3, 4)
    ])
    measured = vlm_case().profile
    save(profile, msgspec.structs.replace(measured, modules={**measured.modules, "vit": msgspec.structs.replace(measured.modules["vit"], layer=layer)}))
    assert main([*arguments, "--workload", str(profiled)]) == 0
    # Of six batch shapes the fourth is held out: its forward and its backward.
    assert re.search(r"held out\W+2\W", capsys.readouterr().out)
    assert load_device(str(output)).efficiency.kernel_overhead_us < load_device("cpu").efficiency.kernel_overhead_us


def test_calibration_refuses_what_holds_no_measurements(workload: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(workload), "--device", "a100", "--output", str(tmp_path / "x.json")]) == 2
    assert "holds no measurements" in capsys.readouterr().err
    assert main(["calibrate", str(STEPS), "--device", "a100", "--output", str(tmp_path / "x.json"), "--parameters", "luck"]) == 2
    assert main(["calibrate", str(STEPS), "--device", "a100", "--output", str(tmp_path / "x.json"), "--parameters", ","]) == 2
    assert "names no parameter" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def small_workload(path: Path) -> Path:
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4}
    path.write_text(json.dumps({
        "format": "megatron-dip/workload/1",
        "model": {"modules": [
            {"name": "vit", "kind": "vit", "role": "encoder", "num_layers": 2, **sizes},
            {"name": "lm", "kind": "lm", "role": "backbone", "num_layers": 3, "vocab_size": 64, "num_query_groups": 2, **sizes},
            {"name": "dit", "kind": "dit", "role": "decoder", "num_layers": 2, "cross_attention": True, "inputs": ["lm"], "trainable": False, **sizes},
        ]},
        "parallel": {"pipeline": 2}, "training": {"dtype": "fp32"}, "device": "cpu",
        "microbatches": [{"vit": [32, 32, 32], "lm": [48], "dit": [16, 24]}, {"lm": [48], "dit": [16]}],
    }))
    return path


@pytest.mark.long
def test_layers_are_measured_and_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = small_workload(tmp_path / "small.json"), tmp_path / "profile.json"
    # A process of its own: measuring sets up Megatron's groups and its CPU mode.
    subprocess.run(
        [sys.executable, "-m", "megatron_dip.cli.main", "profile", str(path), "--output", str(output), "--device", "cpu", "--seconds", "0.005",
         "--threads", "1", "--busy", "2"], check=True, timeout=240, capture_output=True,
    )
    profile = load_profile(output)
    vit, lm, dit = (profile.modules[name] for name in ("vit", "lm", "dit"))
    assert [(p.instances, p.tokens) for p in vit.layer.points] == [(1, 32), (2, 64), (3, 96)]
    assert (lm.num_layers, dit.num_layers) == (3, 2)
    for module in (vit, lm):
        point = module.layer.points[-1]
        assert min(point.forward_ns, point.backward_input_ns) > 0
        assert point.boundary_bytes == point.tokens * 32 * 4
        assert module.first is not None
        assert module.last is not None
        # Local layers keep scores; recomputing the core attention frees them.
        assert module.strategies["full"].activation < module.strategies["selective"].activation < 1
        offload = module.strategies["offload"].offload
        assert offload is not None
        assert offload.activation == 0
        assert 1e6 < offload.bytes_per_second < 1e12, "memory's speed, or a bus's"
    # Activations grow with the instances exactly, times only about so.
    assert vit.layer.points[2].activation_bytes == pytest.approx(3 * vit.layer.points[0].activation_bytes)
    assert all(point.backward_weight_ns == 0 for point in dit.layer.points), "a frozen module"
    capsys.readouterr()
    path.write_text(json.dumps({**json.loads(path.read_text()), "profile": "profile.json"}))
    assert simulate(path, "--json") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["iteration_time_s"] > 0
    assert "warning" not in captured.err


def test_what_to_measure_can_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_workload(tmp_path / "small.json")
    shapes = grid_shapes(load_workload(path), {"vit": [2, 5]}, {"lm": [7]})
    assert shapes == {"vit": ([2, 5], [32]), "lm": ([1], [7]), "dit": ([1, 2], [16, 24])}
    for arguments, field in ((["--counts", "vit=x"], "--counts"), (["--lengths", "ear=3"], "--lengths"), (["--seconds", "0"], "--seconds")):
        assert main(["profile", str(path), "--output", str(tmp_path / "p.json"), *arguments]) == 2
        assert f"error: {field}" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_overlapped_tensor_collectives_save_time(workload: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for flags in ((), ("--tp-comm-overlap",)):
        assert simulate(workload, "--schedule", "1f1b", "--json", *flags) == 0
        seconds.append(json.loads(capsys.readouterr().out)["iteration_time_s"])
    assert seconds[1] < seconds[0]
