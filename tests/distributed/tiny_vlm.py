"""A vision-language model so small that many cases run in one spawn, its data, and how results of ranks are put together.

Everything here runs inside ranks started by :mod:`tests.distributed.launcher`, except :func:`merge_ranks` and :func:`worst_difference`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch

from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.training import ImageSpec, LayerOptions, OptimizerSpec, TowerSpec, VisionLanguageModel, VitSpec
from megatron_dip.spec.workload import Parallel
from megatron_dip.workloads.image_patches import token_positions
from tests.distributed.launcher import launch

IMAGE_TOKEN = 2
IMAGE_COUNTS = (3, 0, 5, 1, 0, 2)
"""Images in each microbatch, where a test says nothing else."""
OPTIMIZER = OptimizerSpec(lr=1e-3, weight_decay=0.01, clip_grad=0.5)


@dataclass(frozen=True)
class Case:
    """One configuration of a parity test."""

    parallel: Parallel = field(default_factory=Parallel)
    chunks: tuple[int, int] = (1, 1)
    """K of the ViT and of the language model."""
    tied: bool = False
    gated: bool = False
    trainable: tuple[bool, bool] = (True, True)
    frozen: frozenset[str] = frozenset()
    per_token: bool = False
    sub_microbatch_size: int = 2
    image_counts: tuple[tuple[int, ...], ...] = (IMAGE_COUNTS,)
    """For each data-parallel replica the images in each of its microbatches."""
    num_layers: tuple[int, int] = (8, 8)
    seed: int = 0
    steps: int = 0
    """Optimizer steps; 0 = one forward and backward."""
    overlap_grad_reduce: bool = False
    distributed_optimizer: bool = False
    dtype: str = "float32"
    options: tuple[tuple[str, Any], ...] = ()
    """What only one kind of test knows."""

    def option(self, name: str, default: Any = None) -> Any:
        return dict(self.options).get(name, default)


def tiny_model(case: Case) -> VisionLanguageModel:
    vit = ModuleSpec(
        name="vit", kind="vit", role="encoder", num_layers=case.num_layers[0], hidden_size=16, ffn_hidden_size=32, num_attention_heads=2,
        trainable=case.trainable[0],
    )
    lm = ModuleSpec(
        name="lm", kind="lm", role="backbone", num_layers=case.num_layers[1], hidden_size=24, ffn_hidden_size=48, num_attention_heads=4,
        num_query_groups=2, vocab_size=32, gated_mlp=case.gated, tied_embeddings=case.tied, trainable=case.trainable[1],
    )
    image = ImageSpec(size=8, channels=1, patch=2, merge=2, token_id=IMAGE_TOKEN)
    modules = ModelSpec(modules=[vit, lm])
    if case.option("vit") is not None:
        return one_size_model(modules, image, str(case.option("vit")))
    if case.option("tower") is None:
        return VisionLanguageModel(modules=modules, image=image, sequence_length=48)
    return any_size_model(modules, str(case.option("tower")))


def one_size_model(modules: ModelSpec, image: ImageSpec, kind: str) -> VisionLanguageModel:
    """With a vision module as LLaVA (``clip``), LLaVA-OneVision (``siglip``) or InternVL (``intern``) have it."""
    vit, activation = {
        "clip": (VitSpec(patch_bias=False, first_norm=True, final_norm=False), "quick_gelu"),
        "siglip": (VitSpec(final_norm=False), "gelu_tanh"),
        "intern": (VitSpec(final_norm=False, layer_scale=True, projector_norm=True), "gelu"),
    }[kind]
    return VisionLanguageModel(
        modules=modules, image=msgspec.structs.replace(image, class_token=kind != "siglip", end_token=kind == "siglip"), sequence_length=48, vit=vit,
        vision_layers=LayerOptions(layernorm_epsilon=1e-6, activation=activation),  # type: ignore[arg-type]
        language_layers=LayerOptions(normalization="RMSNorm", add_bias_linear=False, add_qkv_bias=True),
    )


def any_size_model(modules: ModelSpec, kind: str) -> VisionLanguageModel:
    """With a tower for images of any size, as Qwen2.5-VL (``windows``) or Qwen3-VL (``deepstack``) have it."""
    image = ImageSpec(size=16, channels=1, patch=2, merge=2, token_id=IMAGE_TOKEN)
    if kind == "windows":
        tower = TowerSpec(frames_per_patch=2, patch_bias=False, window_size=8, full_attention_layers=[1, 5])
        return VisionLanguageModel(
            modules=modules, image=image, sequence_length=64, tower=tower,
            vision_layers=LayerOptions(normalization="RMSNorm", layernorm_epsilon=1e-6, activation="silu"),
            language_layers=LayerOptions(normalization="RMSNorm", add_bias_linear=False, add_qkv_bias=True, kv_channels=8, mrope_section=[1, 1, 2]),
        )
    tower = TowerSpec(learned_positions=4, deepstack_layers=[0, 3, 6])
    return VisionLanguageModel(
        modules=modules, image=image, sequence_length=64, tower=tower,
        vision_layers=LayerOptions(layernorm_epsilon=1e-6, activation="gelu_tanh"),
        language_layers=LayerOptions(
            normalization="RMSNorm", add_bias_linear=False, qk_layernorm=True, kv_channels=8, mrope_section=[2, 1, 1], mrope_interleaved=True
        ),
    )


FRAME_SIZES = ((1, 2, 2), (1, 4, 6), (2, 2, 4), (1, 8, 2), (1, 6, 4))
"""Patches along time, height and width of images and a clip, one after another."""


def make_any_size_microbatch(seed: int, num_images: int, model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """A packed sequence of 64 tokens: text, images of mixed sizes and aspects, a clip of two frames, and a second document of text alone."""
    generator = torch.Generator().manual_seed(seed)
    tower = model.tower
    assert tower is not None
    grids = [FRAME_SIZES[(seed + index) % len(FRAME_SIZES)] for index in range(num_images)]
    counts = [time * rows * columns // 4 for time, rows, columns in grids]
    tokens = torch.randint(3, 32, (1, 64), generator=generator)
    place = 2
    for count in counts:
        tokens[0, place : place + count] = IMAGE_TOKEN
        place += count + 2
    assert place < 60, place
    bounds = [0, place + 1 + int(torch.randint(0, 3, (1,), generator=generator)), 64]
    positions = token_positions((tokens[0] == IMAGE_TOKEN).numpy(), grids, bounds, 2)
    mask = (torch.rand(1, 64, generator=generator) < 0.7).float()
    mask[0, 0] = 1.0
    values = tower.frames_per_patch * model.image.patch**2
    return {
        "images": torch.randn(4 * sum(counts), values, generator=generator), "image_grid_thw": torch.tensor(grids, dtype=torch.int64).view(-1, 3),
        "tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": mask, "position_ids": torch.from_numpy(positions)[:, None],
        "cu_lengths": torch.tensor(bounds, dtype=torch.int32),
    }


def make_microbatch(seed: int, num_images: int, image_tokens: int = 4) -> dict[str, torch.Tensor]:
    """A packed sequence of 48 tokens: text, images of 4 or 5 tokens each, and a second document of text alone."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 32, (1, 48), generator=generator)
    for image in range(num_images):
        tokens[0, 3 + 6 * image : 3 + image_tokens + 6 * image] = IMAGE_TOKEN
    middle = 33 + int(torch.randint(0, 8, (1,), generator=generator))
    bounds = torch.tensor([0, middle, 48], dtype=torch.int32)
    positions = torch.cat([torch.arange(middle), torch.arange(48 - middle)])[None]
    mask = (torch.rand(1, 48, generator=generator) < 0.7).float()
    mask[0, 0] = 1.0
    return {
        "images": torch.randn(num_images, 1, 8, 8, generator=generator), "tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": mask,
        "position_ids": positions, "cu_lengths": bounds,
    }


