"""Gantt charts: one panel for each timeline, all on one time axis, so that their lengths compare by eye."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.typing import ColorType

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.timeline import Bar, Timeline

PALETTE = (
    ("#f6c28b", "#d9791a", "#a85508"),
    ("#a9cbe8", "#3b7fb8", "#1f4f7a"),
    ("#b9dcae", "#4f9a4a", "#2c6128"),
    ("#d9c2e3", "#8d5fa5", "#573570"),
    ("#e8b7b7", "#bd4f4f", "#7d2626"),
    ("#d8d0b8", "#94855a", "#5c5133"),
)
"""For each module: forward, backward, weight gradients. Told apart by lightness as well as by hue."""

KIND_COLOUR = {"fw": 0, "bw": 1, "w": 2}
KIND_LABEL = {"fw": "forward", "bw": "backward", "w": "weight gradients"}
IDLE = "#f1f1ee"
LARGEST_LABELLED = 400
"""Bars of a panel beyond which no numbers are written into them."""


def draw_gantt(timelines: Sequence[Timeline], path: Path, *, title: str) -> None:
    """Writes one PNG (or what the suffix of ``path`` says) with a panel for each timeline.

    Numbers in the bars are microbatches. Raises InputError when there is nothing to draw or the file cannot be written.
    """
    drawn = [timeline for timeline in timelines if timeline.bars]
    if not drawn:
        raise InputError("FILE", [timeline.title for timeline in timelines], "no stages to draw", "give a plan or timeline with stages")
    longest = max(timeline.makespan for timeline in drawn)
    unit, unit_name = _time_unit(longest)
    modules = _modules(drawn)
    heights = [0.55 + 0.42 * timeline.ranks for timeline in drawn]
    head, foot = 0.85, 0.55
    height = sum(heights) + head + foot
    figure = Figure(figsize=(13, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.012, 1 - 0.30 / height, title, fontsize=14, weight="bold", va="center")
    top = height - head
    for index, (timeline, panel_height) in enumerate(zip(drawn, heights, strict=True)):
        bottom = top - panel_height + 0.36
        axes = figure.add_axes((0.065, (bottom - 0.18) / height, 0.925, (panel_height - 0.36) / height))
        _draw_panel(axes, timeline, modules, unit=unit, span=longest / unit)
        axes.set_title(
            f"{timeline.title}:  {timeline.makespan / unit:.4g} {unit_name}, {100 * timeline.bubble_fraction:.1f} % bubbles",
            loc="left", fontsize=10.5, pad=4,
        )
        if index + 1 == len(drawn):
            axes.set_xlabel(f"time in {unit_name}", fontsize=9.5)
        else:
            axes.set_xticklabels([])
        top -= panel_height
    shown = {(bar.module, bar.kind) for timeline in drawn for bar in timeline.bars}
    handles = [
        Patch(color=PALETTE[at % len(PALETTE)][KIND_COLOUR[kind]], label=f"{module} {KIND_LABEL[kind]}")
        for at, module in enumerate(modules)
        for kind in KIND_COLOUR
        if (module, kind) in shown
    ]
    handles.append(Patch(facecolor=IDLE, edgecolor="#bbbbbb", label="idle"))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.06, 1 - 0.42 / height), ncol=len(handles), fontsize=9 if len(handles) < 9 else 8, frameon=False,
        handlelength=1.2, columnspacing=1.2, borderaxespad=0,
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError("--output", str(path), f"cannot be written ({error})", "name a .png file in a folder that exists") from error


def _modules(timelines: Sequence[Timeline]) -> list[str]:
    """Single modules before joined ones, by name: the same colours in every picture of a model."""
    return sorted({bar.module for timeline in timelines for bar in timeline.bars}, key=lambda module: (module.count("+"), module))


def _draw_panel(axes: Axes, timeline: Timeline, modules: Sequence[str], *, unit: float, span: float) -> None:
    origin = min(bar.start for bar in timeline.bars)
    makespan = timeline.makespan / unit
    for rank in range(timeline.ranks):
        axes.barh(rank, makespan, height=0.84, color=IDLE, linewidth=0)
    corners: list[list[tuple[float, float]]] = []
    colours: list[ColorType] = []
    for bar in timeline.bars:
        left, right = (bar.start - origin) / unit, (bar.end - origin) / unit
        low, high = bar.rank - 0.42, bar.rank + 0.42
        corners.append([(left, low), (left, high), (right, high), (right, low)])
        colours.append(_colour(bar, modules))
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.5))
    if len(timeline.bars) <= LARGEST_LABELLED:
        for bar in timeline.bars:
            width = (bar.end - bar.start) / unit
            if width > span * 0.0105:
                axes.text(
                    (bar.start + bar.end - 2 * origin) / (2 * unit), bar.rank, str(bar.microbatch), ha="center", va="center",
                    fontsize=7.5, color="#222222" if bar.kind == "fw" else "white",
                )
    axes.axvline(makespan, color="#444444", linewidth=0.9)
    axes.set_xlim(0, span * 1.005)
    axes.set_ylim(timeline.ranks - 0.5, -0.5)
    axes.set_yticks(range(timeline.ranks), [f"rank {rank}" for rank in range(timeline.ranks)], fontsize=9)
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _colour(bar: Bar, modules: Sequence[str]) -> str:
    return PALETTE[modules.index(bar.module) % len(PALETTE)][KIND_COLOUR[bar.kind]]


def _time_unit(longest_ns: int) -> tuple[float, str]:
    """Divisor of nanoseconds and name of the unit that suits a timeline."""
    if longest_ns >= 2_000_000_000:
        return 1e9, "s"
    if longest_ns >= 2_000_000:
        return 1e6, "ms"
    return 1e3, "us"
