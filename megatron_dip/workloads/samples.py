"""Training samples of a user's data set as lengths, and their packing into microbatches.

In: a JSONL file, one sample a line, ``{"text": tokens, "images": [[width, height], ...]}`` (``text`` in tokens of the language model without those of
images, sizes in pixels; either may be absent), or samples drawn with the statistics of public data sets. Out: microbatches of one packed sequence of the
language model each, samples in their order, as Megatron's packed data sets make them.

Assumed where samples are drawn: the log-normal sizes of images (median 640 x 480, sigma 0.5 of each side); the rest as in ``workloads/generators.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from megatron_dip.spec.codec import STANDARD_INPUT, read_whole
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Microbatch
from megatron_dip.workloads.generators import IMAGE_TEXT_SETS, draw_document
from megatron_dip.workloads.huggingface import ImageRule

_MAX_TEXT = 10**7
_MEDIAN_WIDTH, _MEDIAN_HEIGHT, _SIDE_SIGMA = 640, 480, 0.5
STATISTICS = ("mixed", *IMAGE_TEXT_SETS)
"""What :func:`draw_samples` knows: one data set, or documents of all of them."""


class Sample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One document."""

    text: int = 0
    """Tokens, without those of images."""
    images: list[list[int]] = []
    """Width and height in pixels of each image."""


def read_samples(path: Path, field: str) -> list[Sample]:
    """A JSONL file's samples. Raises InputError that names the line."""
    try:
        lines = (sys.stdin.buffer.read() if str(path) == STANDARD_INPUT else read_whole(path)).splitlines()
    except OSError as error:
        raise InputError(field, str(path), f"cannot be read ({error.strerror})", "name a JSONL file of samples") from error
    samples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{field}, line {number}"
        try:
            sample = msgspec.json.decode(line, type=Sample)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(where, line[:80].decode(errors="replace"), f"is no sample ({error})",
                             'write {"text": 120, "images": [[640, 480]]}') from error
        if not 0 <= sample.text <= _MAX_TEXT:
            raise InputError(f"{where}: text", sample.text, f"outside 0 to {_MAX_TEXT}", "give the number of text tokens")
        for size in sample.images:
            if len(size) != 2 or not all(1 <= side <= 100_000 for side in size):
                raise InputError(f"{where}: images", size, "is no width and height in pixels", "write [width, height], each 1 to 100000")
        if not sample.text and not sample.images:
            raise InputError(where, line[:80].decode(errors="replace"), "neither text nor images", "leave the line out")
        samples.append(sample)
    if not samples:
        raise InputError(field, str(path), "holds no samples", "give one JSON object a line")
    return samples


def draw_samples(statistics: str, seed: int) -> Iterator[Sample]:
    """Endless documents with the statistics of a public data set, or of all of them in turns of one microbatch's size."""
    if statistics not in STATISTICS:
        raise InputError("--data", statistics, "neither a file nor statistics that are known", f"use one of {', '.join(STATISTICS)}, or a JSONL file")
    rng = np.random.default_rng(seed)
    names = list(IMAGE_TEXT_SETS) if statistics == "mixed" else [statistics]
    while True:
        document = draw_document(rng, IMAGE_TEXT_SETS[names[int(rng.integers(len(names)))]])
        yield Sample(text=document.text_tokens, images=[draw_image_size(rng) for _ in range(document.num_images)])


def draw_image_size(rng: np.random.Generator) -> list[int]:
    """Width and height in pixels."""
    width, height = np.exp(rng.normal(0.0, _SIDE_SIGMA, 2)) * (_MEDIAN_WIDTH, _MEDIAN_HEIGHT)
    return [max(28, round(width)), max(28, round(height))]


def pack_samples(samples: Iterable[Sample], rule: ImageRule | None, sequence_length: int, count: int) -> list[Microbatch]:
    """``count`` microbatches, fewer where the samples end before. A sample that is longer than a sequence gets one of its own, cut off.

    Args:
        rule: how the model reads images; None: it takes none, and theirs are left out.
        sequence_length: tokens of the language model in a microbatch at most.
    """
    microbatches: list[Microbatch] = []
    vision: list[int] = []
    tokens = 0
    for sample in samples:
        own_vision, own_tokens = _lengths(sample, rule, sequence_length)
        if not own_tokens:
            continue
        if tokens and tokens + own_tokens > sequence_length:
            microbatches.append(_microbatch(vision, tokens))
            if len(microbatches) == count:
                return microbatches
            vision, tokens = [], 0
        vision, tokens = vision + own_vision, tokens + own_tokens
    if tokens:
        microbatches.append(_microbatch(vision, tokens))
    return microbatches


def _lengths(sample: Sample, rule: ImageRule | None, limit: int) -> tuple[list[int], int]:
    """Vision instances and language tokens of a sample, images dropped from its end where it would be longer than ``limit``."""
    vision: list[int] = []
    tokens = 0
    for width, height in sample.images if rule is not None else ():
        assert rule is not None
        image = rule.lengths(width, height)
        if tokens + image.text > limit:
            break
        vision += image.vision
        tokens += image.text
    return vision, min(limit, tokens + sample.text)


def _microbatch(vision: Sequence[int], tokens: int) -> Microbatch:
    return {"vit": list(vision), "lm": [tokens]} if vision else {"lm": [tokens]}
