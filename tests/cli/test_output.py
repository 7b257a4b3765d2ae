"""What all commands share: JSON, standard input, schemas, completion, names that look like markup."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from megatron_dip.cli.main import main
from megatron_dip.spec.codec import load_plan, save
from megatron_dip.spec.workload import Parallel, Workload
from tests.strategies import vlm_case

GOLDEN = Path(__file__).parents[1] / "golden" / "plan.json"
ODD = "l[/b]m[red]"
WORKLOAD = {
    "format": "megatron-dip/workload/1",
    "model": {"modules": [{"name": ODD, "kind": "lm", "role": "backbone", "num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128,
                           "num_attention_heads": 4, "vocab_size": 100}]},
    "parallel": {"pipeline": 2}, "device": "h100", "microbatches": [{ODD: [64]}, {ODD: [32]}],
}


def as_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def printed(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_plan_check_and_report_from_standard_input_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "runs [vlm]" / "plan.json"
    plan.parent.mkdir()
    as_input(monkeypatch, json.dumps(WORKLOAD).encode())
    assert main(["plan", "-", "--output", str(plan), "--evaluations", "2", "--json"]) == 0
    found = printed(capsys)
    written = load_plan(plan)
    assert (found["makespan_ns"], found["stages"], len(found["ranks"])) == (written.claimed_makespan, len(written.stages), 2)
    assert found["baselines"]["1f1b"]["makespan_ns"] > 0
    as_input(monkeypatch, plan.read_bytes())
    assert main(["check", "-", "--json"]) == 0
    assert printed(capsys)["holds"] is True
    as_input(monkeypatch, plan.read_bytes())
    assert main(["report", "-", "--output", str(tmp_path / "x.png"), "--json"]) == 0
    assert printed(capsys)["iterations"][0]["makespan_ns"] == written.claimed_makespan


def test_names_that_look_like_markup_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.json").write_text(json.dumps(WORKLOAD))
    output = tmp_path / "[vlm]" / "p.json"
    output.parent.mkdir()
    assert main(["plan", str(tmp_path / "w.json"), "--output", str(output), "--evaluations", "1", "--no-baselines"]) == 0
    text = capsys.readouterr().out
    assert ODD in text
    assert f"wrote {output}" in text
    assert main(["simulate", str(tmp_path / "w.json"), "--schedule", "1f1b"]) == 0
    assert ODD in capsys.readouterr().out


def test_a_plan_that_does_not_hold_says_so_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = json.loads(GOLDEN.read_text())
    plan["order"][0].reverse()
    (tmp_path / "p.json").write_text(json.dumps(plan))
    assert main(["check", str(tmp_path / "p.json"), "--json"]) == 1
    found = printed(capsys)
    assert found["holds"] is False
    assert found["problems"]


def test_nobody_writes_to_standard_input(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(GOLDEN), "--output", "-"]) == 2
    assert "/dev/stdout" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["workload", "profile", "partition", "plan", "timeline", "example", "device", "measured-steps", "tuned"])
def test_every_format_has_a_schema(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert name in capsys.readouterr().out.split()
    assert main(["schema", name]) == 0
    schema = printed(capsys)
    assert schema["$ref"].split("/")[-1] in schema["$defs"]


def test_a_schema_names_the_fields_of_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "plan"]) == 0
    schema = printed(capsys)
    fields = schema["$defs"]["Plan"]["properties"]
    assert fields.keys() == msgspec.json.decode(GOLDEN.read_bytes()).keys() | fields.keys()
    assert main(["schema", "nothing"]) == 2


def test_completion_knows_commands_and_flags(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "--save-partition" in script
    assert "playground" in script


def test_progress_without_a_terminal_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.json").write_text(json.dumps(WORKLOAD))
    assert main(["plan", str(tmp_path / "w.json"), "--output", str(tmp_path / "p.json"), "--evaluations", "1", "--no-baselines"]) == 0
    assert "megatron-dip: choosing the partition\n" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full and /dev/zero")
@pytest.mark.parametrize(("words", "message"), [
    (["--save-partition", "/proc/x"], "--save-partition = '/proc/x': cannot be written"),
    (["--save-partition", "/dev/full"], "No space left on device"),
])
def test_an_output_that_fails_leaves_no_other_behind(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = vlm_case()
    save(tmp_path / "workload.json", Workload(
        format="megatron-dip/workload/1", model=case.model, parallel=Parallel(pipeline=2), profile=case.profile, microbatches=case.microbatches,
    ))
    plan = tmp_path / "plan.json"
    assert main(["plan", str(tmp_path / "workload.json"), "--evaluations", "2", "--no-baselines", "--output", str(plan), *words]) == 2
    assert message in capsys.readouterr().err
    assert not plan.exists()


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs Linux's /dev/full and /dev/zero")
def test_a_device_without_end_is_no_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "/dev/zero", "--output", str(tmp_path / "plan.json")]) == 2
    assert "no end within" in capsys.readouterr().err


def test_what_is_written_is_said_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(GOLDEN), "--output", str(tmp_path / "t.json"), "--json"]) == 0
    assert printed(capsys)["events"] == len(json.loads((tmp_path / "t.json").read_text())["traceEvents"])
    samples = tmp_path / "s.jsonl"
    samples.write_text('{"tokens": 30, "text": "x"}\n{"tokens": 12, "text": "y"}\nbroken\n')
    assert main(["lengths", str(samples), "--output", str(tmp_path / "l.jsonl"), "--json"]) == 0
    found = printed(capsys)
    assert (found["samples"], found["text_tokens"], found["images"], found["skipped"]) == (2, 42, 0, 1)
    assert main(["lengths", str(samples), "--json"]) == 2
    assert "--output" in capsys.readouterr().err
    page = ["playground", "--output", str(tmp_path / "x.html"), "--ranks", "2", "--microbatches", "2", "--images", "0", "--evaluations", "1"]
    assert main([*page, "--json"]) == 0
    (case,) = printed(capsys)["cases"]
    assert (case["pipeline"], case["microbatches"], case["images"]) == (2, 2, 0)
    assert case["seconds"]["DIP"] > 0


def test_samples_and_models_from_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    as_input(monkeypatch, b'{"tokens": 30, "text": "x"}\n')
    assert main(["lengths", "-"]) == 0
    assert printed(capsys) == {"text": 30}
    as_input(monkeypatch, json.dumps(WORKLOAD).encode())
    assert main(["estimate", "-", "--gpus", "2", "--evaluations", "1", "--json"]) == 0
    assert printed(capsys)["systems"]
