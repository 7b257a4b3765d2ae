"""Reading handwritten digits: scikit-learn's 1797 labelled 8x8 scans in packed sequences of images and text.

A microbatch is one packed sequence. It mixes one-image captions (``it is <image> seven``), many-image documents (``<image> two ,
<image> nine , ...``) and text alone (``two plus three is five``), from no image to many; how many is drawn from bounds that change
with the iteration (``image_counts``). Every answer to an image is one word, so that it can be scored. Held-out scans are chosen by a
fixed seed of their own and never trained on, whatever the training's seed.

Batches are a pure function of (seed, iteration): every rank makes the same ones, and a resumed run goes on with the same data.

Letters: N images of a microbatch, S tokens of its packed sequence, D documents in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from megatron.core import tensor_parallel
from numpy.typing import NDArray

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import VisionLanguageModel

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOCABULARY = ("<pad>", "<document>", "<image>", "<end>", *DIGITS, "it", "is", ",", "plus", "comes", "after", "before", "count", "from", ":")
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
SCAN_SIZE = 8
LONGEST_TEXT = 10
"""Tokens of the longest text document; what is left of a sequence is filled with these."""
HELD_OUT_SEED = 20250414
MANY_IMAGES = 6
"""Most images of one document."""


@dataclass(frozen=True, slots=True)
class Document:
    tokens: list[int]
    answers: list[int]
    """Places in ``tokens`` of the words that are trained on: those which what stands before them determines."""


class DataOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The field ``data`` of config.json."""

    held_out: int
    """Scans that are kept for scoring."""
    max_shift: int
    """Training images are moved by up to so many pixels in both directions."""
    image_counts: list[tuple[int, int]]
    """Bounds (both included) of the images in a microbatch; iteration i takes entry i modulo their number."""
    file: str | None = None
    """Own scans instead of scikit-learn's: an .npz with ``images`` [n, 8, 8] from 0 to 16 and ``answers`` [n], one word each."""


