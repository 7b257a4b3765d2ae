"""`megatron-dip checkpoint` on small folders of both formats; tests/megatron_lm converts real ones."""

from __future__ import annotations

import itertools
import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_dip.checkouts.checkpoint_files import check_loadable
from megatron_dip.checkouts.conversion import convert
from megatron_dip.cli.main import main
from megatron_dip.spec.errors import EXIT_CODE, InputError


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """As --save with torch_dist leaves it: a tracker and one iteration."""
    folder = tmp_path / "iter_0000007"
    state = {"language_model.output_layer.weight": torch.zeros(5, 3), "optimizer.state.exp_avg.x": torch.zeros(15), "step": 3}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({"args": Namespace()}, folder / "common.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    return tmp_path


def test_torch_dist(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["iteration"]) == ("torch_dist", 7)
    assert found["tensors"]["language_model.output_layer.weight"] == {"shape": [5, 3], "dtype": "float32"}
    assert main(["checkpoint", "inspect", str(saved / "iter_0000007")]) == 0
    text = capsys.readouterr().out
    assert "language_model" in text
    assert "optimizer state" in text
    assert "every cut" in text


def test_the_old_format_names_its_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for tensor in range(2):
        for pipeline in range(3):
            (tmp_path / f"iter_0000001/mp_rank_{tensor:02d}_{pipeline:03d}").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1\n")
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 0
    assert "tensor parallel size 2, pipeline parallel size 3" in capsys.readouterr().out


def test_the_old_format_tells_expert_ranks_from_pipeline_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Megatron names neither where there is one, and both alike."""
    for expert in range(2):
        folder = tmp_path / f"iter_0000001/mp_rank_00_{expert:03d}"
        folder.mkdir(parents=True)
        torch.save({"args": Namespace(expert_model_parallel_size=2)}, folder / "model_optim_rng.pt")
    assert main(["checkpoint", "inspect", str(tmp_path / "iter_0000001")]) == 0
    assert "tensor parallel size 1, pipeline parallel size 1, expert parallel size 2" in capsys.readouterr().out


@pytest.mark.parametrize("tracker", [None, "9", "nonsense"])
def test_what_is_no_checkpoint_is_refused(tracker: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if tracker is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert main(["checkpoint", "inspect", str(tmp_path)]) == EXIT_CODE
    assert "Remedy" in capsys.readouterr().err


def test_formats_of_fsdp_and_of_older_releases_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fsdp, zarr = tmp_path / "iter_0000001", tmp_path / "iter_0000002"
    dcp.save({"weight": torch.zeros(3)}, checkpoint_id=fsdp, no_dist=True)
    zarr.mkdir()
    (zarr / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))
    for folder, words in ((fsdp, "under FSDP alone"), (zarr, "with the release that wrote it")):
        assert main(["checkpoint", "inspect", str(folder)]) == EXIT_CODE
        message = capsys.readouterr().err
        assert words in message
        assert "Remedy" in message


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """In the old format, tensor size 2, pipeline size 2."""
    for tensor in range(2):
        for pipeline in range(2):
            (tmp_path / f"old/iter_0000004/mp_rank_{tensor:02d}_{pipeline:03d}").mkdir(parents=True)
    (tmp_path / "old/latest_checkpointed_iteration.txt").write_text("4")
    return tmp_path / "old"


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "pretrain.py").write_text("")
    return tmp_path / "pretrain.py"


def test_convert_starts_the_script_on_the_checkpoints_ranks(old: Path, script: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    started: list[list[str]] = []

    def start(command: Sequence[str], environment: Mapping[str, str]) -> int:
        started.append(list(command))
        assert environment["CUDA_VISIBLE_DEVICES"] == ""
        folder = Path(command[command.index("--ckpt-convert-save") + 1]) / "torch_dist"
        dcp.save({"weight": torch.zeros(3)}, checkpoint_id=folder / "iter_0000004", no_dist=True)
        (folder / "iter_0000004/metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
        torch.save({}, folder / "iter_0000004" / "common.pt")
        (folder / "latest_checkpointed_iteration.txt").write_text("4")
        return 0

    written = convert(old, target, script, ["--use-distributed-optimizer", "--tensor-model-parallel-size", "2"], "cpu", start)
    assert (written.format, written.iteration, written.folder) == ("torch_dist", 4, target / "iter_0000004")
    (command,) = started
    assert command[command.index("--nproc-per-node") + 1] == "4"
    flags = dict(itertools.pairwise(command))
    assert (flags["--tensor-model-parallel-size"], flags["--pipeline-model-parallel-size"]) == ("2", "2")
    assert (flags["--load"], flags["--ckpt-format"], flags["--ckpt-convert-format"]) == (str(old), "torch", "torch_dist")
    assert "--dist-ckpt-optim-fully-reshardable" in command
    assert "--ckpt-step" not in command
    assert not (tmp_path / "new.partial").exists()
    convert(old / "iter_0000004", tmp_path / "again", script, [], "cpu", start)
    assert dict(itertools.pairwise(started[1]))["--ckpt-step"] == "4"


@pytest.mark.parametrize(("words", "field"), [
    (["{old}", "{here}", "{script}"], "TARGET"),
    (["{old}", "{here}/new", "{here}/nowhere.py"], "SCRIPT"),
    (["{old}", "{here}/new", "{script}", "--pipeline-model-parallel-size", "4"], "--pipeline-model-parallel-size"),
    (["{old}", "{here}/new", "{script}", "--tensor-model-parallel-size=x"], "--tensor-model-parallel-size"),
    (["{here}", "{here}/new", "{script}"], "PATH"),
])
def test_what_cannot_be_converted_is_refused(
    words: list[str], field: str, old: Path, script: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [word.format(old=old, here=tmp_path, script=script) for word in words]
    assert main(["checkpoint", "convert", "--device", "cpu", *arguments]) == EXIT_CODE
    message = capsys.readouterr().err
    assert field in message
    assert "Remedy" in message


@pytest.mark.parametrize("status", [0, 1])
def test_a_script_that_writes_nothing_is_a_failure_whatever_it_says(status: int, old: Path, script: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without the converted checkpoint"):
        convert(old, tmp_path / "new", script, [], "cpu", lambda command, environment: status)
    assert not (tmp_path / "new").exists()


def test_too_few_gpus_are_refused_before_anything_starts(old: Path, script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(InputError, match="needs 4 ranks"):
        convert(old, tmp_path / "new", script, [], "cuda", lambda command, environment: 0)


def loading(folder: Path, **others: object) -> Namespace:
    given = {"load": str(folder), "ckpt_format": "torch", "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "ckpt_step": None,
             "expert_model_parallel_size": 1}
    return Namespace(**{**given, **others})


@pytest.mark.parametrize("saved_cut", [None, "{'lm': [[2, 2]]}"])
def test_an_old_checkpoint_of_another_cut_is_refused_with_the_way_to_convert_it(saved_cut: str | None, old: Path) -> None:
    args = Namespace() if saved_cut is None else Namespace(dip_cut=saved_cut)
    for rank in old.glob("iter_*/mp_rank_*"):
        torch.save({"args": args, "model": {"weight": torch.zeros(3)}}, rank / "model_optim_rng.pt")
    if saved_cut is not None:
        check_loadable(loading(old), saved_cut)
        check_loadable(loading(old, ckpt_step=4), saved_cut)
    with pytest.raises(InputError, match="convert") as error:
        check_loadable(loading(old), "{'lm': [[1, 1], [1, 1]]}")
    assert ("under the stock schedule" if saved_cut is None else saved_cut) in error.value.problem
    with pytest.raises(InputError, match="tensor parallel size 2, pipeline parallel size 2"):
        check_loadable(loading(old, pipeline_model_parallel_size=4), str(saved_cut))


def test_a_new_checkpoint_fits_every_cut_but_not_the_flag_for_the_old_format(saved: Path, tmp_path: Path) -> None:
    check_loadable(loading(saved, ckpt_format="torch_dist"), "any")
    check_loadable(loading(saved, auto_detect_ckpt_format=True), "any")
    with pytest.raises(InputError, match="use --ckpt-format torch_dist"):
        check_loadable(loading(saved), "any")
    check_loadable(loading(tmp_path / "nowhere"), "any")
    check_loadable(Namespace(load=None), "any")


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 4)])
def test_optimizer_state_goes_from_one_spread_of_experts_to_another_alone(before: int, now: int, saved: Path) -> None:
    common = {"args": Namespace(expert_model_parallel_size=before), "optimizer": {}}
    torch.save(common, saved / "iter_0000007/common.pt")
    run = loading(saved, ckpt_format="torch_dist", expert_model_parallel_size=now)
    if 1 in (before, now):
        with pytest.raises(InputError, match="--no-load-optim"):
            check_loadable(run, "any")
        run.no_load_optim = True
    check_loadable(run, "any")


def test_optimizer_state_in_the_buffers_order_is_not_said_to_load_everywhere(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As --use-distributed-optimizer saves it by default."""
    folder = saved / "iter_0000007"
    dcp.save({"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.x": torch.zeros(15)}, checkpoint_id=folder, no_dist=True)
    sizes = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2}
    torch.save({"args": Namespace(dip_cut="K 1", **sizes), "optimizer": {}}, folder / "common.pt")
    assert main(["checkpoint", "inspect", str(saved)]) == 0
    assert "only under the cut, tensor and pipeline size it was saved with" in capsys.readouterr().out
    args = Namespace(load=str(saved), ckpt_format="torch_dist", expert_model_parallel_size=1, **sizes)
    check_loadable(args, "K 1")
    with pytest.raises(InputError, match="cut K 1 then, K 2 now") as caught:
        check_loadable(args, "K 2")
    assert "--dist-ckpt-optim-fully-reshardable" in str(caught.value)
    args.pipeline_model_parallel_size = 4
    with pytest.raises(InputError, match="pipeline_model_parallel_size 2 then, 4 now"):
        check_loadable(args, "K 1")
    args.no_load_optim = True
    check_loadable(args, "K 2")


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
@pytest.mark.parametrize("harm", ["missing", "cut off"])
def test_missing_and_truncated_files_are_found(saved: Path, capsys: pytest.CaptureFixture[str], name: str, harm: str) -> None:
    file = saved / "iter_0000007" / name
    if harm == "missing":
        file.unlink()
    elif name == "common.pt":
        pytest.skip("its content is not read")
    else:
        os.truncate(file, file.stat().st_size // 2)
    assert main(["checkpoint", "inspect", str(saved)]) == EXIT_CODE
    error = capsys.readouterr().err
    assert name in error
    assert ("damaged" if (name, harm) == (".metadata", "cut off") else harm) in error


@pytest.mark.parametrize(
    ("file", "content"),
    [("iter_0000007/metadata.json", b"9" * 10_000), ("iter_0000007/metadata.json", b"[]"), ("iter_0000007/metadata.json", b"[" * 100_000),
     ("latest_checkpointed_iteration.txt", b"9" * 10_000), ("latest_checkpointed_iteration.txt", b"\xff\x00" * 500)],
)
def test_damaged_small_files_are_named(saved: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes) -> None:
    (saved / file).write_bytes(content)
    assert main(["checkpoint", "inspect", str(saved)]) == EXIT_CODE
    assert "PATH = " in capsys.readouterr().err