def counts_of(case: Case, replica: int, step: int) -> tuple[int, ...]:
    """Images in each microbatch of a step: other steps have others, so that nothing can be remembered from one to the next."""
    counts = case.image_counts[replica]
    return counts[step % len(counts) :] + counts[: step % len(counts)]


def microbatches(case: Case, replica: int, step: int = 0) -> list[dict[str, torch.Tensor]]:
    numbered = [(1000 * replica + 100 * step + index, count) for index, count in enumerate(counts_of(case, replica, step))]
    if case.option("tower") is None:
        return [make_microbatch(seed, count, tiny_model(case).image.tokens) for seed, count in numbered]
    model = tiny_model(case)
    return [make_any_size_microbatch(seed, count, model) for seed, count in numbered]


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss = (output.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    item = next(data_iterator)
    grids = {"image_grid_thw": item["image_grid_thw"]} if "image_grid_thw" in item else {}
    output = model(
        item["images"], item["tokens"], position_ids=item["position_ids"], cu_lengths=item["cu_lengths"], labels=item["labels"], **grids
    )
    return output, partial(loss_func, item["loss_mask"])


@dataclass
class Shard:
    """A tensor, or its part on one tensor-parallel rank."""

    values: np.ndarray
    dimension: int
    """Along which the parts of the tensor-parallel ranks stand; -1 = every rank has all of it."""
    stacked: int = 1
    """Tensors that lie behind each other along the dimension, each spread by itself (the two halves of a gated MLP's first layer)."""


@dataclass
class Result:
    """What one rank saw in one case."""

    pipeline_rank: int
    tensor_rank: int
    data_rank: int
    losses: list[list[float]]
    """For each step the loss of each microbatch (sum over tokens); empty but on the last pipeline rank."""
    gradients: dict[str, Shard]
    """Of the last step."""
    weights: dict[str, Shard]
    """After the last step."""
    grad_norms: list[float] = field(default_factory=list)


def run_case(case: Case, build: Callable[[Case, Any], Any], forward_backward: Callable[..., list[dict[str, Any]]]) -> Result:
    """Builds, runs the steps and collects. ``build(case, config)`` gives a TrainingModel; ``forward_backward(case, model, items,
    replica)`` runs one forward and backward and returns Megatron's list of loss dictionaries (empty but on the last rank)."""
    from megatron.core import parallel_state

    from megatron_dip.models.vlm import VlmConfig
    from megatron_dip.trainer.build import build_optimizer, initialize_parallel

    initialize_parallel(case.parallel, device="cpu", seed=1, timeout_s=60)
    config = VlmConfig(model=tiny_model(case), parallel=case.parallel, frozen=case.frozen, calculate_per_token_loss=case.per_token,
                       init_method_std=0.2, dtype=getattr(torch, case.dtype))
    model = build(case, config)
    replica = parallel_state.get_data_parallel_rank()
    optimizer = build_optimizer(model, OPTIMIZER, distributed_optimizer=case.distributed_optimizer) if case.steps else None
    losses, norms = [], []
    for step in range(max(1, case.steps)):
        model.zero_grad()
        if optimizer is not None:
            optimizer.zero_grad()
        reduced = forward_backward(case, model, microbatches(case, replica, step), replica)
        losses.append([float(entry["lm loss"][0]) for entry in reduced])
        if optimizer is not None:
            success, norm, _ = optimizer.step()
            assert success
            norms.append(float(norm))
    for chunk in model.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    return result_of(model, losses, norms)


def result_of(model: Any, losses: list[list[float]], grad_norms: Sequence[float] = ()) -> Result:
    """Takes down the model's gradients and weights as they are."""
    from megatron.core import parallel_state

    return Result(
        parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(), losses,
        _shards(model, lambda parameter: parameter.main_grad if parameter.requires_grad else None),
        _shards(model, lambda parameter: parameter.data), list(grad_norms),
    )


def _shards(model: Any, value: Callable[[Any], torch.Tensor | None]) -> dict[str, Shard]:
    from megatron.core.transformer.module import MegatronModule

    from megatron_dip.models.description import unwrap
    from megatron_dip.models.initial_weights import global_name

    shards = {}
    for chunk in model.chunks:
        stage = unwrap(chunk, MegatronModule)
        for name, parameter in stage.named_parameters():
            tensor = value(parameter)
            if tensor is not None:
                dimension = parameter.partition_dim if getattr(parameter, "tensor_model_parallel", False) else -1
                gated = ".mlp.linear_fc1." in name and stage.get_submodule(name.split(".mlp.")[0]).config.gated_linear_unit
                shards[global_name(stage, name)] = Shard(tensor.detach().float().numpy().copy(), dimension, 2 if gated else 1)
    return shards


def reference_build(case: Case, config: Any) -> Any:
    """The whole model in one process, in one chunk: nothing of DIP, nothing of a pipeline."""
    from megatron_dip.trainer.stock_layouts import build_stock_model

    return build_stock_model(config, "scripts")


def plain_forward_backward(case: Case, model: Any, items: Sequence[dict[str, torch.Tensor]], replica: int) -> list[dict[str, Any]]:
    """A plain loop over the microbatches of *all* replicas, one after another: what every parallel run must equal."""
    step_items = [items] if len(case.image_counts) == 1 else [items, *_other_replicas(case, items)]
    reports, num_replicas = [], len(step_items)
    total_tokens = torch.zeros([], dtype=torch.int)
    for replica_items in step_items:
        for item in replica_items:
            output, loss_function = forward_step(iter([item]), model.chunks[0])
            loss, num_tokens, report = loss_function(output)
            reports.append(report)
            total_tokens += num_tokens
            scaled = loss if case.per_token else loss / num_tokens / len(replica_items) / num_replicas
            if scaled.requires_grad:
                scaled.backward()
    model.config.finalize_model_grads_func(model.chunks, total_tokens if case.per_token else None)
    return reports


def _other_replicas(case: Case, items: Sequence[dict[str, torch.Tensor]]) -> list[list[dict[str, torch.Tensor]]]:
    own = items[0]["tokens"]
    for step in range(max(1, case.steps)):
        if torch.equal(microbatches(case, 0, step)[0]["tokens"], own):
            return [microbatches(case, replica, step) for replica in range(1, len(case.image_counts))]
    raise AssertionError("the items are none of replica 0's")


def _run_reference(rank: int, num_ranks: int, cases: Sequence[Case]) -> list[Result]:
    return [run_case(case, reference_build, plain_forward_backward) for case in cases]


def references(cases: Sequence[Case]) -> list[Result]:
    """What one process without a pipeline gets in each case; cases that differ only in what a pipeline changes are run once."""
    alone = [
        replace(
            case, parallel=Parallel(), chunks=(1, 1), sub_microbatch_size=2, seed=0, overlap_grad_reduce=False,
            distributed_optimizer=False, options=tuple(option for option in case.options if option[0] in ("tower", "vit")),
        )
        for case in cases
    ]
    distinct = list(dict.fromkeys(alone))
    results = dict(zip(distinct, launch(_run_reference, 1, distinct)[0], strict=True))
    return [results[case] for case in alone]


def merge_ranks(results: Sequence[Result], what: str) -> dict[str, np.ndarray]:
    """Whole tensors of ``gradients`` or ``weights`` from all ranks of one case; copies on several ranks must agree."""
    parts: dict[str, dict[int, Shard]] = {}
    for result in results:
        for name, shard in getattr(result, what).items():
            known = parts.setdefault(name, {}).setdefault(result.tensor_rank, shard)
            scale = max(float(np.abs(known.values).max()), 1e-30)
            assert float(np.abs(known.values - shard.values).max()) <= 5e-6 * scale, f"{what} of {name} differ between ranks"
    whole = {}
    for name, by_rank in parts.items():
        shards = [by_rank[rank] for rank in sorted(by_rank)]
        if shards[0].dimension < 0:
            for shard in shards[1:]:
                scale = max(float(np.abs(shards[0].values).max()), 1e-30)
                assert float(np.abs(shard.values - shards[0].values).max()) <= 5e-6 * scale, f"{what} of {name} differ between ranks"
            whole[name] = shards[0].values
        else:
            axis, stacked = shards[0].dimension, shards[0].stacked
            parts_of_rank = [np.split(shard.values, stacked, axis=axis) for shard in shards]
            whole[name] = np.concatenate([parts[i] for i in range(stacked) for parts in parts_of_rank], axis=axis)
    return whole


def _same_names(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """The names of both, which must be the same but for a tied head's own copy."""
    assert set(found) ^ set(expected) <= {"language_model.output_layer.weight"}, sorted(set(found) ^ set(expected))
    return sorted(set(found) & set(expected))


def worst_difference(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest max|difference| / max|expected| over all tensors."""
    worst = 0.0
    for name in _same_names(found, expected):
        scale = float(np.abs(expected[name]).max())
        difference = float(np.abs(found[name] - expected[name]).max())
        worst = max(worst, difference / scale if scale > 0 else (0.0 if difference == 0 else np.inf))
    return worst


def largest_move(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest |difference| of weights after optimizer steps, in units of the learning rate: what one wrong step would be is about 1.

    Without the attention biases: a key's bias has no gradient but rounding, and Adam makes a whole step of that.
    """
    names = [name for name in _same_names(found, expected) if not name.endswith("linear_qkv.bias")]
    return max(float(np.abs(found[name] - expected[name]).max()) for name in names) / OPTIMIZER.lr


def losses_of(results: Sequence[Result]) -> list[list[float]]:
    """For each step the losses of all microbatches, replica by replica, from the last pipeline ranks (one of each tensor group)."""
    ends: dict[int, list[list[float]]] = {}
    for result in results:
        if any(result.losses) and result.tensor_rank == 0:
            ends[result.data_rank] = result.losses
    steps = len(next(iter(ends.values())))
    return [[loss for replica in sorted(ends) for loss in ends[replica][step]] for step in range(steps)]
