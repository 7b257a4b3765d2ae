"""Draw plans and measured iterations as a Gantt chart, one panel each on a common time axis, and print their figures."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "draw plans and measured iterations as a Gantt chart"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="a plan or a timeline (JSON)")
    parser.add_argument("--output", type=Path, required=True, metavar="PICTURE", help="where to write the picture (.png, .svg or .pdf)")
    parser.add_argument("--title", default="Pipeline iterations", help="heading of the picture")


def run(args: argparse.Namespace) -> int:
    from megatron_dip.report.gantt import draw_gantt
    from megatron_dip.report.tables import timeline_table
    from megatron_dip.report.timeline import read_timeline

    timelines = [read_timeline(path)[0] for path in args.files]
    draw_gantt(timelines, args.output, title=args.title)
    print(timeline_table(timelines))
    print(f"wrote {args.output}")
    return 0
