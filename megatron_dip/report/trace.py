"""Traces for chrome://tracing and ui.perfetto.dev: the trace event format, one process for each timeline, one thread for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_dip.spec.plan import Plan
from megatron_dip.spec.timeline import Timeline

KIND_LETTER = {"fw": "F", "bw": "B", "w": "W"}


def trace_events(timelines: Sequence[tuple[Timeline, Plan | None]]) -> dict[str, Any]:
    """The trace as one JSON object; times are microseconds. Where the plan is given, arrows show the messages between ranks."""
    events: list[dict[str, Any]] = []
    for process, (timeline, plan) in enumerate(timelines):
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": timeline.title}})
        for rank in range(timeline.ranks):
            events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}})
        for bar in timeline.bars:
            events.append(
                {
                    "ph": "X", "name": f"{bar.module} {KIND_LETTER[bar.kind]}{bar.microbatch}.{bar.sub_microbatch}", "cat": bar.kind,
                    "pid": process, "tid": bar.rank, "ts": bar.start / 1000, "dur": (bar.end - bar.start) / 1000,
                    "args": {"chunk": bar.vp_stage, "microbatch": bar.microbatch, "sub_microbatch": bar.sub_microbatch},
                }
            )
        if plan is not None:
            events.extend(_message_arrows(timeline, plan, process))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _message_arrows(timeline: Timeline, plan: Plan, process: int) -> list[dict[str, Any]]:
    bars = {(bar.rank, bar.kind, bar.module, bar.vp_stage, bar.microbatch, bar.sub_microbatch): bar for bar in timeline.bars}
    of_stage = [
        bars[stage.rank, stage.kind, stage.module, stage.vp_stage, stage.microbatch, stage.sub_microbatch] for stage in plan.stages
    ]
    events: list[dict[str, Any]] = []
    for consumer, tags in plan.inputs.items():
        for tag in tags:
            source, target = of_stage[plan.outputs[tag]], of_stage[consumer]
            arrow = {"name": "message", "cat": "p2p", "id": tag, "pid": process}
            events.append({**arrow, "ph": "s", "tid": source.rank, "ts": source.end / 1000 - 0.001})
            events.append({**arrow, "ph": "f", "bp": "e", "tid": target.rank, "ts": target.start / 1000})
    return events
