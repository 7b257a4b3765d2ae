"""Models of the hub: parameters against published counts, images against the families' own rules, and configs that are not whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.spec.errors import InputError
from megatron_dip.workloads.huggingface import ImageRule, read_hub_config

_QWEN2_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
    "tie_word_embeddings": False,
}
_QWEN2_5_VL = {
    "model_type": "qwen2_5_vl", **_QWEN2_7B,
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584, "patch_size": 14,
                      "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [7, 15, 23, 31]},
}
# The fields of the published config.json files that the reader takes, beside the number of parameters that the checkpoints' index files state.
_PUBLISHED: list[tuple[dict[str, Any], int]] = [
    (_QWEN2_5_VL, 8_292_166_656),
    ({"model_type": "qwen2_vl", **_QWEN2_7B, "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16,
                                                               "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}}, 8_291_375_616),
    ({"model_type": "qwen3_vl", "tie_word_embeddings": False,
      "text_config": {"model_type": "qwen3_vl_text", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
                      "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
      "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16, "spatial_merge_size": 2,
                        "temporal_patch_size": 2, "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24]}}, 8_767_123_696),
    ({"model_type": "internvl_chat", "downsample_ratio": 0.5, "max_dynamic_patch": 12,
      "llm_config": {"model_type": "qwen2", **_QWEN2_7B, "vocab_size": 151674},
      "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 448,
                        "patch_size": 14, "qkv_bias": True, "norm_type": "layer_norm"}}, 7_944_373_760),
    ({"model_type": "llava_onevision", "text_config": {"model_type": "qwen2", **_QWEN2_7B, "vocab_size": 152000},
      "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26,
                        "num_attention_heads": 16, "patch_size": 14, "image_size": 384}}, 8_030_348_832),
    ({"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
      "num_key_value_heads": 8, "vocab_size": 128256}, 8_030_261_248),
    ({"model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
      "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}, 46_702_792_704),
    ({"model_type": "qwen2", **_QWEN2_7B}, 7_615_616_512),
    ({"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
      "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False}, 8_190_735_360),
    ({"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
      "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False}, 7_241_732_096),
    ({"model_type": "kimi_vl",
      "text_config": {"model_type": "deepseek_v3", "hidden_size": 2048, "intermediate_size": 11264, "moe_intermediate_size": 1408, "num_hidden_layers": 27,
                      "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
                      "first_k_dense_replace": 1, "moe_layer_freq": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128,
                      "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 163840, "tie_word_embeddings": False},
      "vision_config": {"model_type": "moonvit", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                        "patch_size": 14, "init_pos_emb_height": 64, "init_pos_emb_width": 64, "merge_kernel_size": [2, 2]}}, 16_407_657_776),
    ({"model_type": "llava",  # Pixtral's form
      "text_config": {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 14336, "num_hidden_layers": 40, "num_attention_heads": 32,
                      "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072, "tie_word_embeddings": False},
      "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                        "patch_size": 16, "image_size": 1024}}, 12_682_741_760),
    ({"model_type": "llava",
      "text_config": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                      "vocab_size": 32064, "tie_word_embeddings": False},
      "vision_config": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                        "num_attention_heads": 16, "patch_size": 14, "image_size": 336, "projection_dim": 768}}, 7_063_427_072),
    ({"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960, "in_channels": 16,
      "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "patch_size": [1, 2, 2], "cross_attn_norm": True}, 1_418_996_800),
]


@pytest.mark.parametrize(("config", "published"), _PUBLISHED, ids=lambda value: value.get("model_type", "wan") if isinstance(value, dict) else "")
def test_parameters_are_those_of_the_checkpoint(config: dict[str, Any], published: int) -> None:
    assert read_hub_config(config).parameters == pytest.approx(published, rel=1e-4)


def test_what_the_module_descriptions_leave_out_is_noted() -> None:
    found = read_hub_config(_QWEN2_5_VL)
    assert [module.name for module in found.model.modules] == ["vit", "lm"]
    assert any("window attention of 28" in note for note in found.notes)


@pytest.mark.parametrize("missing", ["hidden_size", "vocab_size", "vision_config"])
def test_a_missing_field_is_named(missing: str) -> None:
    config = {key: value for key, value in _QWEN2_5_VL.items() if key != missing}
    with pytest.raises(InputError, match=missing):
        read_hub_config(config)


@pytest.mark.parametrize("broken", [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"vision_config": 3}, {"model_type": "unheard_of"},
                                    {"num_hidden_layers": -1}, {"vision_config": {"depth": 1}}])
def test_broken_configs_end_in_one_error(broken: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        read_hub_config({**_QWEN2_5_VL, **broken})


def test_images_of_qwen_keep_their_aspect_within_bounds() -> None:
    rule = ImageRule(patch=14, merge=2, min_pixels=56 * 56, max_pixels=14 * 14 * 4 * 1280)
    assert rule.lengths(980, 980).text == 35 * 35
    assert rule.lengths(980, 490).vision == (4 * 35 * 18,)
    assert rule.lengths(4000, 4000).text <= 1280
    assert rule.lengths(20, 20).text == 4


def test_tiles_follow_the_aspect_ratio_and_gain_a_thumbnail() -> None:
    rule = ImageRule(patch=14, merge=2, tile=448, max_tiles=12, class_tokens=1)
    assert rule.lengths(448, 448).vision == (1025,)
    assert rule.lengths(1344, 1344).text == 256 * 10  # three by three, and the thumbnail
    assert rule.lengths(1800, 450).vision == (1025,) * 5


@given(st.integers(1, 100_000), st.integers(1, 100_000))
def test_every_size_becomes_tokens(width: int, height: int) -> None:
    for rule in (ImageRule(patch=14, merge=2, min_pixels=3136, max_pixels=1_003_520), ImageRule(patch=14, merge=2, tile=448, max_tiles=12)):
        found = rule.lengths(width, height)
        assert found.text >= 1
        assert all(length >= 1 for length in found.vision)
        assert rule.tile is not None or found.vision[0] == found.text * rule.merge**2
