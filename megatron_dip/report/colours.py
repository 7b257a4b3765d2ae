"""Colours of modules and kinds of stages, the same in every picture.

Chosen so that all twenty-four stay apart (CIELAB distance of 15 and more) for people who see all colours and for those who lack one kind of
cone, by the simulation of Machado et al. 2009; `tests/report/test_colours.py` measures it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_dip.spec.timeline import Timeline

PALETTE = (
    ("#ffd296", "#ff784b", "#b40000"),
    ("#96a5e1", "#0078ff", "#002d4b"),
    ("#c3f03c", "#699669", "#5a693c"),
    ("#b496ff", "#c33c87", "#4b2db4"),
    ("#ff9696", "#ff2d5a", "#5a1e2d"),
    ("#b4b400", "#a57800", "#2d2d00"),
    ("#0fc3c3", "#0096a5", "#005a5a"),
    ("#c3d2ff", "#875ab4", "#4b0078"),
)
"""For each module: forward, backward, weight gradients."""
KIND_COLOUR = {"fw": 0, "bw": 1, "w": 2}
KIND_LABEL = {"fw": "forward", "bw": "backward", "w": "weight gradients"}
IDLE = "#f1f1ee"
BOUND = "#b00020"
"""Of a plan's lower bound and of the memory capacity, dashed."""
_RANKS = ("#1e1e50", "#2d4b87", "#2d738c", "#239b82", "#5abe5a", "#b9cd2d")
"""From the first rank to the last: lightness grows evenly, which all eyes see."""
_DARK_TEXT = 0.30
"""Relative luminance above which text on a colour is dark."""


def modules_of(timelines: Iterable[Timeline]) -> list[str]:
    """Single modules before joined ones, by name: the same colours in every picture of a model."""
    return sorted({bar.module for timeline in timelines for bar in timeline.bars}, key=lambda module: (module.count("+"), module))


def colour_of(module: str, kind: str, modules: Sequence[str]) -> str:
    return PALETTE[modules.index(module) % len(PALETTE)][KIND_COLOUR[kind]]


def rank_colour(rank: int, ranks: int) -> str:
    """Of a rank's memory line: dark for the first rank, light for the last."""
    at = rank / max(1, ranks - 1) * (len(_RANKS) - 1)
    below = min(int(at), len(_RANKS) - 2)
    ends = [[int(_RANKS[below + more][place : place + 2], 16) for place in (1, 3, 5)] for more in (0, 1)]
    return "#" + "".join(f"{round(low + (high - low) * (at - below)):02x}" for low, high in zip(*ends, strict=True))


def text_colour(colour: str) -> str:
    """Dark or white, whichever reads better on ``colour``."""
    red, green, blue = (_linear(int(colour[at : at + 2], 16) / 255) for at in (1, 3, 5))
    return "#222222" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > _DARK_TEXT else "white"


def _linear(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
