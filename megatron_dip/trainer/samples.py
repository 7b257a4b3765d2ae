"""Samples of a data set as training scripts read them: files by their endings, text, pictures; those that cannot be trained on are counted.

In: a mapping of file endings to bytes with the sample's ``__key__``, as energon gives crude samples. Every error names the key.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.errors import InputError

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif")
MAX_PIXELS = 1 << 26
"""Of a picture as it is stored: larger ones are left out instead of filling the memory."""


class LeftOut:
    """Counts the samples that this process could not train on, and says of each once what is wrong with it.

    Args:
        speaks: False on ranks that read the same samples as one that speaks.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.count, self.speaks = 0, speaks
        self._said: set[str] = set()

    def add(self, error: Exception) -> None:
        self.count += 1
        if not self.speaks or str(error) in self._said:  # in the epoch before
            return
        self._said.add(str(error))
        print(f"left out: {error} ({self.count} so far)", file=sys.stderr, flush=True)

    def unreadable(self, error: Exception, key: str | None = None, *rest: Any) -> None:
        """energon's handler of what fails before a sample is whole."""
        self.add(InputError(f"sample {key}", type(error).__name__, f"cannot be read: {error}", "write it again"))


def file_of_sample(raw: Mapping[str, Any], names: Sequence[str]) -> bytes:
    """The first of a crude sample's files with one of these endings. Raises InputError, with the sample's key, where it has none."""
    for name in names:
        if name in raw:
            return raw[name]
    kinds = sorted(name for name in raw if not name.startswith("__"))
    raise InputError(f"sample {raw.get('__key__')}", kinds, f"has no {' or '.join(names)}", "give every sample such a file")


def text_of_sample(raw: Mapping[str, Any], names: Sequence[str] = ("txt",)) -> str:
    """The words of a sample. Raises InputError where there is no such file, no UTF-8 in it, or nothing but space."""
    key = raw.get("__key__")
    try:
        text = file_of_sample(raw, names).decode().strip()
    except UnicodeDecodeError as error:
        raise InputError(f"sample {key}: txt", str(error), "is no UTF-8 text", "write it again") from error
    if not text:
        raise InputError(f"sample {key}: txt", text, "has no words", "give every sample a caption")
    return text


def picture_names(raw: Mapping[str, Any]) -> list[str]:
    """Endings of the sample's pictures, in their order."""
    return sorted(name for name in raw if name.rpartition(".")[2].lower() in PICTURES)


FIRST_BYTE = 2
"""Token of byte 0 where there is no tokenizer; 1 ends a text."""


def tokenizer_of(args: Any, vocabulary: int) -> Callable[[str], Sequence[int]]:
    """Megatron's tokenizer of --tokenizer-type; the bytes of the text under NullTokenizer."""
    if args.tokenizer_type == "NullTokenizer":
        # Of a tiny vocabulary bytes beyond it are folded back; its last token may stand for an image.
        kinds = min(256, max(1, vocabulary - FIRST_BYTE - 1))
        return lambda text: [FIRST_BYTE + byte % kinds for byte in text.encode()] + [1]
    from megatron.training.global_vars import get_tokenizer

    return get_tokenizer().tokenize


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
