"""pretrain_vlm.py of the checkout on mock data with zero to four random images a sample, instead of always one black one.

Only the data is another: model provider and forward_step are the script's own.
"""

from __future__ import annotations

from typing import Any

import pretrain_vlm
import torch
from megatron.core.datasets.gpt_dataset import MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain

IMAGE_COUNTS = (3, 0, 1, 4, 2)
TEXT_LENGTH = 24


class VaryingImages(MockGPTDataset):
    """Samples of equal text and IMAGE_COUNTS[index % 5] images; everything follows from the index."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        text = super().__getitem__(index)
        generator = torch.Generator().manual_seed(index)
        size = (self.config.image_h, self.config.image_w)
        count = IMAGE_COUNTS[index % len(IMAGE_COUNTS)]
        image_tokens = torch.full((count,), pretrain_vlm.DEFAULT_IMAGE_TOKEN_INDEX, dtype=text["tokens"].dtype)
        tokens = torch.cat([image_tokens, text["tokens"][:TEXT_LENGTH]])
        # The stock preprocessing moves labels along with their text: an image token's label is the token behind it.
        labels = torch.cat([tokens[1:], text["labels"][TEXT_LENGTH - 1 : TEXT_LENGTH]])
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": torch.cat([torch.zeros(count), torch.ones(TEXT_LENGTH)]),
            "position_ids": torch.arange(len(tokens)),
            # Megatron broadcasts tensors of one to four dimensions that are not empty: images are stacked, and one pixel means none.
            "image": torch.rand(count * 3, *size, generator=generator) if count else torch.zeros(1, 1, 1),
        }


def get_batch(data_iterator: Any) -> tuple[Any, ...]:
    """The script's, with the images of the one sample in a microbatch as the model takes them: [images, 3, height, width]."""
    batch = list(stock_get_batch(data_iterator))
    height, width = get_args().img_h, get_args().img_w
    batch[3] = batch[3].view(-1, 3, height, width) if batch[3].numel() > 1 else batch[3].new_zeros(0, 3, height, width)
    return tuple(batch)


def model_provider(**arguments: Any) -> torch.nn.Module:
    """The script's, which insists on the old checkpoint format although it does not depend on it."""
    args = get_args()
    given, args.ckpt_format = args.ckpt_format, "torch"
    try:
        return pretrain_vlm.model_provider(**arguments)
    finally:
        args.ckpt_format = given


stock_get_batch = pretrain_vlm.get_batch
pretrain_vlm.get_batch = get_batch
pretrain_vlm.MockMultimodalDataset = VaryingImages

if __name__ == "__main__":
    pretrain_vlm.train_valid_test_datasets_provider.is_distributed = True
    pretrain(
        pretrain_vlm.train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        pretrain_vlm.forward_step,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer"},
        extra_args_provider=pretrain_vlm.add_vlm_extra_args,
        get_embedding_ranks=pretrain_vlm.llava_embedding_ranks,
        get_position_embedding_ranks=pretrain_vlm.llava_position_embedding_ranks,
    )
