"""Builds what training needs of Megatron: parallel state, model chunks inside DDP, optimizer.

The chunk list is laid out as Megatron's ``finalize_model_grads`` needs it (:func:`megatron_dip.models.layout.chunk_order`). Every DDP
carries one and the same config, that of the outermost module, on which Megatron keeps its training functions.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed import finalize_model_grads as megatron_finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.built_in import BuiltInConfig
from megatron_dip.models.layout import ModuleCut, check_enough_layers, chunk_order
from megatron_dip.models.staged import DescribedStagedModel
from megatron_dip.runtime.startup import load_kernels_eagerly
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.training import OptimizerSpec
from megatron_dip.spec.workload import Parallel
from megatron_dip.without_cuda.core import enable_cpu


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingModel:
    """One rank's part of the model."""

    chunks: list[DistributedDataParallel]
    """In the order of the list that Megatron's functions get."""
    config: TransformerConfig
    """The config that every chunk's DDP carries."""
    whole: BuiltInConfig
    """The model before it was cut."""
    staged: DescribedStagedModel | None = None
    """How DIP's executor runs the chunks; None for a stock layout."""

    def zero_grad(self) -> None:
        """Clears gradients before an iteration, as Megatron's train_step does."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    def train(self, mode: bool = True) -> None:
        for chunk in self.chunks:
            chunk.train(mode)


def initialize_parallel(parallel: Parallel, *, device: str, seed: int, timeout_s: float = 600.0) -> None:
    """Starts torch.distributed (from torchrun's environment, unless it runs already), Megatron's groups and its random states.

    Raises InputError where the ranks do not match the parallel sizes. Ends what an earlier call set up.
    """
    if device not in ("cpu", "cuda"):
        raise InputError("--device", device, "no such device", "use cpu or cuda")
    if device == "cpu":
        enable_cpu()
    elif not torch.cuda.is_available():
        raise InputError("--device", device, "this machine has no CUDA device", "use --device cpu")
    else:
        load_kernels_eagerly()
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if parallel.context != 1:
        raise InputError("parallel.context", parallel.context, "context parallelism is not supported in training", "use 1")
    num_ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks != parallel.num_gpus:
        raise InputError(
            "--tensor x --pipeline x --data", [parallel.tensor, parallel.pipeline, parallel.data],
            f"needs {parallel.num_gpus} ranks, {num_ranks} were started", f"start {parallel.num_gpus} ranks or change the sizes",
        )
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29577")
        dist.init_process_group(
            "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl", rank=int(os.environ.get("RANK", "0")), world_size=num_ranks,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor, pipeline_model_parallel_size=parallel.pipeline,
        distributed_timeout_minutes=timeout_s / 60,  # type: ignore[arg-type]  # a fraction of a minute is one too
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def build_dip_model(
    config: BuiltInConfig, partition: Partition, *, overlap_grad_reduce: bool = False, overlap_param_gather: bool = False,
    distributed_optimizer: bool = False,
) -> TrainingModel:
    """This rank's chunks of every module of ``partition``, each inside Megatron's DDP.

    Args:
        overlap_param_gather: gathers updated weights during the next forward pass; needs the two others.
    """
    spec, ranks = config.model_spec, parallel_state.get_pipeline_model_parallel_world_size()
    partition.validate({module.name: module.num_layers for module in spec.modules}, ranks)
    check_enough_layers(partition)
    rank = parallel_state.get_pipeline_model_parallel_rank()
    description = config.describe()
    keys = chunk_order(partition, rank, config.outermost)
    stages = [description.build_chunk(partition, module, vp_stage, rank) for module, vp_stage in keys]
    cut = ModuleCut.of_partition(partition, config.outermost)
    model = wrap_stages(
        config, stages, cut.config(config.transformer_config(spec.module(config.outermost))), overlap_grad_reduce=overlap_grad_reduce,
        overlap_param_gather=overlap_param_gather, distributed_optimizer=distributed_optimizer,
    )
    return TrainingModel(
        chunks=model.chunks, config=model.config, whole=config,
        staged=DescribedStagedModel(description, dict(zip(keys, model.chunks, strict=True))),
    )


def _tied_weights(stages: Sequence[Any]) -> tuple[torch.nn.Parameter, torch.nn.Parameter] | None:
    """Embedding and head weights that are two copies of one weight on this rank, or None."""
    ends = [stage for stage in stages if stage.pre_process != stage.post_process and stage.share_embeddings_and_output_weights]
    if len(ends) != 2:
        return None
    ends.sort(key=lambda stage: stage.post_process)
    embedding, head = (stage.shared_embedding_or_output_weight() for stage in ends)
    assert isinstance(embedding, torch.nn.Parameter)
    assert isinstance(head, torch.nn.Parameter)
    return embedding, head


def wrap_stages(
    config: BuiltInConfig, stages: Sequence[Any], training_config: TransformerConfig, *, overlap_grad_reduce: bool = False,
    overlap_param_gather: bool = False, distributed_optimizer: bool = False,
) -> TrainingModel:
    """Puts each stage into DDP; all DDPs carry ``training_config``, on which Megatron's training functions are set."""
    if overlap_param_gather and not (overlap_grad_reduce and distributed_optimizer):
        raise InputError(
            "overlap_param_gather", True, "needs the distributed optimizer and overlapped gradient reduction", "switch both on, or this off"
        )
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=overlap_grad_reduce, overlap_param_gather=overlap_param_gather,
        use_distributed_optimizer=distributed_optimizer, grad_reduce_in_fp32=True,
    )
    chunks = [
        DistributedDataParallel(training_config, ddp_config, stage.cuda(), disable_bucketing=index > 0) for index, stage in enumerate(stages)
    ]
    for chunk in chunks:
        chunk.broadcast_params()
    training_config.finalize_model_grads_func = partial(finalize_model_grads, tied=_tied_weights(stages) if len(stages) > 1 else None)
    training_config.no_sync_func = [chunk.no_sync for chunk in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return TrainingModel(chunks=chunks, config=training_config, whole=config)


def finalize_model_grads(
    model: list[DistributedDataParallel], *args: Any, tied: tuple[torch.nn.Parameter, torch.nn.Parameter] | None = None, **kwargs: Any
) -> None:
    """Megatron's ``finalize_model_grads``, and the sum over two copies of a tied weight that lie on one rank, for which Megatron has
    no group to reduce over."""
    megatron_finalize_model_grads(model, *args, **kwargs)
    if tied is not None and parallel_state.get_pipeline_model_parallel_world_size() == 1:
        embedding, head = (weight.main_grad for weight in tied)  # type: ignore[attr-defined]
        embedding += head
        head.copy_(embedding)


def build_optimizer(model: TrainingModel, spec: OptimizerSpec, *, distributed_optimizer: bool = False) -> MegatronOptimizer:
    """Megatron's AdamW over all chunks, with its clipping; the learning rate starts at ``spec.lr`` (schedules are the caller's)."""
    dtype = model.whole.dtype
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=spec.lr, min_lr=spec.min_lr, weight_decay=spec.weight_decay, adam_beta1=spec.adam_beta1,
            adam_beta2=spec.adam_beta2, clip_grad=spec.clip_grad, use_distributed_optimizer=distributed_optimizer,
            overlap_param_gather=model.chunks[0].ddp_config.overlap_param_gather,
            bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, params_dtype=dtype,
        ),
        list(model.chunks),
    )
