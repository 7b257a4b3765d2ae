"""Where an iteration's plan comes from: the background service of the planner rank, fed with the batches that lie ahead.

In: this iteration's batch and a look at the next ones. Out: on the planner rank (first pipeline, tensor and context rank of a replica) a packed plan;
with replicas that share experts, this replica's part of their joint plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dip.iteration.balance import ReplicaBalance
from megatron_dip.iteration.capture_batch import CapturedBatch
from megatron_dip.iteration.foreseen_metadata import ForeseenMetadata, JointRecording
from megatron_dip.iteration.linked_replicas import LinkedReplicas
from megatron_dip.iteration.lookahead import LookaheadIterator
from megatron_dip.planner.linked import own_part, union_of
from megatron_dip.planner.message import PackedPlan
from megatron_dip.planner.service import MAX_WAITING, PlanCounts, PlanService
from megatron_dip.runtime.p2p import PeerError
from megatron_dip.schedule.checker import check_columns, check_plan
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.plan_columns import PlanColumns, plan_of
from megatron_dip.spec.workload import Microbatch

PlanFunction = Callable[[Sequence[Microbatch], bool], Plan | PlanColumns]
"""(microbatches of this replica, forward only) -> plan; as columns it is one whose actions are what its order lowers to"""

UpcomingFunction = Callable[[int], Sequence[int]]
"""(iterations) -> number of microbatches in each of the next training iterations; fewer numbers where training ends before"""

PackFunction = Callable[[Plan | PlanColumns], PackedPlan]


@dataclass(frozen=True, slots=True)
class _Taken:
    """The last iteration's batch and plan, for a replay."""

    microbatches: Sequence[Microbatch]
    forward_only: bool
    plan: PackedPlan


class Foresight:
    """Reads the batches of the next iterations, on every rank alike, since data sets may draw random numbers.

    Args:
        metadata: instance lengths of one item of the data iterator, given the user's forward_step; or why they are not known.
        look_ahead: how many of the next iterations' batches are looked at.
        upcoming: tells how many microbatches these have; None: as many as the one that runs.
        joint: the ranks that run forward_step ahead together, where this is one of them.
    """

    def __init__(
        self, metadata: ForeseenMetadata, look_ahead: int, upcoming: UpcomingFunction | None, joint: JointRecording | None = None
    ) -> None:
        self._metadata = metadata
        self._joint = joint
        self._look_ahead = look_ahead
        self._upcoming = upcoming

    def look(
        self, forward_step: Callable[..., Any], lookahead: LookaheadIterator | None, num_microbatches: int, forward_only: bool,
        source: PlanSource | None, balance: ReplicaBalance | None,
    ) -> None:
        """Reads ahead; ``source``, on the planner rank, gets what was seen; with ``balance`` once it is dealt.

        To be called on all ranks that run forward_step ahead together, in every iteration (``lookahead`` None: where nothing is read).
        """
        if lookahead is not None and self._look_ahead > 0:
            self._look(forward_step, lookahead, num_microbatches, forward_only, source, balance)
        if self._joint is None:
            return
        if source is not None:
            self._joint.end()
            return

        def record(place: int) -> None:
            self._metadata.record(forward_step, None if lookahead is None else lookahead.peek(place + 1)[place])

        self._joint.follow(record)

    def _look(
        self, forward_step: Callable[..., Any], lookahead: LookaheadIterator, num_microbatches: int, forward_only: bool,
        source: PlanSource | None, balance: ReplicaBalance | None,
    ) -> None:
        def describe(item: Any) -> Microbatch | Exception:
            place = next(place for place, other in enumerate(lookahead.peek(sum(sizes))) if other is item)
            return self._metadata(forward_step, item, place)

        sizes = [num_microbatches] * self._look_ahead if forward_only or self._upcoming is None else self._upcoming(self._look_ahead)
        if balance is not None and balance.is_on:
            error = balance.offer(lookahead, sizes, describe)
            if error is not None and source is not None:
                source.count_unseen(lookahead, error)
            return
        if source is None:
            lookahead.peek(sum(sizes))
            return
        source.submit(list(lookahead.look_ahead(sizes, describe)), lookahead, forward_only)


