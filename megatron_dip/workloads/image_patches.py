"""Images of any size as patches, and where their tokens stand: what a loader does before the model, in NumPy.

The order of patches and the positions of tokens are transformers' for Qwen2.5-VL and Qwen3-VL: frame by frame, row by row of merged
blocks, within a block row by row. A still image fills all frames of its patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import ImageSpec, TowerSpec


def fit_size(width: int, height: int, image: ImageSpec) -> tuple[int, int]:
    """Patches along height and width of an image of any pixels: the nearest multiples of merged blocks, scaled down to the model's limit."""
    unit = image.patch * image.merge
    scale = min(1.0, image.size / max(width, height))
    return tuple(  # type: ignore[return-value]
        image.merge * max(1, min(image.size // unit, round(side * scale / unit))) for side in (height, width)
    )


def patchify(frames: NDArray[np.float32], image: ImageSpec, tower: TowerSpec) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
    """Patches [S, C * frames * patch * patch] of one image or clip, and its patches along time, height and width.

    Args:
        frames: [n, C, height, width], height and width multiples of ``patch * merge``; the last frame is repeated to whole patches.
    """
    count, channels, height, width = frames.shape
    unit, depth, side, merge = image.patch * image.merge, tower.frames_per_patch, image.patch, image.merge
    if channels != image.channels or height % unit or width % unit or not frames.size:
        raise InputError(
            "image", list(frames.shape), f"is not of {image.channels} channels with height and width in multiples of {unit}", "resize it"
        )
    missing = -count % depth
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    grid = (len(frames) // depth, height // side, width // side)
    blocks = frames.reshape(grid[0], depth, channels, grid[1] // merge, merge, side, grid[2] // merge, merge, side)
    patches = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid[0] * grid[1] * grid[2], channels * depth * side * side)
    return np.ascontiguousarray(patches), grid


def token_positions(
    is_image: NDArray[np.bool_], grids: Sequence[Sequence[int]], cu_lengths: Sequence[int], merge: int
) -> NDArray[np.int64]:
    """Position in frame, row and column [3, S] of each token of a packed sequence; every document begins at 0.

    Text counts on from the largest position before it, alike in all three; the tokens of an image count its frames, rows and columns from there.

    Args:
        is_image: [S], the tokens that images fill.
        grids: patches along time, height and width of each image, in order.
        cu_lengths: bounds of the documents.
    """
    positions = np.zeros((3, len(is_image)), np.int64)
    left = list(grids)
    for start, end in itertools.pairwise(cu_lengths):
        place, following = start, 0
        while place < end:
            if not is_image[place]:
                positions[:, place] = following
                place, following = place + 1, following + 1
                continue
            time, rows, columns = left.pop(0)
            shape = (time, rows // merge, columns // merge)
            count = shape[0] * shape[1] * shape[2]
            positions[:, place : place + count] = following + np.indices(shape).reshape(3, -1)
            place, following = place + count, following + max(shape)
    return positions
