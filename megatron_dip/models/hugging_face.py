"""Checkpoints of Hugging Face's vision-language models as the model that is built here, and back: configs and weights.

Families: Qwen2-VL (``qwen2_vl``), Qwen2.5-VL (``qwen2_5_vl``) and Qwen3-VL (``qwen3_vl``), whose images have any size; LLaVA (``llava``), LLaVA-OneVision
(``llava_onevision``) and InternVL (``internvl``), whose images, or tiles, have one; with dense language models. A weight of theirs is one weight of
ours, or a part of one: Megatron keeps a head's query, key and value together, and the two halves of a gated MLP. Nothing is rounded: weights
that go there and back are the same bits. What a checkpoint has beyond what the language model is given (layers behind the chosen one, pooling heads) is left
out, see :func:`is_unused`.

Names of theirs are those of transformers 5 (``model.visual.``, ``model.vision_tower.``, ``model.language_model.``, ``lm_head.``); checkpoints as they
were published (``visual.``, ``model.layers.``, ``language_model.model.``) are understood too.

Not modelled: LLaVA-OneVision's grids of tiles, which it puts together again behind the projector: each image is one tile, as OneVision itself has it
with several images in a sample.
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
from megatron_dip.spec.training import Activation, ImageSpec, LayerOptions, TowerSpec, VisionLanguageModel, VitSpec
from megatron_dip.workloads.huggingface import read_hub_config

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "llava_onevision", "internvl")
_ONE_SIZE = ("llava", "llava_onevision", "internvl")
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "silu": "silu",
}
_VISION_ACTIVATIONS: dict[str, Activation] = {"qwen2_vl": "quick_gelu", "qwen2_5_vl": "silu", "qwen3_vl": "gelu_tanh"}
_LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "rms_norm_eps": 1e-6}
"""Sizes of transformers' LlamaConfig, which LLaVA's published configs leave out."""
Tensors = Mapping[str, torch.Tensor]


def model_of_config(config: Mapping[str, Any], *, sequence_length: int, image_size: int) -> VisionLanguageModel:
    """The model that a ``config.json`` describes.

    Args:
        sequence_length: tokens of a packed sequence.
        image_size: largest height and width of an image in pixels, in families whose images have any size.

    Raises:
        InputError: for other families, and for configs with what the model here does not have.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise InputError("config.json: model_type", family, "no weights of this family can be brought in", f"use one of {', '.join(FAMILIES)}")
    if family in _ONE_SIZE:
        return _one_size_model(config, sequence_length)
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


def _one_size_model(config: Mapping[str, Any], sequence_length: int) -> VisionLanguageModel:
    """LLaVA, LLaVA-OneVision and InternVL: a ViT for images of one size, from which the outputs of one layer are taken."""
    family, vision, text = config["model_type"], config["vision_config"], config["text_config"]
    if text.get("model_type") == "llama":
        text = {**_LLAMA, **text}
        config = {**config, "text_config": text}
    kind, layers = vision["model_type"], int(vision["num_hidden_layers"])
    _only(kind, "vision_config.model_type", "internvl_vision" if family == "internvl" else "clip_vision_model", *(
        () if family == "internvl" else ("siglip_vision_model",)
    ))
    chosen = config.get("vision_feature_layer", -2 if family == "llava" else -1)
    if not isinstance(chosen, int):
        raise InputError("config.json: vision_feature_layer", chosen, "outputs of several layers are not supported", "use another checkpoint")
    used = chosen if chosen >= 0 else layers + 1 + chosen
    if not 1 <= used <= layers:
        raise InputError("config.json: vision_feature_layer", chosen, f"is none of the {layers} layers", "give the config.json of this model")
    sizes = [value[0] if isinstance(value, list | tuple) else value for value in (vision["image_size"], vision["patch_size"])]
    default_strategy = "full" if family == "llava_onevision" else "default"
    drops_first = config.get("vision_feature_select_strategy", default_strategy) == "default"
    has_class_token = kind != "siglip_vision_model"
    if drops_first != has_class_token:
        raise InputError(
            "config.json: vision_feature_select_strategy", config.get("vision_feature_select_strategy"),
            f"a {kind} {'keeps its class token among an image' if has_class_token else 'loses a patch of each image'}", "use another checkpoint",
        )
    merge = round(1 / float(config.get("downsample_ratio", 0.5))) if family == "internvl" else 1
    is_intern, normalization = family == "internvl", "LayerNorm"
    if is_intern:
        _only(bool(vision.get("attention_bias", False)), "vision_config.attention_bias", True)
        _only(bool(vision.get("use_qk_norm", False)), "vision_config.use_qk_norm", False)
        _only(bool(vision.get("use_absolute_position_embeddings", True)), "vision_config.use_absolute_position_embeddings", True)
        normalization = "RMSNorm" if vision.get("norm_type", "layer_norm") == "rms_norm" else "LayerNorm"
    _only(bool(config.get("multimodal_projector_bias", True)), "multimodal_projector_bias", True)
    _only(config.get("projector_hidden_act", "gelu"), "projector_hidden_act", "gelu")
    modules = read_hub_config({**config, "tie_word_embeddings": _tied(config)}).model.modules
    return VisionLanguageModel(
        modules=ModelSpec(modules=[
            msgspec.structs.replace(m, num_layers=used) if m.name == VISION else msgspec.structs.replace(m, tied_embeddings=_tied(config)) for m in modules
        ]),
        image=ImageSpec(
            size=int(sizes[0]), channels=int(vision.get("num_channels", 3)), patch=int(sizes[1]), merge=merge,
            token_id=int(config.get("image_token_id", config.get("image_token_index", -1))), class_token=has_class_token,
            end_token=family == "llava_onevision",
        ),
        sequence_length=sequence_length,
        vit=VitSpec(
            patch_bias=kind != "clip_vision_model", first_norm=kind == "clip_vision_model",
            final_norm=is_intern and chosen == -1 and not vision.get("use_mean_pooling", True), layer_scale=is_intern, projector_norm=is_intern,
        ),
        vision_layers=LayerOptions(
            normalization=normalization,  # type: ignore[arg-type]
            layernorm_epsilon=float(vision.get("layer_norm_eps", 1e-5 if kind == "clip_vision_model" else 1e-6)),
            activation=_activation(vision.get("hidden_act"), kind),
        ),
        language_layers=_language_layers(text),
    )


