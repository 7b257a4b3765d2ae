"""``megatron-dip estimate`` and ``lengths``: from a config and a data set to the table."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import msgspec
import pytest

from megatron_dip.cli.estimate_command import _advice, _Subject
from megatron_dip.cli.main import main
from megatron_dip.simulator.estimate import Candidate, System
from megatron_dip.spec.codec import load_partition, load_workload
from megatron_dip.spec.named import named_setup
from megatron_dip.spec.simulation import Breakdown, SimulationResult
from megatron_dip.spec.workload import Parallel
from megatron_dip.workloads.generators import make_workload

TINY = {
    "model_type": "qwen2_5_vl", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "vocab_size": 4096, "tie_word_embeddings": False,
    "vision_config": {"depth": 8, "hidden_size": 512, "intermediate_size": 1024, "num_heads": 8, "out_hidden_size": 512},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_every_system_has_a_row_and_files_are_written(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload, partition = config / "w.json", config / "p.json"
    status = main(["estimate", str(config), "--gpus", "2", "--microbatches", "4", "--evaluations", "5", "--sequence-length", "2048", "--json",
                   "--save-workload", str(workload), "--save-partition", str(partition)])
    assert status == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["system"] for row in found["systems"]] == ["dip", "megatron", "encoder-dp", "fsdp2"]
    dip = found["systems"][0]
    assert found["flags"].split() == [
        "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "2", "--pipeline-schedule", "dip", "--dip-partition", str(partition)
    ]
    assert dip["parallel"]["pipeline"] == 2
    assert all(row["result"]["iteration_time_s"] > 0 for row in found["systems"])
    assert load_workload(workload).parallel.pipeline == 2
    load_partition(partition).validate({"vit": 8, "lm": 8}, 2)


def test_the_table_says_what_it_rests_on(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(config), "--gpus", "2", "--microbatches", "2", "--evaluations", "2", "--data", "text", "--sequence-length", "1024"]) == 0
    said = capsys.readouterr().out
    assert "nothing to interleave" in said
    assert "--pipeline-schedule dip" in said
    assert "counted from the config" in said


WAN = {
    "_class_name": "WanTransformer3DModel", "num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 8, "ffn_dim": 1024, "in_channels": 16,
    "out_channels": 16, "text_dim": 512, "freq_dim": 256, "patch_size": [1, 2, 2], "cross_attn_norm": True,
}


def test_a_diffusion_transformer_alone_is_estimated_on_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, workload = tmp_path / "config.json", tmp_path / "w.json"
    file.write_text(json.dumps(WAN))
    command = ["estimate", str(file), "--gpus", "2", "--microbatches", "2", "--evaluations", "2"]
    assert main([*command, "--save-workload", str(workload)]) == 0
    said = capsys.readouterr().out
    assert "nothing to interleave" in said
    assert "its embeddings are taken as precomputed" in said
    assert all(set(microbatch) == {"dit"} and microbatch["dit"] for microbatch in load_workload(workload).microbatches)
    assert main([*command, "--data", "obelics"]) == 2
    assert "clips" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--gpus", "0"], "--gpus"), (["--gpus", "2", "--data", "nope"], "--data"), (["--gpus", "2", "--device", "abacus"], "--device"),
     (["--gpus", "2", "--save-workload", "/nowhere/w.json"], "--save-workload"), (["--gpus", "2", "--seed", "-1"], "--seed")],
)
def test_bad_arguments_end_before_work_begins(config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["estimate", str(config), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": 3}', '{"a": ' * 100_000, "\xff"])
def test_what_is_no_model_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["estimate", str(tmp_path), "--gpus", "2"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def _webdataset(path: Path) -> None:
    from PIL import Image

    with tarfile.open(path, "w") as archive:

        def add(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        picture = io.BytesIO()
        Image.new("RGB", (64, 48)).save(picture, "PNG")
        add("a.0.png", picture.getvalue())
        add("a.1.png", picture.getvalue())
        add("a.json", b'{"conversations": [{"value": "what is this?"}, {"value": "twenty letters, no more"}]}')
        add("b.jpg", b"no picture")
        add("b.txt", b"a caption")
        add("c.txt", b"x" * 400)


def test_lengths_of_a_webdataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _webdataset(tmp_path / "shard.tar")
    assert main(["lengths", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert [json.loads(line) for line in said.out.splitlines()] == [{"text": 9, "images": [[64, 48], [64, 48]]}, {"text": 100}]
    assert "1 skipped" in said.err
    assert "shard.tar/b" in said.err


def test_lengths_of_jsonl_and_an_output_that_is_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "four letter words"}\nnonsense\n{"text": "x", "images": ["gone.png"]}\n')
    assert main(["lengths", str(path), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert (tmp_path / "out.jsonl").read_text() == '{"text":4}\n'
    assert main(["lengths", str(path), "--output", str(path)]) == 2
    assert path.read_text().startswith('{"text": "four')


def test_recorded_batches_stand_for_data(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Workload files of a folder, in the order of their names; timelines beside them are passed over."""
    folder = config / "recorded"
    folder.mkdir()
    flags = ("--gpus", "2", "--microbatches", "4", "--evaluations", "2", "--sequence-length", "1024", "--json")
    assert main(["estimate", str(config), *flags, "--save-workload", str(folder / "iteration_3.json")]) == 0
    (folder / "iteration_3_measured.json").write_text('{"format": "megatron-dip/timeline/1", "title": "x", "ranks": 1, "bars": []}')
    capsys.readouterr()
    again = config / "again.json"
    assert main(["estimate", str(config), *flags, "--data", str(folder), "--save-workload", str(again)]) == 0
    assert "as recorded" in " ".join(json.loads(capsys.readouterr().out)["notes"])
    assert load_workload(again).microbatches == load_workload(folder / "iteration_3.json").microbatches
    (folder / "iteration_3.json").unlink()
    assert main(["estimate", str(config), *flags, "--data", str(folder)]) == 2
    assert "holds no workload files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ours", "theirs", "dealing", "said"),
    [(1.0, 1.02, 1.0, "Not worth it"), (1.0, 1.3, 1.0, "1.30x"), (1.0, 1.15, 1.15, "Of that all comes from dealing"), (1.0, 1.5, 1.1, "some 1.10x comes")],
)
def test_advice_tells_dealing_from_interleaving(config: Path, ours: float, theirs: float, dealing: float, said: str) -> None:
    def candidate(system: System, seconds: float, dealt: float = 1.0) -> Candidate:
        breakdown = Breakdown(compute=seconds, tensor_parallel=0, data_parallel=0, p2p=0, bubble=0, optimizer=0)
        result = SimulationResult(iteration_time_s=seconds, mfu=0.4, hfu=0.4, bubble_fraction=0, peak_memory_bytes=[1], breakdown_s=breakdown, schedule=system,
                                  chunks={}, sub_microbatch_size={})
        return Candidate(system=system, parallel=Parallel(pipeline=2), result=result, dealing=dealt)

    workload = make_workload("vlm-s", seed=0, num_microbatches=2)
    subject = _Subject(workload=msgspec.structs.replace(workload, model=named_setup("vlm-s").model), title="x")
    assert said in _advice(subject, [candidate("dip", ours, dealing), candidate("megatron", theirs)])
