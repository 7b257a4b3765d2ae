"""Checkpoints of Hugging Face's vision-language models as the model that is built here, and back: configs and weights.

Families: Qwen2-VL (``qwen2_vl``), Qwen2.5-VL (``qwen2_5_vl``) and Qwen3-VL (``qwen3_vl``), with dense language models. A weight of theirs is one weight of ours, or a
part of one: Megatron keeps a head's query, key and value together, and the two halves of a gated MLP. Nothing is rounded: weights that go
there and back are the same bits.

Names of theirs are those of transformers 5 (``model.visual.``, ``model.language_model.``, ``lm_head.``); checkpoints as they were published
(``visual.``, ``model.layers.``) are understood too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from megatron_dip.models.description import LANGUAGE, VISION
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.training import Activation, ImageSpec, LayerOptions, TowerSpec, VisionLanguageModel
from megatron_dip.workloads.huggingface import read_hub_config

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_VISION_ACTIVATIONS: dict[str, Activation] = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_tanh"}
Tensors = Mapping[str, torch.Tensor]


def model_of_config(config: Mapping[str, Any], *, sequence_length: int, image_size: int) -> VisionLanguageModel:
    """The model that a ``config.json`` describes.

    Args:
        sequence_length: tokens of a packed sequence.
        image_size: largest height and width of an image in pixels.

    Raises:
        InputError: for other families, and for configs with what the model here does not have.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError("config.json: model_type", family, "no weights of this family can be brought in", f"use one of {', '.join(FAMILIES)}")
    modules = read_hub_config(config).model.modules
    vision_config, text = config["vision_config"], dict(config.get("text_config") or config)
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if text.get("use_sliding_window"):
        raise InputError("config.json: use_sliding_window", True, "window attention of the language model is not supported", "use another checkpoint")
    is_third = family == "qwen3_vl"
    side = int(vision_config["num_position_embeddings"] ** 0.5) if is_third else None
    tower = TowerSpec(
        frames_per_patch=int(vision_config.get("temporal_patch_size", 2)), patch_bias=is_third,
        window_size=_given(vision_config, "window_size"), full_attention_layers=sorted(vision_config.get("fullatt_block_indexes", ())),
        learned_positions=side, deepstack_layers=sorted(vision_config.get("deepstack_visual_indexes", ())),
    )
    language_layers = LayerOptions(
        normalization="RMSNorm", layernorm_epsilon=float(text.get("rms_norm_eps", 1e-6)), add_bias_linear=False,
        add_qkv_bias=not is_third, qk_layernorm=is_third, kv_channels=_given(text, "head_dim"),
        rotary_base=_given(rope, "rope_theta") or _given(text, "rope_theta") or 1_000_000, mrope_section=list(rope["mrope_section"]),
        mrope_interleaved=is_third,
    )
    vision_layers = LayerOptions(
        normalization="RMSNorm" if family == "qwen2_5_vl" else "LayerNorm", layernorm_epsilon=1e-6, activation=_VISION_ACTIVATIONS[family]
    )
    tied = bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    return VisionLanguageModel(
        modules=ModelSpec(modules=[msgspec.structs.replace(m, tied_embeddings=tied) if m.name == LANGUAGE else m for m in modules]),
        image=ImageSpec(
            size=image_size, channels=int(vision_config.get("in_channels", vision_config.get("in_chans", 3))),
            patch=int(vision_config["patch_size"]), merge=int(vision_config["spatial_merge_size"]), token_id=int(config["image_token_id"]),
        ),
        sequence_length=sequence_length, tower=tower, vision_layers=vision_layers, language_layers=language_layers,
    )


