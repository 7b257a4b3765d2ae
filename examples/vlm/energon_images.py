"""Documents of an energon WebDataset, of images of any format and text, packed into microbatches.

A sample is a document, of a WebDataset of class CrudeWebdataset:

    KEY.txt                               text, UTF-8, with <image> where an image stands (all before the text, where it has no mark)
    KEY.jpg, KEY.png, or KEY.0.jpg, ...   its images, in the order of their names; none in a document of text alone

A sample that cannot be trained on (no text, an image that cannot be read or has more pixels than any model takes, more marks than images,
a document longer than a sequence) is left out, with one message that names its key; all are counted.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from images import Document, pack
from megatron.energon import Cooker, SkipSample, TaskEncoder, basic_sample_keys, stateless
from megatron.energon.flavors.base_dataset import Sample
from numpy.typing import NDArray

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import VisionLanguageModel
from megatron_dip.trainer.pretraining import LeftOut, file_of_sample
from megatron_dip.workloads.image_patches import fit_size, patchify

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
MAX_PIXELS = 1 << 26
"""Of an image as it is stored: larger ones are left out instead of filling the memory."""
FIRST_BYTE = 2
"""Token of byte 0 where there is no tokenizer; 1 ends a document."""


def tokenizer_of(args: Any, model: VisionLanguageModel) -> Callable[[str], Sequence[int]]:
    """Megatron's tokenizer of --tokenizer-type; the bytes of the text under NullTokenizer."""
    if args.tokenizer_type == "NullTokenizer":
        vocabulary = model.modules.module("lm").vocab_size or 0
        if vocabulary < 256 + FIRST_BYTE + 1:
            # Only letters and digits of a tiny vocabulary: what is beyond is folded back.
            return lambda text: [FIRST_BYTE + byte % max(1, vocabulary - FIRST_BYTE - 1) for byte in text.encode()] + [1]
        return lambda text: [FIRST_BYTE + byte for byte in text.encode()] + [1]
    from megatron.training.global_vars import get_tokenizer

    return get_tokenizer().tokenize


@dataclass
class DocumentSample(Sample):
    document: Document


class DocumentEncoder(TaskEncoder):
    """Makes microbatches of samples."""

    def __init__(self, model: VisionLanguageModel, tokenize: Callable[[str], Sequence[int]], mark: str, left_out: LeftOut) -> None:
        super().__init__()
        self.model, self.tokenize, self.mark, self.left_out = model, tokenize, mark, left_out
        self.cookers = [Cooker(self._cook)]

    def _cook(self, raw: dict[str, Any]) -> DocumentSample:
        key = str(raw.get("__key__"))
        try:
            return DocumentSample(**basic_sample_keys(raw), document=self._document(raw, key))
        except InputError as error:
            self.left_out.add(error)
            raise SkipSample from error

    def _document(self, raw: dict[str, Any], key: str) -> Document:
        try:
            text = file_of_sample(raw, ("txt",)).decode().strip()
        except UnicodeDecodeError as error:
            raise InputError(f"sample {key}: txt", str(error), "is no UTF-8 text", "write it again") from error
        names = sorted(name for name in raw if name.rpartition(".")[2].lower() in PICTURES)
        parts = text.split(self.mark)
        if len(parts) == 1:
            parts = [""] * len(names) + parts
        if len(parts) - 1 != len(names):
            raise InputError(f"sample {key}: txt", len(parts) - 1, f"marks stand in the text of {len(names)} images", "give each image its mark")
        if not "".join(parts).strip():
            raise InputError(f"sample {key}: txt", text, "has no words", "give every sample a caption")
        image, document = self.model.image, Document([])
        vocabulary = self.model.modules.module("lm").vocab_size or 0
        for index, part in enumerate(parts):
            if index:
                count = self._add_image(document, raw[names[index - 1]], f"sample {key}: {names[index - 1]}")
                document.tokens += [image.token_id] * count
            words = list(self.tokenize(part)) if part.strip() else []
            if any(not 0 <= token < vocabulary or token == image.token_id for token in words):
                raise InputError(f"sample {key}: txt", max(words), f"is no token of the model's {vocabulary}, or its image token", "use the model's tokenizer")
            document.tokens += words
        if len(document.tokens) > self.model.sequence_length:
            raise InputError(
                f"sample {key}", len(document.tokens), f"has more tokens than a sequence, {self.model.sequence_length}", "divide it or shrink its images"
            )
        return document

    def _add_image(self, document: Document, data: bytes, where: str) -> int:
        """Adds an image to a document; gives the number of its tokens."""
        image, tower = self.model.image, self.model.tower
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

    def select_samples_to_pack(self, samples: list[DocumentSample]) -> list[list[DocumentSample]]:
        """Consecutive documents, as many as fit into a sequence."""
        packs: list[list[DocumentSample]] = []
        left = 0
        for sample in samples:
            length = len(sample.document.tokens)
            if not packs or length > left:
                packs.append([])
                left = self.model.sequence_length
            packs[-1].append(sample)
            left -= length
        return packs

    @stateless
    def pack_selected_samples(self, samples: list[DocumentSample]) -> dict[str, Any]:
        item: dict[str, torch.Tensor] = pack(self.model, [sample.document for sample in samples])
        return {"__key__": ",".join(sample.__key__ for sample in samples), "__restore_key__": (), **item}


def read_pixels(data: bytes, where: str, size: Callable[[int, int], tuple[int, int]], channels: int) -> NDArray[np.float32]:
    """An image [C, height, width] about zero. Raises InputError for one that cannot be read or is too large.

    Args:
        size: width and height of the image as stored -> as it is wanted.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise InputError(where, [picture.width, picture.height], f"has more than {MAX_PIXELS} pixels", "store it smaller")
            wanted = size(picture.width, picture.height)
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB").resize(wanted, Image.Resampling.BICUBIC), np.float32)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(where, f"{len(data)} bytes", f"is no image that can be read ({error})", "write it again") from error
    return np.atleast_3d(pixels).transpose(2, 0, 1) / 127.5 - 1.0
