"""DIP as Megatron's ``forward_backward_func``: same keyword arguments, same return value.

One call is one iteration of one replica:

1. every rank pulls its microbatches and runs the user's forward_step for each, which only records (``models.capture``);
2. the planner rank (first pipeline, tensor and context rank of the replica) takes the batch's plan from its background service and
   broadcasts it; every rank then compares plan, batch, cut and health with every other, and replicas tell each other whether they
   can go on, so that a difference or a bad batch is one clear error on all ranks and not a hang;
3. the planner rank hands the next batches' metadata to the service, which plans while this iteration runs; with several replicas their
   microbatches are dealt first, and travel meanwhile (:mod:`megatron_dip.iteration.balance`);
4. the executor runs the rank's actions; gradients are reduced in one canonical order of chunks (replicas run different plans);
5. ``finalize_model_grads_func`` as ever.

Contract: Megatron-Core's ``forward_backward_pipelining_with_interleaving``. Losses are recorded in the order of microbatches. Losses are
scaled as there. Not done: what needs a static order of the schedule (see ``_REFUSED``).
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config

from megatron_dip.iteration.agreement import Agreement, first_line
from megatron_dip.iteration.balance import BalanceFigures, ReplicaBalance, ReplicaPlans
from megatron_dip.iteration.capture_batch import BatchCapture, CapturedBatch, DataEnded, is_replaying
from megatron_dip.iteration.data_parallel import AT_START, finish_param_sync, grad_sync_points, no_sync, start_param_sync
from megatron_dip.iteration.dealing import Estimate
from megatron_dip.iteration.foreseen_metadata import ForeseenMetadata, JointRecording
from megatron_dip.iteration.linked_replicas import LinkedReplicas, link_replicas
from megatron_dip.iteration.lookahead import find_lookahead
from megatron_dip.iteration.loss import IterationLoss, set_auxiliary_loss_scale
from megatron_dip.iteration.megatron_compute import MegatronCompute, nvtx_range
from megatron_dip.iteration.memory_in_use import MemoryInUse
from megatron_dip.iteration.plan_source import Foresight, PlanFunction, PlanSource, UpcomingFunction
from megatron_dip.iteration.planning_figures import MeasuredIteration, measure_iteration
from megatron_dip.iteration.randomness import DrawPlace
from megatron_dip.iteration.shared_search import SearchRanks, search_of
from megatron_dip.models.capture import CapturedCall
from megatron_dip.models.deferral import LinearWeightDeferral
from megatron_dip.planner.budget import SearchBudget
from megatron_dip.planner.courtesy import FixedCollections
from megatron_dip.planner.message import PackedPlan, pack_plan
from megatron_dip.planner.service import PlanCounts
from megatron_dip.runtime.executor import Executor, PlanLinks
from megatron_dip.runtime.groups import PipelineGroups, new_process_groups
from megatron_dip.runtime.interface import StagedModel
from megatron_dip.runtime.p2p import PeerError, PointToPoint
from megatron_dip.runtime.timing import StageRecord, StageTimer, clock_offset, gather_records, stage_timer
from megatron_dip.schedule.search import SearchFunction, search
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.plan_columns import PlanColumns, plan_of
from megatron_dip.spec.workload import Microbatch

_REFUSED = {
    "overlap_moe_expert_parallel_comm": "combines two microbatches of a fixed order",
    "hybrid_context_parallel": "brings a schedule of its own",
    "fine_grained_activation_offloading": "replays the order of the first iteration",
    "defer_embedding_wgrad_compute": "defers work to a fixed end of the schedule",
    "moe_paged_stash": "assumes a fixed order of microbatches",
}
"""Config flags that assume a static order of the schedule -> why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IterationSettings:
    """How the iterations of a run are read, planned and run."""

    metadata: Callable[[Any], Microbatch]
    """Instance lengths of one item of the data iterator, by its form."""
    call_metadata: Callable[[CapturedCall], Microbatch] | None = None
    """Instance lengths of a captured microbatch ({}: this rank was not given its data), for scripts whose forward_step alone knows what an item
    means; it is run on items read ahead as well, and ``metadata`` serves where that cannot be."""
    call_conditions: Callable[[CapturedCall], Sequence[str]] | None = None
    """Names of what a captured microbatch gives to every layer (masks, bounds of packed sequences), which all ranks must have been given alike."""
    plan_function: PlanFunction
    """Makes plans; called on a background thread of the planner rank."""
    quick_plan_function: PlanFunction | None = None
    """Makes a plan at once where the other is late or fails; None: wait as long as it takes."""
    device: torch.device
    """Where chunks compute."""
    backend: str = "gloo"
    """Of messages along the pipeline."""
    timeout_s: float = 600.0
    """After this long without a sign of another rank this one gives up with an error."""
    budget: SearchBudget | None = None
    """What the plan function searches by; told the length of each training iteration."""
    plan_deadline_s: float = 1.0
    """How long an iteration may wait for its plan."""
    unseen_deadline_s: float | None = None
    """How long, where its batch was not read ahead; None: as long."""
    planner_threads: int = 1
    """Batches planned side by side."""
    search_ranks: SearchRanks = "one"
    """Which ranks of a replica search plans."""
    search_threads: int = 1
    """That search beside training on ranks other than the planner."""
    look_ahead: int = 1
    """How many of the next iterations' batches are planned while one runs, where the data iterator can look ahead."""
    upcoming: UpcomingFunction | None = None
    """Tells how many microbatches these iterations have; None: as many as the one that runs."""
    num_outputs: int | None = None
    """How many values the model returns to forward_step; None = one tensor."""
    joined: tuple[str, Sequence[int]] | None = None
    """The module whose stages exchange data with other replicas (experts), and the global ranks with which this one does."""
    seed: int = 0
    """Of what forward_step draws; equal on all ranks."""
    iteration: Callable[[], int] | None = None
    """Number of the training iteration at hand, for what forward_step draws in it; None: counted here."""
    measures_memory: bool = False
    """Whether what ranks hold is measured on the CPU, where counting takes time; on CUDA it always is."""
    follows_device_memory: bool = False
    """Whether plans' limit is what the device has, asked for again while training."""
    balance: Estimate | None = None
    """Work of microbatches: replicas deal the batches ahead by it; None: every replica trains what it reads."""


