"""The model built here computes what transformers' LLaVA, LLaVA-OneVision and InternVL compute with the same weights; weights come back as the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dip.spec.errors import InputError
from tests.distributed.launcher import launch
from tests.models.test_hugging_face import IMAGE, TEXT, difference, whole

pytestmark = pytest.mark.distributed

SIZE, PATCH = 24, 4
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH}
LLAMA = {**TEXT, "model_type": "llama"}
QWEN = {**TEXT, "model_type": "qwen2"}
FAMILIES = ("llava", "llava siglip", "llava_onevision", "internvl", "internvl rms")


def oracle(family: str, tied: bool = False) -> Any:
    """A tiny random model of transformers. All take outputs of another layer: the last but one, the first, the last."""
    import sys

    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    import transformers as hub

    torch.manual_seed(0)
    if family == "llava":
        config: Any = hub.LlavaConfig(
            vision_config={**VISION, "model_type": "clip_vision_model"}, text_config=LLAMA, image_token_index=IMAGE, tie_word_embeddings=tied,
        )
        model: Any = hub.LlavaForConditionalGeneration(config)
    elif family == "llava siglip":
        config = hub.LlavaConfig(
            vision_config={**VISION, "model_type": "siglip_vision_model"}, text_config={**TEXT, "model_type": "qwen3", "head_dim": 16},
            image_token_index=IMAGE, vision_feature_layer=1, vision_feature_select_strategy="full", tie_word_embeddings=tied,
        )
        model = hub.LlavaForConditionalGeneration(config)
    elif family == "llava_onevision":
        config = hub.LlavaOnevisionConfig(
            vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}, text_config=QWEN, image_token_id=IMAGE,
            image_grid_pinpoints=[[SIZE, SIZE]], tie_word_embeddings=tied,
        )
        model = hub.LlavaOnevisionForConditionalGeneration(config)
    else:
        other = {"norm_type": "rms_norm", "use_mean_pooling": True} if family == "internvl rms" else {"use_mean_pooling": False}
        config = hub.InternVLConfig(
            vision_config={**VISION, "attention_bias": True, "model_type": "internvl_vision", **other}, text_config=QWEN, image_token_id=IMAGE, tie_word_embeddings=tied,
        )
        model = hub.InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def item_of(tokens_of_image: int, count: int) -> dict[str, torch.Tensor]:
    """One document with ``count`` images."""
    words = [11, 12]
    for _ in range(count):
        words += [*[IMAGE] * tokens_of_image, 13, 14]
    return {
        "images": torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), "tokens": torch.tensor([words]),
        "position_ids": torch.arange(len(words))[None], "cu_lengths": torch.tensor([0, len(words)], dtype=torch.int32),
    }


def theirs_on(model: Any, item: dict[str, torch.Tensor]) -> torch.Tensor:
    images = item["images"]
    given: dict[str, Any] = {}
    if len(images):
        given["pixel_values"] = images
        if model.config.model_type == "llava_onevision":
            given = {
                "pixel_values": images[:, None], "image_sizes": torch.full((len(images), 2), SIZE), "batch_num_images": torch.tensor([len(images)]),
            }
    logits: torch.Tensor = model(input_ids=item["tokens"], attention_mask=torch.ones_like(item["tokens"]), **given).logits
    return logits


def compare(rank: int, num_ranks: int, family: str) -> dict[str, float]:
    """Largest relative differences of logits, with several images and with none, and of gradients."""
    from megatron_dip.models.hugging_face import export_weights, import_weights, is_unused

    theirs = oracle(family)
    ours = whole(theirs)
    spec = ours.vlm_config.model
    found = {}
    for name, count in (("logits", 2), ("text", 0)):
        item = item_of(spec.image.tokens, count)
        expected, output = theirs_on(theirs, item), ours(**item)
        found[name] = difference(output, expected)
        if count:
            direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
            (expected * direction).sum().backward()
            (output * direction).sum().backward()
            used = {name: weight.grad for name, weight in theirs.named_parameters() if not is_unused(name, spec)}
            assert None not in used.values()
            gradients = import_weights(used, spec)
            own = {name: weight.grad for name, weight in ours.named_parameters()}
            assert sorted(own) == sorted(gradients)
            # A key's bias moves no attention: its gradient is nothing but rounding.
            found["gradients"] = max(difference(own[name], grad) for name, grad in gradients.items() if not name.endswith("linear_qkv.bias"))
    back, state = export_weights(ours.state_dict(), spec), theirs.state_dict()
    assert sorted(back) == sorted(name for name in state if not is_unused(name, spec))
    assert all(torch.equal(back[name], state[name]) for name in back)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers_on_the_same_weights(family: str) -> None:
    pytest.importorskip("transformers")
    (found,) = launch(compare, 1, family)
    assert max(found.values()) < 1e-5, found


def through_files(rank: int, num_ranks: int, family: str, folder: str) -> float:
    """Writes a checkpoint as Hugging Face's, brings it in and out again: largest difference of logits; all weights come back as the same bits."""
    from megatron.core import dist_checkpointing
    from safetensors.torch import load_file

    from megatron_dip.trainer.hugging_face_checkpoint import export_checkpoint, import_checkpoint

    theirs = oracle(family, tied=family == "llava_onevision")
    ours = whole(theirs)
    place = Path(folder)
    theirs.save_pretrained(place / "hub")
    import_checkpoint(place / "hub", place / "ours", dtype="fp32")
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    ours.load_state_dict(dist_checkpointing.load({"model": ours.sharded_state_dict()}, str(place / "ours/release"))["model"], strict=False)
    export_checkpoint(place / "ours", place / "hub", place / "back", dtype="fp32")
    before, after = load_file(place / "hub/model.safetensors"), load_file(place / "back/model.safetensors")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    item = item_of(ours.vlm_config.image.tokens, 2)
    return difference(ours(**item), theirs_on(theirs, item))


