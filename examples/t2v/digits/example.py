"""Clips of handwritten digits after captions: scikit-learn's 1797 scans move, grow, shrink or turn into other digits.

A microbatch is a pack of clips of 2 to 16 frames of 12x12 pixels, each with a caption, short (``seven moves left``) or long, which tells
every frame and may begin with words that do not matter. A small language model reads the captions, a diffusion transformer learns by flow
matching to make the clips. Noise and noise level of a clip are drawn with it.

Scored are clips that the model makes for captions of its own, by readers that never saw it: a support vector machine trained on the scans
says which digit is seen, a linear classifier trained on real clips says how it moves. The control has the same noise and captions dealt
to the wrong clips: it must come out near chance.

Batches are a pure function of (seed, iteration): every rank makes the same ones, and a resumed run goes on with the same data.

Letters: n clips of a microbatch, S patches of all of them, T tokens of all captions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dip.models.dit import DiTSizes, patchify, unpatchify
from megatron_dip.models.flow_matching import FlowMatching, add_noise, sample, timestep
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import TextToVideoModel

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MOTIONS = ("left", "right", "up", "down", "grows", "shrinks", "turns")
VOCABULARY = (
    "<caption>", "<end>", *DIGITS, "moves", "left", "right", "up", "down", "grows", "shrinks", "turns", "into", ".", "then", "further",
    "a", "digit", "is", "seen", "on", "the", "screen", "look", "here", "again",
)
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
SCAN, CANVAS = 8, 12
SMALLEST = 0.45
"""Size of a digit that grows or shrinks, at the small end."""
HELD_OUT_SEED = 20250414


@dataclass(frozen=True, slots=True)
class Story:
    """What a clip shows."""

    scan: int
    motion: str
    frames: int
    target: int | None = None
    """The scan that the digit turns into."""


class DataOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The field ``data`` of config.json."""

    held_out: int
    """Scans that are kept for the readers' own test."""
    clips: list[tuple[int, int]]
    """Bounds (both included) of the clips in a microbatch; iteration i takes entry i modulo their number."""
    frames: tuple[int, int]
    """Bounds of a clip's frames, both included, even."""
    long_captions: float
    """Share of microbatches whose captions tell every frame."""
    empty_captions: float
    """Share of captions that are left empty in training, so that sampling can be guided."""
    flow: FlowMatching
    sampled: int
    """Clips made for a scoring, and as many for its control."""
    steps: int
    """Euler steps from noise to clip."""
    guidance: float
    """How far predictions are moved from those without a caption; 1 = not at all."""


