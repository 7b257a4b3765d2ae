"""examples/multimodal/train.py of the checkout on an energon/WebDataset, through its own task encoder and data loader.

Replaced are the sizes of its vision and language models, and its tokenizer, whose vocabulary would come from a hub: words are hashed.

By the environment: FAULT="raises 21" or "killed 21" or "ends 21" lets the loaders of the second replica do so instead of giving that microbatch;
LIES says wrong numbers of tiles by ``dip_metadata``.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import declared_torchvision  # noqa: F401  (before megatron.energon)
import numpy as np
from megatron.core import parallel_state
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

import dataloader_provider  # noqa: E402 (of the script's folder, and asks for the tokenizer)


def faulty(stock: Callable[[Any], Iterator[Any]]) -> Callable[[Any], Iterator[Any]]:
    """The example's endless iterator, with what FAULT says."""

    def cyclic_iter(loader: Any) -> Iterator[Any]:
        fault, _, at = os.environ["FAULT"].partition(" ")
        for number, microbatch in enumerate(stock(loader), start=1):
            if parallel_state.get_data_parallel_rank() == 1 and number == int(at):
                if fault == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "ends":
                    return
                raise OSError(f"microbatch {at} cannot be read")
            yield microbatch

    return cyclic_iter


def lie(item: Any) -> dict[str, list[int]]:
    """Lengths that have nothing to do with the item, other ones on each replica and each time."""
    if not lies:
        lies.append(np.random.default_rng(parallel_state.get_data_parallel_rank()))
    return {"vit": [256] * int(lies[0].integers(5)), "lm": [100 + int(lies[0].integers(3))]}


lies: list[np.random.Generator] = []

if __name__ == "__main__":
    if "FAULT" in os.environ:
        dataloader_provider.cyclic_iter = faulty(dataloader_provider.cyclic_iter)
    run(**({"dip_metadata": lie} if "LIES" in os.environ else {}))
