"""Checkpoints in Megatron's torch_dist format: saved from any cut of the model, loaded into any other.

Every chunk names its tensors by their place in the whole module (``vision_model.``, ``vision_projection.``, ``language_model.``, layers
numbered over the whole module), and the optimizer's state goes by the same names. So what P pipeline ranks, K chunks and T
tensor-parallel ranks saved can be loaded with any other P, K and T, in one process, or by stock Megatron's layout of the same model.
Files lie as Megatron lays them: ``<folder>/iter_0000010/`` and ``<folder>/latest_checkpointed_iteration.txt``.

The distributed optimizer's state is saved ``fully_reshardable``. Without Apex and Transformer Engine Megatron-Core falls back on
``torch.optim``, whose per-parameter ``step`` its distributed optimizer cannot load (0.16); :mod:`megatron_dip.without_cuda.torch_adam` is what that needs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dip.models.description import unwrap
from megatron_dip.spec.codec import write_atomically
from megatron_dip.spec.errors import InputError
from megatron_dip.trainer.build import TrainingModel
from megatron_dip.without_cuda.core import CpuDeviceMode
from megatron_dip.without_cuda.torch_adam import allocate_states, mended_steps

LATEST = "latest_checkpointed_iteration.txt"


def save_checkpoint(
    folder: Path, model: TrainingModel, optimizer: MegatronOptimizer | None, *, iteration: int, extra: dict[str, Any] | None = None
) -> Path:
    """Saves weights, optimizer state and ``extra`` (small, equal on all ranks); called by all ranks. Returns the iteration's folder.

    It is written beside its place and moved there, then named as latest, when every rank has written: a run that dies here leaves what was
    there before, and never a folder with files of two runs.
    """
    target = folder / f"iter_{iteration:07d}"
    written = folder / f"{target.name}.unfinished"
    if dist.get_rank() == 0:
        try:
            if written.exists():  # of a run that ended here
                shutil.rmtree(written)
            written.mkdir(parents=True)
        except OSError as error:
            raise InputError("--save", str(folder), f"cannot be written ({error.strerror})", "name a folder that can be written") from error
    dist.barrier()
    for chunk in model.chunks:
        if chunk.ddp_config.overlap_param_gather:
            # The last step's weights are not gathered yet; the next forward pass would do it.
            chunk.start_param_sync(force_sync=True)
    state = _sharded_state(model, optimizer, is_loading=False)
    state.update(iteration=iteration, checkpoint_version=3.0, extra=extra or {})
    dist_checkpointing.save(state, str(written), content_metadata=_content_metadata())
    if dist.get_rank() == 0:
        if target.exists():  # of a run that was taken up again before it
            shutil.rmtree(target)
        written.rename(target)
        write_atomically(folder / LATEST, str(iteration).encode())
    dist.barrier()
    return target


def complete_iterations(folder: Path) -> list[int]:
    """Iterations whose checkpoints lie in ``folder``, in order."""
    found = []
    for place in folder.glob("iter_*"):
        number = place.name.removeprefix("iter_")
        if number.isdecimal() and (place / "metadata.json").is_file() and (place / ".metadata").is_file():
            found.append(int(number))
    return sorted(found)


def refuse_other_runs(folder: Path, load: Path | None) -> None:
    """Raises InputError where ``folder`` holds checkpoints of a run that this one, which loads from ``load``, does not go on with."""
    if (load is not None and load.resolve() == folder.resolve()) or not (found := complete_iterations(folder)):
        return
    raise InputError(
        "--save", str(folder), f"holds another run's checkpoints, up to iteration {found[-1]}",
        f"name another folder, or go on with that run: --load {folder}",
    )


def load_checkpoint(
    folder: Path, model: TrainingModel, optimizer: MegatronOptimizer | None, iteration: int | None = None
) -> tuple[int, dict[str, Any]]:
    """Loads a checkpoint into the model and, when given, the optimizer; returns the iteration and what was saved as ``extra``.

    Args:
        iteration: None: the latest.

    Raises:
        InputError: there is no such checkpoint, it is damaged, or it holds another model.
    """
    target = _checkpoint_folder(folder, iteration)
    with _reading_into_cpu_or_cuda():
        wanted = _sharded_state(model, optimizer, is_loading=True)
        try:
            state = dist_checkpointing.load(wanted, str(target))
        except (Exception, CheckpointException) as error:  # what damaged files raise in the readers is of any kind; torch's is no Exception
            reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
            is_misfit = isinstance(error, (CheckpointingException, CheckpointException, KeyError))
            raise InputError(
                "--load", str(target), f"cannot be loaded: {type(error).__name__}: {reason}",
                "use the configuration that it was saved with" + ("" if is_misfit else "; if this is it, files are damaged: " + _others(target)),
            ) from error
        for index, chunk in enumerate(model.chunks):
            unwrap(chunk, MegatronModule).load_state_dict(state[f"model{index}"])
        if optimizer is not None:
            with mended_steps(optimizer):
                optimizer.load_state_dict(state["optimizer"])
    return int(state["iteration"]), state["extra"]


def _checkpoint_folder(folder: Path, iteration: int | None) -> Path:
    """Of ``iteration``, or of the one that is named as latest. Raises InputError where it is not there."""
    if iteration is None:
        try:
            iteration = int((folder / LATEST).read_text())
        except (OSError, ValueError) as error:
            found = complete_iterations(folder)
            raise InputError(
                "--load", str(folder), f"{LATEST} cannot be read ({error})" if found else f"holds no checkpoint ({LATEST}: {error})",
                f"iterations {found} lie there: name one with --load-iteration" if found else "name the folder given to --save",
            ) from error
    target = folder / f"iter_{iteration:07d}"
    if not (target / "metadata.json").is_file():
        raise InputError("--load", str(target), "holds no complete checkpoint", _others(target))
    return target


def _others(target: Path) -> str:
    """What to load instead of a folder that cannot be loaded."""
    found = [number for number in complete_iterations(target.parent) if target.name != f"iter_{number:07d}"]
    return f"give --load-iteration one of {found}" if found else "there is no other iteration beside it: start anew"


def _content_metadata() -> dict[str, Any]:
    return {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def _sharded_state(model: TrainingModel, optimizer: MegatronOptimizer | None, *, is_loading: bool) -> dict[str, Any]:
    metadata = {**_content_metadata(), "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = {
        f"model{index}": unwrap(chunk, MegatronModule).sharded_state_dict(prefix="", metadata=metadata) for index, chunk in enumerate(model.chunks)
    }
    if optimizer is not None:
        allocate_states(optimizer)
        with mended_steps(optimizer):
            state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    return state


@contextmanager
def _reading_into_cpu_or_cuda() -> Iterator[None]:
    """Reading exchanges tensors on ``device="cuda"``, which is the CPU where there is no CUDA."""
    if torch.cuda.is_available():
        yield
    else:
        with CpuDeviceMode():
            yield
