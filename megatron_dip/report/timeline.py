"""Timelines out of files."""

from __future__ import annotations

from pathlib import Path

from megatron_dip.spec.codec import load_plan, load_timeline, read_format
from megatron_dip.spec.plan import PLAN_FORMAT, Plan
from megatron_dip.spec.timeline import Timeline, plan_timeline


def read_timeline(path: Path) -> tuple[Timeline, Plan | None]:
    """Reads a timeline, or a plan together with its timeline. Raises InputError for any other file."""
    if read_format(path) == PLAN_FORMAT:
        plan = load_plan(path)
        return plan_timeline(plan, f"plan {path.name}"), plan
    return load_timeline(path), None
