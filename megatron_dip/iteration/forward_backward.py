"""DIP as Megatron's ``forward_backward_func``: same keyword arguments, same return value.

One call is one iteration of one replica:

1. every rank pulls its microbatches and runs the user's forward_step once for each, which only records (``models.capture``);
2. the planner rank (first pipeline, tensor and context rank of the replica) takes the batch's plan from its background service and
   broadcasts it; every rank then compares plan, batch, cut and health with every other, and replicas tell each other whether they
   can go on, so that a difference or a bad batch is one clear error on all ranks and not a hang;
3. the planner rank hands the next batches' metadata to the service, which plans while this iteration runs;
4. the executor runs the rank's actions; gradients are reduced in one canonical order of chunks (replicas run different plans);
5. ``finalize_model_grads_func`` as ever.

Contract: Megatron-Core's ``forward_backward_pipelining_with_interleaving``. Losses are recorded in the order of microbatches. Losses are
scaled as there: by 1 / num_microbatches, by tokens per microbatch, or left to ``finalize_model_grads`` when ``calculate_per_token_loss``.
Not done: what needs a static order of the schedule (see ``_REFUSED``); aux losses of MoE modules in sub-microbatches are not re-weighted.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state, rerun_state_machine
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from megatron.core.utils import get_model_config, nvtx_range_pop, nvtx_range_push

from megatron_dip.iteration.linked_replicas import LinkedReplicas, link_replicas
from megatron_dip.iteration.lookahead import LookaheadIterator, find_lookahead
from megatron_dip.models.capture import CapturedCall, capture
from megatron_dip.models.deferral import LinearWeightDeferral
from megatron_dip.planner.linked import restrict, union_of
from megatron_dip.planner.message import PackedPlan, pack_plan, plan_digest, unpack_plan
from megatron_dip.planner.service import MAX_WAITING, PlanCounts, PlanService
from megatron_dip.runtime.compute import AutogradCompute
from megatron_dip.runtime.executor import Executor, PlanLinks
from megatron_dip.runtime.groups import PipelineGroups, new_process_groups
from megatron_dip.runtime.interface import ChunkKey, StagedModel, StageLinks
from megatron_dip.runtime.p2p import PeerError, PointToPoint
from megatron_dip.runtime.timing import StageRecord, StageTimer, clock_offset, gather_records, stage_timer
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan, PlanStage
from megatron_dip.spec.workload import Microbatch

_REFUSED = {
    "overlap_moe_expert_parallel_comm": "combines two microbatches of a fixed order",
    "hybrid_context_parallel": "brings a schedule of its own",
    "fine_grained_activation_offloading": "replays the order of the first iteration",
    "defer_embedding_wgrad_compute": "defers work to a fixed end of the schedule",
    "moe_paged_stash": "assumes a fixed order of microbatches",
}
"""Config flags that assume a static order of the schedule -> why."""

PlanFunction = Callable[[Sequence[Microbatch], bool], Plan]
"""(microbatches of this replica, forward only) -> plan"""

UpcomingFunction = Callable[[int], Sequence[int]]
"""(iterations) -> number of microbatches in each of the next training iterations; fewer numbers where training ends before"""

_PLAN, _ERROR = 0, 1
_FAILED, _MISFIT = 1, 2
_DIGEST = 32
_TEXT = 384
_ROW = 5 * _DIGEST + _TEXT
"""Bytes that each rank tells the others: digests of plan, batch and cut, health, and the start of an error's message."""


