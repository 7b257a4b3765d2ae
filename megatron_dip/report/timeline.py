"""Timelines out of plans and files."""

from __future__ import annotations

from pathlib import Path

from megatron_dip.spec.codec import load_plan, load_timeline, read_format
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import PLAN_FORMAT, Plan
from megatron_dip.spec.timeline import Bar, Timeline


def plan_timeline(plan: Plan, title: str) -> Timeline:
    """The plan's predicted times: a stage starts once its rank is free and every ``dep`` has ended ``lag`` ns ago."""
    end: dict[int, int] = {}
    bars: list[Bar] = []
    position = [0] * plan.ranks
    free_at = [0] * plan.ranks
    left = sum(map(len, plan.order))
    while left:
        before = left
        for rank, order in enumerate(plan.order):
            while position[rank] < len(order):
                stage = plan.stages[order[position[rank]]]
                if any(dep.stage not in end for dep in stage.deps):
                    break
                start = max([free_at[rank], *(end[dep.stage] + dep.lag for dep in stage.deps)])
                free_at[rank] = end[stage.id] = start + stage.duration
                bars.append(
                    Bar(
                        rank=rank, kind=stage.kind, module=stage.module, vp_stage=stage.vp_stage, microbatch=stage.microbatch,
                        sub_microbatch=stage.sub_microbatch, start=start, end=end[stage.id],
                    )
                )
                position[rank] += 1
                left -= 1
        if left == before:
            stuck = [order[at] for order, at in zip(plan.order, position, strict=True) if at < len(order)]
            raise InputError("order", stuck, "these stages wait for each other", "give a plan that `megatron-dip check` accepts")
    return Timeline(title=title, ranks=plan.ranks, bars=bars)


def read_timeline(path: Path) -> tuple[Timeline, Plan | None]:
    """Reads a timeline, or a plan together with its timeline. Raises InputError for any other file."""
    if read_format(path) == PLAN_FORMAT:
        plan = load_plan(path)
        return plan_timeline(plan, f"plan {path.name}"), plan
    return load_timeline(path), None
