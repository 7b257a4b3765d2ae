"""Microbatches of a text-to-video model: packed clips with captions, of samples' files or made on the fly by the statistics of a setup.

Noise and noise levels are drawn with the microbatch, from a generator of its own, so that every rank holds the same.

Letters: n clips, S patches of all clips, T tokens of all captions, C channels of the latents.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dip.models.dit import DiTSizes, patchify
from megatron_dip.models.flow_matching import FlowMatching, add_noise, timestep
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import TextToVideoModel
from megatron_dip.trainer.samples import file_of_sample, picture_names, read_pixels, text_of_sample
from megatron_dip.workloads.generators import MAX_CLIPS, TOKENS_PER_LATENT_FRAME, pack_clips

LATENTS = ("pth", "latents.pth", "npy", "latents.npy")
CAPTIONS = ("txt", "caption.txt")
BLOCK = 4
"""Pixels along the side of what becomes one latent where clips come as frames."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLimits:
    """What fits into a microbatch."""

    patches: int
    tokens: int
    clips: int = MAX_CLIPS


@dataclass(slots=True)
class Clip:
    patches: torch.Tensor
    """float32 [patches of the clip, values]"""
    grid: tuple[int, int, int]
    """Patches along time, height and width."""
    tokens: list[int]


def sizes_of(model: TextToVideoModel) -> DiTSizes:
    video = model.video
    return DiTSizes(in_channels=video.channels, patch_spatial=video.patch_spatial, patch_temporal=video.patch_temporal)


