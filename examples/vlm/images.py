"""Microbatches of a vision-language model: packed documents of text and images, of samples' files or made on the fly by a setup's statistics.

Letters: S tokens of the packed sequence, N images, D documents.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import VisionLanguageModel
from megatron_dip.trainer.samples import picture_names, read_pixels, text_of_sample
from megatron_dip.workloads.generators import IMAGE_TEXT_SETS, draw_document
from megatron_dip.workloads.image_patches import fit_size, patchify, token_positions
from megatron_dip.workloads.samples import draw_image_size

IGNORED = 0
"""Label where no loss is taken."""


@dataclass(slots=True)
class Document:
    tokens: list[int]
    """With the image token in every place that an image fills."""
    images: list[NDArray[np.float32]] = field(default_factory=list)
    """[C, height, width] each, or where the model takes any size the patches of each [V, values]."""
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    """Patches along time, height and width of each, where the model takes any size."""


def pack(model: VisionLanguageModel, documents: Sequence[Document]) -> dict[str, torch.Tensor]:
    """One packed sequence, filled with padding, which is a document of its own without a loss. The loss is that of all text tokens."""
    image, tower = model.image, model.tower
    parts = [document.tokens for document in documents]
    missing = model.sequence_length - sum(map(len, parts))
    assert missing >= 0, "documents are packed up to the model's sequence length"
    lengths = [len(part) for part in parts] + ([missing] if missing else [])
    tokens = np.array([token for part in parts for token in part] + [0] * missing, np.int64)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    is_image = tokens == image.token_id
    labels, mask = np.roll(tokens, -1), np.ones(len(tokens), np.float32)
    mask[bounds[1:] - 1] = 0.0  # what follows is another document
    mask[np.roll(is_image, -1)] = 0.0
    if missing:
        mask[-missing:] = 0.0
    labels[mask == 0] = IGNORED
    images = [one for document in documents for one in document.images]
    grids = [grid for document in documents for grid in document.grids]
    item = {"tokens": tokens[None], "labels": labels[None], "loss_mask": mask[None], "cu_lengths": bounds.astype(np.int32)}
    if tower is None:
        shape = (0, image.channels, image.size, image.size)
        item["images"] = np.stack(images) if images else np.zeros(shape, np.float32)
        item["position_ids"] = np.concatenate([np.arange(length) for length in lengths])[None]
    else:
        values = image.channels * tower.frames_per_patch * image.patch**2
        item["images"] = np.concatenate(images) if images else np.zeros((0, values), np.float32)
        item["image_grid_thw"] = np.array(grids, np.int64).reshape(-1, 3)
        if model.language_layers.mrope_section is not None:
            item["position_ids"] = token_positions(is_image, grids, bounds.tolist(), image.merge)[:, None]
        else:
            item["position_ids"] = np.concatenate([np.arange(length) for length in lengths])[None]
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in item.items()}


def document_of_sample(raw: Mapping[str, Any], model: VisionLanguageModel, tokenize: Callable[[str], Sequence[int]], mark: str) -> Document:
    """A document of a sample's files. Raises InputError, with the sample's key, for one that cannot be trained on.

    Args:
        raw: ``txt`` and pictures (energon_images.py), by their endings, and ``__key__``.
        mark: what stands for an image in the text.
    """
    key, text, names = raw.get("__key__"), text_of_sample(raw), picture_names(raw)
    parts = text.split(mark)
    if len(parts) == 1:
        parts = [""] * len(names) + parts
    if len(parts) - 1 != len(names):
        raise InputError(f"sample {key}: txt", len(parts) - 1, f"marks stand in the text of {len(names)} images", "give each image its mark")
    if not "".join(parts).strip():
        raise InputError(f"sample {key}: txt", text, "has no words", "give every sample a caption")
    image, document = model.image, Document([])
    vocabulary = model.modules.module("lm").vocab_size or 0
    for index, part in enumerate(parts):
        if index:
            count = _add_image(model, document, raw[names[index - 1]], f"sample {key}: {names[index - 1]}")
            document.tokens += [image.token_id] * count
        words = list(tokenize(part)) if part.strip() else []
        if any(not 0 <= token < vocabulary or token == image.token_id for token in words):
            raise InputError(f"sample {key}: txt", max(words), f"is no token of the model's {vocabulary}, or its image token", "use the model's tokenizer")
        document.tokens += words
    if len(document.tokens) > model.sequence_length:
        raise InputError(
            f"sample {key}", len(document.tokens), f"has more tokens than a sequence, {model.sequence_length}", "divide it or shrink its images"
        )
    return document


def _add_image(model: VisionLanguageModel, document: Document, data: bytes, where: str) -> int:
    """Adds an image to a document; gives the number of its tokens."""
    image, tower = model.image, model.tower
    if tower is None:
        document.images.append(read_pixels(data, where, lambda width, height: (image.size, image.size), image.channels))
        return image.tokens

    def size(width: int, height: int) -> tuple[int, int]:
        rows, columns = fit_size(width, height, image)
        return columns * image.patch, rows * image.patch

    patches, grid = patchify(read_pixels(data, where, size, image.channels)[None], image, tower)
    document.images.append(patches)
    document.grids.append(grid)
    return len(patches) // image.merge**2


_SETS = {"LAION-2B": 0.1, "OBELICS": 0.45, "MMC4": 0.25, "ScienceQA": 0.1, "text": 0.35}


def draw_microbatch(model: VisionLanguageModel, seed: int, number: int) -> dict[str, torch.Tensor]:
    """Documents with the statistics of public data sets, of random words and pixels; all of it follows from (seed, number).

    Of a microbatch most documents are of one data set. Text is shortened in the ratio of the model's sequence to the paper's 8192 tokens.
    """
    random = np.random.default_rng((seed, number))
    names = list(_SETS)
    mix = random.dirichlet(list(_SETS.values()))
    documents: list[Document] = []
    left = model.sequence_length
    while True:
        source = draw_document(random, IMAGE_TEXT_SETS[names[int(random.choice(len(names), p=mix))]])
        words = max(1, source.text_tokens * model.sequence_length // 8192)
        document = _random_document(model, random, source.num_images, words, left)
        if document is None:
            return pack(model, documents)
        documents.append(document)
        left -= len(document.tokens)


def _random_document(model: VisionLanguageModel, random: np.random.Generator, num_images: int, words: int, left: int) -> Document | None:
    """None: it would be longer than ``left`` tokens."""
    image, tower = model.image, model.tower
    vocabulary = model.modules.module("lm").vocab_size
    assert vocabulary is not None
    grids = []
    for _ in range(num_images):
        if tower is None:
            grids.append((1, image.size // image.patch, image.size // image.patch))
        else:
            width, height = draw_image_size(random)
            grids.append((1, *fit_size(width, height, image)))
    counts = [rows * columns // image.merge**2 for _, rows, columns in grids]
    if words + sum(counts) > left:
        return None
    text = random.integers(1, vocabulary, words)
    text[text == image.token_id] = 1
    tokens: list[int] = []
    ends = np.linspace(0, words, num_images + 1).astype(int)
    for index, count in enumerate(counts):
        tokens += [image.token_id] * count + text[ends[index] : ends[index + 1]].tolist()
    if not counts:
        tokens = text.tolist()
    values = 0 if tower is None else image.channels * tower.frames_per_patch * image.patch**2
    shapes = [(image.channels, image.size, image.size) if tower is None else (rows * columns, values) for _, rows, columns in grids]
    pixels = [_noise(random, shape) for shape in shapes]
    return Document(tokens, pixels, [] if tower is None else grids)


@functools.cache
def _pool() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)


def _noise(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Random values: a stretch of one pool, from a drawn place. Drawing 48 large images anew for each microbatch takes a second."""
    pool, count = _pool(), math.prod(shape)
    start = int(random.integers(max(1, len(pool) - count)))
    return pool[start : start + count].reshape(shape) if count <= len(pool) else np.resize(pool, shape)
