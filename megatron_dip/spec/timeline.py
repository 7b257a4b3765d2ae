"""When each stage of one iteration ran, planned or measured: the ``megatron-dip/timeline/1`` format."""

from __future__ import annotations

from typing import Literal

import msgspec

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan, StageKind

TIMELINE_FORMAT = "megatron-dip/timeline/1"


class Bar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stage on one rank."""

    rank: int
    kind: StageKind
    module: str
    """Several modules in one stage are joined by ``+``."""
    vp_stage: int
    microbatch: int
    sub_microbatch: int
    start: int
    """ns since the first start of the timeline."""
    end: int
    """ns"""


class Timeline(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: Literal["megatron-dip/timeline/1"] = "megatron-dip/timeline/1"
    title: str
    ranks: int
    bars: list[Bar]

    def validate(self) -> None:
        """Raises InputError for bars that cannot be: of no rank of the timeline, or that end before they start."""
        if not 1 <= self.ranks <= _MAX_RANKS:
            raise InputError("ranks", self.ranks, f"outside 1 to {_MAX_RANKS}", "give the number of pipeline ranks")
        for index, bar in enumerate(self.bars):
            if not 0 <= bar.rank < self.ranks:
                raise InputError(f"bars[{index}].rank", bar.rank, f"the timeline has ranks 0 to {self.ranks - 1}", "give one of them")
            if not -_MAX_TIME_NS <= bar.start <= bar.end <= _MAX_TIME_NS:
                raise InputError(f"bars[{index}]", [bar.start, bar.end], "ends before it starts, or lies years away", "give start and end in ns")

    @property
    def makespan(self) -> int:
        """ns from the first start to the last end."""
        if not self.bars:
            return 0
        return max(bar.end for bar in self.bars) - min(bar.start for bar in self.bars)

    @property
    def bubble_fraction(self) -> float:
        """Idle time of all ranks within the makespan, as a share."""
        if self.makespan == 0:
            return 0.0
        busy = sum(bar.end - bar.start for bar in self.bars)
        return 1.0 - busy / (self.ranks * self.makespan)


_MAX_RANKS = 1 << 16
_MAX_TIME_NS = 10**18


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
