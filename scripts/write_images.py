#!/usr/bin/env python3
"""Writes a small energon/WebDataset of real images with text, to try examples/vlm/train.py with.

    python scripts/write_images.py FOLDER --samples 300
    ... examples/vlm/train.py --data-path FOLDER ...

The images are the photographs that scikit-image and scikit-learn bring along, and scikit-learn's scans of digits: parts of any size and
aspect, cut out at random, with a caption of what they show. A sample is a document of zero to four images: ``KEY.txt`` with ``<image>`` where
one stands, and ``KEY.0.jpg``, ``KEY.1.png``, ... Its shards are of energon's class CrudeWebdataset. ``--damaged N`` spoils N samples (an image
cut off, a caption missing), to see what a loader says. Needs megatron-energon, Pillow, scikit-image and scikit-learn; no network.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.errors import EXIT_CODE, InputError

DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
PHOTOGRAPHS = {
    "astronaut": "an astronaut in an orange suit", "chelsea": "a cat with green eyes", "coffee": "a cup of coffee", "rocket": "a rocket at its start",
    "camera": "a man with a camera", "coins": "old coins", "moon": "the surface of the moon", "page": "a printed page", "brick": "a brick wall",
    "grass": "grass", "gravel": "gravel", "hubble_deep_field": "galaxies far away", "retina": "the back of an eye", "text": "handwritten letters",
}
"""Of scikit-image, by its name for them."""
SAMPLE_IMAGES = {"china.jpg": "a temple in China", "flower.jpg": "a red flower"}
"""Of scikit-learn."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Pixels = NDArray[np.uint8]


def read_pictures() -> list[tuple[Pixels, str]]:
    """Images [height, width, 3] and what they show. Raises InputError where a package is missing."""
    try:
        from skimage import data
        from sklearn.datasets import load_digits, load_sample_image
    except ImportError as error:
        raise InputError("FOLDER", "photographs", f"come with packages that are missing: {error}", "pip install scikit-image scikit-learn") from error
    found = [(_coloured(getattr(data, name)()), caption) for name, caption in PHOTOGRAPHS.items()]
    found += [(_coloured(load_sample_image(name)), caption) for name, caption in SAMPLE_IMAGES.items()]
    scans = load_digits()
    for scan, label in zip(scans.images[:100], scans.target[:100], strict=True):
        found.append((_coloured((scan * 15.9).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)), f"the digit {DIGITS[label]}"))
    return found


def _coloured(image: NDArray[np.uint8]) -> Pixels:
    return image[..., :3] if image.ndim == 3 else np.stack([image] * 3, axis=-1)


def cut_out(picture: Pixels, max_side: int, random: np.random.Generator) -> Pixels:
    """A part of any aspect, shrunk to sides of at most ``max_side``."""
    from PIL import Image

    height, width = (max(8, int(side * share)) for side, share in zip(picture.shape[:2], random.uniform(0.4, 1.0, 2), strict=True))
    top, left = int(random.integers(picture.shape[0] - height + 1)), int(random.integers(picture.shape[1] - width + 1))
    part = picture[top : top + height, left : left + width]
    longest = int(random.integers(max(8, max_side // 4), max_side + 1))
    scale = longest / max(height, width)
    return np.asarray(Image.fromarray(part).resize((max(1, round(width * scale)), max(1, round(height * scale)))))


def encoded(pixels: Pixels, kind: str) -> bytes:
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="JPEG" if kind == "jpg" else "PNG")
    return data.getvalue()


def make_sample(pictures: Sequence[tuple[Pixels, str]], max_images: int, max_side: int, random: np.random.Generator) -> dict[str, bytes]:
    """Ending of a file -> its content."""
    chosen = [pictures[int(index)] for index in random.integers(len(pictures), size=int(random.integers(max_images + 1)))]
    if not chosen:
        return {"txt": f"The digit after {DIGITS[5]} is {DIGITS[6]} .".encode()}
    files = {"txt": " ".join(f"<image> This is {caption} ." for _, caption in chosen).encode()}
    for index, (picture, _) in enumerate(chosen):
        kind = ("jpg", "png")[int(random.integers(2))]
        files[f"{index}.{kind}"] = encoded(cut_out(picture, max_side, random), kind)
    return files


def damage(files: dict[str, bytes], number: int) -> dict[str, bytes]:
    """A sample as it should not be: its caption is missing, or an image ends early."""
    images = [name for name in files if name != "txt"]
    if number % 2 or not images:
        return {name: data for name, data in files.items() if name != "txt"} or {"json": b"{}"}
    return {**files, images[0]: files[images[0]][: len(files[images[0]]) // 3]}


def write_dataset(folder: Path, *, samples: int, shards: int, max_images: int, max_side: int, damaged: int, seed: int) -> None:
    """Writes shards and their description. Raises InputError for a folder in use, impossible numbers and missing packages."""
    limits = (("--samples", samples, 2), ("--shards", shards, 2), ("--max-images", max_images, 0), ("--max-side", max_side, 8),
              ("--damaged", damaged, 0), ("--seed", seed, 0))
    for flag, value, low in limits:
        if value < low:
            raise InputError(flag, value, f"must be at least {low}", f"give {low} or more")
    if samples < shards:
        raise InputError("--shards", shards, f"is more than the {samples} samples", "give fewer shards")
    try:
        import PIL  # noqa: F401
        from megatron.energon.flavors import BaseWebdatasetFactory
    except ImportError as error:
        raise InputError("FOLDER", str(folder), f"the data set needs a package that is missing: {error}", "pip install megatron-energon Pillow") from error
    if folder.exists() and any(folder.iterdir()):
        raise InputError("FOLDER", str(folder), "is not empty", "name a new folder")
    pictures = read_pictures()
    (folder / ".nv-meta").mkdir(parents=True)
    random = np.random.default_rng(seed)
    spoiled = {int(index): number for number, index in enumerate(random.choice(samples, min(damaged, samples), replace=False))}
    names = [f"shard_{shard:04d}.tar" for shard in range(shards)]
    for shard, name in enumerate(names):
        with tarfile.open(folder / name, "w") as archive:
            for number in range(shard, samples, shards):
                files = make_sample(pictures, max_images, max_side, random)
                if number in spoiled:
                    files = damage(files, spoiled[number])
                for ending, data in files.items():
                    entry = tarfile.TarInfo(f"{number:06d}.{ending}")
                    entry.size = len(data)
                    archive.addfile(entry, io.BytesIO(data))
    # One shard in ten, but at least one, is for validation.
    held_out = max(1, shards // 10) / shards
    BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1 - held_out), ("val", held_out)], workers=1)
    (folder / ".nv-meta/dataset.yaml").write_text(DATASET)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--max-images", type=int, default=4, help="images in a sample: 0 to this many, at random")
    parser.add_argument("--max-side", type=int, default=64, help="longest side of an image in pixels")
    parser.add_argument("--damaged", type=int, default=0, help="samples that are spoiled")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    try:
        write_dataset(
            options.folder, samples=options.samples, shards=options.shards, max_images=options.max_images, max_side=options.max_side,
            damaged=options.damaged, seed=options.seed,
        )
    except InputError as error:
        print(f"write_images.py: error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(f"{options.samples} samples in {options.shards} shards: {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
