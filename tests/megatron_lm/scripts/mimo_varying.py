"""examples/mimo/train.py of the checkout with a small MimoModel of Megatron's own modules: zero to three images a sample.

The script runs as it is: its arguments, model_provider, get_batch, forward_step and loss. Replaced are what it finds by name: the model
(the example's have encoders from the Hugging Face hub) and the data set (which needs Megatron-Energon).
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.mimo import MimoModel, MimoModelConfig
from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args

from megatron_dip.models.layers import projector_spec

checkout = next(folder for folder in map(Path, sys.path) if (folder / "pretrain_vlm.py").is_file())
SCRIPT = checkout / "examples/mimo/train.py"
sys.path.insert(0, str(SCRIPT.parent))

IMAGE_COUNTS = (3, 0, 1, 2)
IMAGE_TOKEN = 120
TOKENS_OF_IMAGE = 5
LENGTH = 40


def config_of(layers: int, hidden_size: int, **others: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=layers, hidden_size=hidden_size, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=get_args().tensor_model_parallel_size, calculate_per_token_loss=get_args().calculate_per_token_loss, **others,
    )


def provide_model(pre_process: bool, post_process: bool, *unused: Any, **groups: Any) -> MimoModel:
    ranks = get_args().pipeline_model_parallel_size
    encoder = ModuleSpec(module=CLIPViTModel, params={
        "transformer_config": config_of(4, 32), "transformer_layer_spec": get_vit_layer_with_local_spec(), "patch_dim": 14, "img_h": 28, "img_w": 28,
    })
    projection = ModuleSpec(module=MultimodalProjector, params={
        "config": config_of(1, 64), "submodules": projector_spec(), "projector_type": "mlp", "input_size": 32,
    })
    language = ModuleSpec(module=GPTModel, params={
        "config": config_of(4, 64, pipeline_model_parallel_size=ranks, pipeline_dtype=torch.float32),
        "transformer_layer_spec": get_gpt_layer_local_spec(), "vocab_size": 128, "max_sequence_length": LENGTH, "pre_process": pre_process,
        "post_process": post_process, "position_embedding_type": "rope", "scatter_embedding_sequence_parallel": False,
    })
    images = ModuleSpec(module=VisionModalitySubmodules, params={}, submodules={"encoders": {"clip": encoder}, "input_projections": [projection]})
    return MimoModel(MimoModelConfig(
        language_model_spec=language, modality_submodules_spec={"images": images}, special_token_ids={"images": IMAGE_TOKEN}
    ))


class Samples:
    """Batches of one sample, from their number in the epoch alone."""

    def __init__(self, replica: int, replicas: int) -> None:
        self._replica, self._replicas, self._read = replica, replicas, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        index = self._read * self._replicas + self._replica
        self._read += 1
        generator = torch.Generator().manual_seed(index)
        count = IMAGE_COUNTS[index % len(IMAGE_COUNTS)]
        tokens = torch.randint(1, IMAGE_TOKEN, (1, LENGTH), generator=generator)
        for image in range(count):
            tokens[0, 2 + 6 * image :][:TOKENS_OF_IMAGE] = IMAGE_TOKEN
        pixels = {"images": {"clip": {"x": torch.rand(count, 3, 28, 28, generator=generator)}}} if count else {}
        return {
            "input_ids": tokens, "labels": tokens.roll(-1, 1), "loss_mask": (tokens != IMAGE_TOKEN).float(),
            "position_ids": torch.arange(LENGTH)[None], "modality_inputs": pixels,
        }


def provide_data(samples: Any) -> tuple[Any, Any, Any]:
    if parallel_state.get_tensor_model_parallel_rank():
        return None, None, None
    return Samples(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()), None, None


for module, names in {
    "data.energon_avlm_task_encoder": ["llava_avlm_dataloader_provider"],
    "data.energon_vlm_task_encoder": ["llava_vlm_dataloader_provider"],
    "data.mock": ["train_valid_test_datasets_provider"],
    "model_providers.llava_avlm": ["model_provider_llava_avlm"],
    "model_providers.llava_vlm": ["model_provider_llava_vlm"],
    "model_providers.mock": ["model_provider_mock_vlm_single_encoder"],
}.items():
    stub = types.ModuleType(module)
    vars(stub).update(dict.fromkeys(names, provide_data if module.startswith("data.") else provide_model))
    sys.modules[module] = stub

if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"], "start it with one process a rank"
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec", dont_inherit=True), {"__name__": "__main__", "__file__": str(SCRIPT)})
