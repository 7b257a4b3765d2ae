"""Reads a data set's samples into lengths: one JSON line a sample, for megatron-dip estimate --data.

DATASET is a WebDataset (a .tar file, or a folder of them, as energon has it) or a JSONL file whose lines hold "text" and paths of "images". Of images only
the size is read. Text is counted in tokens by --characters-per-token, unless a sample says "tokens". Samples that cannot be read are skipped, counted,
and the first of them is named.
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec

from megatron_dip.cli.output import print_json
from megatron_dip.spec.codec import STANDARD_INPUT, check_outputs, read_whole, write_atomically
from megatron_dip.spec.errors import InputError
from megatron_dip.workloads.samples import Sample

SUMMARY = "read a data set's samples into lengths"

_IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp"})
_TEXTS = frozenset({"txt", "caption", "text"})
_TEXT_KEYS = ("text", "caption", "texts", "conversations", "content", "value", "question", "answer")


@dataclass(slots=True)
class _Found:
    """A sample while its parts are read."""

    text: int = 0
    images: list[list[int]] = field(default_factory=list)
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, metavar="DATASET", help="a .tar file, a folder of them, or a JSONL file")
    parser.add_argument("--characters-per-token", type=float, default=4.0, metavar="X", help="of the text (default 4.0, English under current tokenizers)")
    parser.add_argument("--limit", type=int, metavar="N", help="read no more than N samples")
    parser.add_argument("--output", type=Path, metavar="FILE", help="file to write (default: standard output)")
    parser.add_argument("--json", action="store_true", help="with --output: print what was read as one JSON object")


def run(args: argparse.Namespace) -> int:
    if not 0.1 <= args.characters_per_token <= 1000:
        raise InputError("--characters-per-token", args.characters_per_token, "outside 0.1 to 1000", "give the mean number, some 4 for English")
    if args.limit is not None and args.limit < 1:
        raise InputError("--limit", args.limit, "must be at least 1", "give a positive whole number")
    if args.json and args.output is None:
        raise InputError("--json", True, "given without --output, whose lines take standard output", "name a file with --output")
    check_outputs({"--output": args.output}, [args.dataset])
    if args.dataset.suffix == ".jsonl" or str(args.dataset) == STANDARD_INPUT:
        samples = _read_jsonl(args.dataset, args.characters_per_token)
    else:
        samples = _read_shards(_shards(args.dataset), args.characters_per_token)
    lines: list[bytes] = []
    tokens, images = 0, 0
    skipped, first = 0, ""
    for key, found in itertools.islice(samples, args.limit):
        if found.problem or not (found.text or found.images):
            skipped, first = skipped + 1, first or f"{key}: {found.problem or 'neither text nor images'}"
            continue
        tokens, images = tokens + found.text, images + len(found.images)
        lines.append(msgspec.json.encode(Sample(text=found.text, images=found.images)))
    if not lines:
        raise InputError("DATASET", str(args.dataset), f"no sample can be read{f' ({first})' if first else ''}", "give a data set with text or images")
    data = b"\n".join(lines) + b"\n"
    if args.output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        write_atomically(args.output, data)
    if args.json:
        print_json({"output": str(args.output), "samples": len(lines), "text_tokens": tokens, "images": images, "skipped": skipped, "first_skipped": first or None})
        return 0
    print(f"{len(lines)} samples" + (f", {skipped} skipped, the first: {first}" if skipped else ""), file=sys.stderr)
    return 0


_MOST_TOKENS = 1 << 40


def _shards(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.rglob("*.tar"))
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise InputError("DATASET", str(path), "is no .tar or .jsonl file and no folder with .tar files", "name a WebDataset or a JSONL file")
    return found


def _read_shards(shards: list[Path], characters: float) -> Iterator[tuple[str, _Found]]:
    """Samples by key: files of one name up to its first dot stand together."""
    for shard in shards:
        try:
            with tarfile.open(shard) as archive:
                members = (member for member in archive if member.isfile())
                for key, parts in itertools.groupby(members, lambda member: _key(member.name)):
                    found = _Found()
                    for part in parts:
                        stream = archive.extractfile(part)
                        assert stream is not None, "regular files have a stream"
                        _add_part(found, part.name, stream, characters)
                    yield f"{shard.name}/{key}", found
        except (tarfile.TarError, OSError) as error:
            raise InputError("DATASET", str(shard), f"cannot be read as a tar file ({error})", "give whole .tar files") from error


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    stem = file.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def _add_part(found: _Found, name: str, stream: IO[bytes], characters: float) -> None:
    ending = name.rsplit(".", 1)[-1].lower()
    if ending in _IMAGES:
        _add_image(found, stream)
    elif ending in _TEXTS:
        found.text += _tokens(stream.read().decode(errors="replace"), characters)
    elif ending == "json":
        try:
            _add_document(found, msgspec.json.decode(stream.read()), characters)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            found.problem = f"its JSON cannot be read ({error})"


def _add_document(found: _Found, document: object, characters: float) -> None:
    if isinstance(document, dict) and type(document.get("tokens")) is int:
        if 0 <= document["tokens"] <= _MOST_TOKENS:
            found.text += document["tokens"]
        else:
            found.problem = f"{document['tokens']} is no number of tokens"
        return
    found.text += sum(_tokens(text, characters) for text in _texts(document))


def _texts(value: object) -> Iterator[str]:
    """The texts of a sample's JSON: of its known keys, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)
    elif isinstance(value, dict):
        for key in _TEXT_KEYS:
            if key in value:
                yield from _texts(value[key])


def _tokens(text: str, characters: float) -> int:
    return max(1, round(len(text) / characters)) if text else 0


def _add_image(found: _Found, stream: IO[bytes]) -> None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(stream.read())) as image:
            found.images.append([image.width, image.height])
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        found.problem = f"an image cannot be read ({error})"


def _read_jsonl(path: Path, characters: float) -> Iterator[tuple[str, _Found]]:
    try:
        lines = (sys.stdin.buffer.read() if str(path) == STANDARD_INPUT else read_whole(path)).splitlines()
    except OSError as error:
        raise InputError("DATASET", str(path), f"cannot be read ({error.strerror})", "name a JSONL file") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = _Found()
        try:
            document = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            found.problem = f"is no JSON ({error})"
        else:
            _add_document(found, document, characters)
            images = document.get("images", []) if isinstance(document, dict) else []
            for name in images if isinstance(images, list) else []:
                try:
                    with (path.parent / str(name)).open("rb") as stream:
                        _add_image(found, stream)
                except (OSError, ValueError) as error:  # ValueError: a name that no file can have
                    found.problem = f"{name} cannot be read ({error})"
        yield f"line {number}", found