def pack(model: TextToVideoModel, clips: Sequence[Clip], flow: FlowMatching, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One microbatch: the model's arguments, ``target`` [S, 1, values] and ``weight`` [S, 1] of the loss."""
    grids = torch.tensor([clip.grid for clip in clips])
    # Double: Megatron's Float16Module would round single ones.
    sigma = torch.tensor([flow.draw_sigma(generator) for _ in clips], dtype=torch.float64)
    level = sigma.float().repeat_interleave(grids.prod(dim=1))[:, None, None]
    clean = torch.cat([clip.patches for clip in clips])[:, None]
    noise = torch.randn(clean.shape, generator=generator)
    return {
        "x": add_noise(clean, noise, level), "timesteps": timestep(sigma), "grid_sizes": grids,
        "text_lengths": torch.tensor([len(clip.tokens) for clip in clips]),
        "tokens": torch.tensor([token for clip in clips for token in clip.tokens])[None],
        "target": flow.target(clean, noise), "weight": flow.loss_weight(level)[:, :, 0],
    }


# ---- made on the fly ----------------------------------------------------------------------------------------------------------------


def draw_microbatch(
    model: TextToVideoModel, frame: tuple[int, int], text_divisor: int, flow: FlowMatching, seed: int, number: int
) -> dict[str, torch.Tensor]:
    """Clips and captions of drawn lengths (:func:`pack_clips`), of noise and random words; all of it follows from (seed, number).

    Args:
        frame: patches along height and width of a latent frame.
        text_divisor: captions are this many times shorter than drawn.
    """
    random = np.random.default_rng((seed, number))
    (lengths,) = pack_clips(random, 1, model.modules.module("dit"))
    generator = torch.Generator().manual_seed(int(random.integers(2**62)))
    vocabulary, values = model.modules.module("lm").vocab_size, sizes_of(model).patch_size
    assert vocabulary is not None
    clips = []
    for tokens, patches in zip(lengths["lm"], lengths["dit"], strict=True):
        grid = (max(1, patches // TOKENS_PER_LATENT_FRAME), *frame)
        words = torch.randint(0, vocabulary, (max(1, tokens // text_divisor),), generator=generator).tolist()
        clips.append(Clip(torch.randn(math.prod(grid), values, generator=generator), grid, words))
    return pack(model, clips, flow, generator)


# ---- of samples' files --------------------------------------------------------------------------------------------------------------


def clip_of_sample(raw: Mapping[str, Any], model: TextToVideoModel, tokenize: Callable[[str], Sequence[int]], limits: PackLimits) -> Clip:
    """A clip of a sample's files. Raises InputError, with the sample's key, for one that cannot be trained on.

    Args:
        raw: one of LATENTS or frames as pictures, and one of CAPTIONS (energon_clips.py), by their endings, and ``__key__``.
    """
    key = raw.get("__key__")
    tokens = list(tokenize(text_of_sample(raw, CAPTIONS)))
    vocabulary = model.modules.module("lm").vocab_size or 0
    if not tokens or len(tokens) > limits.tokens:
        raise InputError(f"sample {key}: txt", len(tokens), f"tokens are not between 1 and {limits.tokens}, all of a microbatch", "shorten the caption")
    if any(not 0 <= token < vocabulary for token in tokens):
        raise InputError(f"sample {key}: txt", max(tokens), f"is no token of the model's {vocabulary}", "use the model's tokenizer")
    name = next((name for name in LATENTS if name in raw), None)
    frames = [] if name else picture_names(raw)
    if name is None and not frames:
        file_of_sample(raw, (*LATENTS, "0.png, ..."))  # raises
    where = f"sample {key}: {name or 'frames'}"
    latents = _read_latents(raw[name], where) if name else latents_of_frames(raw, frames, str(key), model.video.channels)
    _check_latents(latents, model, where)
    patches = patchify(latents, sizes_of(model))
    if len(patches) > limits.patches:
        raise InputError(where, len(patches), f"patches are more than a microbatch's, {limits.patches}", "divide the clip or make its frames smaller")
    video, (_, length, height, width) = model.video, latents.shape
    return Clip(patches, (length // video.patch_temporal, height // video.patch_spatial, width // video.patch_spatial), tokens)


def _read_latents(data: bytes, where: str) -> torch.Tensor:
    """What a .pth or .npy file holds, in float32."""
    try:
        if where.endswith("npy"):
            found = torch.from_numpy(np.load(io.BytesIO(data), allow_pickle=False))
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (OSError, ValueError, EOFError, RuntimeError, TypeError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(where, f"{len(data)} bytes", f"are no latents that can be read ({error})", "write them again") from error
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        kind = str(found.dtype) if isinstance(found, torch.Tensor) else type(found).__name__
        raise InputError(where, kind, "is no tensor of floating-point numbers", "store the latents alone, [C, frames, height, width]")
    return found.float()


def _check_latents(latents: torch.Tensor, model: TextToVideoModel, where: str) -> None:
    video, shape = model.video, list(latents.shape)
    if len(shape) != 4 or shape[0] != video.channels:
        raise InputError(where, shape, f"is no shape [{video.channels}, frames, height, width]", "give the latents of the model's VAE")
    if not shape[1]:
        raise InputError(where, shape, "has no frames", "leave the clip out")
    units = (video.patch_temporal, video.patch_spatial, video.patch_spatial)
    if not all(shape) or any(size % unit for size, unit in zip(shape[1:], units, strict=True)):
        raise InputError(where, shape, f"frames, height and width are not multiples of a patch's, {list(units)}", "cut the clip to such a size")
    if not bool(torch.isfinite(latents).all()):
        raise InputError(where, "inf or nan", "is among the latents", "encode the clip again")


def latents_of_frames(raw: Mapping[str, Any], names: Sequence[str], key: str, channels: int) -> torch.Tensor:
    """Frames as latents [channels, frames, height / BLOCK, width / BLOCK]: of each block of pixels and colours the lowest frequencies.

    It stands in for a VAE, to try things out: nothing is compressed along time, and of grey pictures of 16 channels most is kept.
    """
    frames = [read_pixels(raw[name], f"sample {key}: {name}", lambda width, height: (width, height), 3) for name in names]
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise InputError(f"sample {key}: frames", sorted(shapes), "are of different sizes", "give all frames of a clip one size")
    (_, height, width) = frames[0].shape
    if height % BLOCK or width % BLOCK or not 1 <= channels <= 3 * BLOCK**2:
        raise InputError(
            f"sample {key}: frames", [height, width], f"do not divide into blocks of {BLOCK} pixels for {channels} channels",
            "cut the frames, or give latents",
        )
    blocks = np.stack(frames).reshape(len(frames), 3, height // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(0, 2, 4, 1, 3, 5)
    latents = blocks.reshape(*blocks.shape[:3], -1) @ _lowest_frequencies(channels).T
    return torch.from_numpy(np.ascontiguousarray(latents.transpose(3, 0, 1, 2), np.float32))


def _lowest_frequencies(channels: int) -> NDArray[np.float64]:
    """Rows of an orthonormal cosine transform over colours and the pixels of a block [channels, 3 * BLOCK * BLOCK], divided by 4 so that
    values are about 1."""

    def cosines(size: int) -> NDArray[np.float64]:
        table = np.cos(np.pi * np.outer(np.arange(size), 2 * np.arange(size) + 1) / (2 * size)) * (2 / size) ** 0.5
        table[0] /= 2**0.5
        return table

    colours, pixels = cosines(3), cosines(BLOCK)
    order = sorted(np.ndindex(3, BLOCK, BLOCK), key=lambda at: (3 * at[0] + at[1] + at[2], at))[:channels]
    return np.stack([np.kron(colours[c], np.kron(pixels[i], pixels[j])) for c, i, j in order]) / 4