class DipForwardBackward:
    """One for each rank and run.

    Args:
        staged_model: this rank's chunks, for the executor.
        chunks: the same in Megatron's wrappers, in ``staged_model.chunk_keys``' order: the list given as ``model`` in every call.
        partition: how modules are cut, equal on all ranks.
        metadata: instance lengths of one item of the data iterator.
        call_metadata: instance lengths of a captured microbatch ({}: this rank was not given its data), for scripts whose forward_step
            alone knows what an item means; ``metadata`` then only serves to plan ahead.
        call_conditions: names of what a captured microbatch gives to every layer (masks, bounds of packed sequences), which all ranks must
            have been given alike.
        plan_function: makes plans; called on a background thread of the planner rank.
        quick_plan_function: makes a plan at once where the other is late or fails; None: wait as long as it takes.
        device: where chunks compute.
        backend: of messages along the pipeline.
        timeout_s: after this long without a sign of another rank this one gives up with an error.
        plan_deadline_s: how long an iteration may wait for its plan.
        planner_threads: batches planned side by side.
        look_ahead: how many of the next iterations' batches are planned while one runs, where the data iterator can look ahead.
        upcoming: tells how many microbatches these iterations have; None: as many as the one that runs.
        num_outputs: how many values the model returns to forward_step; None = one tensor.
        joined: the module whose stages exchange data with other replicas (experts), and the global ranks with which this one does.

    Making it is collective over all ranks of the job (process groups).
    """

    def __init__(
        self,
        *,
        staged_model: StagedModel,
        chunks: Sequence[torch.nn.Module],
        partition: Partition,
        metadata: Callable[[Any], Microbatch],
        call_metadata: Callable[[CapturedCall], Microbatch] | None = None,
        call_conditions: Callable[[CapturedCall], Sequence[str]] | None = None,
        plan_function: PlanFunction,
        quick_plan_function: PlanFunction | None = None,
        device: torch.device,
        backend: str = "gloo",
        timeout_s: float = 600.0,
        plan_deadline_s: float = 1.0,
        planner_threads: int = 1,
        look_ahead: int = 1,
        upcoming: UpcomingFunction | None = None,
        num_outputs: int | None = None,
        joined: tuple[str, Sequence[int]] | None = None,
    ) -> None:
        assert len(chunks) == len(staged_model.chunk_keys), (len(chunks), staged_model.chunk_keys)
        self._staged_model = staged_model
        self._chunks = list(chunks)
        self._metadata = metadata
        self._call_metadata = call_metadata
        self._call_conditions = call_conditions
        self._num_outputs = num_outputs
        self._device = device
        self._plan_deadline_s = plan_deadline_s
        self._look_ahead = look_ahead
        self._upcoming = upcoming
        self.groups: PipelineGroups = new_process_groups(
            dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()),
            parallel_state.get_data_parallel_rank(),
            backend=backend,
            timeout_s=timeout_s,
        )
        if partition.num_ranks != self.groups.num_ranks:
            raise InputError(
                "partition.chunks", partition.chunks, f"is for {partition.num_ranks} pipeline ranks, the run has {self.groups.num_ranks}",
                "give a partition for as many ranks",
            )
        self._cut_digest = _digest(msgspec.json.encode(partition, order="sorted"))
        self.is_planner: bool = dist.get_rank() == self.groups.control_ranks[0]
        self._link: LinkedReplicas | None = None
        if joined is not None:
            module, joined_ranks = joined
            replica, planner = parallel_state.get_data_parallel_rank(), self.groups.control_ranks[0]
            self._link = link_replicas(replica, joined_ranks, planner, module, timeout_s)
        self._service: PlanService[PackedPlan] | None = None
        if self.is_planner:
            pack = pack_plan if len(self.groups.control_ranks) > 1 else _unpacked
            quick = None if quick_plan_function is None else _then(pack, self._own_part(quick_plan_function))
            # Training and evaluation foresee batches in turn, and one must not drive out what the other will take.
            self._service = PlanService(
                _then(pack, self._own_part(plan_function)), quick, num_threads=planner_threads, max_waiting=max(MAX_WAITING, 3 * look_ahead)
            )
        self._last_taken: tuple[list[Microbatch], bool, PackedPlan] | None = None
        """The last iteration's batch, whether it was forward only, and its plan, for a replay."""
        p2p = PointToPoint(self.groups, device) if self.groups.num_ranks > 1 else None
        self._executor = Executor(self.groups.rank, p2p, device)
        self._deferral: LinearWeightDeferral | None = None
        """Made with the first plan that splits backwards."""
        self._timer: StageTimer | None = None
        self._clock_offset_ns: int | None = None
        self.plan: Plan | None = None
        """The plan of the last iteration."""

    def __call__(
        self,
        *,
        forward_step_func: Callable[..., Any],
        data_iterator: Iterator[Any] | Sequence[Iterator[Any] | None] | None,
        model: torch.nn.Module | Sequence[torch.nn.Module],
        num_microbatches: int,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
        decoder_seq_length: int | None = None,
        forward_only: bool = False,
        collect_non_loss_data: bool = False,
        first_val_step: bool | None = None,
        adjust_tensor_shapes_fn: Callable[..., Any] | None = None,
        p2p_communicator: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        force_all_reduce: bool | None = False,
    ) -> list[Any]:
        """Runs one iteration; shapes come from the plan, so ``seq_length``, ``micro_batch_size`` and ``decoder_seq_length`` are not read.

        Returns:
            On the rank of the loss what the loss function reports, one entry a microbatch; an empty list elsewhere.
        Raises:
            InputError: a batch, a setting or a forward_step that cannot be run; on all ranks.
            PeerError: another rank failed, died, or holds something else; within ``timeout_s``.
        """
        chunks = list(model) if isinstance(model, Sequence) else [model]
        assert [id(chunk) for chunk in chunks] == [id(chunk) for chunk in self._chunks], "model is not the list of chunks DIP was made with"
        if adjust_tensor_shapes_fn is not None:
            raise InputError("adjust_tensor_shapes_fn", adjust_tensor_shapes_fn, "is not supported: shapes come from the plan", "leave it out")
        config = get_model_config(chunks[0])
        _refuse_unsupported(config)
        if config.timers is not None:
            config.timers("forward-backward", log_level=1).start(barrier=config.barrier_with_L1_time)

        iterator = data_iterator[0] if isinstance(data_iterator, Sequence) else data_iterator
        with _nvtx_range("dip prepare"):
            calls, plan = self._prepare(forward_step_func, iterator, num_microbatches, forward_only)
        if pg_collection is None:
            pg_collection = _default_pg_collection()
        loss = _Loss(calls, config, num_microbatches, forward_only, collect_non_loss_data, pg_collection.cp.size(), self._device)
        _set_auxiliary_loss_scale(config, num_microbatches, pg_collection.cp.size(), self._device)
        if not (first_val_step is False and forward_only):
            for chunk in chunks:
                if hasattr(chunk, "set_is_first_microbatch"):
                    chunk.set_is_first_microbatch()  # type: ignore[operator]

        if self._deferral is None and any(stage.kind == "w" for stage in plan.stages):
            self._deferral = LinearWeightDeferral(chunks)
        deferral = self._deferral
        self._timer = stage_timer(self._device)
        try:
            with _no_sync(config):
                self._start_param_sync()
                after = {} if forward_only else self._grad_sync_points(plan, config, bool(force_all_reduce))
                for function in after.pop(_AT_START, ()):
                    function()
                self._executor.run(PlanLinks(plan), _MegatronCompute(self._staged_model, loss, deferral, config), self._timer, after)
                self._finish_param_sync()
        finally:
            self._staged_model.end_iteration()

        if config.finalize_model_grads_func is not None and not forward_only:
            with _nvtx_range("dip finalize"), _naming_the_other_replicas():
                config.finalize_model_grads_func(
                    chunks, loss.num_tokens if config.calculate_per_token_loss else None, pg_collection=pg_collection,
                    force_all_reduce=force_all_reduce,
                )
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return loss.reports()

    def forget_plans(self) -> None:
        """To be called when the plan function's costs have changed: batches that come again are planned anew."""
        if self._service is not None:
            self._service.forget()

    def records(self) -> list[StageRecord]:
        """Measured start and end of this rank's stages in the last iteration (:attr:`plan` says what they are)."""
        return [] if self._timer is None else self._timer.records()

    def gather_records(self) -> list[list[StageRecord]] | None:
        """All pipeline ranks' records of the last iteration on one clock, on pipeline rank 0 (None elsewhere). All ranks of the replica
        must call it together."""
        if self._clock_offset_ns is None:
            self._clock_offset_ns = clock_offset(self.groups)
        return gather_records(self.records(), self.groups, self._clock_offset_ns)

    def counts(self) -> PlanCounts | None:
        """How plans were had so far; None where this rank does not plan."""
        return None if self._service is None else self._service.counts()

    # ---- the batch and its plan -----------------------------------------------------------------------------------------------

    def _prepare(
        self, forward_step: Callable[..., Any], iterator: Iterator[Any] | None, num_microbatches: int, forward_only: bool
    ) -> tuple[list[CapturedCall], Plan]:
        """Captures the microbatches, agrees on their plan and hands both to the model. Whatever goes wrong on one rank ends on all."""
        calls: list[CapturedCall] = []
        microbatches: list[Microbatch] | None = None
        conditions = b""
        error: Exception | None = None
        is_replay = getattr(iterator, "replaying", False)  # Megatron's iterator while the rerun state machine repeats an iteration
        try:
            if iterator is None:
                calls = [capture(forward_step, None, self._chunks[0], self._num_outputs) for _ in range(num_microbatches)]
            else:
                items = [next(iterator) for _ in range(num_microbatches)]
                if self._call_metadata is None:
                    microbatches = [self._metadata(item) for item in items]
                calls = [capture(forward_step, iter([item]), self._chunks[0], self._num_outputs) for item in items]
            if self._call_metadata is not None:
                known = [self._call_metadata(call) for call in calls]
                microbatches = known if all(known) else None
            if self._call_conditions is not None and self.groups.num_ranks > 1:
                conditions = _digest(msgspec.json.encode([self._call_conditions(call) for call in calls]))
        except StopIteration:
            error = InputError("data_iterator", num_microbatches, "ended before it gave this many microbatches", "give more data or fewer iterations")
        except Exception as caught:
            error = caught
        plan, digest, plan_error = self._share_plan(microbatches, error, forward_only, is_replay)
        error = error or plan_error
        misfit: Exception | None = None
        try:
            if error is None and plan is not None:
                try:
                    self._staged_model.begin_iteration(plan, calls, forward_only=forward_only)
                except Exception as caught:
                    misfit = caught
            self._compare(digest, microbatches, conditions, error, misfit)
        except Exception:
            self._staged_model.end_iteration()
            raise
        assert plan is not None
        self.plan = plan
        if not is_replay:
            self._look_at_next(find_lookahead(iterator), num_microbatches, forward_only)
        return calls, plan

    def _share_plan(
        self, microbatches: list[Microbatch] | None, error: Exception | None, forward_only: bool, is_replay: bool
    ) -> tuple[Plan | None, bytes, Exception | None]:
        """The planner rank's plan and its digest, or the error that kept it from one, on every rank."""
        packed: PackedPlan | None = None
        message = b""
        if self._service is not None:
            try:
                packed = self._take_plan(self._service, microbatches, error, forward_only, is_replay)
                message = bytes([_PLAN]) + packed.data
            except Exception as caught:
                error = caught
                message = bytes([_ERROR]) + _pickled(caught)
        if len(self.groups.control_ranks) == 1:
            return None if packed is None else packed.plan, b"", error
        try:
            message = _broadcast(message, self.groups.control_ranks[0], self.groups.control)
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        if packed is not None:
            return packed.plan, packed.digest, None
        if message[0] == _ERROR:
            return None, b"", pickle.loads(message[1:])
        try:
            return unpack_plan(message[1:]), plan_digest(message[1:]), None
        except InputError as unreadable:
            return None, b"", unreadable

    def _take_plan(
        self, service: PlanService[PackedPlan], microbatches: list[Microbatch] | None, error: Exception | None, forward_only: bool, is_replay: bool
    ) -> PackedPlan:
        """This batch's plan, on the planner rank; with linked replicas all of them come here, with an error or without."""
        packed: PackedPlan | None = None
        joint = microbatches
        if self._link is not None:
            (joint,) = self._link.exchange([None if error is not None else microbatches])
        try:
            if error is not None:
                raise error
            assert microbatches is not None, "the planner rank has no data iterator"
            if joint is None:
                raise PeerError("a replica that shares experts with this one could not read its batch, so none runs the iteration")
            if is_replay and self._last_taken is not None and self._last_taken[:2] == (joint, forward_only):
                packed = self._last_taken[2]  # the same plan, or its numbers would differ from those that are checked
            else:
                packed = service.take(joint, forward_only=forward_only, deadline_s=self._plan_deadline_s)
        finally:
            difference = None if self._link is None else self._link.compare(None if packed is None else packed.plan)
        if difference is not None:
            raise difference
        self._last_taken = (joint, forward_only, packed)
        return packed

    def _own_part(self, make: PlanFunction) -> PlanFunction:
        """A plan function that takes the microbatches of all linked replicas and gives this one's part of their joint plan."""
        link = self._link
        if link is None:
            return make

        def plan(joint: Sequence[Microbatch], forward_only: bool) -> Plan:
            of_replicas = link.split(joint)
            return restrict(make(union_of(of_replicas), forward_only), of_replicas[link.index])

        return plan

    def _compare(
        self, digest: bytes, microbatches: list[Microbatch] | None, conditions: bytes, error: Exception | None, misfit: Exception | None
    ) -> None:
        """Raises on every rank when one of them has an error, or another plan, batch or cut than its planner rank.

        Args:
            misfit: what is wrong with this rank's microbatches under the plan; where ranks hold different things, that is told instead.
        """
        if len(self.groups.control_ranks) == 1:
            verdict = error or misfit
        else:
            verdict = self._verdict_of_replica(digest, microbatches, conditions, error, misfit)
        if self.groups.peers is not None:
            verdict = self._verdict_of_all(self.groups.peers, verdict)
        if verdict is not None:
            # All ranks raise now. A process that ends at once would cut off those that have not read what it told them.
            for group in (self.groups.peers, self.groups.control):
                with contextlib.suppress(RuntimeError):
                    if group is not None:
                        dist.barrier(group=group)
            raise verdict

    def _verdict_of_replica(
        self, digest: bytes, microbatches: list[Microbatch] | None, conditions: bytes, error: Exception | None, misfit: Exception | None
    ) -> Exception | None:
        """This rank's error, or what the ranks of the replica do not agree on; None on all of them: nothing."""
        row = bytearray(_ROW)
        row[: len(digest)] = digest
        if microbatches is not None:
            row[_DIGEST : 2 * _DIGEST] = _digest(msgspec.json.encode(microbatches, order="sorted"))
        row[2 * _DIGEST : 3 * _DIGEST] = self._cut_digest
        row[3 * _DIGEST : 3 * _DIGEST + len(conditions)] = conditions
        if (said := error or misfit) is not None:
            row[4 * _DIGEST] = _FAILED if error is not None else _MISFIT
            text = _summary(said)
            row[5 * _DIGEST : 5 * _DIGEST + len(text)] = text
        mine = torch.frombuffer(row, dtype=torch.uint8)
        rows = [torch.empty_like(mine) for _ in self.groups.control_ranks]
        try:
            dist.all_gather(rows, mine, group=self.groups.control)
        except RuntimeError as failure:
            raise self._lost(failure) from failure
        told = [bytes(other.numpy()) for other in rows]
        return error or self._failure(told, _FAILED) or self._difference(told) or misfit or self._failure(told, _MISFIT)

    def _verdict_of_all(self, peers: dist.ProcessGroup, verdict: Exception | None) -> Exception | None:
        """``verdict`` of this rank's replica, or else that of another replica that cannot go on."""
        failed = torch.tensor([0 if verdict is None else dist.get_rank(peers) + 1])
        try:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=peers)
            if not failed:
                return None
            source = dist.get_global_rank(peers, int(failed) - 1)
            text = torch.zeros(_TEXT, dtype=torch.uint8)
            if verdict is not None:
                summary = _summary(verdict)
                text[: len(summary)] = torch.frombuffer(bytearray(summary), dtype=torch.uint8)
            dist.broadcast(text, source, group=peers)
        except RuntimeError as failure:
            return verdict or PeerError(
                f"global rank {dist.get_rank()} lost its peers in other replicas while agreeing to run an iteration, "
                f"time limit {self.groups.timeout_s:g} s: {_first_line(failure)}"
            )
        message = bytes(text.numpy()).rstrip(b"\0").decode(errors="replace")
        return verdict or PeerError(
            f"replica {self.groups.replica_of[source]} could not prepare the iteration, so no replica runs it: rank {source}: {message}"
        )

    def _failure(self, told: Sequence[bytes], kind: int) -> PeerError | None:
        for rank, other in zip(self.groups.control_ranks, told, strict=True):
            if other[4 * _DIGEST] == kind:
                message = other[5 * _DIGEST :].rstrip(b"\0").decode(errors="replace")
                return PeerError(f"rank {rank} could not prepare the iteration, so no rank runs it: {message}")
        return None

    def _difference(self, told: Sequence[bytes]) -> InputError | None:
        """What ranks hold differently, by the rows that they told each other."""
        reference = told[0]
        fields = (
            ("plan", 0, "the ranks hold different plans for this iteration", "run the same version of megatron_dip on all ranks"),
            ("data_iterator", 1, "the ranks of one replica got different batches", "give every rank of a replica the same data in the same order"),
            ("partition", 2, "the ranks cut the model differently", "give all ranks the same chunks and sub-microbatch sizes"),
            ("forward_step", 3, "gives the model masks or bounds of packed sequences on some pipeline ranks only, so that layers would attend "
             "differently", "use at most two pipeline ranks where the script reads data on the first and last one, or read it on all"),
        )
        for field, index, problem, remedy in fields:
            part = slice(index * _DIGEST, (index + 1) * _DIGEST)
            differing = [
                rank
                for rank, other in zip(self.groups.control_ranks, told, strict=True)
                # A rank that was given no data (Megatron's tensor ranks beyond the first) cannot compare its batch.
                if other[part] != reference[part] and any(other[part])
            ]
            if differing:
                return InputError(field, {"ranks": differing, "differ from rank": self.groups.control_ranks[0]}, problem, remedy)
        return None

    def _look_at_next(self, lookahead: LookaheadIterator | None, num_microbatches: int, forward_only: bool) -> None:
        """Reads the batches of the next iterations, on every rank alike: data sets may draw random numbers. The planner rank hands
        them to the service."""
        if lookahead is None or self._look_ahead == 0:
            return
        sizes = [num_microbatches] * self._look_ahead if forward_only or self._upcoming is None else self._upcoming(self._look_ahead)
        if self._service is None:
            lookahead.peek(sum(sizes))
            return
        ahead = list(lookahead.look_ahead(sizes, self._describe))
        # An item that cannot be read ends the run when its iteration comes, on all ranks.
        errors = [next((said for said in batch if isinstance(said, Exception)), None) for batch in ahead]
        batches = [batch if error is None else None for batch, error in zip(ahead, errors, strict=True)]
        for batch in batches if self._link is None else self._link.exchange(batches):
            if batch is not None:
                self._service.submit(batch, forward_only=forward_only)
        if errors and errors[0] is not None:
            self._service.count_unseen(lookahead.peek(1)[0], errors[0])

    def _describe(self, item: Any) -> Microbatch | Exception:
        try:
            return self._metadata(item)
        except Exception as error:
            return error

    def _lost(self, failure: RuntimeError) -> PeerError:
        return PeerError(
            f"pipeline rank {self.groups.rank} (global rank {dist.get_rank()}) lost another rank of its replica while agreeing on a plan, "
            f"time limit {self.groups.timeout_s:g} s: {_first_line(failure)}"
        )

    # ---- data-parallel communication in canonical order --------------------------------------------------------------------------

    def _grad_sync_points(self, plan: Plan, config: Any, force_all_reduce: bool) -> dict[int, list[Callable[[], None]]]:
        """Stage id -> gradient reductions to start once that stage has run (``_AT_START``: before the first stage).

        Replicas run different plans, but collectives must come in one order on all of them: chunk i is reduced once the last gradient
        of chunks 0..i has been made. With ``force_all_reduce``, several instances of the distributed optimizer (whose finish starts a
        reduction whether one was started or not), or without overlap ``finalize_model_grads`` does it all at the end.
        """
        functions: dict[ChunkKey, Callable[[], None]] = {}
        for index, (key, chunk) in enumerate(zip(self._staged_model.chunk_keys, self._chunks, strict=True)):
            if _has_several_optimizer_instances(chunk):
                continue
            if config.grad_sync_func is not None:
                function = config.grad_sync_func[index] if isinstance(config.grad_sync_func, list) else config.grad_sync_func
                functions[key] = _bound(function, chunk)
            elif _overlaps_grad_reduce(chunk) and not force_all_reduce:
                functions[key] = chunk.start_grad_sync  # type: ignore[assignment]
        last: dict[ChunkKey, int] = {}
        for position, stage_id in enumerate(plan.order[self.groups.rank]):
            stage = plan.stages[stage_id]
            if stage.kind != "fw":
                last[stage.module, stage.vp_stage] = position
        points: dict[int, list[Callable[[], None]]] = {}
        position = -1
        for key in self._staged_model.chunk_keys:
            position = max(position, last.get(key, -1))
            if key in functions:
                stage_id = _AT_START if position < 0 else plan.order[self.groups.rank][position]
                points.setdefault(stage_id, []).append(functions[key])
        return points

    def _start_param_sync(self) -> None:
        """Starts the gathering of updated parameters where it overlaps with the forward pass: all chunks, in canonical order.

        Left to the forward hooks, the order would be that of the plan, which differs between replicas.
        """
        for chunk in self._chunks:
            if getattr(chunk, "remove_forward_pre_hook_handles", None) and not all(
                group.param_gather_dispatched for group in _bucket_groups(chunk)
            ):
                chunk.start_param_sync()  # type: ignore[operator]

    def _finish_param_sync(self) -> None:
        """Waits for the gathering of chunks that had nothing to do in this iteration; the others waited in their forward hooks."""
        for chunk in self._chunks:
            if getattr(chunk, "remove_forward_pre_hook_handles", None):
                for group in _bucket_groups(chunk):
                    if group.param_gather_handle is not None:
                        group.finish_param_sync(skip_next_bucket_dispatch=True)


