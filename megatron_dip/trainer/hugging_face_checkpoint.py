"""Hugging Face checkpoints on disk as Megatron checkpoints of the model that is built here, and back.

In: a folder with ``config.json`` and ``*.safetensors``. Out: a folder for ``--load`` in Megatron's torch_dist format, which any cut and any
tensor-parallel size of the model reads; and the reverse. One process, weights on the host: the memory holds the model about twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_dip.models.hugging_face import export_weights, import_weights, is_unused, model_of_config, named_as_now
from megatron_dip.models.vlm import VlmConfig, VlmStage
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import VisionLanguageModel
from megatron_dip.spec.workload import Parallel
from megatron_dip.trainer.build import initialize_parallel
from megatron_dip.trainer.checkpoint import LATEST
from megatron_dip.trainer.stock_layouts import stock_cuts

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RELEASE = "release"
"""Megatron's name for weights that no iteration made."""
_SHARD_BYTES = 5 << 30


def import_checkpoint(source: Path, target: Path, *, dtype: str) -> int:
    """Writes ``target``, for ``--load`` with ``--finetune``; gives the number of weights.

    Args:
        source: Hugging Face's folder.
        dtype: of :data:`DTYPES`, that training will have.
    """
    config = read_config(source)
    _refuse_existing(target)
    stage = _whole(config, dtype)
    found = import_weights(read_tensors(source), stage.vlm_config.model)
    state = stage.state_dict()
    wrong = [name for name, value in found.items() if name not in state or state[name].shape != value.shape]
    if wrong:
        raise InputError("SOURCE", wrong[:3], "are not of the shapes that config.json asks for", "give the checkpoint's own config.json")
    stage.load_state_dict({name: value.to(DTYPES[dtype]) for name, value in found.items()}, strict=False)
    folder = target / RELEASE
    folder.mkdir(parents=True)
    described = SimpleNamespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1, world_size=1, no_save_optim=True, no_save_rng=True)
    dist_checkpointing.save({"model": stage.sharded_state_dict(), "args": described, "checkpoint_version": 3.0, "iteration": 0}, str(folder))
    (target / LATEST).write_text(RELEASE)
    return sum(value.numel() for value in found.values())


def export_checkpoint(source: Path, config_folder: Path, target: Path, *, dtype: str) -> int:
    """Writes ``target`` in Hugging Face's form; gives the number of weights.

    Args:
        source: a folder that ``--save`` or :func:`import_checkpoint` wrote, in torch_dist format.
        config_folder: with the config.json that the model began from; what else lies there but weights is copied, and weights get the names
            that they have there; those that the model here does not use are taken from it.
    """
    from safetensors.torch import save_file

    config = read_config(config_folder)
    _refuse_existing(target)
    stage = _whole(config, dtype)
    latest = source / LATEST
    if not latest.is_file():
        raise InputError("SOURCE", str(source), f"holds no {LATEST}", "name the folder of --save")
    name = latest.read_text().strip()
    folder = source / (name if name == RELEASE else f"iter_{int(name):07d}")
    state = dist_checkpointing.load({"model": stage.sharded_state_dict()}, str(folder))["model"]
    tensors = export_weights({key: value for key, value in state.items() if isinstance(value, torch.Tensor)}, stage.vlm_config.model)
    published = _published_names(config_folder)
    tensors = {published.get(key, key): value for key, value in tensors.items()}
    tensors |= _unused_tensors(config_folder, stage.vlm_config.model)
    target.mkdir(parents=True)
    for file in config_folder.iterdir():
        if file.is_file() and ".safetensors" not in file.name and file.suffix not in (".bin", ".pt", ".pth"):
            shutil.copy(file, target)
    shards = _shards({key: value.detach().to(DTYPES[dtype]) for key, value in tensors.items()})
    if len(shards) == 1:
        save_file(shards[0], target / "model.safetensors", metadata={"format": "pt"})
        return sum(value.numel() for value in tensors.values())
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, target / file_name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file_name)
    size = sum(value.numel() * value.element_size() for shard in shards for value in shard.values())
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=1))
    return sum(value.numel() for value in tensors.values())


def _shards(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if held and held + size > _SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][name] = tensor.contiguous()
        held += size
    return shards


def read_config(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError("config.json", str(folder), f"cannot be read ({error})", "name a folder with a Hugging Face checkpoint") from error


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise InputError("SOURCE", str(folder), "needs the package safetensors", "pip install safetensors") from error
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError("SOURCE", str(folder), "holds no *.safetensors", "download the checkpoint's weights in that format")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            found |= load_file(file)
        except (OSError, SafetensorError) as error:
            raise InputError("SOURCE", str(file), f"cannot be read ({error})", "download it again") from error
    return found


def _published_names(folder: Path) -> dict[str, str]:
    """Name of a weight in transformers 5 -> its name in the folder's files."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {named_as_now(name): name for name in tensors.keys()}  # noqa: SIM118 (no dict)
    return found


def _unused_tensors(folder: Path, model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """What training had no part in, from the checkpoint that it began from, by the names of its files."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if is_unused(named_as_now(name), model)}  # noqa: SIM118 (no dict)
    return found


def _refuse_existing(target: Path) -> None:
    if target.exists() and any(target.iterdir()):
        raise InputError("TARGET", str(target), "is not empty", "name a new folder")


def _whole(config: Mapping[str, Any], dtype: str) -> VlmStage:
    """The model in one piece on this process, with any weights."""
    model = model_of_config(config, sequence_length=8192, image_size=1288)
    if not dist.is_initialized():
        # One rank: a store in memory needs no port.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        initialize_parallel(Parallel(), device="cuda" if torch.cuda.is_available() else "cpu", seed=1)
    whole = VlmConfig(model=model, parallel=Parallel(), dtype=DTYPES[dtype])
    return whole.build_stage(stock_cuts(whole, "scripts", ranks=1), 0, 0, is_chained=False)