class _Instant(NamedTuple):
    at_s: float
    waited_s: float
    """For plans, until then."""


class DipForwardBackward:
    """One for each rank and run.

    Long since it puts together everything that an iteration consists of; a third of it is the constructor and Megatron's own signature.

    Args:
        staged_model: this rank's chunks, for the executor.
        chunks: the same in Megatron's wrappers, in ``staged_model.chunk_keys``' order: the list given as ``model`` in every call.
        partition: how modules are cut, equal on all ranks.

    Making it is collective over all ranks of the job (process groups).
    """

    def __init__(
        self, *, staged_model: StagedModel, chunks: Sequence[torch.nn.Module], partition: Partition, settings: IterationSettings
    ) -> None:
        assert len(chunks) == len(staged_model.chunk_keys), (len(chunks), staged_model.chunk_keys)
        self._staged_model = staged_model
        self._chunks = list(chunks)
        self._modules = tuple(partition.chunks)
        self._device = settings.device
        self.groups: PipelineGroups = new_process_groups(
            dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()),
            parallel_state.get_data_parallel_rank(),
            backend=settings.backend,
            timeout_s=settings.timeout_s,
        )
        if partition.num_ranks != self.groups.num_ranks:
            raise InputError(
                "partition.chunks", partition.chunks, f"is for {partition.num_ranks} pipeline ranks, the run has {self.groups.num_ranks}",
                "give a partition for as many ranks",
            )
        self.is_planner: bool = dist.get_rank() == self.groups.control_ranks[0]
        self._capture = BatchCapture(
            chunk=self._chunks[0], metadata=settings.metadata, call_metadata=settings.call_metadata,
            call_conditions=settings.call_conditions if self.groups.num_ranks > 1 else None, num_outputs=settings.num_outputs,
            bind=staged_model.bind,
        )
        self._agreement = Agreement(self.groups, partition)
        joint = _joint_recording(self.groups, settings.timeout_s)
        self._foresight = Foresight(
            ForeseenMetadata(self._chunks[0], settings.metadata, settings.call_metadata, settings.num_outputs, joint),
            settings.look_ahead, settings.upcoming, joint,
        )
        if self.groups.peers is not None:
            _check_alike({"--dip-search-ranks": settings.search_ranks, "--dip-balance": settings.balance is not None, "--dip-look-ahead": settings.look_ahead})
        link: LinkedReplicas | None = None
        if settings.joined is not None:
            module, joined_ranks = settings.joined
            link = link_replicas(
                parallel_state.get_data_parallel_rank(), joined_ranks, self.groups.control_ranks[0], module, settings.timeout_s
            )
        self.shared_search = search_of(self.groups, settings.search_ranks, settings.search_threads, settings.timeout_s)
        self._plans: PlanSource | None = None
        """On the planner rank."""
        if self.is_planner:
            self._plans = PlanSource(
                settings.plan_function, settings.quick_plan_function, pack_plan if len(self.groups.control_ranks) > 1 else _unpacked,
                deadline_s=settings.plan_deadline_s, num_threads=settings.planner_threads, look_ahead=settings.look_ahead, link=link,
                unseen_deadline_s=settings.unseen_deadline_s,
            )
            if settings.budget is not None:
                settings.budget.ask(self._plans.is_needed)
        self._balance: ReplicaBalance | None = None
        if settings.balance is not None and settings.look_ahead > 0 and self.groups.peers is not None:
            plans = None if self._plans is None else ReplicaPlans(submit=self._plans.submit_dealt, planned_ns=self._plans.planned_ns)
            self._balance = ReplicaBalance(self.groups, settings.balance, plans, settings.timeout_s)
        p2p = PointToPoint(self.groups, self._device) if self.groups.num_ranks > 1 else None
        self._executor = Executor(self.groups.rank, p2p, self._device)
        self.memory: MemoryInUse | None = None
        """What this rank holds beside its plans."""
        if settings.measures_memory or settings.follows_device_memory or self._device.type == "cuda":
            self.memory = MemoryInUse(self.groups, self._device, self.forget_plans, follows_device=settings.follows_device_memory)
            if self._staged_model.offload is not None:
                self._staged_model.offload.meter = self.memory.meter
            if p2p is not None:
                p2p.meter = self.memory.meter
        self._deferral: LinearWeightDeferral | None = None
        """Made with the first plan that splits backwards."""
        self._timer: StageTimer | None = None
        self._training_timer: StageTimer | None = None
        """Of the last iteration that trained."""
        self._clock_offset_ns: int | None = None
        self._loss_is_sum = False
        """Seen once: losses of a microbatch's parts add up to its loss."""
        self._seed = settings.seed
        self._iteration = settings.iteration
        self._iterations = self._evaluations = 0
        """Training iterations so far; evaluation steps since the last."""
        self._collections = FixedCollections()
        self._budget = settings.budget
        self._last_start: _Instant | None = None
        """Of a training iteration."""
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

        self._observe_length(forward_only)
        self._collections.step()  # the last iteration's graphs are gone, and no rank waits for this one's messages yet
        iterator = data_iterator[0] if isinstance(data_iterator, Sequence) else data_iterator
        with nvtx_range("dip prepare"):
            batch, plan = self._prepare(forward_step_func, iterator, num_microbatches, forward_only)
        if pg_collection is None:
            pg_collection = _default_pg_collection()
        loss = IterationLoss(
            batch.calls, config, num_microbatches, forward_only, collect_non_loss_data, pg_collection.cp.size(), self._device,
            self._loss_is_sum,
        )
        if self.memory is not None:
            self.memory.count_inputs(batch.inputs)
        batch.calls.clear()  # each is let go when its last stage has run
        batch.inputs.clear()
        set_auxiliary_loss_scale(config, num_microbatches, pg_collection.cp.size(), self._device)
        if not (first_val_step is False and forward_only):
            for chunk in chunks:
                if hasattr(chunk, "set_is_first_microbatch"):
                    chunk.set_is_first_microbatch()  # type: ignore[operator]

        try:
            self._run(plan, loss, config, forward_only, bool(force_all_reduce))
        finally:
            self._staged_model.end_iteration()
        self._loss_is_sum = loss.is_known_as_sum

        if config.finalize_model_grads_func is not None and not forward_only:
            with nvtx_range("dip finalize"), _naming_the_other_replicas():
                config.finalize_model_grads_func(
                    chunks, loss.num_tokens if config.calculate_per_token_loss else None, pg_collection=pg_collection,
                    force_all_reduce=force_all_reduce,
                )
        if self.memory is not None and not forward_only:
            self.memory.after_iteration()
        self._iterations += not forward_only
        if config.timers is not None:
            config.timers("forward-backward").stop()
        return loss.reports()

    def sample(self, forward_step: Callable[..., Any], iterator: Iterator[Any] | None, num_microbatches: int, count: int) -> list[list[Microbatch]]:
        """Reads ``count`` batches and gives their microbatches' instance lengths; nothing runs, and the data are let go. All ranks of the replica
        must call it together.

        Returns:
            Fewer batches where the data end before; none on ranks that are not given the data.
        Raises:
            InputError: a batch that cannot be read.
        """
        found: list[list[Microbatch]] = []
        for _ in range(count):
            batch = self._capture(forward_step, iterator, num_microbatches, self._draw_place(False))
            self._staged_model.end_iteration()  # no stage will read what was bound for it
            if isinstance(batch.error, DataEnded):
                break
            if batch.error is not None:
                raise batch.error
            if batch.microbatches is not None:
                found.append(batch.microbatches)
        return found

    def forget_plans(self) -> None:
        """To be called when the plan function's costs have changed: batches that come again are planned anew."""
        if self._plans is not None:
            self._plans.forget()

    def records(self) -> list[StageRecord]:
        """Measured start and end of this rank's stages in the last iteration (:attr:`plan` says what they are)."""
        return [] if self._timer is None else self._timer.records()

    def gather_records(self) -> list[list[StageRecord]] | None:
        """All pipeline ranks' records of the last iteration on one clock, on pipeline rank 0 (None elsewhere). All ranks of the replica
        must call it together."""
        if self._clock_offset_ns is None:
            self._clock_offset_ns = clock_offset(self.groups)
        return gather_records(self.records(), self.groups, self._clock_offset_ns)

    def measured(self) -> MeasuredIteration:
        """What the last iteration's stages came to on all pipeline ranks. All ranks of the replica must call it together."""
        if self._clock_offset_ns is None:
            self._clock_offset_ns = clock_offset(self.groups)
        return measure_iteration(self.records(), self.groups, self._clock_offset_ns)

    def counts(self) -> PlanCounts | None:
        """How plans were had so far; None where this rank does not plan."""
        return None if self._plans is None else self._plans.counts()

    def last_batch(self) -> Sequence[Microbatch] | None:
        """The last iteration's microbatches on the rank that plans; None elsewhere."""
        return None if self._plans is None else self._plans.last_batch

    @property
    def search(self) -> SearchFunction:
        """What plan functions search with: all ranks of the replica that search, or this one."""
        return search if self.shared_search is None else self.shared_search

    def balance_figures(self) -> BalanceFigures | None:
        """What dealing batches to replicas came to so far; None where they are not dealt."""
        return None if self._balance is None else self._balance.figures()

    def measured_imbalance(self) -> float:
        """Pipeline time of the last training iteration: slowest replica over mean. Ranks of one place in all replicas must call it together."""
        if self.groups.peers is None:
            return 1.0
        spans = torch.tensor([_span_ns(self._training_timer)] * 2, dtype=torch.int64)
        dist.all_reduce(spans[:1], dist.ReduceOp.MAX, group=self.groups.peers)
        dist.all_reduce(spans[1:], dist.ReduceOp.SUM, group=self.groups.peers)
        return int(spans[0]) * dist.get_world_size(self.groups.peers) / max(int(spans[1]), 1)

    def _draw_place(self, forward_only: bool) -> DrawPlace:
        """Where numbers are drawn in this call."""
        self._evaluations = self._evaluations + 1 if forward_only else 0
        return DrawPlace(
            seed=self._seed, iteration=self._iterations if self._iteration is None else self._iteration(), evaluation=self._evaluations,
            replica=parallel_state.get_data_parallel_rank(),
        )

    def _observe_length(self, forward_only: bool) -> None:
        """Tells the planner how long the iteration before was, from start to start, without what it waited for its plan."""
        counts = self.counts()
        if counts is None or self._budget is None or forward_only:
            return
        now, before = _Instant(time.perf_counter(), counts.waited_ns / 1e9), self._last_start
        self._last_start = now
        if before is not None:
            self._budget.observe(now.at_s - before.at_s - (now.waited_s - before.waited_s))

    def _run(self, plan: Plan, loss: IterationLoss, config: Any, forward_only: bool, force_all_reduce: bool) -> None:
        """Runs this rank's actions, with the data-parallel communication that overlaps with them."""
        if self._deferral is None and any(stage.kind == "w" for stage in plan.stages):
            offload = self._staged_model.offload
            self._deferral = LinearWeightDeferral(self._chunks, None if offload is None else offload.keep)
        self._timer = stage_timer(self._device)
        with no_sync(config):
            start_param_sync(self._chunks)
            after: dict[int, list[Callable[[], None]]] = {}
            if not forward_only:
                after = grad_sync_points(
                    self._chunks, self._staged_model.chunk_keys, self._modules, plan, self.groups.rank, config, force_all_reduce
                )
            for function in after.pop(AT_START, ()):
                function()
            for microbatch, stage in last_forwards(plan, self.groups.rank).items():
                after.setdefault(stage, []).insert(0, partial(self._release, loss, microbatch))
            compute = MegatronCompute(self._staged_model, loss, self._deferral, config)
            if self.memory is not None:
                self.memory.begin(self._chunks)
            with _saying_what_was_planned(plan, self.groups.rank):
                self._executor.run(PlanLinks(plan), compute, self._timer, after)
            if self.memory is not None and not forward_only:
                self.memory.end(plan, compute.kept_bytes)
            finish_param_sync(self._chunks)
        if not forward_only:
            self._training_timer = self._timer

    def _release(self, loss: IterationLoss, microbatch: int) -> None:
        """Lets go of what was captured of a microbatch."""
        self._staged_model.release(microbatch)
        loss.release(microbatch)

    def _prepare(
        self, forward_step: Callable[..., Any], iterator: Iterator[Any] | None, num_microbatches: int, forward_only: bool
    ) -> tuple[CapturedBatch, Plan]:
        """Captures the microbatches, agrees on their plan and hands both to the model. Whatever goes wrong on one rank ends on all."""
        balance = None if forward_only else self._balance
        lookahead = find_lookahead(iterator)
        if balance is not None:
            balance.start(lookahead, iterator is not None)
        if balance is not None and balance.is_on:
            balance.settle(lookahead, num_microbatches, is_replaying(iterator), _span_ns(self._training_timer))
        batch = self._capture(forward_step, iterator, num_microbatches, self._draw_place(forward_only))
        shared = self._agreement.share(None if self._plans is None else self._plans.take(batch, forward_only))
        error = batch.error or shared.error
        misfit: Exception | None = None
        try:
            if error is None and shared.plan is not None:
                try:
                    self._staged_model.begin_iteration(shared.plan, batch.inputs, batch.recapture, forward_only=forward_only)
                except Exception as caught:
                    misfit = caught
            self._agreement.compare(shared.digest, batch.microbatches, batch.conditions, error, misfit)
        except Exception:
            self._staged_model.end_iteration()
            raise
        assert shared.plan is not None
        self.plan = shared.plan
        self._foresight.look(forward_step, None if batch.is_replay else lookahead, num_microbatches, forward_only, self._plans, balance)
        return batch, shared.plan


