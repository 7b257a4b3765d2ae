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
    from megatron_dip.report.gantt import SUFFIXES, draw_gantt
    from megatron_dip.report.tables import timeline_table
    from megatron_dip.report.timeline import read_timeline
    from megatron_dip.spec.codec import check_outputs
    from megatron_dip.spec.errors import InputError

    check_outputs({"--output": args.output}, args.files)
    if args.output.suffix.lower() not in SUFFIXES:
        raise InputError("--output", str(args.output), "is no kind of picture", f"end its name in one of {', '.join(SUFFIXES)}")
    read = [read_timeline(path) for path in args.files]
    timelines = [timeline for timeline, _ in read]
    draw_gantt(timelines, args.output, title=args.title, plans=[plan for _, plan in read])
    print(timeline_table(timelines))
    print(f"wrote {args.output}")
    return 0