_AT_START = -1


class _Loss:
    """Runs the captured loss functions, records what they report, and scales the losses as Megatron's forward_step_calc_loss does."""

    def __init__(
        self, calls: Sequence[CapturedCall], config: Any, num_microbatches: int, forward_only: bool, collect_non_loss_data: bool,
        context_parallel_size: int, device: torch.device,
    ) -> None:
        self._calls = calls
        self._config = config
        self._num_microbatches = num_microbatches
        self._forward_only = forward_only
        self._collect_non_loss_data = collect_non_loss_data
        self._context_parallel_size = context_parallel_size
        self._reports: dict[int, Any] = {}
        self.num_tokens = torch.zeros([], dtype=torch.int, device=device)

    def __call__(self, stage: PlanStage, result: Any) -> torch.Tensor | None:
        call = self._calls[stage.microbatch]
        if stage.microbatch in self._reports:
            raise InputError(
                f"sub_microbatch_size.{stage.module}", stage.sub_microbatch, "the module that ends in the loss is split within a microbatch",
                "make its sub-microbatch size as large as a microbatch's instances",
            )
        loss_function, output = call.resolved_loss_function(result), call.resolved_output(result)
        if loss_function is None:
            self._reports[stage.microbatch] = output
            loss = output
        elif self._collect_non_loss_data:
            self._reports[stage.microbatch] = loss_function(output, non_loss_data=True)
            return None
        else:
            with _validations_by_microbatch(stage.microbatch):
                returned = loss_function(output)
            if len(returned) == 3:
                loss, num_tokens, report = returned
                if not self._config.calculate_per_token_loss:
                    loss = loss / torch.clamp(num_tokens, min=1) / self._num_microbatches
                self.num_tokens += num_tokens
            elif len(returned) == 2:
                loss, report = returned
                loss = loss * self._context_parallel_size / self._num_microbatches
            else:
                raise InputError("loss function", len(returned), "returned this many values", "return (loss, report) or (loss, num_tokens, report)")
            self._reports[stage.microbatch] = report
        if self._forward_only:
            return None
        return loss if self._config.grad_scale_func is None else self._config.grad_scale_func(loss)

    def reports(self) -> list[Any]:
        """In the order of microbatches."""
        return [self._reports[microbatch] for microbatch in sorted(self._reports)]


