"""Timelines out of files."""

from __future__ import annotations

from pathlib import Path

from megatron_dip.schedule.checker import inspect_plan
from megatron_dip.spec.codec import decode_plan, decode_timeline, format_of, read_file
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import PLAN_FORMAT, Plan
from megatron_dip.spec.timeline import Timeline, plan_timeline
from megatron_dip.spec.workload import WORKLOAD_FORMAT


def read_timeline(path: Path) -> tuple[Timeline, Plan | None]:
    """Reads a timeline, or a plan together with its timeline. Raises InputError for any other file, and for plans that do not hold."""
    data = read_file(path)
    kind = format_of(data)
    if kind == WORKLOAD_FORMAT:
        raise InputError(f"{path.name}: format", kind, "this is a workload, which has no times yet", "give a plan (`megatron-dip plan`) or a timeline")
    if kind != PLAN_FORMAT:
        return decode_timeline(data, path), None
    plan = decode_plan(data, path)
    if problems := inspect_plan(plan).problems:
        raise InputError(path.name, problems[0], "the plan does not hold", "see `megatron-dip check`, and give a plan that it accepts")
    return plan_timeline(plan, f"plan {path.name}"), plan
