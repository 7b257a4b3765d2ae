"""`megatron-dip checkpoint inspect` on small folders of both formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_dip.cli.main import main
from megatron_dip.spec.errors import EXIT_CODE


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """As --save with torch_dist leaves it: a tracker and one iteration."""
    folder = tmp_path / "iter_0000007"
    state = {"language_model.output_layer.weight": torch.zeros(5, 3), "optimizer.state.exp_avg.x": torch.zeros(15), "step": 3}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
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


@pytest.mark.parametrize("tracker", [None, "9", "nonsense"])
def test_what_is_no_checkpoint_is_refused(tracker: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if tracker is not None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker)
    assert main(["checkpoint", "inspect", str(tmp_path)]) == EXIT_CODE
    assert "Remedy" in capsys.readouterr().err
