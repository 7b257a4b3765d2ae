#!/usr/bin/env python3
"""Writes a small energon/WebDataset of synthetic conversations about pictures, to try Megatron-LM's examples/multimodal with.

    python scripts/write_webdataset.py FOLDER --samples 300
    ... examples/multimodal/train.py --data-path FOLDER --dataloader-type external ...

Every sample is a conversation with zero or more PNG pictures of random colours and shapes (wide ones become several tiles under
``--use-tiling``), in the form that the example takes for fine-tuning: shards ``shard_0000.tar`` with ``KEY.json`` and ``KEY.image_0.png``,
and energon's description of them in ``.nv-meta``. Needs megatron-energon and Pillow.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_dip.spec.errors import EXIT_CODE, InputError

DATASET = """\
sample_type:
  __module__: megatron.energon
  __class__: SimilarityInterleavedSample
part_filter: sample_loader.py:part_filter
sample_loader: sample_loader.py:sample_loader
"""

SAMPLE_LOADER = '''\
"""How energon makes a sample of the files that share a key."""


def part_filter(part):
    return True


def sample_loader(raw):
    pictures = sorted(name for name in raw if name.endswith(".png"))
    return {"images": [raw[name] for name in pictures], "texts": raw["json"]}
'''

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 210), "yellow": (220, 200, 40), "grey": (128, 128, 128)}
SIZES = ((64, 64), (128, 64), (64, 128), (192, 64))
"""Width and height of pictures."""


def conversation(colours: Sequence[str]) -> list[dict[str, str]]:
    if not colours:
        return [{"from": "human", "value": "Name a colour ."}, {"from": "gpt", "value": "red is one , blue is another"}]
    tags = " ".join(f"<image-{index + 1}>" for index in range(len(colours)))
    return [{"from": "human", "value": f"{tags} Which colours do you see ?"}, {"from": "gpt", "value": " then ".join(colours)}]


def picture(colour: str, random: np.random.Generator) -> bytes:
    from PIL import Image

    width, height = SIZES[random.integers(len(SIZES))]
    pixels = np.clip(np.array(COLOURS[colour]) + random.normal(0, 25, (height, width, 3)), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return data.getvalue()


def write_shard(path: Path, keys: Sequence[str], max_images: int, random: np.random.Generator) -> None:
    with tarfile.open(path, "w") as shard:
        for key in keys:
            colours = [str(colour) for colour in random.choice(list(COLOURS), random.integers(max_images + 1))]
            files = {"json": json.dumps(conversation(colours)).encode()}
            files |= {f"image_{index}.png": picture(colour, random) for index, colour in enumerate(colours)}
            for name, data in files.items():
                entry = tarfile.TarInfo(f"{key}.{name}")
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))


def write_dataset(folder: Path, *, samples: int, shards: int, max_images: int, seed: int) -> None:
    """Writes shards and their description. Raises InputError for a folder in use, impossible numbers and missing packages."""
    for flag, value, low in (("--samples", samples, 2), ("--shards", shards, 2), ("--max-images", max_images, 0), ("--seed", seed, 0)):
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
    meta = folder / ".nv-meta"
    meta.mkdir(parents=True)
    random = np.random.default_rng(seed)
    names = [f"shard_{shard:04d}.tar" for shard in range(shards)]
    for shard, name in enumerate(names):
        write_shard(folder / name, [f"{key:06d}" for key in range(shard, samples, shards)], max_images, random)
    # One shard in ten, but at least one, is for validation.
    held_out = max(1, shards // 10) / shards
    BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1 - held_out), ("val", held_out)], workers=1)
    (meta / "dataset.yaml").write_text(DATASET)
    (meta / "sample_loader.py").write_text(SAMPLE_LOADER)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--max-images", type=int, default=4, help="pictures in a sample: 0 to this many, at random")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    try:
        write_dataset(options.folder, samples=options.samples, shards=options.shards, max_images=options.max_images, seed=options.seed)
    except InputError as error:
        print(f"write_webdataset.py: error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(f"{options.samples} samples in {options.shards} shards: {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