def _tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config["text_config"].get("tie_word_embeddings", False)))


def _activation(name: str | None, kind: str) -> Activation:
    name = name or {"clip_vision_model": "quick_gelu", "siglip_vision_model": "gelu_pytorch_tanh"}.get(kind, "gelu")
    _only(name, "vision_config.hidden_act", *_ACTIVATIONS)
    return _ACTIVATIONS[name]


def _language_layers(text: Mapping[str, Any]) -> LayerOptions:
    """Of a language model of Llama's kind without positions in rows and columns."""
    kind = text["model_type"]
    _only(kind, "text_config.model_type", "llama", "mistral", "qwen2", "qwen3")
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    _only(rope.get("rope_type", rope.get("type", "default")), "text_config.rope_parameters.rope_type", "default")
    _only(bool(text.get("attention_bias", False)), "text_config.attention_bias", False)
    _only(bool(text.get("mlp_bias", False)), "text_config.mlp_bias", False)
    window = text.get("sliding_window") if kind == "mistral" else text.get("use_sliding_window")
    _only(window or None, "text_config.sliding_window", None)
    _only(text.get("hidden_act", "silu"), "text_config.hidden_act", "silu")
    return LayerOptions(
        normalization="RMSNorm", layernorm_epsilon=float(text.get("rms_norm_eps", 1e-6)), add_bias_linear=False, add_qkv_bias=kind == "qwen2",
        qk_layernorm=kind == "qwen3", kv_channels=_given(text, "head_dim"),
        rotary_base=_given(rope, "rope_theta") or _given(text, "rope_theta") or 10_000,
    )


def _only(value: Any, field: str, *supported: Any) -> None:
    if value not in supported:
        raise InputError(f"config.json: {field}", value, f"is not supported (only {', '.join(map(str, supported))})", "use another checkpoint")


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


