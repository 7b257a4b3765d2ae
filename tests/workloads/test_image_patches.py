"""Images of any size as patches and positions, against slow twins that say it patch by patch and token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import ImageSpec, TowerSpec
from megatron_dip.workloads.image_patches import fit_size, patchify, token_positions

IMAGE = ImageSpec(size=24, channels=2, patch=3, merge=2, token_id=1)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_patches_lie_block_by_block(frames: int, high: int, wide: int, depth: int) -> None:
    height, width = high * 6, wide * 6
    pixels = np.random.default_rng(0).standard_normal((frames, 2, height, width)).astype(np.float32)
    patches, grid = patchify(pixels, IMAGE, TowerSpec(frames_per_patch=depth))
    assert grid == (-(-frames // depth), high * 2, wide * 2)
    place = 0
    for time in range(grid[0]):
        for block_row in range(high):
            for block_column in range(wide):
                for row in range(2 * block_row, 2 * block_row + 2):
                    for column in range(2 * block_column, 2 * block_column + 2):
                        taken = [pixels[min(time * depth + k, frames - 1), :, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3] for k in range(depth)]
                        assert np.array_equal(patches[place], np.stack(taken, axis=1).ravel())
                        place += 1
    assert place == len(patches)


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_sizes_fit_the_model(width: int, height: int) -> None:
    rows, columns = fit_size(width, height, IMAGE)
    assert rows % 2 == 0
    assert columns % 2 == 0
    assert 2 <= rows <= 8
    assert 2 <= columns <= 8
    assert fit_size(columns * 3, rows * 3, IMAGE) == (rows, columns)


def test_an_image_of_another_form_is_refused() -> None:
    with pytest.raises(InputError, match="multiples of 6"):
        patchify(np.zeros((1, 2, 7, 6), np.float32), IMAGE, TowerSpec())


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3)), max_size=3), min_size=1, max_size=3))
def test_positions_of_tokens(documents: list[list[tuple[int, int, int, int]]]) -> None:
    """A document: words, then an image of frames x rows x columns of blocks, and so on; one word behind all."""
    kinds: list[bool] = []
    grids, bounds, expected = [], [0], []
    for document in documents:
        following = 0
        for words, time, rows, columns in document:
            expected += [(following + word,) * 3 for word in range(words)]
            following += words
            expected += [(following + t, following + r, following + c) for t in range(time) for r in range(rows) for c in range(columns)]
            following += max(time, rows, columns)
            kinds += [False] * words + [True] * (time * rows * columns)
            grids.append((time, 2 * rows, 2 * columns))
        expected.append((following,) * 3)
        kinds.append(False)
        bounds.append(len(kinds))
    found = token_positions(np.array(kinds), grids, bounds, 2)
    assert [tuple(position) for position in found.T.tolist()] == expected
