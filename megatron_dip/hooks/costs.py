"""What plans of a script's model cost: times by a profile or by a device, memory by the chunks that were built."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.device import device_names, load_device
from megatron_dip.cost.fixed import FixedLeast, WithoutOffload
from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.modules import Connector, Kernels
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.cost.run import ChunkShape, RunCosts
from megatron_dip.hooks.arguments import DipOptions
from megatron_dip.iteration.built_model import TrainedModel
from megatron_dip.models.trained import built_kernels
from megatron_dip.spec.codec import load_profile
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import Profile
from megatron_dip.spec.workload import Parallel, Training

logger = logging.getLogger(__name__)


def make_costs(
    spec: ModelSpec, args: Any, options: DipOptions, kernels: Kernels | None = None, connectors: Mapping[str, Connector] | None = None
) -> CostModel:
    """What plans cost: the profile of the flags, or the analytic costs of a device.

    Args:
        kernels: which implementations the built chunks run.
        connectors: which projectors they have.
    """
    if options.profile is not None:
        costs: CostModel = ProfileCost(load_profile(options.profile), options.memory_limit_bytes, field="--dip-profile")
    else:
        parallel = Parallel(
            tensor=args.tensor_model_parallel_size, pipeline=args.pipeline_model_parallel_size, data=args.data_parallel_size,
            context=args.context_parallel_size, sequence=bool(args.sequence_parallel),
        )
        training = Training(
            dtype="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32", distributed_optimizer=bool(args.use_distributed_optimizer),
            split_backward=options.split_backward is True,
        )
        device = load_device(options.device or detect_device(), "--dip-device")
        costs = AnalyticCost(
            spec, parallel, training, device, memory_capacity_bytes=options.memory_limit_bytes,
            undivided=[module.name for module in spec.modules if module.role == "encoder"], kernels=kernels, connectors=connectors,
        )
    if getattr(args, "recompute_granularity", None) == "selective" and "core_attn" in (args.recompute_modules or ["core_attn"]):
        return FixedLeast(costs, "selective")
    return costs


def run_costs(built: TrainedModel, partition: Partition, args: Any, options: DipOptions, chunks: Sequence[torch.nn.Module]) -> RunCosts:
    """Costs of the model that was built, with all memory that its ranks hold.

    Args:
        chunks: this rank's, of which there is one of every module.
    """
    width = 2 if args.bf16 or args.fp16 else 4
    replicas = args.data_parallel_size * args.context_parallel_size if args.use_distributed_optimizer else 1
    # Weight, fp32 gradient, Adam's two moments; beside narrow weights an fp32 copy.
    trained = width + 4 + (8 if width == 4 else 12) / replicas
    of_chunks: dict[ChunkShape, int] = {}
    for (module, vp_stage, rank), weights in built.weights.items():
        rows = partition.chunks[module]
        shape = (module, rows[vp_stage][rank], (vp_stage, rank) == (0, 0), (vp_stage, rank) == (len(rows) - 1, len(rows[0]) - 1))
        held = weights.frozen_bytes + round(weights.trained_parameters * trained)
        of_chunks[shape] = max(of_chunks.get(shape, 0), held)
    kernels = replace(built_kernels(chunks), rotary=frozenset(module for (module, _, _), weights in built.weights.items() if weights.is_rotary))
    connectors = {module: weights.connector for (module, _, _), weights in built.weights.items() if weights.connector is not None}
    costs = make_costs(built.spec, args, options, kernels, connectors)
    return RunCosts(costs if options.host_memory_bytes != 0 else WithoutOffload(costs), built.spec, of_chunks)


def costs_file(folder: str | None, spec: ModelSpec, args: Any, options: DipOptions) -> Path | None:
    """Where a run that saves its checkpoints in ``folder`` keeps measured costs: one file for each model, sharding, number format and device,
    whatever the partition. None without a folder."""
    if folder is None:
        return None
    same = [
        spec, args.tensor_model_parallel_size, args.context_parallel_size, bool(args.sequence_parallel), bool(args.bf16), bool(args.fp16),
        str(getattr(args, "fp8", None)), options.device, device_name(),
    ]
    return Path(folder) / "dip" / f"costs_{hashlib.sha256(msgspec.json.encode(same)).hexdigest()[:16]}.json"


def kept_costs(file: Path | None) -> Profile | None:
    """What an earlier run measured; None where there is nothing to be had."""
    if file is None or not file.is_file():
        return None
    try:
        profile = load_profile(file)
        profile.validate(str(file))
    except InputError as error:
        logger.warning("costs of the run that is resumed are not taken up, and measured anew: %s", error)
        return None
    logger.warning("plans begin with the costs that were measured before: %s", file)
    return profile


def device_name() -> str:
    """Of the device that this process trains on, as torch calls it."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def detect_device() -> str:
    """The named device that this process trains on. Raises InputError for one without figures."""
    name = device_name()
    known = [device for device in device_names() if device.lower() in name.lower()]
    if not known:
        raise InputError(
            "--dip-device", None, f"there are no figures for {name!r}", f"give one of {list(device_names())}, a device file, or --dip-profile"
        )
    return max(known, key=len)
