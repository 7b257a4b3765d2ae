"""Starts a training script for a short rehearsal that chooses the run's cut, by the launcher and ``--dip-rehearse``.

In: the script with the flags of the run. Out: what :mod:`megatron_dip.hooks.rehearsal` writes. The processes are those of one replica, on this machine:
tensor x pipeline x context (x expert) ranks, or of its first pipeline rank alone. A rehearsal over several machines is started as the run is, with
``--dip-rehearse DIR`` among its flags.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_dip.spec.errors import InputError

_PIPELINE = "--pipeline-model-parallel-size"
_SIZES = ("--tensor-model-parallel-size", _PIPELINE, "--context-parallel-size")
_LEFT_OUT = (
    "--save", "--save-interval", "--load", "--tensorboard-dir", "--wandb-project", "--wandb-exp-name", "--wandb-save-dir", "--exit-duration-in-mins",
    "--exit-interval", "--pipeline-schedule", "--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank",
    "--dip-partition",
)
"""Flags with one value that a rehearsal goes without: it saves and loads nothing, and DIP cuts the modules itself."""
_NEVER = str(10**9)

Start = Callable[[Sequence[str], Mapping[str, str]], int]
"""(command, environment) -> exit status"""


def rehearse(
    script: Path, arguments: Sequence[str], output: Path, device: str, data_parallel: int = 1, *, one_rank: bool = False, start: Start | None = None
) -> None:
    """Runs the rehearsal.

    Args:
        arguments: the script's, as the run has them.
        output: the folder to write.
        device: ``cuda`` or ``cpu``.
        data_parallel: replicas of the run; the rehearsal runs one of them, with its share of the global batch.
        one_rank: one pipeline rank, with all layers, stands for all.
        start: runs the processes; by default with torchrun.

    Raises:
        InputError: for what cannot be started, and for a script that did not get through.
    """
    if not script.is_file():
        raise InputError("SCRIPT", str(script), "no such file", "give the training script, such as pretrain_vlm.py, and its arguments")
    if data_parallel < 1:
        raise InputError("--data-parallel", data_parallel, "must be at least 1", "give the replicas of the run")
    flags = without_flags(arguments, _LEFT_OUT)
    ranks = 1
    for flag in _SIZES:
        ranks *= flag_value(arguments, flag) or 1
    batch = flag_value(arguments, "--global-batch-size")
    if batch is not None and data_parallel > 1:
        if batch % data_parallel:
            raise InputError("--global-batch-size", batch, f"cannot be shared among {data_parallel} replicas", "give a multiple of --data-parallel")
        flags += ["--global-batch-size", str(batch // data_parallel)]
    given = _last(arguments, "--dip-partition")
    if given is not None:
        flags += ["--dip-partition", given]
    pipeline = flag_value(arguments, _PIPELINE) or 1
    if one_rank:
        ranks //= pipeline
        flags += [_PIPELINE, "1", "--dip-rehearse-ranks", str(pipeline)]
    flags += ["--pipeline-schedule", "dip", "--dip-rehearse", str(output.resolve()), "--eval-interval", _NEVER]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks), "--standalone", "--local-addr", "127.0.0.1",
        "-m", "megatron_dip.launch", "--device", device, str(script), *flags,
    ]
    environment = dict(os.environ)
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": environment.get("GLOO_SOCKET_IFNAME", "lo")}
    report = output / "report.txt"
    report.unlink(missing_ok=True)
    status = (start or _start)(command, environment)
    if status != 0 or not report.is_file():
        raise InputError(
            "SCRIPT", str(script), f"ended with status {status} before the rehearsal was through",
            "see its messages above; --train-iters must leave room for some thirty iterations",
        )


def without_flags(arguments: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The arguments without these flags and their values, whether in one word or two."""
    kept: list[str] = []
    skip = False
    for word in arguments:
        if skip:
            skip = False
        elif word in flags:
            skip = True
        elif word.partition("=")[0] not in flags:
            kept.append(word)
    return kept


def flag_value(arguments: Sequence[str], flag: str) -> int | None:
    """The last value of a numeric flag, as argparse takes it. Raises InputError for what is no number from 1."""
    text = _last(arguments, flag)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(flag, text, "is not a number from 1", "give a whole number")
    return int(text)


def _last(arguments: Sequence[str], flag: str) -> str | None:
    value = None
    for index, word in enumerate(arguments):
        if word.startswith(f"{flag}="):
            value = word.removeprefix(f"{flag}=")
        elif word == flag and index + 1 < len(arguments):
            value = arguments[index + 1]
    return value


def _start(command: Sequence[str], environment: Mapping[str, str]) -> int:
    return subprocess.run(command, env=dict(environment), check=False).returncode