class Dataset:
    """Microbatches for training, and for scoring on held-out scans."""

    def __init__(self, model: VisionLanguageModel, data: Mapping[str, Any], seed: int) -> None:
        try:
            self.options = msgspec.convert(dict(data), DataOptions)
        except msgspec.ValidationError as error:
            raise InputError("config.json: data", dict(data), str(error), "mend the field named") from error
        self.model = model
        self.seed = seed
        images, self.answers = _load_scans(self.options.file)
        if not 0 < self.options.held_out < len(images):
            raise InputError(
                "config.json: data.held_out", self.options.held_out, f"not between 1 and {len(images) - 1}, one less than there are scans",
                "keep some scans for training and some for scoring",
            )
        self.images = _upsample(images, model.image.size)
        order = np.random.default_rng(HELD_OUT_SEED).permutation(len(images))
        self.held_out_scans = order[: self.options.held_out]
        self.training_scans = order[self.options.held_out :]
        self._check_fit()

    def _check_fit(self) -> None:
        image = self.model.image
        if image.channels != 1:
            raise InputError("config.json: model.image.channels", image.channels, "the scans are grey", "use 1")
        if image.token_id != TOKEN["<image>"]:
            raise InputError("config.json: model.image.token_id", image.token_id, "is not the image token", f"use {TOKEN['<image>']}")
        vocabulary = self.model.modules.module("lm").vocab_size
        if vocabulary is None or vocabulary < len(VOCABULARY):
            raise InputError(
                "config.json: model.lm.vocab_size", vocabulary, f"smaller than the {len(VOCABULARY)} words used", "use 64"
            )
        if not self.options.image_counts:
            raise InputError("config.json: data.image_counts", [], "no bounds", "give at least one pair such as [0, 12]")
        longest_caption = image.tokens + 5
        for index, (low, high) in enumerate(self.options.image_counts):
            if not 0 <= low <= high:
                raise InputError(f"config.json: data.image_counts[{index}]", [low, high], "not 0 <= low <= high", "give low and high")
            if high * longest_caption > self.model.sequence_length:
                raise InputError(
                    f"config.json: data.image_counts[{index}]", [low, high],
                    f"{high} images take up to {high * longest_caption} of {self.model.sequence_length} tokens",
                    f"use at most {self.model.sequence_length // longest_caption} or a longer sequence",
                )

    def microbatches(self, iteration: int, num_microbatches: int) -> list[dict[str, torch.Tensor]]:
        """The global batch of an iteration (from 0)."""
        random = np.random.default_rng((self.seed, iteration))
        low, high = self.options.image_counts[iteration % len(self.options.image_counts)]
        return [self._microbatch(random, int(random.integers(low, high + 1))) for _ in range(num_microbatches)]

    def held_out(self, multiple: int) -> list[dict[str, torch.Tensor]]:
        """Every held-out scan once, as captions, as many to a sequence as fit; then sequences that ask nothing, up to a multiple."""
        per_sequence = self.model.sequence_length // (self.model.image.tokens + 5)
        packs = [self.held_out_scans[i : i + per_sequence] for i in range(0, len(self.held_out_scans), per_sequence)]
        items = [self._pack([self._caption(int(scan)) for scan in pack], self.images[pack]) for pack in packs]
        return items + [self._pack([], self.images[:0]) for _ in range(-len(items) % multiple)]

    def _microbatch(self, random: np.random.Generator, num_images: int) -> dict[str, torch.Tensor]:
        scans = random.choice(self.training_scans, size=num_images)
        documents: list[Document] = []
        image_order: list[NDArray[np.int64]] = []
        used = 0
        while used < num_images:
            count = 1 if random.random() < 0.5 else min(int(random.integers(2, MANY_IMAGES + 1)), num_images - used)
            chosen = scans[used : used + count]
            documents.append(self._caption(int(chosen[0])) if count == 1 else self._many([int(scan) for scan in chosen]))
            image_order.append(chosen)
            used += count
        left = self.model.sequence_length - sum(len(document.tokens) for document in documents)
        texts: list[Document] = []
        while left >= LONGEST_TEXT:
            texts.append(_text(random))
            left -= len(texts[-1].tokens)
        # Text documents go between the image documents; the images keep the order of their documents.
        for text in texts:
            documents.insert(int(random.integers(len(documents) + 1)), text)
        images = self.images[np.concatenate(image_order)] if image_order else self.images[:0]
        return self._pack(documents, _shift(images, random, self.options.max_shift))

    def _caption(self, scan: int) -> Document:
        image = [TOKEN["<image>"]] * self.model.image.tokens
        tokens = [TOKEN["<document>"], TOKEN["it"], TOKEN["is"], *image, TOKEN[self.answers[scan]], TOKEN["<end>"]]
        return Document(tokens, [len(tokens) - 2])

    def _many(self, scans: Sequence[int]) -> Document:
        tokens = [TOKEN["<document>"]]
        answers = []
        for scan in scans:
            tokens += [TOKEN["<image>"]] * self.model.image.tokens
            answers.append(len(tokens))
            tokens += [TOKEN[self.answers[scan]], TOKEN[","]]
        return Document([*tokens[:-1], TOKEN["<end>"]], answers)

    def _pack(self, documents: Sequence[Document], images: NDArray[np.float32]) -> dict[str, torch.Tensor]:
        """One packed sequence; the padding is a document of its own that carries no loss."""
        padding = self.model.sequence_length - sum(len(document.tokens) for document in documents)
        if padding:
            documents = [*documents, Document([TOKEN["<pad>"]] * padding, [])]
        lengths = [len(document.tokens) for document in documents]
        tokens = np.concatenate([np.asarray(document.tokens, np.int64) for document in documents])
        bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        mask = np.zeros(len(tokens), np.float32)
        for start, document in zip(bounds, documents, strict=False):
            mask[[start + answer - 1 for answer in document.answers]] = 1.0
        labels = np.roll(tokens, -1)
        labels[bounds[1:] - 1] = TOKEN["<pad>"]
        positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
        return {
            "images": torch.from_numpy(np.ascontiguousarray(images[:, None])),
            "tokens": torch.from_numpy(tokens[None]),
            "labels": torch.from_numpy(labels[None]),
            "loss_mask": torch.from_numpy(mask[None]),
            "position_ids": torch.from_numpy(positions[None]),
            "cu_lengths": torch.from_numpy(bounds),
        }


def _load_scans(file: str | None) -> tuple[NDArray[np.float32], list[str]]:
    """Images [n, 8, 8] from 0 to 16 and one word for each."""
    if file is None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError("examples/vlm/digits", "scikit-learn", "is not installed", "pip install 'megatron-dip[examples]'") from error
        scans = load_digits()
        return scans.images.astype(np.float32), [DIGITS[label] for label in scans.target]
    try:
        with np.load(Path(file), allow_pickle=False) as content:
            images, answers = np.asarray(content["images"], np.float32), [str(answer).strip() for answer in content["answers"]]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "--data-file", file, f"cannot be read ({error})", "give an .npz file with the arrays images and answers"
        ) from error
    if images.ndim != 3 or images.shape[1:] != (SCAN_SIZE, SCAN_SIZE):
        raise InputError("--data-file: images", list(images.shape), "is not of shape [n, 8, 8]", "give grey scans of 8x8 pixels")
    if not np.isfinite(images).all() or images.min(initial=0) < 0 or images.max(initial=0) > 16:
        raise InputError("--data-file: images", [float(images.min()), float(images.max())], "values outside [0, 16]", "scale the scans")
    if len(answers) != len(images):
        raise InputError("--data-file: answers", len(answers), f"not one for each of the {len(images)} images", "give one word for each")
    for index, answer in enumerate(answers):
        if not answer:
            raise InputError(f"--data-file: answers[{index}]", answer, "an answer without text", "give each image a word")
        if answer not in DIGITS:
            raise InputError(f"--data-file: answers[{index}]", answer, "is not a word of the vocabulary", f"use one of {', '.join(DIGITS)}")
    return images, answers