class PlanSource:
    """Of a planner rank.

    Args:
        plan_function: makes plans; called on a background thread.
        quick_plan_function: makes a plan at once where the other is late or fails; None: wait as long as it takes.
        pack: makes a plan ready for sending, on the planner's thread.
        deadline_s: how long an iteration may wait for its plan.
        num_threads: batches planned side by side.
        unseen_deadline_s: the same for a batch that was not handed in ahead; None: no other.
        look_ahead: how many batches are handed in ahead at most.
        link: to the replicas that share experts with this one; None: there are none.
    """

    def __init__(
        self, plan_function: PlanFunction, quick_plan_function: PlanFunction | None, pack: PackFunction, *, deadline_s: float, num_threads: int,
        look_ahead: int, link: LinkedReplicas | None, unseen_deadline_s: float | None = None,
    ) -> None:
        self._unseen_deadline_s = unseen_deadline_s
        self._link = link
        self._deadline_s = deadline_s
        quick = None if quick_plan_function is None else _then(pack, self._own_part(quick_plan_function))
        # Training and evaluation foresee batches in turn, and one must not drive out what the other will take.
        self._service: PlanService[PackedPlan] = PlanService(
            _then(pack, self._own_part(plan_function)), quick, num_threads=num_threads, max_waiting=max(MAX_WAITING, 3 * look_ahead)
        )
        self._last_taken: _Taken | None = None

    def take(self, batch: CapturedBatch, forward_only: bool) -> PackedPlan | Exception:
        """This batch's plan, or what kept it from one; with linked replicas all of them come here, with an error or without."""
        try:
            return self._take(batch, forward_only)
        except Exception as error:
            return error

    def submit(self, ahead: Sequence[Sequence[Microbatch | Exception]], lookahead: LookaheadIterator, forward_only: bool) -> None:
        """Hands the next batches to the service, as they were read from ``lookahead``."""
        # An item that cannot be read ends the run when its iteration comes, on all ranks.
        errors = [next((said for said in batch if isinstance(said, Exception)), None) for batch in ahead]
        batches = [
            [said for said in batch if not isinstance(said, Exception)] if error is None else None
            for batch, error in zip(ahead, errors, strict=True)
        ]
        for batch in batches if self._link is None else self._link.exchange(batches):
            if batch is not None:
                self._service.submit(batch, forward_only=forward_only)
        if errors and errors[0] is not None:
            self.count_unseen(lookahead, errors[0])

    def submit_dealt(self, batch: Sequence[Microbatch]) -> None:
        """Hands one training batch to the service; from any thread."""
        self._service.submit(batch)

    @property
    def last_batch(self) -> Sequence[Microbatch] | None:
        """Microbatches of the last iteration whose plan was taken; of all linked replicas together."""
        return None if self._last_taken is None else self._last_taken.microbatches

    def planned_ns(self, batch: Sequence[Microbatch]) -> int:
        """What a plan of this training batch takes; planned at once, from any thread."""
        return self._service.plan(batch).plan.claimed_makespan

    def count_unseen(self, lookahead: LookaheadIterator, error: Exception) -> None:
        """Counts a batch ahead that could not be read."""
        self._service.count_unseen(lookahead.peek(1)[0], error)

    def forget(self) -> None:
        """To be called when the plan function's costs have changed: batches that come again are planned anew."""
        self._service.forget()

    def is_needed(self) -> bool:
        """For plan functions: whether training waits for the plan that the calling thread makes."""
        return self._service.is_needed()

    def counts(self) -> PlanCounts:
        return self._service.counts()

    def _take(self, batch: CapturedBatch, forward_only: bool) -> PackedPlan:
        packed: PackedPlan | None = None
        joint: Sequence[Microbatch] | None = batch.microbatches
        if self._link is not None:
            (joint,) = self._link.exchange([None if batch.error is not None else batch.microbatches])
        try:
            if batch.error is not None:
                raise batch.error
            assert batch.microbatches is not None, "the planner rank has no data iterator"
            if joint is None:
                raise PeerError("a replica that shares experts with this one could not read its batch, so none runs the iteration")
            last = self._last_taken
            if batch.is_replay and last is not None and (last.microbatches, last.forward_only) == (joint, forward_only):
                packed = last.plan  # the same plan, or its numbers would differ from those that are checked
            else:
                packed = self._service.take(joint, forward_only=forward_only, deadline_s=self._deadline_s, unseen_deadline_s=self._unseen_deadline_s)
        finally:
            difference = None if self._link is None else self._link.compare(None if packed is None else packed.plan)
        if difference is not None:
            raise difference
        self._last_taken = _Taken(joint, forward_only, packed)
        return packed

    def _own_part(self, make: PlanFunction) -> PlanFunction:
        """A plan function that takes the microbatches of all linked replicas and gives this one's part of their joint plan, checked."""
        link = self._link
        if link is None:
            return _checked(make)

        def plan(joint: Sequence[Microbatch], forward_only: bool) -> Plan:
            of_replicas = link.split(joint)
            joint_plan = make(union_of(of_replicas), forward_only)
            if isinstance(joint_plan, PlanColumns):
                joint_plan = plan_of(joint_plan)
            return own_part(joint_plan, of_replicas, link.index, link.module)

        return plan


def _then(pack: PackFunction, make: PlanFunction) -> Callable[[Sequence[Microbatch], bool], PackedPlan]:
    return lambda microbatches, forward_only: pack(make(microbatches, forward_only))


def _checked(make: PlanFunction) -> PlanFunction:
    """A plan function whose plans hold and are for the very microbatches, whatever made them.

    Raises:
        PlanInvalid: where ``make`` gives another.
    """

    def plan(microbatches: Sequence[Microbatch], forward_only: bool) -> Plan | PlanColumns:
        made = make(microbatches, forward_only)
        if isinstance(made, PlanColumns):
            check_columns(made, microbatches)
        else:
            check_plan(made, microbatches)
        return made

    return plan
