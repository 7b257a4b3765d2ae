"""A model of the Hugging Face hub, described by its ``config.json``: its modules, its parameters, and how many tokens an image becomes.

In: the decoded JSON of a config (transformers' fields; diffusers' for Wan). Out: a :class:`HubModel`. The parameters are counted tensor by tensor as
the family's code makes them, so that they can be held against the checkpoint's published count; the :class:`~megatron_dip.spec.model.ModelSpec` is
what plans and simulations are made of, and knows less: ``notes`` says what it leaves out.

Sources: the fields and tensors of transformers' ``models/{llama,qwen2,qwen3,mixtral,qwen2_vl,qwen2_5_vl,qwen3_vl,internvl,llava_onevision,pixtral}``,
of the InternVL, NVLM and Kimi-VL repositories' own code, and of diffusers' ``WanTransformer3DModel``. Image sizes become tokens by each family's own
rule: multiples of patch times merge within bounds on pixels, or tiles of one size by the aspect ratio and one thumbnail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLengths:
    """What one image costs: sequence lengths of its vision instances, and tokens of the language model."""

    vision: tuple[int, ...]
    text: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRule:
    """How a family turns the pixels of an image into vision instances and language-model tokens."""

    patch: int
    """Pixels of a patch's side."""
    merge: int
    """Patches in each direction that become one token of the language model."""
    tile: int | None = None
    """Side of the square tiles that an image is cut into; None = the image keeps its size."""
    max_tiles: int = 1
    class_tokens: int = 0
    """Added to each tile in the vision model."""
    min_pixels: int = 0
    max_pixels: int = 1 << 40
    row_ends: int = 0
    """Tokens of the language model behind each row of merged patches."""

    def lengths(self, width: int, height: int) -> ImageLengths:
        """Of an image of ``width`` x ``height`` pixels. Raises InputError for sizes that no image has."""
        if not (1 <= width <= 100_000 and 1 <= height <= 100_000):
            raise InputError("image", [width, height], "outside 1 to 100000 pixels a side", "give width and height in pixels")
        if self.tile is None:
            unit = self.patch * self.merge
            rows, columns = _fit(height, width, unit, self.min_pixels, self.max_pixels)
            return ImageLengths(vision=(rows * columns * self.merge**2,), text=rows * columns + rows * self.row_ends)
        across = self.tile // self.patch
        tiles = _tiles(width, height, self.tile, self.max_tiles)
        count = tiles + (1 if tiles > 1 else 0)  # a thumbnail of the whole stands beside several tiles
        merged = math.ceil(across / self.merge) ** 2
        return ImageLengths(vision=(across * across + self.class_tokens,) * count, text=merged * count)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubModel:
    name: str
    """The config's ``model_type`` or class."""
    model: ModelSpec
    parameters: int
    """All of the checkpoint's, counted from the config."""
    image: ImageRule | None
    """None: the model takes no images."""
    notes: list[str] = field(default_factory=list)
    """What the module descriptions leave out, in sentences."""


def read_hub_config(config: Config, where: str = "config.json") -> HubModel:
    """The model that a config describes. Raises InputError for families that are not known here, and for fields that are missing."""
    name = str(config.get("model_type") or config.get("_class_name") or "")
    reader = _FAMILIES.get(name)
    if reader is None:
        raise InputError(
            f"{where}.model_type", name or None, "not a family that is known here",
            f"use one of {', '.join(sorted(_FAMILIES))}, or write a workload by hand",
        )
    try:
        found = reader(config)
    except KeyError as missing:
        raise InputError(f"{where}.{missing.args[0]}", None, f"is missing, and a {name} needs it", "give the model's whole config.json") from missing
    except (TypeError, ValueError, ZeroDivisionError, AttributeError) as broken:
        raise InputError(where, name, f"holds a field of the wrong kind ({broken})", "give the model's config.json as it was published") from broken
    found.model.validate(where)
    return found


# ---- language models -------------------------------------------------------------------------------------------------------------------


