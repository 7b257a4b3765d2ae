"""Replicas that share experts agree on one order of stages.

Under expert parallelism the experts of a layer are spread over replicas, and every forward and backward of such a layer exchanges tokens
with all of them: linked replicas must run these stages in one order, whatever their own batches hold. So the planner ranks of linked
replicas tell each other their batches' metadata, each makes the same plan from them (:mod:`megatron_dip.planner.linked`), and they compare
the orders before they run them.
"""

from __future__ import annotations

import datetime
from collections.abc import Hashable, Sequence

import torch.distributed as dist

from megatron_dip.planner.linked import order_digest
from megatron_dip.runtime.p2p import PeerError
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.workload import Microbatch

Batch = list[Microbatch]


class LinkedReplicas:
    """One for each planner rank; its methods are collective over the planner ranks of the linked replicas.

    Args:
        module: whose stages join the replicas.
        index: of this replica among the linked ones.
    """

    def __init__(self, group: dist.ProcessGroup, module: str, index: int) -> None:
        self._group = group
        self.module = module
        self.index = index
        self.num_replicas = dist.get_world_size(group)

    def exchange(self, batches: Sequence[Batch | None]) -> list[Batch | None]:
        """For each batch of this replica (None: it could not be read) the microbatches of all linked replicas, one replica's behind the
        other's; None where a replica has none. As many as the replica has that sees the fewest ahead."""
        every: list[list[Batch | None]] = [[] for _ in range(self.num_replicas)]
        dist.all_gather_object(every, list(batches), group=self._group)
        joint: list[Batch | None] = []
        for of_replicas in zip(*every, strict=False):
            known = [batch for batch in of_replicas if batch is not None]
            joint.append([microbatch for batch in known for microbatch in batch] if len(known) == self.num_replicas else None)
        return joint

    def split(self, joint: Sequence[Microbatch]) -> list[Sequence[Microbatch]]:
        """What :meth:`exchange` put together, by replica. Raises InputError where replicas have other numbers of microbatches."""
        size, rest = divmod(len(joint), self.num_replicas)
        if rest:
            raise InputError(
                "microbatches", len(joint), f"are not the same number in each of {self.num_replicas} replicas that share experts",
                "give every replica the same number",
            )
        return [joint[index * size : (index + 1) * size] for index in range(self.num_replicas)]

    def compare(self, plan: Plan | None) -> Exception | None:
        """What keeps the linked replicas from running their plans (None: there is no plan here) together; None: nothing."""
        every: list[bytes | None] = [None] * self.num_replicas
        dist.all_gather_object(every, None if plan is None else order_digest(plan, self.module), group=self._group)
        if None in every:
            return PeerError("a replica that shares experts with this one could not prepare the iteration, so none runs it")
        if len(set(every)) > 1:
            return InputError(
                "plan", self.module, "replicas that share experts would run its stages in different orders",
                "give all replicas the same flags, files and version of megatron_dip",
            )
        return None


def link_replicas(
    replica: Hashable, joined_ranks: Sequence[int], planner_rank: int, module: str, timeout_s: float
) -> LinkedReplicas | None:
    """Finds out which replicas are linked and makes their planner ranks' group; all processes of the job must call it together.

    Args:
        replica: of this process, equal on all ranks that work on the same batch.
        joined_ranks: global ranks with which this process exchanges tokens.
        planner_rank: of this process's replica.
        module: whose stages join the replicas.

    Returns:
        This planner rank's link; None on ranks that do not plan, and where no replica is linked to another.
    """
    replica_of: list[Hashable] = [None] * dist.get_world_size()
    dist.all_gather_object(replica_of, replica)
    linked = tuple(sorted({replica_of[rank] for rank in joined_ranks}, key=repr))
    every: list[tuple[tuple[Hashable, ...], int]] = [(linked, planner_rank)] * dist.get_world_size()
    dist.all_gather_object(every, (linked, planner_rank))
    mine: LinkedReplicas | None = None
    me = dist.get_rank()
    for replicas in dict.fromkeys(replicas for replicas, _ in every):
        if len(replicas) == 1:
            continue
        planners = sorted({planner for others, planner in every if others == replicas})
        group = dist.new_group(planners, timeout=datetime.timedelta(seconds=timeout_s), backend="gloo")
        if me in planners:
            mine = LinkedReplicas(group, module, planners.index(me))
    return mine