@contextlib.contextmanager
def _validations_by_microbatch(microbatch: int) -> Iterator[None]:
    """Results that the loss function has validated are counted by microbatch, not in the order of losses.

    Megatron's rerun state machine knows a result again, in the same iteration run a second time, by its number. A run that was started
    again from a checkpoint may have another plan, and so another order.
    """
    machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
    if machine is None:  # asked for, it would be made, with a warning
        yield
        return
    counts = machine.validation_counts
    machine.validation_counts = defaultdict(lambda: microbatch)
    try:
        yield
    finally:
        machine.validation_counts = counts


class _MegatronCompute(AutogradCompute):
    """Stages inside Megatron's timers, NVTX ranges and autocast."""

    def __init__(self, model: StagedModel, loss: _Loss, deferral: LinearWeightDeferral | None, config: Any) -> None:
        super().__init__(model, loss, deferral, free_outputs=config.deallocate_pipeline_outputs)
        self._timers = config.timers
        self._autocast_dtype = config.autocast_dtype if config.enable_autocast else None

    def forward(self, links: StageLinks, inputs: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        with self._measured("forward-compute", links.forward):
            if self._autocast_dtype is None:
                return super().forward(links, inputs)
            with torch.autocast("cuda", dtype=self._autocast_dtype):
                return super().forward(links, inputs)

    def backward(self, links: StageLinks, grads: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        assert links.backward is not None
        with self._measured("backward-compute", links.backward):
            return super().backward(links, grads)

    def weight(self, links: StageLinks) -> None:
        assert links.weight is not None
        with self._measured("backward-compute", links.weight):
            super().weight(links)

    @contextlib.contextmanager
    def _measured(self, timer: str, stage: PlanStage) -> Iterator[None]:
        name = f"dip {stage.kind} {stage.module} chunk {stage.vp_stage} microbatch {stage.microbatch}.{stage.sub_microbatch}"
        with _nvtx_range(name):
            if self._timers is None:
                yield
                return
            self._timers(timer, log_level=2).start()
            yield
            self._timers(timer).stop()


@contextlib.contextmanager
def _naming_the_other_replicas() -> Iterator[None]:
    """Around Megatron's finishing of gradients: says where the run is when a collective fails, which most often means that a rank died.

    A replica finds out about its own ranks by messages along the pipeline. Of others it hears here, at the first collective with them:
    over gloo at once, over NCCL when Megatron's --distributed-timeout-minutes has passed.
    """
    try:
        yield
    except RuntimeError as failure:
        raise PeerError(
            f"global rank {dist.get_rank()} could not finish its gradients with the ranks of other replicas; one of them may have ended, "
            f"see its output: {_first_line(failure)}"
        ) from failure


@contextlib.contextmanager
def _nvtx_range(name: str) -> Iterator[None]:
    """One of Megatron's NVTX ranges; nothing unless its profiling is on (``configure_nvtx_profiling``)."""
    nvtx_range_push(name)
    yield
    nvtx_range_pop(name)


def _refuse_unsupported(config: Any) -> None:
    for flag, reason in _REFUSED.items():
        if getattr(config, flag, False):
            raise InputError(f"--{flag.replace('_', '-')}", True, f"cannot be used with --pipeline-schedule dip: it {reason}", "leave it out")


def _set_auxiliary_loss_scale(config: Any, num_microbatches: int, context_parallel_size: int, device: torch.device) -> None:
    """Megatron sets these before every forward of every stage; they are constant within an iteration."""
    scalers: list[tuple[Any, str, int]] = []
    if getattr(config, "num_moe_experts", None) is not None:
        scalers.append((MoEAuxLossAutoScaler, "moe_grad_scale_func", context_parallel_size))
    if getattr(config, "mtp_num_layers", None) is not None:
        scalers.append((MTPLossAutoScaler, "mtp_grad_scale_func", 1))
    for scaler, own_function, factor in scalers:
        one = torch.ones(1, device=device)
        scale = one if config.grad_scale_func is None else config.grad_scale_func(one)
        if (own := getattr(config, own_function, None)) is not None:  # from 0.19
            scale = torch.as_tensor(own(), device=device)
        scaler.set_loss_scale(scale if config.calculate_per_token_loss else scale * factor / num_microbatches)


def _no_sync(config: Any) -> contextlib.AbstractContextManager[Any]:
    functions = config.no_sync_func
    stack = contextlib.ExitStack()
    for function in functions if isinstance(functions, list) else [] if functions is None else [functions]:
        stack.enter_context(function())
    return stack


def _bucket_groups(chunk: Any) -> list[Any]:
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def _overlaps_grad_reduce(chunk: Any) -> bool:
    ddp_config = getattr(chunk, "ddp_config", None)
    return ddp_config is not None and ddp_config.overlap_grad_reduce


def _has_several_optimizer_instances(chunk: Any) -> bool:
    ddp_config = getattr(chunk, "ddp_config", None)
    return ddp_config is not None and ddp_config.num_distributed_optimizer_instances > 1


def _bound(function: Callable[..., None], chunk: torch.nn.Module) -> Callable[[], None]:
    return lambda: function(chunk.parameters())


def _default_pg_collection() -> ProcessGroupCollection:
    """The groups that Megatron's schedules pass to finalize_model_grads_func when the caller gives none."""
    build = getattr(schedules, "_build_default_pg_collection", None)
    if build is not None:
        return build()
    collection = ProcessGroupCollection()
    collection.tp = parallel_state.get_tensor_model_parallel_group()
    collection.cp = parallel_state.get_context_parallel_group()
    collection.embd = parallel_state.get_embedding_group(check_initialized=False)
    collection.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    collection.pp = parallel_state.get_pipeline_model_parallel_group()
    collection.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    collection.tp_dp_cp = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    return collection


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _pickled(error: Exception) -> bytes:
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return pickle.dumps(PeerError(f"the planner rank failed: {type(error).__name__}: {error}"))
    return data


def _first_line(failure: RuntimeError) -> str:
    return next(iter(str(failure).strip().splitlines()), type(failure).__name__)


def _summary(error: Exception) -> bytes:
    return f"{type(error).__name__}: {error}".encode()[:_TEXT]


def _then(pack: Callable[[Plan], PackedPlan], make: PlanFunction) -> Callable[[Sequence[Microbatch], bool], PackedPlan]:
    return lambda microbatches, forward_only: pack(make(microbatches, forward_only))


def _unpacked(plan: Plan) -> PackedPlan:
    """For a planner rank that has nobody to send to."""
    return PackedPlan(plan, b"", b"")


def _broadcast(message: bytes, source: int, group: dist.ProcessGroup) -> bytes:
    """``message`` of global rank ``source`` on every rank of the group."""
    length = torch.tensor([len(message)], dtype=torch.int64)
    dist.broadcast(length, source, group=group)
    data = torch.frombuffer(bytearray(message), dtype=torch.uint8) if dist.get_rank() == source else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, source, group=group)
    return bytes(data.numpy())
