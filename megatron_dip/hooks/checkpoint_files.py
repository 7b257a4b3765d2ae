"""What a Megatron checkpoint folder holds, read without a model and without ranks.

In: a folder that ``--save`` wrote, or one iteration's folder in it. Out: its format, its cut where the format has one, and the tensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_dip.spec.errors import InputError

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?$")


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    folder: Path
    """Of the iteration."""
    format: str
    """``torch_dist``: loads under any cut and parallel size; ``torch``: one file for each rank, loads under its own sizes alone."""
    iteration: int | None
    """None: a release, which has no iteration."""
    parallel: dict[str, int]
    """Tensor and pipeline size that a ``torch`` checkpoint is bound to; empty for ``torch_dist``."""
    tensors: dict[str, tuple[tuple[int, ...], str]]
    """Name -> global shape, dtype; of ``torch_dist`` alone."""


def read_checkpoint(path: Path) -> CheckpointFiles:
    """Raises InputError for what is no checkpoint, or has a format that pipelines cannot load."""
    folder = _iteration_folder(path)
    found = re.search(r"iter_(\d+)$", folder.name)
    iteration = int(found.group(1)) if found else None
    if (folder / "metadata.json").is_file():
        format_name = json.loads((folder / "metadata.json").read_text()).get("sharded_backend", "unknown")
        if format_name != "torch_dist":
            raise InputError(
                "PATH", str(folder), f"the format {format_name!r} is read by none of the releases that DIP serves",
                "load it with the release that wrote it and save with --ckpt-format torch_dist",
            )
        metadata = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
        tensors = {
            name: (tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
            for name, entry in sorted(metadata.items()) if isinstance(entry, TensorStorageMetadata)
        }
        return CheckpointFiles(folder, "torch_dist", iteration, {}, tensors)
    if (folder / ".metadata").is_file():
        raise InputError(
            "PATH", str(folder), "written by FSDP (torch_dcp or fsdp_dtensor): Megatron loads it under FSDP alone, and has no way from it to another "
            "format", "go on under FSDP, or start from a torch_dist checkpoint that was saved without it",
        )
    ranks = [match for match in (_RANK_FOLDER.match(child.name) for child in sorted(folder.iterdir())) if match]
    if not ranks:
        raise InputError("PATH", str(folder), "holds no checkpoint of Megatron", "give a folder that --save wrote")
    sizes = {name: 1 + max(int(match.group(group) or 0) for match in ranks) for group, name in enumerate(("tensor", "pipeline", "expert"), start=1)}
    if sizes["expert"] == 1:
        del sizes["expert"]
    return CheckpointFiles(folder, "torch", iteration, sizes, {})


def _iteration_folder(path: Path) -> Path:
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        text = tracker.read_text().strip()
        path = path / (text if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not path.is_dir():
        raise InputError("PATH", str(path), "no such folder", "give a folder that --save wrote, or one iteration's folder in it")
    return path
