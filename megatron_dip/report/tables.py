"""Tables in Markdown and figures over repeated measurements."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dip.spec.plan import Plan
from megatron_dip.spec.timeline import Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median and quartiles of repeated measurements, in their own unit."""

    median: float
    low_quartile: float
    high_quartile: float
    count: int


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value."""
    assert values, "nothing was measured"
    if len(values) == 1:
        return Spread(median=values[0], low_quartile=values[0], high_quartile=values[0], count=1)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=middle, low_quartile=low, high_quartile=high, count=len(values))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are set right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


TIMELINE_HEADER = ("iteration", "ms", "bubbles %", "busy % of each rank")


def timeline_table(timelines: Sequence[Timeline]) -> str:
    """Length, bubbles and each rank's busy share of some timelines, in Markdown."""
    return markdown_table(TIMELINE_HEADER, timeline_rows(timelines))


def timeline_rows(timelines: Sequence[Timeline]) -> list[list[str]]:
    """As :func:`timeline_table`, cell by cell."""
    rows = []
    for timeline in timelines:
        busy = [0] * timeline.ranks
        for bar in timeline.bars:
            busy[bar.rank] += bar.end - bar.start
        length = max(timeline.makespan, 1)
        rows.append(
            [
                printable(timeline.title), f"{timeline.makespan / 1e6:{'.2f' if timeline.makespan >= 10**6 else '.4g'}}", f"{100 * timeline.bubble_fraction:.1f}",
                " ".join(f"{100 * value / length:.0f}" for value in busy),
            ]
        )
    return rows


def printable(text: str) -> str:
    """Text that every font and file can hold: half of a surrogate pair, which JSON can escape, is shown as its escape."""
    return text.encode(errors="backslashreplace").decode()


def headline(timeline: Timeline, plan: Plan | None, unit: float, unit_name: str) -> str:
    """What stands above a chart: name, length, bubbles and size, and a plan's lower bound; ``unit`` and ``unit_name`` as of :func:`time_unit`."""
    said = f"{printable(timeline.title)}: {timeline.makespan / unit:.4g} {unit_name}, {100 * timeline.bubble_fraction:.1f} % bubbles"
    if plan is not None and plan.lower_bound > 0:
        said += f", lower bound {plan.lower_bound / unit:.4g} {unit_name}"
    microbatches = len({bar.microbatch for bar in timeline.bars})
    return said + f"; {timeline.ranks} ranks, {microbatches} microbatches, {len(timeline.bars)} stages"


def memory_unit(largest_bytes: int) -> tuple[float, str]:
    """Divisor of bytes and name of the unit that suits what ranks hold."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest_bytes >= unit:
            return unit, name
    return 1.0, "bytes"


def time_unit(longest_ns: int) -> tuple[float, str]:
    """Divisor of nanoseconds and name of the unit that suits a timeline."""
    if longest_ns >= 2_000_000_000:
        return 1e9, "s"
    if longest_ns >= 2_000_000:
        return 1e6, "ms"
    return 1e3, "us"
