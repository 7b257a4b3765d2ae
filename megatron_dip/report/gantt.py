"""Gantt charts: one panel for each timeline, all on one time axis, so that their lengths compare by eye.

Of a plan the panel below shows what each rank holds over time, with its capacity, and a mark shows the lower bound of the makespan. Timelines of many
stages are painted by pixel columns, each in the mixture of what ran in its span: bars narrower than a pixel would hide or swell idle time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.typing import ColorType
from numpy.typing import NDArray

from megatron_dip.report.colours import BOUND, IDLE, KIND_COLOUR, KIND_LABEL, PALETTE, colour_of, modules_of, rank_colour, text_colour
from megatron_dip.report.tables import headline, memory_unit, printable, time_unit
from megatron_dip.report.trace import held_over_time
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.timeline import Timeline

LARGEST_LABELLED = 400
"""Bars of a panel beyond which it is painted by columns, without numbers."""
_COLUMNS = 2600
"""Pixel columns of a panel of many stages: two for each pixel of the picture."""
_MEMORY_HEIGHT = 1.5
"""Inches of a plan's memory panel."""


def draw_gantt(timelines: Sequence[Timeline], path: Path, *, title: str, plans: Sequence[Plan | None] = ()) -> None:
    """Writes one picture (its kind is the suffix of ``path``) with a panel for each timeline.

    Numbers in the bars are microbatches.

    Args:
        plans: of the timelines, None where one is measured; adds what ranks hold and the bound.

    Raises:
        InputError: there is nothing to draw, or the file cannot be written.
    """
    of_timeline = list(plans) if plans else [None] * len(timelines)
    pairs = [(timeline, plan) for timeline, plan in zip(timelines, of_timeline, strict=True) if timeline.bars]
    drawn = [timeline for timeline, _ in pairs]
    if not drawn:
        raise InputError("FILE", [timeline.title for timeline in timelines], "no stages to draw", "give a plan or timeline with stages")
    longest = max(timeline.makespan for timeline in drawn)
    unit, unit_name = time_unit(longest)
    modules = modules_of(drawn)
    memory = [_MEMORY_HEIGHT if plan is not None and any(stage.mem_delta_start for stage in plan.stages) else 0.0 for _, plan in pairs]
    heights = [0.55 + 0.42 * min(timeline.ranks, 128) for timeline in drawn]
    head, foot = 0.85, 0.55
    height = sum(heights) + sum(memory) + head + foot
    figure = Figure(figsize=(13, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.012, 1 - 0.30 / height, printable(title), fontsize=14, weight="bold", va="center", parse_math=False)
    top = height - head
    for index, ((timeline, plan), panel_height, memory_height) in enumerate(zip(pairs, heights, memory, strict=True)):
        bottom = top - panel_height + 0.36
        axes = figure.add_axes((0.065, (bottom - 0.18) / height, 0.925, (panel_height - 0.36) / height))
        _draw_panel(axes, timeline, modules, unit=unit, span=longest / unit)
        axes.set_title(
            headline(timeline, plan, unit, unit_name), loc="left", fontsize=10.5, pad=4, parse_math=False,
        )
        if plan is not None and plan.lower_bound > 0:
            axes.axvline(plan.lower_bound / unit, color=BOUND, linewidth=1.0, linestyle="--")
        if memory_height:
            assert plan is not None
            axes.set_xticklabels([])
            axes = figure.add_axes((0.065, (bottom - 0.18 - memory_height + 0.15) / height, 0.925, (memory_height - 0.35) / height))
            _draw_memory(axes, timeline, plan, unit=unit, span=longest / unit)
        if index + 1 == len(drawn):
            axes.set_xlabel(f"time in {unit_name}", fontsize=9.5)
        else:
            axes.set_xticklabels([])
        top -= panel_height + memory_height
    shown = {(bar.module, bar.kind) for timeline in drawn for bar in timeline.bars}
    handles: list[Artist] = [
        Patch(color=PALETTE[at % len(PALETTE)][KIND_COLOUR[kind]], label=printable(f"{module} {KIND_LABEL[kind]}"))
        for at, module in enumerate(modules)
        for kind in KIND_COLOUR
        if (module, kind) in shown
    ]
    handles.append(Patch(facecolor=IDLE, edgecolor="#bbbbbb", label="idle"))
    if any(plan is not None and plan.lower_bound > 0 for _, plan in pairs):
        handles.append(Line2D([], [], color=BOUND, linewidth=1.0, linestyle="--", label="lower bound"))
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.06, 1 - 0.42 / height), ncol=len(handles), fontsize=9 if len(handles) < 9 else 8, frameon=False,
        handlelength=1.2, columnspacing=1.2, borderaxespad=0,
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError("--output", str(path), f"cannot be written ({error})", "name a .png file in a folder that exists") from error


