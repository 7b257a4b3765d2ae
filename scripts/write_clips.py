#!/usr/bin/env python3
"""Writes a small energon/WebDataset of clips with captions, to try examples/t2v/train.py with.

    python scripts/write_clips.py FOLDER --samples 300
    ... examples/t2v/train.py --data-path FOLDER ...

The clips are those of examples/t2v/digits: scikit-learn's scans of digits that move, grow, shrink or turn into others, in 2 to 16 frames of
24 x 24 pixels. A sample is ``KEY.txt`` and, with ``--form latents``, ``KEY.pth`` or ``KEY.npy`` [16, frames, 6, 6] (what
examples/t2v/clips.py makes of frames, in a VAE's place), with ``--form frames`` ``KEY.0000.png``, ``KEY.0001.png``, ... Its shards are of
energon's class CrudeWebdataset. ``--damaged N`` spoils N samples (no caption, a file cut off, latents of another shape, a clip without
frames), to see what a loader says. Needs megatron-energon, Pillow and scikit-learn; no network.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dip.spec.codec import load_example
from megatron_dip.spec.errors import EXIT_CODE, InputError

EXAMPLE = Path(__file__).parents[1] / "examples" / "t2v"
CHANNELS = 16
DATASET = """\
__module__: megatron.energon
__class__: CrudeWebdataset
"""


def load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"write_clips_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def pictures_of(clip: NDArray[np.float32]) -> dict[str, bytes]:
    """Frames [frames, height, width] from -1 to 1 as PNGs of twice the size, by their endings."""
    from PIL import Image

    files = {}
    for number, frame in enumerate(clip):
        data = io.BytesIO()
        Image.fromarray(np.clip((frame + 1) * 127.5, 0, 255).astype(np.uint8).repeat(2, 0).repeat(2, 1)).save(data, format="PNG")
        files[f"{number:04d}.png"] = data.getvalue()
    return files


def stored(latents: torch.Tensor, kind: str) -> bytes:
    data = io.BytesIO()
    if kind == "npy":
        np.save(data, latents.numpy())
    else:
        torch.save(latents, data)
    return data.getvalue()


class Writer:
    """Makes samples: ending of a file -> its content."""

    def __init__(self, form: str, seed: int) -> None:
        digits, self.clips = load_module(EXAMPLE / "digits/example.py"), load_module(EXAMPLE / "clips.py")
        config = load_example(EXAMPLE / "digits/config.json")
        self.words: Sequence[str] = digits.VOCABULARY
        self.dataset = digits.Dataset(config.model, msgspec.to_builtins(config.data), seed)
        self.form, self.random = form, np.random.default_rng(seed)

    def sample(self, number: int) -> dict[str, bytes]:
        (story,) = self.dataset.stories(self.random, 1, self.dataset.training_scans)
        words = [self.words[token] for token in self.dataset.caption(story, self.random, False)[1:-1]]
        files = {"txt": " ".join(words).encode()}
        pictures = pictures_of(self.dataset.render(story))
        if self.form == "frames":
            return files | pictures
        kind = ("pth", "npy")[number % 2]
        return {**files, kind: stored(self.clips.latents_of_frames(pictures, list(pictures), str(number), CHANNELS), kind)}

    def damaged(self, number: int) -> dict[str, bytes]:
        """A sample as it should not be."""
        files = self.sample(number)
        kind = number % 4
        if kind == 0:
            return {name: data for name, data in files.items() if name != "txt"}
        if kind == 1:
            name = next(name for name in files if name != "txt")
            return {**files, name: files[name][: len(files[name]) // 2]}
        if kind == 2:
            return {"txt": files["txt"], "npy": stored(torch.zeros(CHANNELS + 1, 2, 6, 6), "npy")}
        return {"txt": files["txt"], "npy": stored(torch.zeros(CHANNELS, 0, 6, 6), "npy")}


def write_dataset(folder: Path, *, samples: int, shards: int, form: str, damaged: int, seed: int) -> None:
    """Writes shards and their description. Raises InputError for a folder in use, impossible numbers and missing packages."""
    for flag, value, low in (("--samples", samples, 2), ("--shards", shards, 2), ("--damaged", damaged, 0), ("--seed", seed, 0)):
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
    writer = Writer(form, seed)
    (folder / ".nv-meta").mkdir(parents=True)
    spoiled = {int(index): kind for kind, index in enumerate(np.random.default_rng(seed).choice(samples, min(damaged, samples), replace=False))}
    names = [f"shard_{shard:04d}.tar" for shard in range(shards)]
    for shard, name in enumerate(names):
        with tarfile.open(folder / name, "w") as archive:
            for number in range(shard, samples, shards):
                files = writer.damaged(spoiled[number]) if number in spoiled else writer.sample(number // shards)
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
    parser.add_argument("--form", choices=("latents", "frames"), default="latents", help="what a clip is stored as")
    parser.add_argument("--damaged", type=int, default=0, help="samples that are spoiled")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(argv)
    try:
        write_dataset(
            options.folder, samples=options.samples, shards=options.shards, form=options.form, damaged=options.damaged, seed=options.seed
        )
    except InputError as error:
        print(f"write_clips.py: error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(f"{options.samples} samples in {options.shards} shards: {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
