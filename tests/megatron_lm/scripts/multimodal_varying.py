"""examples/multimodal/train.py of the checkout on mock data: zero to three images a sample, of one to three tiles each.

The script runs as it is: its forward_step, get_batch and model provider. Replaced are its data loader, which needs Megatron-Energon and a
data set, the sizes of its vision and language models, and a tokenizer's padding token.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX
from megatron.training import get_args, global_vars
from multimodal_small import run

TILES_OF_IMAGES = ((1, 2), (), (3,), (1,), (2, 1, 1))
TEXT_LENGTH = 24
PAD = 0


class Samples:
    """The form of the example's batches, from their number in the epoch alone; one sample in each."""

    def __init__(self, replica: int, replicas: int) -> None:
        self._replica, self._replicas, self._read = replica, replicas, 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        index = self._read * self._replicas + self._replica
        self._read += 1
        generator = torch.Generator().manual_seed(index)
        tiles = TILES_OF_IMAGES[index % len(TILES_OF_IMAGES)]
        tokens = torch.randint(1, get_args().vocab_size, (1, TEXT_LENGTH), generator=generator)
        for image in range(len(tiles)):
            tokens[0, 2 + 5 * image] = DEFAULT_IMAGE_TOKEN_INDEX
        return {
            "tokens": tokens,
            "labels": torch.cat([tokens, tokens[:, -1:]], dim=1).clamp(min=PAD),
            # A text alone comes with an image, a count and lengths of one element each.
            "imgs": torch.rand(sum(tiles), 3, get_args().img_h, get_args().img_w, generator=generator) if tiles else torch.zeros(1, 1),
            "num_tiles": torch.tensor(tiles or [0], dtype=torch.int32),
            "cu_lengths": torch.zeros(1, 1, dtype=torch.int32),
            "max_lengths": torch.zeros(1, 1, dtype=torch.int32),
        }

    def save_state(self) -> int:
        return self._read


def is_first_or_last_stage(pp_size: int) -> bool:
    return parallel_state.get_pipeline_model_parallel_rank() in (0, pp_size - 1)


def train_valid_test_dataloaders_provider(samples: Any) -> tuple[Any, Any, Any]:
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    if not reads or not is_first_or_last_stage(parallel_state.get_pipeline_model_parallel_world_size()):
        return None, None, None
    return Samples(parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()), None, None


loader = types.ModuleType("dataloader_provider")
vars(loader).update(train_valid_test_dataloaders_provider=train_valid_test_dataloaders_provider, is_first_or_last_stage=is_first_or_last_stage)
sys.modules["dataloader_provider"] = loader


def get_tokenizer() -> Any:
    tokenizer = stock_get_tokenizer()
    type(tokenizer).pad = PAD
    return tokenizer


stock_get_tokenizer = global_vars.get_tokenizer
sys.modules["megatron.training"].get_tokenizer = get_tokenizer  # type: ignore[attr-defined]

if __name__ == "__main__":
    run()
