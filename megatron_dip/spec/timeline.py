"""When each stage of one iteration ran, planned or measured: the ``megatron-dip/timeline/1`` format."""

from __future__ import annotations

from typing import Literal

import msgspec

from megatron_dip.spec.plan import StageKind

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
