"""Traces for chrome://tracing and ui.perfetto.dev: the trace event format, one process for each timeline, one thread for each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_dip.spec.plan import Plan, PlanStage
from megatron_dip.spec.timeline import Bar, Timeline

KIND_LETTER = {"fw": "F", "bw": "B", "w": "W"}


def trace_events(timelines: Sequence[tuple[Timeline, Plan | None]]) -> dict[str, Any]:
    """The trace as one JSON object; times are microseconds. Where the plan is given, arrows show the messages between ranks."""
    events: list[dict[str, Any]] = []
    for process, (timeline, plan) in enumerate(timelines, 1):  # viewers take process and thread 0 for the idle ones
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": timeline.title}})
        for rank in range(timeline.ranks):
            events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": rank + 1, "args": {"name": f"rank {rank}"}})
            events.append({"ph": "M", "name": "thread_sort_index", "pid": process, "tid": rank + 1, "args": {"sort_index": rank}})
        facts = {} if plan is None else {stage_key(stage): stage_facts(stage) for stage in plan.stages}
        for bar in timeline.bars:
            events.append(
                {
                    "ph": "X", "name": f"{bar.module} {KIND_LETTER[bar.kind]}{bar.microbatch}.{bar.sub_microbatch}", "cat": bar.kind,
                    "pid": process, "tid": bar.rank + 1, "ts": bar.start / 1000, "dur": (bar.end - bar.start) / 1000,
                    "args": {
                        "chunk": bar.vp_stage, "microbatch": bar.microbatch, "sub_microbatch": bar.sub_microbatch, **facts.get(stage_key(bar), {})
                    },
                }
            )
        if plan is not None:
            events.extend(_message_arrows(timeline, plan, process))
            events.extend(_memory_counters(timeline, plan, process))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


StageKey = tuple[int, str, str, int, int, int]


def stage_key(stage: Bar | PlanStage) -> StageKey:
    """What tells a stage of an iteration from all others."""
    return stage.rank, stage.kind, stage.module, stage.vp_stage, stage.microbatch, stage.sub_microbatch


def stage_facts(stage: PlanStage) -> dict[str, Any]:
    """What viewers show of a planned stage besides its times."""
    return {
        "stage": stage.id, "layers": f"{stage.layers[0]} to {stage.layers[0] + stage.layers[1] - 1}", "instances": stage.instances,
        "tokens": stage.tokens, "strategy": ", ".join(f"{name} x {count}" for name, count in Counter(stage.strategy).items()),
    }


def _message_arrows(timeline: Timeline, plan: Plan, process: int) -> list[dict[str, Any]]:
    bars = {stage_key(bar): bar for bar in timeline.bars}
    of_stage = [bars[stage_key(stage)] for stage in plan.stages]
    events: list[dict[str, Any]] = []
    for consumer, tags in plan.inputs.items():
        for tag in tags:
            source, target = of_stage[plan.outputs[tag]], of_stage[consumer]
            # Viewers pair arrows by this id alone, whatever process they are of.
            arrow = {"name": "message", "cat": "p2p", "id": f"{process}.{tag}", "pid": process}
            events.append({**arrow, "ph": "s", "tid": source.rank + 1, "ts": source.end / 1000 - 0.001})
            events.append({**arrow, "ph": "f", "bp": "e", "tid": target.rank + 1, "ts": target.start / 1000})
    return events


def _memory_counters(timeline: Timeline, plan: Plan, process: int) -> list[dict[str, Any]]:
    """What each rank holds over time, in GB, as counters."""
    return [
        {"ph": "C", "name": f"memory of rank {rank}, GB", "pid": process, "tid": rank + 1, "ts": instant / 1000, "args": {"GB": held / 1e9}}
        for rank, steps in enumerate(held_over_time(timeline, plan)) for instant, held in steps
    ]


class Held(NamedTuple):
    instant_ns: int
    held_bytes: int


def held_over_time(timeline: Timeline, plan: Plan) -> list[list[Held]]:
    """For each rank what it holds after each instant at which that changes; at equal times an end comes before a start."""
    bars = {stage_key(bar): bar for bar in timeline.bars}
    changes: list[dict[int, int]] = [{0: initial} for initial in plan.memory_initial]
    for stage in plan.stages:
        bar = bars[stage_key(stage)]
        for instant, delta in ((bar.start, stage.mem_delta_start), (bar.end, stage.mem_delta_end)):
            if delta:
                changes[stage.rank][instant] = changes[stage.rank].get(instant, 0) + delta
    found: list[list[Held]] = []
    for of_rank in changes:
        steps, held = [], 0
        for instant in sorted(of_rank):
            held += of_rank[instant]
            steps.append(Held(instant, held))
        found.append(steps)
    return found
