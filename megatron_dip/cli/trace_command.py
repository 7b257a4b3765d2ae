"""Write plans and measured iterations as a trace that chrome://tracing and ui.perfetto.dev open."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "write plans and measured iterations as a Chrome/Perfetto trace"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path, help="a plan or a timeline (JSON)")
    parser.add_argument("--output", type=Path, required=True, metavar="TRACE", help="where to write the trace (.json)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    import msgspec

    from megatron_dip.cli.output import print_json
    from megatron_dip.report.timeline import read_timeline
    from megatron_dip.report.trace import trace_events
    from megatron_dip.spec.codec import check_outputs, write_atomically
    from megatron_dip.spec.errors import InputError

    check_outputs({"--output": args.output}, args.files)
    events = trace_events([read_timeline(path) for path in args.files])
    try:
        data = msgspec.json.encode(events)
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can escape and no text can hold
        raise InputError(
            ", ".join(map(str, args.files)), "...", "hold a character that is no text", "remove the lone \\ud800 to \\udfff escapes"
        ) from error
    write_atomically(args.output, data)
    if args.json:
        print_json({"output": str(args.output), "files": [str(path) for path in args.files], "events": len(events["traceEvents"])})
    else:
        print(f"wrote {args.output}")
    return 0
