"""Items of the data iterator on their way to the replicas that train them: groups of their own, called on one background thread.

Ranks of one place in their replicas (pipeline x tensor x context) exchange among themselves, so that all ranks of a replica keep
getting the same data.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_dip.iteration.travel import PackedItem, unpack
from megatron_dip.runtime.groups import PipelineGroups


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeGroups:
    """Of one rank."""

    has_data: bool
    """Whether this rank reads data."""
    place: dist.ProcessGroup | None
    """The ranks in this one's place of all replicas, by replica; None without data."""
    place_ranks: tuple[int, ...]
    """Their global ranks."""
    own: dist.ProcessGroup | None
    """The ranks of this replica that read data; None where it is this one alone."""
    own_source: int
    """Global rank of the replica's planner rank."""


def make_exchange_groups(groups: PipelineGroups, timeout_s: float, *, has_data: bool, can_look_ahead: bool) -> ExchangeGroups | None:
    """Collective over all ranks of the job; None on all of them where replicas do not read data in the same places, or some cannot
    look ahead."""
    mine = (tuple(groups.control_ranks), tuple(sorted(groups.replica_of)), has_data, can_look_ahead)
    every: list[Any] = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    planners = {ranks[0] for ranks, _, _, _ in every}
    can = all(sees for _, _, data, sees in every if data) and all(every[rank][2] for rank in planners)
    alike = all(len({every[rank][2] for rank in place}) == 1 for _, place, _, _ in every)
    if not (can and alike):
        return None
    timeout = datetime.timedelta(seconds=timeout_s)
    me = dist.get_rank()
    place = own = None
    place_ranks: tuple[int, ...] = ()
    for ranks in dict.fromkeys(ranks for _, ranks, data, _ in every if data):
        group = dist.new_group(list(ranks), timeout=timeout, backend="gloo")
        if me in ranks:
            place, place_ranks = group, ranks
    for ranks in dict.fromkeys(ranks for ranks, _, _, _ in every):
        reading = [rank for rank in ranks if every[rank][2]]
        if len(reading) > 1:
            group = dist.new_group(reading, timeout=timeout, backend="gloo")
            if me in reading:
                own = group
    return ExchangeGroups(has_data=has_data, place=place, place_ranks=place_ranks, own=own, own_source=groups.control_ranks[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    items: list[Any]
    """What this replica trains, in the order of its share."""
    bytes_sent: int
    bytes_received: int
    seconds: float


def exchange_items(
    items: Sequence[Any], packed: Sequence[PackedItem | None], shares: Sequence[Sequence[int]], replica: int, groups: ExchangeGroups
) -> Exchanged:
    """Sends what was dealt away and receives what comes; called by the ranks of a place together.

    Args:
        items: of this rank, by place in its replica.
        packed: the same, ready to travel.
        shares: each replica's microbatches as numbers in the global batch, of which number n was read by replica n mod their number.
    """
    began, count = time.perf_counter(), len(shares)
    waiting: list[tuple[dist.Work, torch.Tensor]] = []
    bytes_sent = 0
    for other, share in enumerate(shares):
        for number in share if other != replica else ():
            if number % count == replica:
                item = packed[number // count]
                assert item is not None, "an item that cannot travel was dealt away"
                for message in (torch.tensor([item.num_bytes], dtype=torch.int64), item.join()):
                    waiting.append((_sent(message, groups.place_ranks[other], groups.place), message))
                bytes_sent += item.num_bytes
    received: dict[int, torch.Tensor] = {}
    # In the sender's order: by its replica's share, which is the order of numbers among those that come.
    for source in range(count):
        for number in shares[replica]:
            if source != replica and number % count == source:
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, groups.place_ranks[source], group=groups.place)
                whole = torch.empty(int(size), dtype=torch.uint8)
                dist.recv(whole, groups.place_ranks[source], group=groups.place)
                received[number] = whole
    for work, _ in waiting:
        work.wait()
    return Exchanged(
        items=[items[number // count] if number % count == replica else unpack(received[number]) for number in shares[replica]],
        bytes_sent=bytes_sent, bytes_received=sum(whole.numel() for whole in received.values()), seconds=time.perf_counter() - began,
    )


def _sent(message: torch.Tensor, to: int, group: dist.ProcessGroup | None) -> dist.Work:
    work = dist.isend(message, to, group=group)
    assert work is not None
    return work
