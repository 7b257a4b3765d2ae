"""Whose microbatches a global batch's are to be: decided once, on the first replica, for all.

In: what every replica read of a batch (:class:`BatchRead`), how fast items travel. Out: a :class:`Verdict`, the same for all ranks. The
first pass goes by estimated work. Where plans take no longer than the time there is, replicas plan what they were dealt and a second pass
goes by planned times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_dip.partition.deal import Deal, deal
from megatron_dip.partition.second_pass import SecondPass
from megatron_dip.spec.workload import Microbatch

logger = logging.getLogger(__name__)

WORTH = 0.005
"""A deal moves data where it lowers the largest load by this share."""
_PROBED_EVERY = 16
"""Batches after which a link that was too slow is tried again."""

Estimate = Callable[[Sequence[Microbatch]], NDArray[np.int64]]
"""Microbatches -> ns on each pipeline rank [microbatches, ranks]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRead:
    """What a replica says of a batch ahead. Number n in the global batch of R replicas is place n // R in replica n mod R."""

    is_there: bool
    """False: fewer microbatches are ahead."""
    descriptions: list[Microbatch] | None
    """Instance lengths, by place; None: an item cannot be read, or cannot travel."""
    sizes: list[int]
    """Bytes of each item on its way, by place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """How fast items travel, and how long they may."""

    bytes_per_second: float
    """0: not measured."""
    iteration_s: float
    """0: not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    shares: list[list[int]] | None
    """Each replica's microbatches as numbers in the global batch; None: as read."""
    reason: str
    """Why as read; see ``BalanceFigures.left``."""
    imbalance_before: float = 1.0
    imbalance: float = 1.0
    """Of estimated loads, largest over mean."""
    planned_imbalance: float | None = None
    """Of planned times; None: plans were not at hand."""
    gain_ns: int = 0
    moves: int = 0


def microbatches_of(share: Sequence[int], read: Sequence[BatchRead]) -> list[Microbatch]:
    """Instance lengths of these numbers; empty where a replica could not tell."""
    microbatches = []
    for number in share:
        known = read[number % len(read)].descriptions
        if known is None:
            return []
        microbatches.append(known[number // len(read)])
    return microbatches


class Dealer:
    """On the first replica's planner rank.

    Args:
        estimate: work of microbatches.
    """

    def __init__(self, estimate: Estimate) -> None:
        self._estimate = estimate
        self._asked = 0
        self._second: SecondPass | None = None

    def first_pass(self, read: Sequence[BatchRead], link: Link) -> Verdict:
        """Deals by estimated work."""
        self._second = None
        counts = {len(one.descriptions) for one in read if one.descriptions is not None}
        if not all(one.is_there for one in read) or len(counts) > 1:
            return Verdict(shares=None, reason="short")
        if any(one.descriptions is None for one in read):
            return Verdict(shares=None, reason="unknown")
        (count,) = counts
        try:
            work = self._estimate(microbatches_of(range(count * len(read)), read))
            dealt = deal(work, len(read))
        except Exception as error:
            logger.warning("a global batch could not be dealt: %s: %s", type(error).__name__, error)
            return Verdict(shares=None, reason="unknown")
        if dealt.load_before_ns.max() - dealt.load_ns.max() < WORTH * dealt.load_before_ns.max():
            return Verdict(shares=None, reason="even", imbalance_before=dealt.imbalance_before, imbalance=dealt.imbalance_before)
        self._asked += 1
        if self._asked % _PROBED_EVERY and _is_too_slow(dealt, read, link):
            return Verdict(shares=None, reason="slow", imbalance_before=dealt.imbalance_before, imbalance=dealt.imbalance_before)
        self._second = SecondPass(work, dealt)
        return _verdict(dealt)

    def next_pass(self, planned_ns: Sequence[int], *, is_last: bool) -> tuple[Verdict, bool]:
        """Takes what plans of the last verdict's shares take on each replica (0: it could not be planned).

        Args:
            is_last: there is no time to plan another deal.

        Returns:
            The next deal to plan, or the best one so far; whether it is to be planned.
        """
        second = self._second
        assert second is not None, "a first pass dealt"
        if second.best is None and min(planned_ns) == 0:
            return _verdict(second.dealt), False
        following = None if second.tell(planned_ns) or is_last else second.following()
        if following is not None:
            return _verdict(following), True
        assert second.best is not None
        return replace(_verdict(second.best.dealt), planned_imbalance=second.best.imbalance), False


def _verdict(dealt: Deal) -> Verdict:
    return Verdict(
        shares=dealt.shares(), reason="", imbalance_before=dealt.imbalance_before, imbalance=dealt.imbalance,
        gain_ns=int(dealt.load_before_ns.max() - dealt.load_ns.max()), moves=dealt.moves,
    )


def _is_too_slow(dealt: Deal, read: Sequence[BatchRead], link: Link) -> bool:
    """Whether the replica with the most to send and receive would not be through when the iteration is."""
    if link.bytes_per_second <= 0 or link.iteration_s <= 0:
        return False
    traffic = [0] * len(read)
    for replica, share in enumerate(dealt.shares()):
        for number in share:
            source, place = number % len(read), number // len(read)
            if source != replica:
                traffic[source] += read[source].sizes[place]
                traffic[replica] += read[source].sizes[place]
    return max(traffic) / link.bytes_per_second > link.iteration_s
