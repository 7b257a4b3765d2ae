"""What a Megatron checkpoint folder holds, read without a model and without ranks.

In: a folder that ``--save`` wrote, or one iteration's folder in it. Out: its format, its cut where the format has one, and the tensors.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_dip.spec.errors import InputError

_RANK_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?$")

_TRACKER = "latest_checkpointed_iteration.txt"

_BOUND_OPTIMIZER = "optimizer.distributed.dp_group_idx_"

CUT_ATTRIBUTE = "dip_cut"
"""Of Megatron's namespace, which is saved in every checkpoint: how the run has cut its modules."""
SIZES_ATTRIBUTE = "dip_sizes"
"""Likewise: the run's sub-microbatch sizes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCut:
    """The cut of the run under DIP that saved a checkpoint."""

    chunks: str
    """As :data:`CUT_ATTRIBUTE` holds it."""
    sizes: str | None
    """As :data:`SIZES_ATTRIBUTE` holds it; None: saved by an earlier version."""
    is_bound: bool
    """Whether what is to be loaded fits no other cut."""


@dataclass(frozen=True, slots=True)
class CheckpointFiles:
    folder: Path
    """Of the iteration."""
    format: str
    """``torch_dist``: loads under any cut and parallel size; ``torch``: one file for each rank, loads under its own sizes alone."""
    iteration: int | None
    """None: a release, which has no iteration."""
    parallel: dict[str, int]
    """Tensor, pipeline and (above 1) expert size that a ``torch`` checkpoint is bound to; empty for ``torch_dist``."""
    tensors: dict[str, tuple[tuple[int, ...], str]]
    """Name -> global shape, dtype; of ``torch_dist`` alone."""
    has_bound_optimizer: bool = False
    """Whether the optimizer's state lies in the gradient buffers' order, as ``--use-distributed-optimizer`` saves it by default: it then loads
    under the cut, tensor and pipeline size of the saving run alone (and any number of replicas)."""


def read_checkpoint(path: Path) -> CheckpointFiles:
    """Raises InputError for what is no checkpoint, or has a format that pipelines cannot load."""
    folder = _iteration_folder(path)
    found = re.search(r"iter_(\d+)$", folder.name)
    iteration = int(found.group(1)) if found else None
    if (folder / "metadata.json").is_file():
        format_name = _named_format(folder / "metadata.json")
        if format_name != "torch_dist":
            raise InputError(
                "PATH", str(folder), f"the format {format_name!r} is read by none of the releases that DIP serves",
                "load it with the release that wrote it and save with --ckpt-format torch_dist",
            )
        metadata = _whole_metadata(folder).state_dict_metadata
        tensors = {
            name: (tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
            for name, entry in sorted(metadata.items()) if isinstance(entry, TensorStorageMetadata)
        }
        return CheckpointFiles(
            folder, "torch_dist", iteration, {}, tensors, has_bound_optimizer=any(name.startswith(_BOUND_OPTIMIZER) for name in metadata)
        )
    if (folder / ".metadata").is_file():
        raise InputError(
            "PATH", str(folder), "written by FSDP (torch_dcp or fsdp_dtensor): Megatron loads it under FSDP alone, and has no way from it to another "
            "format", "go on under FSDP, or start from a torch_dist checkpoint that was saved without it",
        )
    ranks = [match for match in (_RANK_FOLDER.match(child.name) for child in sorted(folder.iterdir())) if match]
    if not ranks:
        raise InputError("PATH", str(folder), "holds no checkpoint of Megatron", "give a folder that --save wrote")
    sizes = {name: 1 + max(int(match.group(group) or 0) for match in ranks) for group, name in enumerate(("tensor", "pipeline", "expert"), start=1)}
    if sizes["pipeline"] > 1 and sizes["expert"] == 1 and _experts_are_spread(folder):
        sizes["pipeline"], sizes["expert"] = 1, sizes["pipeline"]  # Megatron leaves the pipeline rank out where there is one
    if sizes["expert"] == 1:
        del sizes["expert"]
    return CheckpointFiles(folder, "torch", iteration, sizes, {})


def _named_format(file: Path) -> object:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError("PATH", str(file), f"cannot be read ({str(error)[:200]})", "give a whole checkpoint: this file is damaged") from None
    if not isinstance(found, dict):
        raise InputError("PATH", str(file), "holds no JSON object", "give a whole checkpoint: this file is damaged")
    return found.get("sharded_backend", "unknown")


def _whole_metadata(folder: Path) -> Metadata:
    """What a torch_dist folder holds, if all of it is there. Raises InputError for files that are missing or cut off; it reads no tensors."""
    remedy = "take another iteration's checkpoint, or copy this one again"
    if not (folder / ".metadata").is_file():
        raise InputError("PATH", str(folder / ".metadata"), "is missing", remedy)
    try:
        metadata = FileSystemReader(str(folder)).read_metadata()
    except Exception as error:  # a damaged pickle raises anything
        raise InputError("PATH", str(folder / ".metadata"), f"is damaged ({type(error).__name__}: {error})", remedy) from error
    # What is no tensor lies in a file of its own, from Megatron-Core 0.19 on among the tensors.
    if not (folder / "common.pt").is_file() and not any(name.startswith("common_state/") for name in metadata.state_dict_metadata):
        raise InputError("PATH", str(folder / "common.pt"), "is missing", remedy)
    needed: dict[str, int] = {}
    for place in metadata.storage_data.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for file, size in needed.items():
        if not (folder / file).is_file():
            raise InputError("PATH", str(folder / file), "is missing", remedy)
        if (folder / file).stat().st_size < size:
            raise InputError("PATH", str(folder / file), f"is cut off: {(folder / file).stat().st_size} of {size} bytes", remedy)
    return metadata


def check_loadable(args: Any, cut: str) -> None:
    """Refuses, before anything is loaded, a checkpoint that ``--load`` names and this run's cut does not fit.

    Args:
        args: Megatron's namespace.
        cut: this run's, as :data:`CUT_ATTRIBUTE` of the saving run's namespace holds it.

    Raises:
        InputError: a checkpoint of the old format from another cut or other sizes, one of FSDP, or a format other than ``--ckpt-format``.
    """
    load = getattr(args, "load", None)
    if load is None or not (Path(load) / _TRACKER).is_file():
        return  # Megatron says what it then does
    step = getattr(args, "ckpt_step", None)
    found = read_checkpoint(Path(load) / f"iter_{step:07d}" if step else Path(load))
    if found.format == "torch_dist":
        if args.ckpt_format == "torch" and not getattr(args, "auto_detect_ckpt_format", False):
            raise InputError("--ckpt-format", "torch", f"the checkpoint of --load {load} is torch_dist", "use --ckpt-format torch_dist")
        _check_expert_optimizer(args, found.folder)
        if found.has_bound_optimizer:
            _check_bound_optimizer(args, found.folder, cut)
        return
    sizes = {"tensor": args.tensor_model_parallel_size, "pipeline": args.pipeline_model_parallel_size}
    if args.expert_model_parallel_size > 1:
        sizes["expert"] = args.expert_model_parallel_size
    if found.parallel != sizes:
        saved: object = found.parallel
    else:
        saved = _saved_cut(found.folder)
    if saved != cut:
        raise InputError(
            "--load", str(load),
            f"is in the old format, one file for each rank, and was saved {_words(saved)}; it fits no other cut ({_words(cut)} this run)",
            "convert it: megatron-dip checkpoint convert PATH TARGET SCRIPT ARGUMENTS (of the run that saved), then --load TARGET --ckpt-format torch_dist",
        )


def saved_cut(args: Any) -> SavedCut | None:
    """The cut that a checkpoint which ``--load`` names was saved under; None: there is no checkpoint, or it was not saved under DIP.

    Args:
        args: Megatron's namespace.

    Raises:
        InputError: for what is no checkpoint that pipelines can load.
    """
    load = getattr(args, "load", None)
    if load is None or not (Path(load) / _TRACKER).is_file():
        return None
    step = getattr(args, "ckpt_step", None)
    found = read_checkpoint(Path(load) / f"iter_{step:07d}" if step else Path(load))
    if found.format == "torch_dist":
        from megatron.core.dist_checkpointing import load_common_state_dict

        saved = load_common_state_dict(str(found.folder)).get("args")
        without_optimizer = getattr(args, "finetune", False) or getattr(args, "no_load_optim", False)
        is_bound = found.has_bound_optimizer and not without_optimizer
    else:
        saved, is_bound = _saved_args(found.folder), True
    chunks = getattr(saved, CUT_ATTRIBUTE, None)
    return None if chunks is None else SavedCut(chunks=chunks, sizes=getattr(saved, SIZES_ATTRIBUTE, None), is_bound=is_bound)


def _check_expert_optimizer(args: Any, folder: Path) -> None:
    """Raises InputError for optimizer state from one rank with all experts where they are spread now, or the reverse.

    Megatron keeps the optimizer of spread experts apart from that of all other weights, and its checkpoints with it.
    """
    if getattr(args, "finetune", False) or getattr(args, "no_load_optim", False):
        return
    from megatron.core.dist_checkpointing import load_common_state_dict

    state = load_common_state_dict(str(folder))
    saved, now = getattr(state.get("args"), "expert_model_parallel_size", 1), args.expert_model_parallel_size
    if "optimizer" in state and (saved == 1) != (now == 1):
        raise InputError(
            "--load", str(args.load), f"was saved with expert parallel size {saved}, {now} this run: Megatron's optimizer state goes from one size "
            "above 1 to another, not from or to 1", "load weights alone (--no-load-optim --no-load-rng, or --finetune), or use the size it was saved with",
        )


def _check_bound_optimizer(args: Any, folder: Path, cut: str) -> None:
    """Raises InputError for optimizer state in the order of another cut's gradient buffers."""
    if getattr(args, "finetune", False) or getattr(args, "no_load_optim", False):
        return
    from megatron.core.dist_checkpointing import load_common_state_dict

    saved = load_common_state_dict(str(folder)).get("args")
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    before = {"cut": getattr(saved, CUT_ATTRIBUTE, None), **{name: getattr(saved, name, None) for name in names}}
    now = {"cut": cut, **{name: getattr(args, name) for name in names}}
    differing = [name for name in now if before[name] != now[name]]
    if differing:
        raise InputError(
            "--load", str(args.load),
            "holds the distributed optimizer's state in its default format, which fits the cut and sizes it was saved with alone: "
            + ", ".join(f"{name} {before[name]} then, {now[name]} now" for name in differing),
            "go back to these, load weights alone (--no-load-optim), or save with --dist-ckpt-optim-fully-reshardable first",
        )


