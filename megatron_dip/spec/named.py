"""The models and setups of the DIP paper by name (arXiv 2504.14145, tables of models and of setups).

Sourced: layers, widths, heads, key/value groups, tensor and pipeline sizes. Assumed, since the paper names the models only: the
vocabularies (Llama 3, Qwen 2 and Megatron's GPT), two MLP matrices in ViT, DiT and GPT, cross-attention in DiT, and that the
T2V language model feeds its last hidden states, not logits, to the DiT (it has an embedding but no head).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec

IMAGE_PATCHES = 2704
"""ViT tokens of one image: 728 px, patch 14."""
IMAGE_TOKENS = 169
"""Language-model tokens of one image, after the spatial merge of 4 x 4 patches."""
PACKED_TOKENS = 8192
"""Language-model tokens of one packed VLM microbatch."""
MAX_IMAGES = 48
"""Images in one packed VLM microbatch at most."""

_VIT_5B = ModuleSpec(name="vit", kind="vit", role="encoder", num_layers=63, hidden_size=1792, ffn_hidden_size=15360, num_attention_heads=16)
_VIT_22B = ModuleSpec(name="vit", kind="vit", role="encoder", num_layers=48, hidden_size=6144, ffn_hidden_size=24576, num_attention_heads=48)
_LLAMA3_8B = ModuleSpec(
    name="lm", kind="lm", role="backbone", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32,
    num_query_groups=8, vocab_size=128256,
)
_QWEN2_32B = ModuleSpec(
    name="lm", kind="lm", role="backbone", num_layers=64, hidden_size=5120, ffn_hidden_size=27648, num_attention_heads=40,
    num_query_groups=8, vocab_size=152064,
)
_QWEN2_72B = ModuleSpec(
    name="lm", kind="lm", role="backbone", num_layers=80, hidden_size=8192, ffn_hidden_size=29568, num_attention_heads=64,
    num_query_groups=8, vocab_size=152064,
)
_GPT_175B = ModuleSpec(
    name="lm", kind="lm", role="backbone", num_layers=96, hidden_size=12288, ffn_hidden_size=49152, num_attention_heads=96,
    vocab_size=51200, gated_mlp=False,
)
_DIT_5B = ModuleSpec(
    name="dit", kind="dit", role="decoder", num_layers=28, hidden_size=3584, ffn_hidden_size=10240, num_attention_heads=28,
    cross_attention=True,
)
_DIT_30B = ModuleSpec(
    name="dit", kind="dit", role="decoder", num_layers=48, hidden_size=6144, ffn_hidden_size=24576, num_attention_heads=48,
    cross_attention=True,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model with the parallel sizes that the paper trains it with."""

    family: Literal["vlm", "t2v"]
    model: ModelSpec
    tensor: int
    pipeline: int
    data: int = 1
    device: str = "h800"


def _vlm(vit: ModuleSpec, lm: ModuleSpec, tensor: int, pipeline: int, data: int = 1, device: str = "h800") -> Setup:
    return Setup(family="vlm", model=ModelSpec(modules=[vit, lm]), tensor=tensor, pipeline=pipeline, data=data, device=device)


def _t2v(lm: ModuleSpec, dit: ModuleSpec, tensor: int, pipeline: int, data: int = 1, device: str = "h800") -> Setup:
    return Setup(family="t2v", model=ModelSpec(modules=[lm, dit]), tensor=tensor, pipeline=pipeline, data=data, device=device)


NAMED_SETUPS: dict[str, Setup] = {
    "vlm-s": _vlm(_VIT_5B, _LLAMA3_8B, 4, 4),
    "vlm-m": _vlm(_VIT_5B, _QWEN2_32B, 8, 4),
    "vlm-l": _vlm(_VIT_22B, _QWEN2_72B, 8, 8),
    "t2v-s": _t2v(_LLAMA3_8B, _DIT_5B, 4, 4),
    "t2v-l": _t2v(_QWEN2_32B, _DIT_30B, 8, 8),
    "vlm-xl-8k": _vlm(_VIT_22B, _GPT_175B, 8, 8, 128, "h100"),
    "vlm-xl-16k": _vlm(_VIT_22B, _GPT_175B, 8, 16, 128, "h100"),
    "t2v-xl-3k": _t2v(_QWEN2_72B, _DIT_30B, 8, 4, 96, "h100"),
    "t2v-xl-6k": _t2v(_QWEN2_72B, _DIT_30B, 8, 8, 96, "h100"),
}
"""The paper's five setups on H800 and its four simulated XL ones on H100."""

FIVE_SETUPS = ("vlm-s", "vlm-m", "vlm-l", "t2v-s", "t2v-l")


def named_setup(name: str, field: str = "setup") -> Setup:
    if name not in NAMED_SETUPS:
        raise InputError(field, name, "no such setup", f"use one of {', '.join(NAMED_SETUPS)}")
    return NAMED_SETUPS[name]


def named_model(name: str) -> ModelSpec:
    """The modules of a named setup. Raises InputError for an unknown name."""
    return named_setup(name, "model").model