def _given(config: Mapping[str, Any], field: str) -> int | None:
    return int(config[field]) if config.get(field) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """One weight of ours, made of some of theirs."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[..., torch.Tensor]
    split: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]


def _same(ours: str, theirs: str) -> _Rule:
    return _Rule(ours=ours, theirs=(theirs,), join=lambda one: one, split=lambda one: (one,))


def _shaped(ours: str, theirs: str, flat: tuple[int, ...], whole: tuple[int, ...]) -> _Rule:
    """The same values in another shape; of theirs ``whole``, of ours ``flat``."""
    return _Rule(ours=ours, theirs=(theirs,), join=lambda one: one.reshape(flat), split=lambda one: (one.reshape(whole),))


def _halves(ours: str, first: str, second: str) -> _Rule:
    return _Rule(
        ours=ours, theirs=(first, second), join=lambda *parts: torch.cat(parts), split=lambda one: tuple(one.chunk(2))
    )


def _attention(ours: str, theirs: tuple[str, ...], heads: int, groups: int, size: int) -> _Rule:
    """Queries, keys and values, by groups of heads in ours; of theirs three weights, or one with the three behind each other.

    Args:
        size: channels of a head.
    """
    rows = (heads * size, groups * size, groups * size)
    of_group = (heads // groups * size, size, size)

    def join(*parts: torch.Tensor) -> torch.Tensor:
        three = parts[0].split(rows) if len(parts) == 1 else parts
        return torch.cat([part.view(groups, own, *part.shape[1:]) for part, own in zip(three, of_group, strict=True)], dim=1).flatten(0, 1)

    def split(whole: torch.Tensor) -> tuple[torch.Tensor, ...]:
        three = whole.view(groups, sum(of_group), *whole.shape[1:]).split(of_group, dim=1)
        flat = tuple(part.flatten(0, 1) for part in three)
        return (torch.cat(flat),) if len(theirs) == 1 else flat

    return _Rule(ours=ours, theirs=theirs, join=join, split=split)


def _both(make: Callable[[str], _Rule], kinds: tuple[str, ...] = ("weight", "bias")) -> Iterator[_Rule]:
    return (make(kind) for kind in kinds)


def _vision_rules(model: VisionLanguageModel) -> Iterator[_Rule]:
    vision, image, tower = model.modules.module(VISION), model.image, model.tower
    assert tower is not None
    theirs, ours = "model.visual.", "vision_model."
    hidden, heads = vision.hidden_size, vision.num_attention_heads
    patch = (image.channels, tower.frames_per_patch, image.patch, image.patch)
    yield _shaped(f"{ours}patch_embed.weight", f"{theirs}patch_embed.proj.weight", (hidden, -1), (hidden, *patch))
    is_third = tower.learned_positions is not None
    if is_third:
        yield _same(f"{ours}patch_embed.bias", f"{theirs}patch_embed.proj.bias")
        yield _same(f"{ours}position_embeddings.weight", f"{theirs}pos_embed.weight")
    norm_kinds = ("weight", "bias") if model.vision_layers.normalization == "LayerNorm" else ("weight",)
    for layer in range(vision.num_layers):
        mine, other = f"{ours}decoder.layers.{layer}.", f"{theirs}blocks.{layer}."
        for kind in norm_kinds:
            yield _same(f"{mine}input_layernorm.{kind}", f"{other}norm1.{kind}")
            yield _same(f"{mine}pre_mlp_layernorm.{kind}", f"{other}norm2.{kind}")
        for kind in ("weight", "bias"):
            yield _attention(f"{mine}self_attention.linear_qkv.{kind}", (f"{other}attn.qkv.{kind}",), heads, heads, hidden // heads)
            yield _same(f"{mine}self_attention.linear_proj.{kind}", f"{other}attn.proj.{kind}")
            if not vision.has_gated_mlp:
                prefix = "linear_" if is_third else ""
                yield _same(f"{mine}mlp.linear_fc1.{kind}", f"{other}mlp.{prefix}fc1.{kind}")
                yield _same(f"{mine}mlp.linear_fc2.{kind}", f"{other}mlp.{prefix}fc2.{kind}")
            else:
                yield _halves(f"{mine}mlp.linear_fc1.{kind}", f"{other}mlp.gate_proj.{kind}", f"{other}mlp.up_proj.{kind}")
                yield _same(f"{mine}mlp.linear_fc2.{kind}", f"{other}mlp.down_proj.{kind}")
    merger = f"{theirs}merger."
    first, second = ("linear_fc1", "linear_fc2") if is_third else ("mlp.0", "mlp.2")
    for kind in norm_kinds:
        yield _same(f"{ours}final_layernorm.{kind}", f"{merger}{'norm' if is_third else 'ln_q'}.{kind}")
    for kind in ("weight", "bias"):
        yield _same(f"vision_projection.encoder.linear_fc1.{kind}", f"{merger}{first}.{kind}")
        yield _same(f"vision_projection.encoder.linear_fc2.{kind}", f"{merger}{second}.{kind}")
        for number in range(len(tower.deepstack_layers)):
            mine, other = f"deepstack_projections.{number}.", f"{theirs}deepstack_merger_list.{number}."
            for part in ("norm", "linear_fc1", "linear_fc2"):
                yield _same(f"{mine}{part if part == 'norm' else f'projection.encoder.{part}'}.{kind}", f"{other}{part}.{kind}")


def _language_rules(model: VisionLanguageModel) -> Iterator[_Rule]:
    language: ModuleSpec = model.modules.module(LANGUAGE)
    options = model.language_layers
    theirs, ours = "model.language_model.", "language_model."
    heads, groups = language.num_attention_heads, language.query_groups
    size = options.kv_channels or language.hidden_size // heads
    yield _same(f"{ours}embedding.word_embeddings.weight", f"{theirs}embed_tokens.weight")
    for layer in range(language.num_layers):
        mine, other = f"{ours}decoder.layers.{layer}.", f"{theirs}layers.{layer}."
        yield _same(f"{mine}input_layernorm.weight", f"{other}input_layernorm.weight")
        yield _same(f"{mine}pre_mlp_layernorm.weight", f"{other}post_attention_layernorm.weight")
        for kind in ("weight", "bias") if options.add_qkv_bias else ("weight",):
            parts = tuple(f"{other}self_attn.{name}_proj.{kind}" for name in "qkv")
            yield _attention(f"{mine}self_attention.linear_qkv.{kind}", parts, heads, groups, size)
        yield _same(f"{mine}self_attention.linear_proj.weight", f"{other}self_attn.o_proj.weight")
        if options.qk_layernorm:
            for name in "qk":
                yield _same(f"{mine}self_attention.{name}_layernorm.weight", f"{other}self_attn.{name}_norm.weight")
        yield _halves(f"{mine}mlp.linear_fc1.weight", f"{other}mlp.gate_proj.weight", f"{other}mlp.up_proj.weight")
        yield _same(f"{mine}mlp.linear_fc2.weight", f"{other}mlp.down_proj.weight")
    yield _same(f"{ours}decoder.final_layernorm.weight", f"{theirs}norm.weight")
    if not language.tied_embeddings:
        yield _same(f"{ours}output_layer.weight", "lm_head.weight")


def _rules(model: VisionLanguageModel) -> Iterator[_Rule]:
    yield from _vision_rules(model)
    yield from _language_rules(model)


def named_as_now(name: str) -> str:
    """A name of a published checkpoint as transformers 5 has it."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return f"model.language_model.{name.removeprefix('model.')}"
    return name