def _draw_panel(axes: Axes, timeline: Timeline, modules: Sequence[str], *, unit: float, span: float) -> None:
    origin = min(bar.start for bar in timeline.bars)
    makespan = timeline.makespan / unit
    for rank in range(timeline.ranks):
        axes.barh(rank, makespan, height=0.84, color=IDLE, linewidth=0)
    if len(timeline.bars) > LARGEST_LABELLED:
        # Each rank by itself: one image of all would blur the gaps between them into the bars.
        for rank, row in enumerate(_columns(timeline, modules)):
            axes.imshow(row[None], extent=(0, makespan, rank + 0.42, rank - 0.42), aspect="auto", interpolation="antialiased", zorder=2)
    else:
        _draw_bars(axes, timeline, modules, origin, unit=unit, span=span)
    axes.axvline(makespan, color="#444444", linewidth=0.9)
    axes.set_xlim(0, span * 1.005)
    axes.set_ylim(timeline.ranks - 0.5, -0.5)
    step = -(-timeline.ranks // 32)
    axes.set_yticks(range(0, timeline.ranks, step), [f"rank {rank}" for rank in range(0, timeline.ranks, step)], fontsize=9)
    axes.tick_params(axis="x", labelsize=9)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _columns(timeline: Timeline, modules: Sequence[str]) -> NDArray[np.float64]:
    """[ranks, columns, rgb]: the mixture of what ran on each rank in each column's span, idle time included."""
    start, span = min(bar.start for bar in timeline.bars), max(1, timeline.makespan)
    shares = np.zeros((timeline.ranks, _COLUMNS + 1))
    colours = np.zeros((timeline.ranks, _COLUMNS + 1, 3))
    for bar in timeline.bars:
        colour = np.array(to_rgb(colour_of(bar.module, bar.kind, modules)))
        left, right = (bar.start - start) * _COLUMNS / span, (bar.end - start) * _COLUMNS / span
        first, last = int(left), min(int(right), _COLUMNS - 1)
        part = np.ones(last - first + 1)
        part[0] -= left - first
        part[-1] -= last + 1 - right
        shares[bar.rank, first : last + 1] += part
        colours[bar.rank, first : last + 1] += part[:, None] * colour
    idle = np.clip(1.0 - shares[:, :_COLUMNS], 0.0, 1.0)
    return np.clip(colours[:, :_COLUMNS] + idle[..., None] * np.array(to_rgb(IDLE)), 0.0, 1.0)


def _draw_memory(axes: Axes, timeline: Timeline, plan: Plan, *, unit: float, span: float) -> None:
    """What each rank holds over time, and the least capacity of the ranks."""
    capacity = min(plan.memory_capacity) if plan.memory_capacity is not None else None
    size, size_name = memory_unit(max(*plan.peak_memory, capacity or 0))
    named = range(plan.ranks) if plan.ranks <= 8 else (0, plan.ranks - 1)
    for rank, steps in enumerate(held_over_time(timeline, plan)):
        instants = [step.instant_ns / unit for step in steps] + [timeline.makespan / unit]
        held = [step.held_bytes / size for step in steps]
        axes.step(instants, [*held, held[-1]], where="post", linewidth=0.8, color=rank_colour(rank, plan.ranks), label=f"rank {rank}" if rank in named else None)
    if capacity is not None:
        axes.axhline(capacity / size, color=BOUND, linewidth=1.0, linestyle="--", label=f"capacity {capacity / size:.4g} {size_name}")
    axes.set_xlim(0, span * 1.005)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend
    axes.set_ylabel(f"{size_name} held", fontsize=9)
    axes.tick_params(labelsize=8)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", ncol=9, fontsize=7, frameon=False)


def _draw_bars(axes: Axes, timeline: Timeline, modules: Sequence[str], origin: int, *, unit: float, span: float) -> None:
    corners: list[list[tuple[float, float]]] = []
    colours: list[ColorType] = []
    for bar in timeline.bars:
        left, right = (bar.start - origin) / unit, (bar.end - origin) / unit
        low, high = bar.rank - 0.42, bar.rank + 0.42
        corners.append([(left, low), (left, high), (right, high), (right, low)])
        colours.append(colour_of(bar.module, bar.kind, modules))
    axes.add_collection(PolyCollection(corners, facecolors=colours, edgecolors="white", linewidths=0.5))
    for bar in timeline.bars:
        width = (bar.end - bar.start) / unit
        if width > span * 0.0105:
            axes.text(
                (bar.start + bar.end - 2 * origin) / (2 * unit), bar.rank, str(bar.microbatch), ha="center", va="center",
                fontsize=7.5, color=text_colour(colour_of(bar.module, bar.kind, modules)),
            )
