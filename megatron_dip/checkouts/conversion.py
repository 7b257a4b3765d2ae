"""Converts checkpoints between Megatron's formats by Megatron's own loading and saving, in the user's script.

In: a checkpoint that ``--save`` wrote, and the script with the arguments it is trained with. The script is started with one process a
rank of the checkpoint's tensor and pipeline sizes and Megatron's ``--ckpt-convert-*`` flags: it builds the model, loads, saves in the other
format, and ends before training. Out: a folder for ``--load``, optimizer state included.

``torch`` (one file a rank) becomes ``torch_dist`` (any sizes, any cut), and the reverse for tools that read only the old format.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_dip.checkouts.checkpoint_files import CheckpointFiles, read_checkpoint
from megatron_dip.spec.errors import InputError

_OTHER = {"torch": "torch_dist", "torch_dist": "torch"}
_SIZES = {"tensor": "--tensor-model-parallel-size", "pipeline": "--pipeline-model-parallel-size", "expert": "--expert-model-parallel-size"}

Start = Callable[[Sequence[str], Mapping[str, str]], int]
"""(command, environment) -> exit status"""


def convert(path: Path, target: Path, script: Path, arguments: Sequence[str], device: str, start: Start | None = None) -> CheckpointFiles:
    """Converts to the other format; the files written.

    Args:
        path: a folder that ``--save`` wrote, or one iteration's folder in it.
        target: the folder to make, as ``--save`` would.
        arguments: the script's. Sizes of a ``torch`` checkpoint are added; for the other direction they say the sizes to save for.
        device: ``cuda``, a GPU of this machine for each rank; or ``cpu``, GPUs hidden.
        start: runs the processes; by default with torchrun.

    Raises:
        InputError: what cannot be converted, and a script that did not get through.
    """
    found = read_checkpoint(path)
    if not script.is_file():
        raise InputError("SCRIPT", str(script), "no such file", "give the training script, such as pretrain_vlm.py, and its arguments")
    if target.exists():
        raise InputError("TARGET", str(target), "exists already", "give a folder that is yet to be made")
    sizes = _sizes(found, arguments)
    ranks = sizes["tensor"] * sizes["pipeline"] * sizes.get("expert", 1)
    if device == "cuda":
        _check_devices(ranks)
    partial = target.with_name(target.name + ".partial")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks), "--standalone", "--local-addr", "127.0.0.1",
        "-m", "megatron_dip.launch", "--device", device, str(script), *arguments, *_flags(path, found, sizes, arguments, partial),
    ]
    environment = dict(os.environ)
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": environment.get("GLOO_SOCKET_IFNAME", "lo")}
    status = (start or _start)(command, environment)
    written = partial / _OTHER[found.format]
    # Megatron ends with status 0 after some failures to load.
    if status != 0 or not (written / "latest_checkpointed_iteration.txt").is_file():
        raise InputError(
            "SCRIPT", str(script), f"ended with status {status} without the converted checkpoint",
            "see its messages above; the model's flags must be those of the run that saved, layers of the same kind (--transformer-impl) included",
        )
    written.rename(target)
    partial.rmdir()
    return read_checkpoint(target)


def _sizes(found: CheckpointFiles, arguments: Sequence[str]) -> dict[str, int]:
    """Parallel sizes of the run, by the checkpoint and the script's arguments, which must not differ."""
    given = {name: _value(arguments, flag) for name, flag in _SIZES.items()}
    for name, size in given.items():
        if size is not None and found.parallel and size != found.parallel.get(name, 1):
            raise InputError(
                _SIZES[name], size, f"the checkpoint was saved with {found.parallel.get(name, 1)}, and its format fits no other",
                f"give {found.parallel.get(name, 1)}, or leave it out",
            )
    return found.parallel or {name: size or 1 for name, size in given.items()}


def _value(arguments: Sequence[str], flag: str) -> int | None:
    """The last value of a flag, as argparse takes it."""
    value = None
    for index, word in enumerate(arguments):
        text = word.removeprefix(f"{flag}=") if word.startswith(f"{flag}=") else arguments[index + 1] if word == flag and index + 1 < len(arguments) else None
        if text is not None:
            if not text.isdecimal() or int(text) < 1:
                raise InputError(flag, text, "is not a number of ranks", "give 1 or more")
            value = int(text)
    return value


def _flags(path: Path, found: CheckpointFiles, sizes: Mapping[str, int], arguments: Sequence[str], partial: Path) -> list[str]:
    whole = (path / "latest_checkpointed_iteration.txt").is_file()
    flags = [word for name, size in sizes.items() for word in (_SIZES[name], str(size))]
    flags += ["--load", str((path if whole else found.folder.parent).resolve()), "--exit-on-missing-checkpoint", "--ckpt-format", found.format]
    flags += [] if whole or found.iteration is None else ["--ckpt-step", str(found.iteration)]
    flags += ["--ckpt-convert-format", _OTHER[found.format], "--ckpt-convert-save", str(partial.resolve())]
    if "--use-distributed-optimizer" in arguments and found.format == "torch":
        flags += ["--dist-ckpt-optim-fully-reshardable"]  # the default form fits the sizes it was saved with
    return flags


def _check_devices(ranks: int) -> None:
    import torch

    if torch.cuda.device_count() < ranks:
        raise InputError(
            "--device", "cuda", f"the checkpoint needs {ranks} ranks, one a GPU; this machine has {torch.cuda.device_count()}",
            "use --device cpu with a script's arguments for the CPU (local layers, gloo), or start the script on as many GPUs yourself with "
            "--ckpt-convert-format and --ckpt-convert-save",
        )


def _start(command: Sequence[str], environment: Mapping[str, str]) -> int:
    return subprocess.run(command, env=dict(environment), check=False).returncode