def import_weights(theirs: Tensors, model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Weights of the whole model by our names. Raises InputError for weights that are missing, of another shape, or known nowhere."""
    left = {named_as_now(name): tensor for name, tensor in theirs.items()}
    found = {}
    for rule in _rules(model):
        missing = [name for name in rule.theirs if name not in left]
        if missing:
            raise InputError("checkpoint", missing, "are weights that it lacks", "give the checkpoint and the config.json of one model")
        parts = [left.pop(name) for name in rule.theirs]
        try:
            found[rule.ours] = rule.join(*parts).contiguous()
        except RuntimeError as error:
            shapes = [list(part.shape) for part in parts]
            raise InputError(f"checkpoint: {rule.theirs[0]}", shapes, f"do not fit the config ({error})", "give the config.json of this model") from error
    if model.modules.module(LANGUAGE).tied_embeddings:
        left.pop("lm_head.weight", None)
    if left:
        raise InputError("checkpoint", sorted(left)[:5], f"and {max(0, len(left) - 5)} more are weights of no part of the model", "use a plain checkpoint")
    return found


def export_weights(ours: Tensors, model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """The inverse of :func:`import_weights`."""
    found: dict[str, torch.Tensor] = {}
    for rule in _rules(model):
        if rule.ours not in ours:
            raise InputError("checkpoint", rule.ours, "is a weight that it lacks", "give the checkpoint of this model")
        found |= {name: part.contiguous() for name, part in zip(rule.theirs, rule.split(ours[rule.ours]), strict=True)}
    return found
