"""examples/multimodal/train.py of the checkout on an energon/WebDataset, through its own task encoder and data loader.

Replaced are the sizes of its vision and language models, and its tokenizer, whose vocabulary would come from a hub: words are hashed.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Sequence

import declared_torchvision  # noqa: F401  (before megatron.energon)
import numpy as np
from megatron.core.models.multimodal.llava_model import DEFAULT_IMAGE_TOKEN_INDEX, IGNORE_INDEX, IMAGE_TOKEN
from megatron.training import get_args
from multimodal_small import run


class WordTokenizer:
    """What the example's task encoder and get_batch ask of a tokenizer."""

    pad = 0

    def convert_tokens_to_ids(self, token: str) -> int:
        return DEFAULT_IMAGE_TOKEN_INDEX if token == IMAGE_TOKEN else 1 + zlib.crc32(token.encode()) % (get_args().vocab_size - 1)

    def tokenize_conversation(
        self, conversation: Sequence[dict[str, str]], return_target: bool, add_generation_prompt: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and the same with all but the assistant's turns left out of the loss."""
        tokens, target = [], []
        for turn in conversation:
            ids = [self.convert_tokens_to_ids(word) for word in re.findall(rf"{IMAGE_TOKEN}|\S+", turn["content"])]
            tokens += ids
            target += ids if turn["role"] == "assistant" else [IGNORE_INDEX] * len(ids)
        return np.array(tokens), np.array(target)


sys.modules["megatron.training"].get_tokenizer = WordTokenizer  # type: ignore[attr-defined]

if __name__ == "__main__":
    run()
