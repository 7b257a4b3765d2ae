"""The model built here computes what transformers' Qwen-VL models compute with the same weights; weights come back as the same bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch

pytestmark = pytest.mark.distributed

GRIDS = ((1, 4, 6), (1, 10, 8), (2, 2, 4), (1, 2, 2))
IMAGE, START, END, VIDEO = 5, 6, 7, 8
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}
TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def oracle(family: str, tied: bool = False) -> Any:
    """A tiny random model of transformers."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # the latter: one for another torch; the models do without
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    torch.manual_seed(0)
    if family == "qwen2_vl":
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        vision: dict[str, Any] = {
            "depth": 3, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 32, "patch_size": 4, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "in_channels": 3,
        }
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config: Any = Qwen2VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=tied, **TOKENS)
        model: Any = Qwen2VLForConditionalGeneration(config)
    elif family == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        vision = {
            "depth": 5, "hidden_size": 32, "num_heads": 2, "intermediate_size": 40, "out_hidden_size": 32, "patch_size": 4, "window_size": 24,
            "fullatt_block_indexes": [1, 3], "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config = Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=tied, **TOKENS)
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        vision = {
            "depth": 5, "hidden_size": 32, "num_heads": 2, "intermediate_size": 40, "out_hidden_size": 32, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3, "num_position_embeddings": 36, "deepstack_visual_indexes": [0, 2],
        }
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
        config = Qwen3VLConfig(
            text_config={**TEXT, "head_dim": 16, "rope_parameters": rope}, vision_config=vision, tie_word_embeddings=tied, **TOKENS
        )
        model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def item_of(model: Any, grids: tuple[tuple[int, int, int], ...]) -> dict[str, torch.Tensor]:
    """One document with an image behind each few words."""
    from megatron_dip.workloads.image_patches import token_positions

    random = torch.Generator().manual_seed(1)
    words, types = [11, 12], [0, 0]
    for grid in grids:
        count = grid[0] * grid[1] * grid[2] // 4
        words += [START, *[IMAGE] * count, END, 13, 14]
        types += [0, *[1] * count, 0, 0, 0]
    patches = torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 16, generator=random)
    positions = token_positions(np.array(types, bool), grids, [0, len(words)], 2)
    return {
        "tokens": torch.tensor([words]), "images": patches, "image_grid_thw": torch.tensor(grids).view(-1, 3),
        "position_ids": torch.from_numpy(positions)[:, None], "cu_lengths": torch.tensor([0, len(words)], dtype=torch.int32),
        "types": torch.tensor([types]),
    }


def whole(model: Any) -> Any:
    """Our model with the same weights, in one piece."""
    from megatron_dip.models.hugging_face import import_weights, model_of_config
    from megatron_dip.models.vlm import VlmConfig
    from megatron_dip.trainer.build import initialize_parallel
    from megatron_dip.trainer.stock_layouts import stock_cuts

    initialize_parallel(Parallel(), device="cpu", seed=1, timeout_s=60)
    spec = model_of_config(model.config.to_dict(), sequence_length=128, image_size=64)
    config = VlmConfig(model=spec, parallel=Parallel())
    ours = config.build_stage(stock_cuts(config, "scripts", ranks=1), 0, 0, is_chained=False)
    missing, unexpected = ours.load_state_dict(import_weights(model.state_dict(), spec), strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("_extra_state") and "output_layer" not in name], missing
    return ours


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def compare(rank: int, num_ranks: int, family: str) -> dict[str, float]:
    """Largest relative differences: of the tower's tokens, of logits with and without images, of the gradients."""
    from megatron_dip.models.hugging_face import export_weights, import_weights, model_of_config
    from megatron_dip.models.vision_tower import TowerLayout, frames_of

    theirs = oracle(family)
    ours = whole(theirs)
    found = {}
    item = item_of(theirs, GRIDS)
    kinds = item.pop("types")
    layout = TowerLayout.of_frames(frames_of(item["image_grid_thw"]), ours.vlm_config.image, ours.vlm_config.tower, torch.device("cpu"))
    hidden = ours.vision_model(item["images"], layout)
    tokens = ours.project(hidden, layout)[0][:, 0]
    found["tower"] = difference(tokens, theirs.model.visual(item["images"], grid_thw=item["image_grid_thw"]).pooler_output)
    still = tuple(grid for grid in GRIDS if grid[0] == 1)  # clips are counted otherwise by each of their families
    for name, grids in (("logits", still), ("text", ())):
        item = item_of(theirs, grids)
        kinds = item.pop("types")
        images = {"pixel_values": item["images"], "image_grid_thw": item["image_grid_thw"], "mm_token_type_ids": kinds} if grids else {}
        expected = theirs(input_ids=item["tokens"], attention_mask=torch.ones_like(item["tokens"]), **images).logits
        output = ours(**item)
        found[name] = difference(output, expected)
        if grids:
            direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
            (expected * direction).sum().backward()
            (output * direction).sum().backward()
            gradients = import_weights({name: weight.grad for name, weight in theirs.named_parameters()}, ours.vlm_config.model)
            own = {name: weight.grad for name, weight in ours.named_parameters()}
            # A key's bias moves no attention: its gradient is nothing but rounding.
            found["gradients"] = max(difference(own[name], grad) for name, grad in gradients.items() if not name.endswith("linear_qkv.bias"))
    spec = model_of_config(theirs.config.to_dict(), sequence_length=128, image_size=64)
    back = export_weights(ours.state_dict(), spec)
    state = theirs.state_dict()
    assert sorted(back) == sorted(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    return found


def through_files(rank: int, num_ranks: int, family: str, folder: str) -> float:
    """Writes a checkpoint as Hugging Face's, brings it in and out again: largest difference of logits; weights come back as the same bits."""
    from megatron.core import dist_checkpointing
    from safetensors.torch import load_file

    from megatron_dip.trainer.hugging_face_checkpoint import export_checkpoint, import_checkpoint

    theirs = oracle(family, tied=True)
    ours = whole(theirs)
    place = Path(folder)
    theirs.save_pretrained(place / "hub")
    count = import_checkpoint(place / "hub", place / "ours", dtype="fp32")
    assert count == sum(weight.numel() for weight in theirs.parameters())
    with torch.no_grad():
        for weight in ours.parameters():
            weight.zero_()
    ours.load_state_dict(dist_checkpointing.load({"model": ours.sharded_state_dict()}, str(place / "ours/release"))["model"], strict=False)
    export_checkpoint(place / "ours", place / "hub", place / "back", dtype="fp32")
    before, after = load_file(place / "hub/model.safetensors"), load_file(place / "back/model.safetensors")
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    item = item_of(theirs, GRIDS[:2])
    kinds = item.pop("types")
    expected = theirs(
        input_ids=item["tokens"], attention_mask=torch.ones_like(item["tokens"]), pixel_values=item["images"],
        image_grid_thw=item["image_grid_thw"], mm_token_type_ids=kinds,
    ).logits
    return difference(ours(**item), expected)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_checkpoints_come_in_and_go_out(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (found,) = launch(through_files, 1, family, str(tmp_path))
    assert found < 1e-5


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_equals_transformers_on_the_same_weights(family: str) -> None:
    pytest.importorskip("transformers")
    (found,) = launch(compare, 1, family)
    assert max(found.values()) < 1e-5, found


def test_other_families_are_refused() -> None:
    from megatron_dip.models.hugging_face import model_of_config

    with pytest.raises(InputError, match=r"model_type.*bert.*qwen2_5_vl"):
        model_of_config({"model_type": "bert"}, sequence_length=8, image_size=8)