def _language(config: Config, notes: list[str], *, head: bool = True) -> tuple[ModuleSpec, int]:
    """The module of a Llama-like decoder and its parameters."""
    if "kv_lora_rank" in config:
        return _latent_language(config, notes)
    hidden, layers, heads = int(config["hidden_size"]), int(config["num_hidden_layers"]), int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    kind = config.get("model_type", "")
    head_dim = int(config.get("head_dim") or hidden // heads)
    vocab, tied = int(config["vocab_size"]), bool(config.get("tie_word_embeddings", False))
    experts, active = int(config.get("num_local_experts") or config.get("num_experts") or 0), int(config.get("num_experts_per_tok") or 0)
    width = int(config.get("moe_intermediate_size") or config["intermediate_size"]) if experts else int(config["intermediate_size"])
    attention = hidden * head_dim * (2 * heads + 2 * groups)
    if config.get("attention_bias", kind in ("qwen2", "qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text")) or config.get("qkv_bias"):
        attention += head_dim * (heads + 2 * groups)
    if kind.startswith("qwen3"):
        attention += 2 * head_dim  # norms of queries and keys
    mlp = 3 * hidden * width * (experts or 1) + hidden * experts
    embeddings = vocab * hidden * (2 if head and not tied else 1)
    parameters = layers * (attention + mlp + 2 * hidden) + hidden + embeddings
    if head_dim * heads != hidden:
        notes.append(f"attention heads are {head_dim} wide where {hidden} / {heads} is counted")
    if experts:
        notes.append(f"of {experts} experts a layer the {active} that work on a token are counted in time; memory and messages of the others are not")
    spec = ModuleSpec(
        name="lm", kind="lm", role="backbone", num_layers=layers, hidden_size=hidden, ffn_hidden_size=width * max(active, 1),
        num_attention_heads=heads, num_query_groups=groups, vocab_size=vocab, tied_embeddings=tied,
    )
    return spec, parameters


def _latent_language(config: Config, notes: list[str]) -> tuple[ModuleSpec, int]:
    """DeepSeek's attention with compressed keys and values, experts behind the first dense layers (Kimi-VL)."""
    hidden, layers, heads, vocab = (int(config[key]) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"))
    nope, rope, value, rank = (int(config[key]) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    query_rank = config.get("q_lora_rank")
    query = hidden * heads * (nope + rope) if not query_rank else int(query_rank) * (hidden + 1 + heads * (nope + rope))
    attention = query + hidden * (rank + rope) + rank + rank * heads * (nope + value) + heads * value * hidden
    experts, shared, width = int(config["n_routed_experts"]), int(config.get("n_shared_experts") or 0), int(config["moe_intermediate_size"])
    dense, active = int(config.get("first_k_dense_replace", 0)), int(config["num_experts_per_tok"])
    sparse = 3 * hidden * width * (experts + shared) + hidden * experts + (experts if config.get("topk_method") == "noaux_tc" else 0)
    parameters = layers * (attention + 2 * hidden) + dense * 3 * hidden * int(config["intermediate_size"]) + (layers - dense) * sparse
    tied = bool(config.get("tie_word_embeddings", False))
    parameters += hidden + vocab * hidden * (1 if tied else 2)
    notes.append(f"compressed attention is counted as plain; of {experts} experts a layer the {active} + {shared} that work on a token are counted")
    spec = ModuleSpec(
        name="lm", kind="lm", role="backbone", num_layers=layers, hidden_size=hidden, ffn_hidden_size=width * (active + shared),
        num_attention_heads=heads, vocab_size=vocab, tied_embeddings=tied,
    )
    return spec, parameters


def _text_only(config: Config) -> HubModel:
    notes: list[str] = []
    spec, parameters = _language(config, notes)
    return HubModel(name=str(config["model_type"]), model=ModelSpec(modules=[spec]), parameters=parameters, image=None, notes=notes)


# ---- vision models ---------------------------------------------------------------------------------------------------------------------


def _vision(config: Config, *, hidden: str = "hidden_size", layers: str = "num_hidden_layers", heads: str = "num_attention_heads",
            ffn: int | None = None, gated: bool = False) -> ModuleSpec:
    return ModuleSpec(
        name="vit", kind="vit", role="encoder", num_layers=int(config[layers]), hidden_size=int(config[hidden]),
        ffn_hidden_size=int(config["intermediate_size"]) if ffn is None else ffn, num_attention_heads=int(config[heads]), gated_mlp=gated,
    )


def _block(module: ModuleSpec, *, biases: bool, norm_biases: bool, qk_norm: int = 0, scales: bool = False) -> int:
    """Parameters of one block: four attention products, the MLP, two norms, layer scales."""
    hidden, ffn = module.hidden_size, module.ffn_hidden_size
    matrices = 3 if module.has_gated_mlp else 2
    weights = 4 * hidden * hidden + matrices * hidden * ffn
    bias = 4 * hidden + (matrices - 1) * ffn + hidden if biases else 0
    return weights + bias + (4 if norm_biases else 2) * hidden + qk_norm + (2 * hidden if scales else 0)


def _joined(name: str, vision: ModuleSpec, language: tuple[ModuleSpec, int], vision_parameters: int, image: ImageRule, notes: list[str]) -> HubModel:
    spec, parameters = language
    return HubModel(
        name=name, model=ModelSpec(modules=[vision, spec]), parameters=parameters + vision_parameters, image=image, notes=notes,
    )


def _text_part(config: Config, *names: str) -> Config:
    """The language model's own config, or the whole where its fields stand at the top."""
    for name in names:
        if isinstance(config.get(name), Mapping):
            inner = dict(config[name])
            inner.setdefault("tie_word_embeddings", config.get("tie_word_embeddings", False))
            inner.setdefault("model_type", config["model_type"])
            return inner
    return config


def _qwen2_vl(config: Config) -> HubModel:
    notes: list[str] = []
    text = _text_part(config, "text_config")
    language = _language(text, notes)
    out = int(text["hidden_size"])
    vision = config["vision_config"]
    merge, patch = int(vision.get("spatial_merge_size", 2)), int(vision.get("patch_size", 14))
    frames = int(vision.get("temporal_patch_size", 2))
    name = str(config["model_type"])
    if name == "qwen2_5_vl":
        module = _vision(vision, layers="depth", heads="num_heads", gated=True)
        block, norm = _block(module, biases=True, norm_biases=False), module.hidden_size
        full = vision.get("fullatt_block_indexes")
        if full is not None:
            notes.append(f"window attention of {module.num_layers - len(full)} vision layers is counted as full attention, so the tower is too slow here")
    else:
        hidden = int(vision["embed_dim"])
        module = _vision({**vision, "hidden_size": hidden}, layers="depth", heads="num_heads", ffn=int(hidden * float(vision.get("mlp_ratio", 4))))
        block, norm = _block(module, biases=True, norm_biases=True), 2 * module.hidden_size
    wide = module.hidden_size * merge * merge
    parameters = (
        module.num_layers * block + 3 * frames * patch * patch * module.hidden_size + norm + wide * (wide + 1) + out * (wide + 1)
    )
    rule = ImageRule(patch=patch, merge=merge, min_pixels=56 * 56, max_pixels=14 * 14 * 4 * 1280)
    return _joined(name, module, language, parameters, rule, notes)


def _qwen3_vl(config: Config) -> HubModel:
    notes: list[str] = []
    text = _text_part(config, "text_config")
    language = _language(text, notes)
    out = int(text["hidden_size"])
    vision = config["vision_config"]
    module = _vision(vision, layers="depth", heads="num_heads")
    merge, patch, frames = int(vision["spatial_merge_size"]), int(vision["patch_size"]), int(vision.get("temporal_patch_size", 2))
    hidden = module.hidden_size
    wide = hidden * merge * merge
    deep = len(vision.get("deepstack_visual_indexes", ()))
    merger = wide * (wide + 1) + out * (wide + 1)
    parameters = (
        module.num_layers * _block(module, biases=True, norm_biases=True) + (3 * frames * patch * patch + 1) * hidden
        + int(vision["num_position_embeddings"]) * hidden + 2 * hidden + merger + deep * (2 * wide + merger)
    )
    if deep:
        notes.append(f"the {deep} further outputs of the vision model into the first language layers (deepstack) are not counted")
    rule = ImageRule(patch=patch, merge=merge, min_pixels=256 * 256, max_pixels=4096 * 4096)
    return _joined(str(config["model_type"]), module, language, parameters, rule, notes)


def _internvl(config: Config) -> HubModel:
    """InternVL's own configs (``internvl_chat``), transformers' (``internvl``) and NVLM's."""
    notes: list[str] = []
    text = _text_part(config, "llm_config", "text_config")
    if text.get("model_type") == "internlm2":
        text = {**text, "attention_bias": bool(text.get("bias", False))}
    language = _language(text, notes)
    out = int(text["hidden_size"])
    vision = config["vision_config"]
    module = _vision(vision)
    hidden = module.hidden_size
    size, patch = (int(v[0] if isinstance(v, list) else v) for v in (vision["image_size"], vision["patch_size"]))
    qkv_bias = bool(vision.get("qkv_bias", vision.get("attention_bias", False)))
    plain_norm = vision.get("norm_type", "layer_norm") != "rms_norm"
    block = _block(module, biases=True, norm_biases=plain_norm, qk_norm=2 * hidden if vision.get("qk_normalization", vision.get("use_qk_norm")) else 0, scales=True)
    if not qkv_bias:
        block -= 3 * hidden
    positions = (size // patch) ** 2 + 1
    parameters = module.num_layers * block + (3 * patch * patch + 1) * hidden + hidden + positions * hidden
    merge = round(1 / float(config.get("downsample_ratio", 0.5)))
    wide = hidden * merge * merge
    nvlm = config["model_type"] == "NVLM_D"
    between = int(text["intermediate_size"]) if nvlm else out
    parameters += 2 * wide + (wide + (0 if nvlm else 1)) * between + (between + (0 if nvlm else 1)) * out
    rule = ImageRule(patch=patch, merge=merge, tile=size, max_tiles=int(config.get("max_dynamic_patch", config.get("max_patches", 12))), class_tokens=1)
    return _joined(str(config["model_type"]), module, language, parameters, rule, notes)


def _llava(config: Config) -> HubModel:
    """LLaVA-OneVision (SigLIP tower) and Pixtral in LLaVA's form."""
    notes: list[str] = []
    text = _text_part(config, "text_config")
    language = _language(text, notes)
    out = int(text["hidden_size"])
    vision = config["vision_config"]
    pixtral = vision.get("model_type") == "pixtral"
    module = _vision(vision, gated=pixtral)
    hidden, patch = module.hidden_size, int(vision["patch_size"])
    projector = hidden * out + out * out + 2 * out
    if pixtral:
        parameters = module.num_layers * _block(module, biases=False, norm_biases=False) + 3 * patch * patch * hidden + hidden
        rule = ImageRule(patch=patch, merge=1, max_pixels=int(vision["image_size"]) ** 2, row_ends=1)
    else:
        size = int(vision["image_size"])
        parameters = module.num_layers * _block(module, biases=True, norm_biases=True) + (3 * patch * patch + 1) * hidden
        parameters += (size // patch) ** 2 * hidden + 2 * hidden + out  # positions, the last norm, the mark at row ends
        rule = ImageRule(patch=patch, merge=1, tile=size, max_tiles=9)
    return _joined(str(config["model_type"]), module, language, parameters + projector, rule, notes)


def _kimi_vl(config: Config) -> HubModel:
    notes: list[str] = []
    text = _text_part(config, "text_config")
    language = _language(text, notes)
    out = int(text["hidden_size"])
    vision = config["vision_config"]
    module = _vision(vision)
    hidden, patch = module.hidden_size, int(vision["patch_size"])
    merge = int(vision.get("merge_kernel_size", [2, 2])[0])
    wide = hidden * merge * merge
    places = int(vision.get("init_pos_emb_height", 64)) * int(vision.get("init_pos_emb_width", 64))
    parameters = module.num_layers * _block(module, biases=True, norm_biases=True) + (3 * patch * patch + 1 + places) * hidden + 2 * hidden
    parameters += 2 * hidden + wide * (wide + 1) + out * (wide + 1)
    rule = ImageRule(patch=patch, merge=merge, max_pixels=4096 * patch * patch)
    return _joined(str(config["model_type"]), module, language, parameters, rule, notes)


# ---- video -----------------------------------------------------------------------------------------------------------------------------


def _wan(config: Config) -> HubModel:
    heads, head_dim, layers = int(config["num_attention_heads"]), int(config["attention_head_dim"]), int(config["num_layers"])
    hidden, ffn, channels, text, freq = heads * head_dim, int(config["ffn_dim"]), int(config["in_channels"]), int(config["text_dim"]), int(config["freq_dim"])
    frames, rows, columns = config["patch_size"]
    patch = frames * rows * columns
    out_channels = int(config.get("out_channels") or channels)
    block = 8 * hidden * (hidden + 1) + 4 * hidden + 2 * hidden * ffn + ffn + hidden + 6 * hidden
    block += 2 * hidden if config.get("cross_attn_norm", True) else 0
    image = int(config.get("image_dim") or 0)
    if config.get("added_kv_proj_dim"):
        block += 2 * hidden * (hidden + 1) + hidden
    parameters = layers * block + (channels * patch + 1) * hidden + (freq + 1) * hidden + hidden * (hidden + 1) + 6 * hidden * (hidden + 1)
    parameters += (text + 1) * hidden + hidden * (hidden + 1) + 2 * hidden + (hidden + 1) * out_channels * patch
    if image:
        parameters += 4 * image + image * (image + 1) + hidden * (image + 1) - 2 * image + 2 * hidden
    notes = ["the text encoder is not counted: its embeddings are taken as precomputed", "4 latent frames a second of 448 patches are assumed for clips"]
    spec = ModuleSpec(name="dit", kind="dit", role="decoder", num_layers=layers, hidden_size=hidden, ffn_hidden_size=ffn, num_attention_heads=heads, cross_attention=True)
    return HubModel(name="WanTransformer3DModel", model=ModelSpec(modules=[spec]), parameters=parameters, image=None, notes=notes)


# ---- sizes of images -------------------------------------------------------------------------------------------------------------------


class _Grid(NamedTuple):
    rows: int
    columns: int


def _fit(height: int, width: int, unit: int, min_pixels: int, max_pixels: int) -> _Grid:
    """Rows and columns of ``unit`` x ``unit`` squares of the image once it is scaled between the bounds (Qwen2-VL's ``smart_resize``)."""
    rows, columns = max(1, round(height / unit)), max(1, round(width / unit))
    if rows * columns * unit * unit > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = max(1, math.floor(height / scale / unit)), max(1, math.floor(width / scale / unit))
    elif rows * columns * unit * unit < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = math.ceil(height * scale / unit), math.ceil(width * scale / unit)
    return _Grid(rows, columns)


def _tiles(width: int, height: int, tile: int, max_tiles: int) -> int:
    """Number of tiles of the grid whose aspect ratio is nearest the image's (InternVL's ``find_closest_aspect_ratio``).

    Of equals the larger wins while the image has more than half of its pixels.
    """
    aspect, best, nearest = width / height, 1, math.inf
    grids = [_Grid(rows, columns) for rows in range(1, max_tiles + 1) for columns in range(1, max_tiles // rows + 1)]
    for grid in sorted(grids, key=lambda grid: grid.rows * grid.columns):
        count, distance = grid.rows * grid.columns, abs(aspect - grid.columns / grid.rows)
        if distance < nearest or (distance == nearest and width * height > 0.5 * tile * tile * count):
            best, nearest = count, distance
    return best


_FAMILIES: dict[str, Callable[[Config], HubModel]] = {
    "llama": _text_only, "mistral": _text_only, "qwen2": _text_only, "qwen3": _text_only, "mixtral": _text_only, "qwen3_moe": _text_only,
    "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_vl, "qwen3_vl": _qwen3_vl, "qwen3_vl_moe": _qwen3_vl,
    "internvl_chat": _internvl, "internvl": _internvl, "NVLM_D": _internvl,
    "llava_onevision": _llava, "llava": _llava, "kimi_vl": _kimi_vl, "WanTransformer3DModel": _wan,
}