def last_forwards(plan: Plan, rank: int) -> dict[int, int]:
    """Microbatch -> its last forward stage on the rank."""
    return {plan.stages[stage].microbatch: stage for stage in plan.order[rank] if plan.stages[stage].kind == "fw"}


@contextmanager
def _saying_what_was_planned(plan: Plan, rank: int) -> Iterator[None]:
    """Around a plan's stages: where memory runs out, the error says what the plan counted on."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        limit = "no limit" if plan.memory_capacity is None else f"{plan.memory_capacity[rank] / 2**30:.2f} GiB"
        error.add_note(
            f"memory ran out on pipeline rank {rank} (global rank {dist.get_rank()}); its plan counts on {plan.peak_memory[rank] / 2**30:.2f} GiB, "
            f"limit {limit}. A lower --dip-memory-limit makes plans recompute and offload more; auto takes what the device has"
        )
        raise


@contextmanager
def _naming_the_other_replicas() -> Iterator[None]:
    """Around Megatron's finishing of gradients: says where the run is when a collective fails, which most often means that a rank died.

    A replica finds out about its own ranks by messages along the pipeline. Of others it hears here, at the first collective with them:
    over gloo at once, over NCCL when Megatron's --distributed-timeout-minutes has passed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(f"while global rank {dist.get_rank()} finished its gradients, behind the plan's stages")
        raise
    except RuntimeError as failure:
        # Tensor-parallel ranks, and those that share embeddings, take part as well: with one replica it is one of these.
        others = "of other replicas" if parallel_state.get_data_parallel_world_size() > 1 else "of its replica"
        raise PeerError(
            f"global rank {dist.get_rank()} could not finish its gradients with the ranks {others}; one of them may have ended, "
            f"see its output: {first_line(failure)}"
        ) from failure