def _upsample(scans: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """[n, 8, 8] from 0 to 16 -> [n, size, size] about zero, bilinear with half-pixel centres."""
    at = np.clip((np.arange(size) + 0.5) * SCAN_SIZE / size - 0.5, 0, SCAN_SIZE - 1)
    below = np.minimum(at.astype(np.int64), SCAN_SIZE - 2)
    weights = np.zeros((size, SCAN_SIZE), np.float32)
    weights[np.arange(size), below] = 1 - (at - below)
    weights[np.arange(size), below + 1] = at - below
    return (((weights @ (scans / 16) @ weights.T) - 0.3) / 0.35).astype(np.float32)


def _shift(images: NDArray[np.float32], random: np.random.Generator, most: int) -> NDArray[np.float32]:
    """Moves each image [n, size, size] by up to ``most`` pixels; what comes in at an edge is background."""
    background = -0.3 / 0.35
    padded = np.pad(images, ((0, 0), (most, most), (most, most)), constant_values=background)
    size = images.shape[1]
    offsets = random.integers(0, 2 * most + 1, size=(len(images), 2))
    return np.stack([p[y : y + size, x : x + size] for p, (y, x) in zip(padded, offsets, strict=True)]) if len(images) else images


def _text(random: np.random.Generator) -> Document:
    """A text document of at most LONGEST_TEXT tokens."""
    kind = int(random.integers(3))
    if kind == 0:
        first = int(random.integers(10))
        second = int(random.integers(10 - first))
        question, answers = [DIGITS[first], "plus", DIGITS[second], "is"], [DIGITS[first + second]]
    elif kind == 1:
        first = int(random.integers(9))
        up = bool(random.integers(2))
        question = [DIGITS[first if up else first + 1], "comes", "before" if up else "after"]
        answers = [DIGITS[first + 1 if up else first]]
    else:
        first = int(random.integers(6))
        question, answers = ["count", "from", DIGITS[first], ":"], list(DIGITS[first + 1 : first + 5])
    tokens = [TOKEN["<document>"], *(TOKEN[word] for word in (*question, *answers)), TOKEN["<end>"]]
    return Document(tokens, list(range(1 + len(question), len(tokens) - 1)))


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron's form: sum of the losses (float32 scalar), number of tokens (int32 scalar), and what is logged.

    Args:
        loss_mask: [1, S]
        output: loss of each token, [1, S]
    """
    loss = (output.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int32)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def next_item(data_iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The next microbatch, on the device that Megatron computes on."""
    return {name: value.to(torch.cuda.current_device(), non_blocking=True) for name, value in next(data_iterator).items()}


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron's forward_step: one microbatch through the model."""
    item = next_item(data_iterator)
    output = model(
        images=item["images"], tokens=item["tokens"], position_ids=item["position_ids"], cu_lengths=item["cu_lengths"],
        labels=item["labels"],
    )
    return output, partial(loss_func, item["loss_mask"])


def score_func(labels: torch.Tensor, loss_mask: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Counts the digits that are read right: the word with the largest logit where the answer stands.

    Args:
        labels, loss_mask: [1, S]
        logits: [1, S, V / TP], of this rank's part of the vocabulary
    """
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    asked = loss_mask > 0
    right = (logits.argmax(dim=-1) == labels) & asked
    counts = torch.stack([right.sum().float(), asked.sum().float()])
    return logits.sum() * 0, asked.sum().to(torch.int32), {"answers": counts}


def evaluation_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    """forward_step of the scoring: no labels, so that the model gives logits."""
    item = next_item(data_iterator)
    logits = model(
        images=item["images"], tokens=item["tokens"], position_ids=item["position_ids"], cu_lengths=item["cu_lengths"], labels=None
    )
    return logits, partial(score_func, item["labels"], item["loss_mask"])
