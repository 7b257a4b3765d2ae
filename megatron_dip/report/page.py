"""Interactive pages: one HTML file that needs no network, with zoom, hover and a clickable legend, by Bokeh (the extra ``html``).

:func:`write_page` shows the timelines and plans that :func:`megatron_dip.report.gantt.draw_gantt` paints; :func:`write_playground` lets sliders choose
among schedules that were made before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bokeh.document import Document
from bokeh.embed import file_html
from bokeh.layouts import column, row
from bokeh.models import ColumnDataSource, CustomJS, HoverTool, NumeralTickFormatter, Range1d
from bokeh.models.annotations import Span
from bokeh.models.layouts import LayoutDOM
from bokeh.models.tools import WheelZoomTool
from bokeh.models.widgets import Div, Slider
from bokeh.plotting import figure
from bokeh.resources import INLINE

from megatron_dip.report.colours import BOUND, IDLE, KIND_LABEL, colour_of, modules_of, rank_colour
from megatron_dip.report.tables import TIMELINE_HEADER, headline, memory_unit, time_unit, timeline_rows
from megatron_dip.report.trace import StageKey, held_over_time, stage_facts, stage_key
from megatron_dip.spec.codec import write_atomically
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.timeline import Timeline

_TOOLS = "xpan,xwheel_zoom,xbox_zoom,reset,save"
_TOOLTIPS = [
    ("stage", "@module @kind_label, chunk @vp_stage"), ("microbatch", "@microbatch, part @sub_microbatch"), ("from", "@start_ms{0.000} to @end_ms{0.000} ms"),
    ("takes", "@takes_ms{0.000} ms"), ("of it", "@facts"),
]
_STYLE = "font-family: system-ui, sans-serif; font-size: 14px; max-width: 70em"


def write_page(timelines: Sequence[Timeline], plans: Sequence[Plan | None], path: Path, *, title: str) -> None:
    """Writes one page with a chart for each timeline, all on one time axis, and of plans the memory of each rank below.

    Raises:
        InputError: there is nothing to draw, or the file cannot be written.
    """
    pairs = [(timeline, plan) for timeline, plan in zip(timelines, plans, strict=True) if timeline.bars]
    if not pairs:
        raise InputError("FILE", [timeline.title for timeline in timelines], "no stages to draw", "give a plan or timeline with stages")
    unit, unit_name = time_unit(max(timeline.makespan for timeline, _ in pairs))
    modules = modules_of(timeline for timeline, _ in pairs)
    shared = Range1d(start=0, end=max(timeline.makespan for timeline, _ in pairs) / unit * 1.005, bounds="auto")
    parts: list[LayoutDOM] = [Div(text=f"<h2>{escape(title)}</h2>", stylesheets=[f":host {{{_STYLE}}}"])]
    for timeline, plan in pairs:
        parts.append(_stages(timeline, plan, modules, shared, unit, unit_name))
        if plan is not None and any(stage.mem_delta_start for stage in plan.stages):
            parts.append(_memory(timeline, plan, shared, unit, unit_name))
    parts.append(Div(text=f"<p>Wheel: zoom. Drag: move. Click the legend: hide. Dashed: lower bound, capacity.</p>{_table(timeline_rows([timeline for timeline, _ in pairs]))}",
                     stylesheets=[f":host {{{_STYLE}}}"]))
    _write(column(*parts, sizing_mode="stretch_width"), path, title)


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = ["".join(f"<{'td' if at else 'th'} style='padding: 0 1em 0 0; text-align: left'>{escape(cell)}</{'td' if at else 'th'}>" for cell in cells)
             for at, cells in enumerate([TIMELINE_HEADER, *rows])]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def _stages(timeline: Timeline, plan: Plan | None, modules: Sequence[str], shared: Range1d, unit: float, unit_name: str) -> figure:
    origin = min(bar.start for bar in timeline.bars)
    facts: dict[StageKey, str] = {}
    if plan is not None:
        facts = {stage_key(stage): ", ".join(f"{name} {value}" for name, value in stage_facts(stage).items()) for stage in plan.stages}
    chart = figure(
        title=headline(timeline, plan, unit, unit_name), x_range=shared,
        y_range=Range1d(start=timeline.ranks - 0.5, end=-0.5), height=140 + 26 * min(timeline.ranks, 32), tools=_TOOLS, output_backend="webgl",
        sizing_mode="stretch_width", y_axis_label="rank", x_axis_label=f"time in {unit_name}",
    )
    chart.background_fill_color = IDLE
    chart.ygrid.visible = False
    chart.yaxis.ticker = list(range(0, timeline.ranks, -(-timeline.ranks // 32)))
    series: dict[tuple[str, str], list[Any]] = {}
    for bar in timeline.bars:
        series.setdefault((bar.module, bar.kind), []).append(bar)
    for (module, kind), bars in sorted(series.items(), key=lambda item: (modules.index(item[0][0]), list(KIND_LABEL).index(item[0][1]))):
        source = ColumnDataSource({
            "rank": [bar.rank for bar in bars], "left": [(bar.start - origin) / unit for bar in bars], "right": [(bar.end - origin) / unit for bar in bars],
            "module": [module] * len(bars), "kind_label": [KIND_LABEL[kind]] * len(bars), "vp_stage": [bar.vp_stage for bar in bars],
            "microbatch": [bar.microbatch for bar in bars], "sub_microbatch": [bar.sub_microbatch for bar in bars],
            "start_ms": [(bar.start - origin) / 1e6 for bar in bars], "end_ms": [(bar.end - origin) / 1e6 for bar in bars],
            "takes_ms": [(bar.end - bar.start) / 1e6 for bar in bars], "facts": [facts.get(stage_key(bar), "measured") for bar in bars],
        })
        chart.hbar(y="rank", left="left", right="right", height=0.84, source=source, color=colour_of(module, kind, modules), line_width=0,
                   legend_label=f"{module} {KIND_LABEL[kind]}")
    chart.add_tools(HoverTool(tooltips=_TOOLTIPS))
    _finish(chart)
    if plan is not None and plan.lower_bound > 0:
        chart.add_layout(Span(location=plan.lower_bound / unit, dimension="height", line_color=BOUND, line_dash="dashed"))
    return chart


def _memory(timeline: Timeline, plan: Plan, shared: Range1d, unit: float, unit_name: str) -> figure:
    capacity = min(plan.memory_capacity) if plan.memory_capacity is not None else None
    largest = max(*plan.peak_memory, capacity or 0)
    size, size_name = memory_unit(largest)
    said = f"memory: peak {max(plan.peak_memory) / size:.4g} {size_name}" + (f", capacity {capacity / size:.4g} {size_name}" if capacity is not None else "")
    chart = figure(
        title=said, height=220, x_range=shared, y_range=Range1d(start=0, end=1.1 * largest / size), tools=_TOOLS, sizing_mode="stretch_width",
        y_axis_label=f"{size_name} held", x_axis_label=f"time in {unit_name}",
    )
    named = range(plan.ranks) if plan.ranks <= 8 else (0, plan.ranks - 1)
    for rank, steps in enumerate(held_over_time(timeline, plan)):
        source = ColumnDataSource({
            "at": [*(step.instant_ns / unit for step in steps), timeline.makespan / unit],
            "held": [step.held_bytes / size for step in [*steps, steps[-1]]], "rank": [rank] * (len(steps) + 1),
        })
        extra: dict[str, Any] = {"legend_label": f"rank {rank}"} if rank in named else {}
        chart.step(x="at", y="held", source=source, mode="after", line_width=1, color=rank_colour(rank, plan.ranks), **extra)
    chart.add_tools(HoverTool(tooltips=[("rank", "@rank"), (size_name, "@held{0.000}")]))
    if capacity is not None:
        chart.add_layout(Span(location=capacity / size, dimension="width", line_color=BOUND, line_dash="dashed"))
    _finish(chart)
    return chart


def _finish(chart: figure) -> None:
    chart.toolbar.active_scroll = next(tool for tool in chart.tools if isinstance(tool, WheelZoomTool))
    chart.toolbar.logo = None
    chart.xaxis.formatter = NumeralTickFormatter(format="0,0.[000]")
    if chart.legend:
        chart.legend.click_policy = "hide"
        chart.legend.orientation = "horizontal"
        chart.legend.label_text_font_size = "8pt"
        chart.legend.location = "left"
        chart.legend.border_line_color = None
        chart.add_layout(chart.legend[0], "above")


def _write(layout: LayoutDOM, path: Path, title: str) -> None:
    write_atomically(path, file_html(layout, INLINE, title=title).encode(errors="backslashreplace"))


# --- the playground ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaygroundCase:
    """One position of the sliders."""

    position: tuple[int, ...]
    """The value of each slider."""
    timelines: Mapping[str, Timeline]
    """Name of a system -> what it does with the same batch."""


_CHOOSE = """
const key = sliders.map((slider, index) => values[index][slider.value]).join(" ");
const systems = cases[key];
let longest = 0;
for (const system of systems) longest = Math.max(longest, system.makespan);
systems.forEach((system, index) => {
  sources[index].data = {rank: system.rank, left: system.left, right: system.right, color: system.colour.map(at => colours[at]),
                         microbatch: system.microbatch, label: system.colour.map(at => labels[at])};
  charts[index].title.text = system.title;
  charts[index].y_range.start = system.ranks - 0.5;
});
shared.end = 1.005 * longest;
sliders.forEach((slider, index) => { slider.title = names[index] + " " + values[index][slider.value]; });
"""


def write_playground(cases: Sequence[PlaygroundCase], sliders: Sequence[str], path: Path, *, title: str, explanation: str) -> None:
    """Writes one page on which sliders choose among ``cases``, one for every combination of the sliders' values.

    Args:
        sliders: names, in the order of a case's position.
        explanation: a paragraph below the title.
    """
    modules = modules_of(timeline for case in cases for timeline in case.timelines.values())
    kinds = list(KIND_LABEL)
    colours = [colour_of(module, kind, modules) for module in modules for kind in kinds]
    labels = [f"{module} {KIND_LABEL[kind]}" for module in modules for kind in kinds]
    values = [sorted({case.position[index] for case in cases}) for index in range(len(sliders))]
    assert len(cases) == len({case.position for case in cases})
    known = {
        " ".join(map(str, case.position)): [_series(name, timeline, modules, kinds) for name, timeline in case.timelines.items()] for case in cases
    }
    assert Counter(len(series) for series in known.values()).keys() == {len(cases[0].timelines)}
    shared = Range1d(start=0, end=1)
    sources, charts = [], []
    for _ in cases[0].timelines:
        source = ColumnDataSource({"rank": [], "left": [], "right": [], "color": [], "microbatch": [], "label": []})
        chart = figure(title=" ", x_range=shared, y_range=Range1d(start=0.5, end=-0.5), height=230, tools=_TOOLS, sizing_mode="stretch_width", y_axis_label="rank")
        chart.background_fill_color = IDLE
        chart.ygrid.visible = False
        chart.yaxis.ticker = list(range(64))
        chart.hbar(y="rank", left="left", right="right", height=0.84, color="color", line_color="white", line_width=0.3, source=source)
        chart.add_tools(HoverTool(tooltips=[("stage", "@label"), ("microbatch", "@microbatch"), ("from", "@left to @right ms")]))
        _finish(chart)
        sources.append(source)
        charts.append(chart)
    charts[-1].xaxis.axis_label = "time in ms"
    controls = [Slider(start=0, end=max(1, len(of_slider) - 1), step=1, value=(len(of_slider) - 1) // 2, title=name, show_value=False)
                for name, of_slider in zip(sliders, values, strict=True)]
    choose = CustomJS(args={"sliders": controls, "values": values, "names": list(sliders), "cases": known, "sources": sources, "charts": charts,
                            "shared": shared, "colours": colours, "labels": labels}, code=_CHOOSE)
    for control in controls:
        control.js_on_change("value", choose)
    legend = " ".join(
        f'<span style="white-space:nowrap"><span style="display:inline-block;width:1em;height:1em;background:{colour}"></span> {escape(label)}</span>'
        for colour, label in zip(colours, labels, strict=True) if any(colours.index(colour) in series["colour"] for of in known.values() for series in of)
    )
    head = Div(text=f"<h2>{escape(title)}</h2><p>{escape(explanation)}</p><p>{legend}</p>", stylesheets=[f":host {{{_STYLE}}}"])
    layout = column(head, row(*controls), *charts, sizing_mode="stretch_width")
    document = Document()
    document.add_root(layout)
    document.js_on_event("document_ready", choose)
    write_atomically(path, file_html(document, INLINE, title=title).encode(errors="backslashreplace"))


def _series(name: str, timeline: Timeline, modules: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """A timeline in the form that the page's script takes; times in ms, rounded to 0.01."""
    return {
        "title": f"{name}: {timeline.makespan / 1e6:.1f} ms, {100 * timeline.bubble_fraction:.1f} % bubbles", "ranks": timeline.ranks,
        "makespan": round(timeline.makespan / 1e6, 2), "rank": [bar.rank for bar in timeline.bars],
        "left": [round(bar.start / 1e6, 2) for bar in timeline.bars], "right": [round(bar.end / 1e6, 2) for bar in timeline.bars],
        "colour": [modules.index(bar.module) * len(kinds) + kinds.index(bar.kind) for bar in timeline.bars],
        "microbatch": [bar.microbatch for bar in timeline.bars],
    }
