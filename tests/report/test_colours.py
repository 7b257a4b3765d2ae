"""Colours stay apart for everybody: distances in CIELAB under full vision and without one kind of cone (Machado et al. 2009, severity 1)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_dip.report.colours import IDLE, PALETTE, rank_colour, text_colour

VISION = {
    "full": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}


def linear(colour: str) -> NDArray[np.float64]:
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB (D65) of linear sRGB."""
    xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]) @ rgb
    root = [np.cbrt(part) if part > 0.008856 else 7.787 * part + 16 / 116 for part in xyz / (0.95047, 1.0, 1.08883)]
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("vision", list(VISION))
def test_eight_modules_are_told_apart(vision: str) -> None:
    colours = [*itertools.chain.from_iterable(PALETTE), IDLE]
    assert len(PALETTE) == 8
    seen = {colour: lab(np.clip(VISION[vision] @ linear(colour), 0, 1)) for colour in colours}
    least = min((float(np.linalg.norm(seen[a] - seen[b])), a, b) for a, b in itertools.combinations(colours, 2))
    assert least[0] >= 15.0, least


def test_text_can_be_read_on_every_colour() -> None:
    def luminance(colour: str) -> float:
        return float(linear(colour) @ (0.2126, 0.7152, 0.0722))

    for colour in itertools.chain.from_iterable(PALETTE):
        text = text_colour(colour)
        high, low = sorted((luminance(colour), luminance({"white": "#ffffff"}.get(text, text))), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 3.0, colour


def test_memory_lines_grow_lighter_from_the_first_rank_to_the_last() -> None:
    """Lightness is what all eyes see."""
    lightness = [lab(linear(rank_colour(rank, 16)))[0] for rank in range(16)]
    assert all(after - before > 1.0 for before, after in itertools.pairwise(lightness))
    assert rank_colour(0, 1) == rank_colour(0, 16)
