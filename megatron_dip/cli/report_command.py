"""Draw plans and measured iterations as a Gantt chart, one panel each on a common time axis, and print their figures.

A name that ends in .html gives one page that needs no network, with zoom, hover and memory. Pictures need matplotlib (the extra "pictures"), pages Bokeh
(the extra "html").
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

PICTURES = (".png", ".svg", ".pdf")
PAGE = ".html"
SUMMARY = "draw plans and measured iterations as a Gantt chart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="a plan or a timeline (JSON)")
    parser.add_argument("--output", type=Path, required=True, metavar="PICTURE", help="where to write: a picture (.png, .svg, .pdf), or a page with zoom and hover (.html)")
    parser.add_argument("--title", default="Pipeline iterations", help="heading of the picture")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    from megatron_dip.cli.output import print_json
    from megatron_dip.report.tables import timeline_table
    from megatron_dip.report.timeline import read_timeline
    from megatron_dip.spec.codec import check_outputs
    from megatron_dip.spec.errors import InputError

    check_outputs({"--output": args.output}, args.files)
    suffix = args.output.suffix.lower()
    if suffix not in (*PICTURES, PAGE):
        raise InputError("--output", str(args.output), "is no kind of picture", f"end its name in one of {', '.join((*PICTURES, PAGE))}")
    extra, package = ("html", "bokeh") if suffix == PAGE else ("pictures", "matplotlib")
    if find_spec(package) is None:
        raise InputError("--output", str(args.output), f"needs {package}, which is not installed", f'pip install "megatron-dip[{extra}]"')
    read = [read_timeline(path) for path in args.files]
    timelines, plans = [timeline for timeline, _ in read], [plan for _, plan in read]
    if suffix == PAGE:
        from megatron_dip.report.page import write_page

        write_page(timelines, plans, args.output, title=args.title)
    else:
        from megatron_dip.report.gantt import draw_gantt

        draw_gantt(timelines, args.output, title=args.title, plans=plans)
    if args.json:
        print_json({"output": str(args.output), "iterations": [
            {"title": timeline.title, "ranks": timeline.ranks, "stages": len(timeline.bars), "makespan_ns": timeline.makespan,
             "bubble_fraction": timeline.bubble_fraction} for timeline in timelines
        ]})
        return 0
    print(timeline_table(timelines))
    print(f"wrote {args.output}")
    return 0