@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl"])
def test_checkpoints_come_in_and_go_out(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (found,) = launch(through_files, 1, family, str(tmp_path))
    assert found < 1e-5


def test_published_names_are_understood() -> None:
    from megatron_dip.models.hugging_face import named_as_now

    for published, now in {
        "vision_tower.vision_model.embeddings.class_embedding": "model.vision_tower.embeddings.class_embedding",
        "language_model.model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight", "multi_modal_projector.linear_1.bias": "model.multi_modal_projector.linear_1.bias",
        "image_newline": "model.image_newline", "model.image_newline": "model.image_newline",
    }.items():
        assert named_as_now(published) == now


@pytest.mark.parametrize(("change", "message"), [
    ({"vision_feature_layer": [-2, -1]}, r"vision_feature_layer = \[-2, -1\]: outputs of several layers"),
    ({"vision_feature_layer": -9}, r"vision_feature_layer = -9: is none of the 3 layers"),
    ({"vision_feature_select_strategy": "full"}, r"vision_feature_select_strategy = 'full': a clip_vision_model keeps its class token"),
    ({"projector_hidden_act": "relu"}, r"projector_hidden_act = 'relu': is not supported \(only gelu\)"),
    ({"text_config": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2}}}, r"rope_type = 'linear': is not supported"),
    ({"vision_config": {**VISION, "model_type": "pixtral"}}, r"vision_config\.model_type = 'pixtral'"),
])
def test_what_is_not_modelled_is_refused(change: dict[str, Any], message: str) -> None:
    from megatron_dip.models.hugging_face import model_of_config

    config = {"model_type": "llava", "vision_config": {**VISION, "model_type": "clip_vision_model"}, "text_config": LLAMA, "image_token_index": IMAGE}
    with pytest.raises(InputError, match=message):
        model_of_config({**config, **change}, sequence_length=64, image_size=24)


def test_sizes_that_llavas_configs_leave_out_are_llamas() -> None:
    from megatron_dip.models.hugging_face import model_of_config

    vision = {**VISION, "model_type": "clip_vision_model", "hidden_size": 1024, "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "num_hidden_layers": 24}
    config = {"model_type": "llava", "vision_config": vision, "text_config": {"model_type": "llama", "vocab_size": 32064}, "image_token_index": 32000}
    model = model_of_config(config, sequence_length=64, image_size=24)
    assert model.modules.module("lm").hidden_size == 4096
    assert model.modules.module("vit").num_layers == 23
    assert (model.image.tokens, model.image.patches) == (576, 577)