def _refuse_unsupported(config: Any) -> None:
    for flag, reason in _REFUSED.items():
        if getattr(config, flag, False):
            raise InputError(f"--{flag.replace('_', '-')}", True, f"cannot be used with --pipeline-schedule dip: it {reason}", "leave it out")


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


def _span_ns(timer: StageTimer | None) -> int:
    """From the first stage's start to the last one's end on this rank."""
    records = [] if timer is None else timer.records()
    return max((record.end_ns for record in records), default=0) - min((record.start_ns for record in records), default=0)


def _check_alike(flags: dict[str, Any]) -> None:
    """Raises InputError on all ranks of the job where they were given different flags; collective over them."""
    every: list[dict[str, Any]] = [flags] * dist.get_world_size()
    dist.all_gather_object(every, flags)
    for flag in flags:
        if len({str(of_rank[flag]) for of_rank in every}) > 1:
            raise InputError(flag, [of_rank[flag] for of_rank in every], "differs between ranks, in their order", "give all ranks the same flags")


def _joint_recording(groups: PipelineGroups, timeout_s: float) -> JointRecording | None:
    """For the tensor- and context-parallel ranks of the first pipeline rank, where these are several; collective over the job."""
    own = dist.get_process_group_ranks(parallel_state.get_tensor_and_context_parallel_group())
    every: list[list[int]] = [own] * dist.get_world_size()
    dist.all_gather_object(every, own)
    joint = None
    for ranks in dict.fromkeys(map(tuple, every)):
        if len(ranks) > 1:
            group = dist.new_group(list(ranks), timeout=datetime.timedelta(seconds=timeout_s), backend="gloo")
            if dist.get_rank() in ranks and groups.rank == 0:
                joint = JointRecording(group, groups.control_ranks[0])
    return joint


def _unpacked(plan: Plan | PlanColumns) -> PackedPlan:
    """For a planner rank that has nobody to send to."""
    return PackedPlan(plan_of(plan) if isinstance(plan, PlanColumns) else plan, b"", b"")