def _saved_cut(folder: Path) -> str | None:
    """The cut that a run under DIP has noted in a checkpoint of the old format; None: saved under the stock schedule."""
    return getattr(_saved_args(folder), CUT_ATTRIBUTE, None)


def _experts_are_spread(folder: Path) -> bool:
    return getattr(_saved_args(folder), "expert_model_parallel_size", 1) > 1


def _saved_args(folder: Path) -> Any:
    """The namespace of the run that saved a checkpoint of the old format; None where no rank has written it."""
    file = next(folder.glob("mp_rank_*/model_optim_rng.pt"), None)
    # The file is a pickle as Megatron loads it; mapped, only its small parts are read.
    return None if file is None else torch.load(file, map_location="cpu", mmap=True, weights_only=False)["args"]


def _words(cut: object) -> str:
    if isinstance(cut, dict):
        return "with " + ", ".join(f"{name} parallel size {size}" for name, size in cut.items())
    return "under the stock schedule" if cut is None else f"cut into layers {cut}"


_LONGEST_TRACKED = 60
"""Characters of a tracker's text that are read: a number, or ``release``."""


def _iteration_folder(path: Path) -> Path:
    tracker = path / _TRACKER
    if tracker.is_file():
        text = tracker.read_text(errors="replace").replace("\0", "").strip()[:_LONGEST_TRACKED]
        path = path / (text if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not path.is_dir():
        raise InputError("PATH", str(path), "no such folder", "give a folder that --save wrote, or one iteration's folder in it")
    return path
