"""The process groups of a rank: two for messages along the pipeline, one on gloo for what the ranks of a replica tell each other.

Messages to a higher pipeline rank and messages to a lower one go through groups of their own, so that every directed pair of ranks has
its own NCCL communicator, and a channel's messages never wait for those of the opposite direction. The control group holds all ranks
that work on one batch (pipeline x tensor x context), on gloo also where messages go over NCCL: plans and fingerprints are host data.
The peers group joins the ranks of one place in all replicas, so that a replica that cannot go on tells the others.
"""

from __future__ import annotations

import datetime
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_dip.runtime.startup import check_start


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineGroups:
    ranks: tuple[int, ...]
    """Global ranks of the pipeline group, by pipeline rank."""
    rank: int
    """This process's pipeline rank."""
    up: dist.ProcessGroup | None
    """Carries messages to higher pipeline ranks; None with one rank."""
    down: dist.ProcessGroup | None
    """Carries messages to lower pipeline ranks."""
    control: dist.ProcessGroup
    """All ranks of the replica, gloo."""
    control_ranks: tuple[int, ...]
    """Global ranks of the control group, ascending."""
    peers: dist.ProcessGroup | None
    """The ranks in this one's place in every replica, gloo; None with one replica."""
    replica_of: Mapping[int, Hashable]
    """Global rank of each peer -> its replica, as given to :func:`new_process_groups`."""
    timeout_s: float
    """How long a rank waits for another before it gives up."""

    @property
    def num_ranks(self) -> int:
        return len(self.ranks)


def new_process_groups(
    pipeline_ranks: Sequence[int], replica: Hashable, *, backend: str = "gloo", timeout_s: float = 600.0
) -> PipelineGroups:
    """Makes the groups of every replica; all processes of the job must call it together.

    Args:
        pipeline_ranks: global ranks of this process's pipeline group, by pipeline rank.
        replica: equal on all ranks that work on the same batch (the data-parallel rank).
        backend: of the pipeline messages: ``nccl`` for CUDA tensors, ``gloo`` for CPU tensors (and, staged, for CUDA in tests).
        timeout_s: after this long without a message or answer a rank gives up with an error.

    Raises:
        InputError: NCCL was initialised in a way under which programs hang (:mod:`megatron_dip.runtime.startup`).
    """
    if backend == "nccl":
        settings = check_start(dist.distributed_c10d._get_default_group(), cuda_runs=torch.cuda.is_initialized())
        if dist.get_rank() == 0:
            print(settings.describe(), flush=True)
    timeout = datetime.timedelta(seconds=timeout_s)
    mine = (tuple(pipeline_ranks), replica)
    every: list[tuple[tuple[int, ...], Hashable]] = [mine] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    me = dist.get_rank()
    up = down = control = None
    # Groups are made by all processes in one order, which the gathered list gives: first seen, first made.
    for ranks in dict.fromkeys(ranks for ranks, _ in every):
        if len(ranks) == 1:
            continue
        directions = [dist.new_group(list(ranks), timeout=timeout, backend=backend) for _ in range(2)]
        if me in ranks:
            up, down = directions
    members_of: dict[Hashable, list[int]] = {}
    for rank, (_, one) in enumerate(every):
        members_of.setdefault(one, []).append(rank)
    for members in members_of.values():
        group = dist.new_group(members, timeout=timeout, backend="gloo")
        if me in members:
            control = group
    assert control is not None
    control_ranks = tuple(members_of[replica])
    peers = None
    replica_of: dict[int, Hashable] = {me: replica}
    if len(members_of) > 1:
        for place in range(len(control_ranks)):
            in_place = {members[place]: one for one, members in members_of.items()}
            group = dist.new_group(sorted(in_place), timeout=timeout, backend="gloo")
            if me in in_place:
                peers, replica_of = group, in_place
    return PipelineGroups(
        ranks=tuple(pipeline_ranks), rank=tuple(pipeline_ranks).index(me), up=up, down=down, control=control,
        control_ranks=control_ranks, peers=peers, replica_of=replica_of, timeout_s=timeout_s,
    )