def _one_size_vision_rules(model: VisionLanguageModel) -> Iterator[_Rule]:
    vision, image, vit = model.modules.module(VISION), model.image, model.vit
    theirs, ours, is_intern = _TOWER, "vision_model.", model.vit.layer_scale
    hidden, heads = vision.hidden_size, vision.num_attention_heads
    patch = "patch_embeddings.projection" if is_intern else "patch_embedding"
    yield _same(f"{ours}conv1.weight", f"{theirs}embeddings.{patch}.weight")
    if vit.patch_bias:
        yield _same(f"{ours}conv1.bias", f"{theirs}embeddings.{patch}.bias")
    if is_intern:
        flat = (image.patches, hidden)
        yield _shaped(f"{ours}position_embeddings.weight", f"{theirs}embeddings.position_embeddings", flat, (1, *flat))
        yield _same(f"{ours}class_token", f"{theirs}embeddings.cls_token")
    else:
        yield _same(f"{ours}position_embeddings.weight", f"{theirs}embeddings.position_embedding.weight")
        if image.class_token:
            yield _shaped(f"{ours}class_token", f"{theirs}embeddings.class_embedding", (1, 1, hidden), (hidden,))
    if vit.first_norm:
        yield from _both(lambda kind: _same(f"{ours}ln_pre.{kind}", f"{theirs}pre_layrnorm.{kind}"))
    names = _INTERN_LAYER if is_intern else _CLIP_LAYER
    norm_kinds = ("weight", "bias") if model.vision_layers.normalization == "LayerNorm" else ("weight",)
    for layer in range(vision.num_layers):
        mine, other = f"{ours}decoder.layers.{layer}.", f"{theirs}encoder.{names['layers']}.{layer}."
        for kind in norm_kinds:
            yield _same(f"{mine}input_layernorm.{kind}", f"{other}{names['norm1']}.{kind}")
            yield _same(f"{mine}pre_mlp_layernorm.{kind}", f"{other}{names['norm2']}.{kind}")
        for kind in ("weight", "bias"):
            parts = tuple(f"{other}{names['attention']}.{part}_proj.{kind}" for part in "qkv")
            yield _attention(f"{mine}self_attention.linear_qkv.{kind}", parts, heads, heads, hidden // heads)
            yield _same(f"{mine}self_attention.linear_proj.{kind}", f"{other}{names['attention']}.{names['out']}.{kind}")
            yield _same(f"{mine}mlp.linear_fc1.{kind}", f"{other}mlp.fc1.{kind}")
            yield _same(f"{mine}mlp.linear_fc2.{kind}", f"{other}mlp.fc2.{kind}")
        if is_intern:
            yield _same(f"{mine}ls1", f"{other}lambda_1")
            yield _same(f"{mine}ls2", f"{other}lambda_2")
    if vit.final_norm:
        yield from _both(lambda kind: _same(f"{ours}decoder.final_layernorm.{kind}", f"{theirs}layernorm.{kind}"))
    projector = "model.multi_modal_projector."
    for kind in ("weight", "bias"):
        if vit.projector_norm:
            yield _same(f"vision_projection.norm.{kind}", f"{projector}layer_norm.{kind}")
        yield _same(f"vision_projection.encoder.linear_fc1.{kind}", f"{projector}linear_1.{kind}")
        yield _same(f"vision_projection.encoder.linear_fc2.{kind}", f"{projector}linear_2.{kind}")
    if image.end_token:
        out = model.modules.module(LANGUAGE).hidden_size
        yield _shaped("vision_projection.end_token", "model.image_newline", (1, 1, out), (out,))


_TOWER = "model.vision_tower."
_CLIP_LAYER = {"layers": "layers", "norm1": "layer_norm1", "norm2": "layer_norm2", "attention": "self_attn", "out": "out_proj"}
_INTERN_LAYER = {"layers": "layer", "norm1": "layernorm_before", "norm2": "layernorm_after", "attention": "attention", "out": "projection_layer"}


def is_unused(name: str, model: VisionLanguageModel) -> bool:
    """Whether a weight, by its name in transformers 5, makes nothing that the language model is given."""
    if model.tower is not None or not name.startswith(_TOWER):
        return False
    steps = name.removeprefix(_TOWER).split(".")
    if steps[0] == "encoder":
        return int(steps[2]) >= model.modules.module(VISION).num_layers
    return steps[0] in ("post_layernorm", "head") or (steps[0] == "layernorm" and not model.vit.final_norm) or steps[-1] == "mask_token"


def _vision_rules(model: VisionLanguageModel) -> Iterator[_Rule]:
    if model.tower is None:
        yield from _one_size_vision_rules(model)
        return
    vision, image, tower = model.modules.module(VISION), model.image, model.tower
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


_PARTS = ("visual.", "vision_tower.", "multi_modal_projector.", "image_newline", "language_model.")


def named_as_now(name: str) -> str:
    """A name of a published checkpoint as transformers 5 has it."""
    if name.startswith(("visual.", "vision_tower.", "multi_modal_projector.", "image_newline")):
        name = f"model.{name}"
    if name.startswith("language_model."):
        name = name.removeprefix("language_model.")
    if name.startswith(f"{_TOWER}vision_model."):
        return _TOWER + name.removeprefix(f"{_TOWER}vision_model.")
    if name.startswith("model.") and not name.startswith(tuple(f"model.{part}" for part in _PARTS)):
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
    left = {name: tensor for name, tensor in left.items() if not is_unused(name, model)}
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