class Dataset:
    """Microbatches for training, and captions for scoring."""

    def __init__(self, model: TextToVideoModel, data: Mapping[str, Any], seed: int) -> None:
        try:
            self.options = msgspec.convert(dict(data), DataOptions)
        except msgspec.ValidationError as error:
            raise InputError("config.json: data", dict(data), str(error), "mend the field named") from error
        self.options.flow.validate("config.json: data.flow")
        self.model, self.seed = model, seed
        video = model.video
        self.sizes = DiTSizes(in_channels=video.channels, patch_spatial=video.patch_spatial, patch_temporal=video.patch_temporal)
        self.scans, self.labels = _load_scans()
        self._check()
        order = np.random.default_rng(HELD_OUT_SEED).permutation(len(self.scans))
        self.held_out_scans, self.training_scans = order[: self.options.held_out], order[self.options.held_out :]

    def _check(self) -> None:
        options, video = self.options, self.model.video
        if video.channels != 1 or CANVAS % video.patch_spatial:
            raise InputError(
                "config.json: model.video", [video.channels, video.patch_spatial], f"clips have 1 channel and {CANVAS}x{CANVAS} pixels",
                "use 1 channel and a patch that divides them",
            )
        low, high = options.frames
        if not 2 <= low <= high or low % video.patch_temporal or high % video.patch_temporal:
            raise InputError(
                "config.json: data.frames", [low, high], f"not 2 <= low <= high, in patches of {video.patch_temporal} frames", "use [2, 16]"
            )
        for index, (least, most) in enumerate(options.clips):
            if not 1 <= least <= most:
                raise InputError(f"config.json: data.clips[{index}]", [least, most], "not 1 <= low <= high", "give low and high")
        language = self.model.modules.module("lm").vocab_size
        if language is None or language < len(VOCABULARY):
            raise InputError("config.json: model.lm.vocab_size", language, f"smaller than the {len(VOCABULARY)} words used", "use 64")
        if not 0 < options.held_out < len(self.scans):
            raise InputError("config.json: data.held_out", options.held_out, f"not between 1 and {len(self.scans) - 1}", "use 360")

    def microbatches(self, iteration: int, num_microbatches: int) -> list[dict[str, torch.Tensor]]:
        """The global batch of an iteration (from 0)."""
        random = np.random.default_rng((self.seed, iteration))
        low, high = self.options.clips[iteration % len(self.options.clips)]
        return [self._microbatch(random, int(random.integers(low, high + 1))) for _ in range(num_microbatches)]

    def held_out(self, multiple: int) -> list[dict[str, torch.Tensor]]:
        """A held-out batch as training's, for its loss; scoring makes clips of its own (:func:`evaluate`)."""
        random = np.random.default_rng(HELD_OUT_SEED)
        return [self._microbatch(random, self.options.clips[0][1]) for _ in range(multiple)]

    def stories(self, random: np.random.Generator, count: int, scans: NDArray[np.int64]) -> list[Story]:
        low, high = (bound // self.model.video.patch_temporal for bound in self.options.frames)
        made = []
        for _ in range(count):
            scan, motion = int(random.choice(scans)), str(random.choice(MOTIONS))
            target = None
            if motion == "turns":
                others = scans[self.labels[scans] != self.labels[scan]]
                target = int(random.choice(others))
            # Short clips are more frequent than long ones.
            frames = int(low * ((high + 1) / low) ** random.random() ** 2) * self.model.video.patch_temporal
            made.append(Story(scan, motion, frames, target))
        return made

    def render(self, story: Story) -> NDArray[np.float32]:
        """A clip [frames, CANVAS, CANVAS] from -1 (background) to 1."""
        progress = np.linspace(0.0, 1.0, story.frames)
        middle, way = CANVAS / 2, (CANVAS - SCAN) / 2
        scan = self.scans[story.scan]
        pictures = []
        for at in progress:
            x, y, size, picture = middle, middle, 1.0, scan
            if story.motion in ("left", "right"):
                x += way * (1 - 2 * at) * (1 if story.motion == "left" else -1)
            elif story.motion in ("up", "down"):
                y += way * (1 - 2 * at) * (1 if story.motion == "up" else -1)
            elif story.motion in ("grows", "shrinks"):
                size = SMALLEST + (1 - SMALLEST) * (at if story.motion == "grows" else 1 - at)
            else:
                assert story.target is not None
                picture = (1 - at) * scan + at * self.scans[story.target]
            pictures.append(_spread(CANVAS, y, size) @ picture @ _spread(CANVAS, x, size).T)
        return (np.stack(pictures) * 2 - 1).astype(np.float32)

    def caption(self, story: Story, random: np.random.Generator, is_long: bool) -> list[int]:
        digit = DIGITS[self.labels[story.scan]]
        if story.motion == "turns":
            words = [digit, "turns", "into", DIGITS[self.labels[story.target]]]
        elif story.motion in ("grows", "shrinks"):
            words = [digit, story.motion]
        else:
            words = [digit, "moves", story.motion]
        if is_long:
            opening = [["look", "here", "."], ["a", "digit", "is", "seen", "on", "the", "screen", "."], ["look", "again", "."]]
            before = opening[int(random.integers(3))]
            words = [*before, *words, *(word for _ in range(story.frames) for word in (".", "then", digit, "further", words[-1]))]
        return [TOKEN[word] for word in ("<caption>", *words, "<end>")]

    def _microbatch(self, random: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
        stories = self.stories(random, count, self.training_scans)
        is_long = random.random() < self.options.long_captions
        captions = [
            [TOKEN["<caption>"], TOKEN["<end>"]] if random.random() < self.options.empty_captions else self.caption(story, random, is_long)
            for story in stories
        ]
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        clips, noises, sigmas, flow = [], [], [], self.options.flow
        for story in stories:
            clips.append(torch.from_numpy(self.render(story)))
            noises.append(torch.randn(clips[-1].shape, generator=generator))
            sigmas.append(flow.draw_sigma(generator))
        item = self.pack([add_noise(clip, noise, sigma) for clip, noise, sigma in zip(clips, noises, sigmas, strict=True)], captions)
        item["timesteps"] = timestep(torch.tensor(sigmas))
        item["target"] = torch.cat([self.patches(flow.target(clip, noise)) for clip, noise in zip(clips, noises, strict=True)])[:, None]
        weight = flow.loss_weight(torch.tensor(sigmas))
        item["weight"] = weight.repeat_interleave(item["grid_sizes"].prod(dim=1))[:, None]
        return item

    def pack(self, clips: Sequence[torch.Tensor], captions: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Noised clips [frames, CANVAS, CANVAS] and captions as the model takes them."""
        side = CANVAS // self.sizes.patch_spatial
        return {
            "x": torch.cat([self.patches(clip) for clip in clips])[:, None],
            "tokens": torch.tensor([token for caption in captions for token in caption])[None],
            "grid_sizes": torch.tensor([[len(clip) // self.sizes.patch_temporal, side, side] for clip in clips]),
            "text_lengths": torch.tensor([len(caption) for caption in captions]),
        }

    def patches(self, clip: torch.Tensor) -> torch.Tensor:
        return patchify(clip[None], self.sizes)

    def clips(self, patches: torch.Tensor, grid_sizes: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of packing: [S, values] -> clips [frames, CANVAS, CANVAS]."""
        parts = patches.split(grid_sizes.prod(dim=1).tolist())
        return [unpatchify(part, tuple(grid), self.sizes)[0] for part, grid in zip(parts, grid_sizes.tolist(), strict=True)]


def _load_scans() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scans [n, 8, 8] from 0 to 1, and what they show."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("examples/t2v/digits", "scikit-learn", "is not installed", "pip install 'megatron-dip[examples]'") from error
    found = load_digits()
    return (found.images / 16).astype(np.float32), found.target.astype(np.int64)


def _spread(size: int, centre: float, scale: float, source: int = SCAN) -> NDArray[np.float32]:
    """Bilinear weights [size, source] that draw ``source`` pixels, ``scale`` times as large, around ``centre``."""
    at = (np.arange(size) + 0.5 - centre) / scale + source / 2 - 0.5
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(source)[None])).astype(np.float32)


# ---- Megatron's steps ---------------------------------------------------------------------------------------------------------------


ARGUMENTS = ("x", "timesteps", "tokens", "grid_sizes", "text_lengths")


def loss_func(target: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Megatron's form: sum of the losses (float32 scalar), number of patches (int32 scalar), and what is logged.

    Args:
        target, output: velocity of each patch or clean patch, [S, 1, values]
        weight: of each patch, [S, 1]
    """
    loss = ((output.float() - target).square().mean(dim=-1) * weight).sum()
    count = torch.tensor(len(target), dtype=torch.int32, device=output.device)
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}


def next_item(data_iterator: Iterator[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The next microbatch, where the model computes."""
    item = next(data_iterator)
    return {name: value.cuda() for name, value in item.items()} if torch.cuda.is_available() else item


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    item = next_item(data_iterator)
    output = model(**{name: item[name] for name in ARGUMENTS})
    return output, partial(loss_func, item["target"], item["weight"])


def _output_func(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return output.sum() * 0, {"output": output.detach()}


def prediction_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    """forward_step of sampling: what is reported is the output [S, 1, values]."""
    item = next_item(data_iterator)
    return model(**{name: item[name] for name in ARGUMENTS}), _output_func


# ---- making clips, and reading them -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Clips that the model made for stories."""

    stories: list[Story]
    clips: list[torch.Tensor]


def make_clips(
    dataset: Dataset, predict: Callable[[list[dict[str, torch.Tensor]]], list[torch.Tensor]], stories: Sequence[Story],
    captions: Sequence[Sequence[int]], seed: int,
) -> Made:
    """Samples one clip for each story's length and caption.

    Args:
        predict: microbatches -> outputs [S, 1, values] of each.
    """
    options = dataset.options
    per_pack = max(high for _, high in options.clips)
    generator = torch.Generator().manual_seed(seed)
    made: list[torch.Tensor] = []
    packs = [range(start, min(start + per_pack, len(stories))) for start in range(0, len(stories), per_pack)]
    empty = [TOKEN["<caption>"], TOKEN["<end>"]]
    guided = options.guidance != 1
    items, noises = [], []
    for pack in packs:
        noise = [torch.randn(stories[i].frames, CANVAS, CANVAS, generator=generator) for i in pack]
        items.append(dataset.pack(noise, [captions[i] for i in pack]))
        items += [dataset.pack(noise, [empty for _ in pack])] if guided else []
        noises.append(items[-1]["x"])
    bounds = np.cumsum([0, *(len(noise) for noise in noises)])

    def velocity_at(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        parts = [x[start:end] for start, end in itertools.pairwise(bounds)]
        for index, item in enumerate(items):
            item["x"] = parts[index // 2 if guided else index]
            item["timesteps"] = timestep(sigma).repeat(len(item["grid_sizes"]))
        found = [options.flow.velocity_of(output, item["x"], sigma) for output, item in zip(predict(items), items, strict=True)]
        if not guided:
            return torch.cat(found)
        told, untold = torch.cat(found[::2]), torch.cat(found[1::2])
        return untold + options.guidance * (told - untold)

    x = sample(velocity_at, torch.cat(noises), options.steps, options.flow.shift)
    for index, start in enumerate(bounds[:-1]):
        item = items[2 * index if guided else index]
        made += dataset.clips(x[start : bounds[index + 1], 0], item["grid_sizes"])
    return Made(stories=list(stories), clips=made)


class Readers:
    """Say what a clip shows; trained on scans and on real clips of them, never on what the model makes."""

    def __init__(self, dataset: Dataset, seed: int = HELD_OUT_SEED) -> None:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVC

        random = np.random.default_rng(seed)
        scans = dataset.training_scans
        self.digits = SVC(C=10.0, gamma=0.02)
        still = [np.clip(dataset.render(Story(int(scan), "right", 3))[1], -1, 1) for scan in scans]
        self.digits.fit(np.stack([_centred(frame).ravel() for frame in still]), dataset.labels[scans])
        stories = dataset.stories(random, 1500, scans)
        self.motions = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        self.motions.fit(np.stack([_features(dataset.render(story)) for story in stories]), [story.motion for story in stories])

    def motion(self, clip: NDArray[np.float32]) -> str:
        return str(self.motions.predict(_features(clip)[None])[0])

    def digit(self, clip: NDArray[np.float32], frame: int) -> int:
        return int(self.digits.predict(_centred(clip[frame]).ravel()[None])[0])

    def read(self, clip: NDArray[np.float32], story: Story, labels: NDArray[np.int64]) -> tuple[bool, bool]:
        """Whether the digit (both, where one turns into another) and the motion are those of the story."""
        clip = np.clip(clip, -1, 1)
        # A digit is read where it is large: at the end if it grows, else at the beginning.
        first = self.digit(clip, -1 if story.motion == "grows" else 0) == labels[story.scan]
        last = story.target is None or self.digit(clip, -1) == labels[story.target]
        return bool(first and last), self.motion(clip) == story.motion


def _ink(frame: NDArray[np.float32]) -> NDArray[np.float32]:
    """0 to 1, without the faint noise that sampling leaves on the background."""
    return np.maximum((frame + 1) / 2 - 0.15, 0)


def _centre(ink: NDArray[np.float32]) -> tuple[float, float]:
    total = float(ink.sum()) + 1e-6
    places = np.arange(len(ink)) + 0.5
    return float(ink.sum(1) @ places) / total, float(ink.sum(0) @ places) / total


def _centred(frame: NDArray[np.float32]) -> NDArray[np.float32]:
    """The SCAN x SCAN pixels around the centre of a frame's ink."""
    ink = _ink(frame)
    y, x = _centre(ink)
    centred = _spread(SCAN, SCAN / 2 - (y - CANVAS / 2), 1.0, CANVAS) @ ink @ _spread(SCAN, SCAN / 2 - (x - CANVAS / 2), 1.0, CANVAS).T
    return centred.astype(np.float32)


def _features(clip: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far the ink moves, how its amount and extent change, and how much its form does."""
    first, last = _ink(np.clip(clip[0], -1, 1)), _ink(np.clip(clip[-1], -1, 1))
    (y0, x0), (y1, x1) = _centre(first), _centre(last)
    one, other = _centred(clip[0]).ravel(), _centred(clip[-1]).ravel()
    alike = float(one @ other) / (float(np.linalg.norm(one) * np.linalg.norm(other)) + 1e-6)
    grown = np.log((first.sum() + 1e-3) / (last.sum() + 1e-3))
    dy, dx = y1 - y0, x1 - x0
    return np.array([dy, dx, abs(dy), abs(dx), grown, abs(grown), alike], np.float32)


def evaluate(dataset: Dataset, run: Callable[[Any, list[Any]], list[Any]]) -> dict[str, tuple[int, int]]:
    """Makes clips and reads them: what was asked for and seen, of how many; ``control`` with captions dealt to the wrong clips.

    Args:
        run: (forward_step, microbatches) -> what each reports, on every rank.
    """
    made, control = sampled(dataset, run)
    readers = Readers(dataset)
    scores = {}
    for name, found in (("", made), ("control: ", control)):
        seen = [readers.read(clip.numpy(), story, dataset.labels) for clip, story in zip(found.clips, found.stories, strict=True)]
        scores[f"{name}digits"] = (sum(digit for digit, _ in seen), len(seen))
        scores[f"{name}motions"] = (sum(motion for _, motion in seen), len(seen))
    return scores


def sampled(dataset: Dataset, run: Callable[[Any, list[Any]], list[Any]]) -> tuple[Made, Made]:
    """Clips for fresh stories, and the control: the same noise, every caption that of another story."""
    random = np.random.default_rng(HELD_OUT_SEED + 1)
    stories = dataset.stories(random, dataset.options.sampled, dataset.held_out_scans)
    captions = [dataset.caption(story, random, bool(random.random() < dataset.options.long_captions)) for story in stories]

    def predict(items: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        return [report["output"].cpu() for report in run(prediction_step, items)]

    made = make_clips(dataset, predict, stories, captions, seed=1)
    order = random.permutation(len(stories))
    shuffled = [captions[i] for i in order]
    control = make_clips(dataset, predict, stories, shuffled, seed=1)
    return made, control
