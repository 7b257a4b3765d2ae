"""A model together with the schedule that trains it: DIP's, or one of Megatron's own, behind the same few calls.

Systems of one process share Megatron's parallel groups. Each has its own weights, optimizer and stream of data, so that several can
take turns on the same batches.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from megatron_dip.models.built_in import BuiltInConfig, ChainCost, config_of
from megatron_dip.models.description import unwrap
from megatron_dip.planner.service import PlanCounts
from megatron_dip.spec.codec import save
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.timeline import Bar, Timeline
from megatron_dip.spec.training import BalanceRecord, ExampleConfig, OptimizerSpec, RunSettings, SchedulePlan
from megatron_dip.trainer.build import TrainingModel, build_optimizer
from megatron_dip.trainer.checkpoint import load_checkpoint, save_checkpoint
from megatron_dip.trainer.stock_layouts import build_stock_model, stock_forward_backward
from megatron_dip.trainer.stock_timing import StockTimer


class Dataset(Protocol):
    """What an example's ``Dataset`` offers; items are what its ``forward_step`` takes from the iterator."""

    def microbatches(self, iteration: int, num_microbatches: int) -> list[Any]:
        """The global batch of an iteration (from 0), the same on every rank."""
        ...

    def held_out(self, multiple: int) -> list[Any]:
        """Items for scoring, the same on every rank; their number is a multiple of ``multiple``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """An example's module, loaded: its data and Megatron's step functions."""

    config: ExampleConfig
    dataset: Dataset
    module: ModuleType
    """Defines forward_step, and evaluation_step whose report counts ``answers``: (right, asked); or instead of that ``evaluate(dataset,
    run)``, which scores by any number of calls of :meth:`System.run_everywhere`."""


def whole_model(example: Example, settings: RunSettings) -> BuiltInConfig:
    """The example's model under the run's parallel sizes; weights by the run's seed, the same for every schedule."""
    return config_of(example.config.model, settings.parallel, seed=settings.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    loss: float
    """Mean over the tokens of the global batch that carry a loss; the same on all ranks."""
    grad_norm: float
    pipeline_s: float
    """Forward and backward of all microbatches on this rank, gradients finalized."""


class System(ABC):
    """One schedule with its model; subclasses say how microbatches go through the pipeline."""

    def __init__(self, label: str, model: TrainingModel, example: Example, settings: RunSettings) -> None:
        self.label = label
        self.model = model
        self.example = example
        self.settings = settings
        self.optimizer: MegatronOptimizer = build_optimizer(
            model, example.config.optimizer, distributed_optimizer=settings.distributed_optimizer
        )
        self.scheduler = _parameter_scheduler(self.optimizer, example.config.optimizer, settings.iterations)
        model.config.grad_scale_func = self.optimizer.scale_loss
        self.microbatches_of_replica = settings.num_microbatches // settings.parallel.data
        self.start_data(0)

    @abstractmethod
    def start_data(self, iteration: int) -> None:
        """Makes ``iteration`` the next one whose data are taken."""

    def _stream(self, iteration: int) -> Iterator[Any]:
        """This replica's microbatches from an iteration on, without end. Raises InputError where the data set gives another number."""
        while True:
            items = self.example.dataset.microbatches(iteration, self.settings.num_microbatches)
            if len(items) != self.settings.num_microbatches:
                # Fewer would move all that follow; none at all would never end.
                raise InputError(
                    f"Dataset.microbatches({iteration}, {self.settings.num_microbatches})", f"{len(items)} items",
                    f"iteration {iteration + 1} takes {self.settings.num_microbatches}",
                    "return as many items as are asked for in every iteration, or train fewer --iterations",
                )
            yield from self._own_share(items)
            iteration += 1

    def _own_share(self, items: list[Any]) -> list[Any]:
        """This replica's part of a global batch."""
        return items[parallel_state.get_data_parallel_rank() :: self.settings.parallel.data]

    @abstractmethod
    def run(self, step: Any, *, forward_only: bool, items: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        """Runs forward (and backward) of an iteration's microbatches; returns the reports of the last pipeline rank.

        Args:
            items: what to run instead of the stream's next microbatches.
        """

    @abstractmethod
    def timeline(self, title: str) -> Timeline | None:
        """The last training iteration as measured, on pipeline rank 0 of each replica (None elsewhere); all ranks must call it."""

    def train_step(self) -> StepFigures:
        """One training iteration, as Megatron's train_step: gradients cleared, all microbatches, optimizer, learning rate.

        Raises InputError, on all ranks and before weights change, where loss or gradient are not finite.
        """
        self.model.zero_grad()
        self.optimizer.zero_grad()
        began = time.perf_counter()
        reports = self.run(self.example.module.forward_step, forward_only=False)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        pipeline_s = time.perf_counter() - began
        loss, tokens, unsound = _reduce_report(reports, "lm loss", 0.0 if _is_finite(self.model) else 1.0)
        loss /= max(tokens, 1.0)
        if unsound or not math.isfinite(loss):
            raise InputError(
                "the gradient" if math.isfinite(loss) else "the loss", "not finite", f"in iteration {self.scheduler.num_steps + 1}, whose loss is {loss:.4f}: weights were not stepped, nothing was saved",
                "look for values that are not finite in this iteration's data and in the loss function, or lower optimizer.lr in config.json; "
                "--load goes on from the last checkpoint, --load-iteration from one before",
            )
        _, grad_norm, _ = self.optimizer.step()
        self.scheduler.step(increment=1)
        self.after_step()
        return StepFigures(loss=loss, grad_norm=float(grad_norm or 0.0), pipeline_s=pipeline_s)

    def after_step(self) -> None:  # noqa: B027  (a static schedule learns nothing)
        """What a schedule learns from the iteration that just ran."""

    def end(self) -> None:  # noqa: B027  (as above)
        """Behind the last iteration: what there is to say of the run."""

    def score(self) -> dict[str, tuple[int, int]]:
        """What was scored -> (right, asked), the same on all ranks; by the example's ``evaluate``, else by its ``evaluation_step``."""
        module = self.example.module
        self.model.train(False)
        try:
            with torch.no_grad():
                if hasattr(module, "evaluate"):
                    return module.evaluate(self.example.dataset, self.run_everywhere)
                replica, replicas = parallel_state.get_data_parallel_rank(), self.settings.parallel.data
                # Megatron's interleaved schedule takes whole rounds of the pipeline.
                items = self.example.dataset.held_out(replicas * self.settings.parallel.pipeline)[replica::replicas]
                right, asked = _reduce_report(self.run(module.evaluation_step, forward_only=True, items=items), "answers")[:2]
                return {"digits read right": (round(right), round(asked))}
        finally:
            self.model.train(True)

    def run_everywhere(self, step: Any, items: Sequence[Any]) -> list[Any]:
        """Runs ``items`` forward on every replica; what ``step``'s loss function reports of each, on all ranks."""
        ranks = parallel_state.get_pipeline_model_parallel_world_size()
        # Megatron's interleaved schedule takes whole rounds of the pipeline.
        padded = [*items, *[items[-1]] * (-len(items) % ranks)]
        reports: list[Any] = self.run(step, forward_only=True, items=padded)
        shared: list[Any] = [reports]
        dist.broadcast_object_list(
            shared, parallel_state.get_pipeline_model_parallel_last_rank(), group=parallel_state.get_pipeline_model_parallel_group()
        )
        return shared[0][: len(items)]

    def save(self, folder: Path, iteration: int) -> None:
        save_checkpoint(folder, self.model, self.optimizer, iteration=iteration, extra={"scheduler": self.scheduler.state_dict()})

    def load(self, folder: Path, iteration: int | None = None) -> int:
        """Takes weights and optimizer from a checkpoint, the latest if none is named, and the learning rate's schedule of this run's
        iterations; returns the iteration behind which it was saved."""
        loaded, extra = load_checkpoint(folder, self.model, self.optimizer, iteration)
        self.scheduler.load_state_dict(extra["scheduler"])
        return loaded

    def warnings(self) -> list[str]:
        """What to know before training starts."""
        return []

    def last_plan(self) -> Plan | None:
        """The plan of the last training iteration; None under Megatron's own schedules."""
        return None

    def balance(self) -> BalanceRecord | None:
        """What dealing microbatches to replicas came to so far, as this rank knows it; None where they are not dealt."""
        return None

    def plan_counts(self) -> PlanCounts | None:
        """How plans were had so far, on the ranks that plan; None elsewhere, and under Megatron's own schedules."""
        return None

    def write_timelines(self, folder: Path) -> None:
        """Writes the last training iteration as planned and as measured, of replica 0; all ranks must call it."""
        timeline = self.timeline(f"{self.label}, measured")
        if timeline is not None and parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            save(folder / "measured.json", timeline)


class StockSystem(System):
    """Megatron's own schedule on one of its layouts."""

    def __init__(
        self, schedule: SchedulePlan, example: Example, settings: RunSettings,
        layer_times: Mapping[str, ChainCost] | None = None,
    ) -> None:
        virtual = schedule.virtual if schedule.name == "interleaved" else 1
        model = build_stock_model(
            whole_model(example, settings), schedule.layout, virtual=virtual, layer_times=layer_times,
            distributed_optimizer=settings.distributed_optimizer,
        )
        self.forward_backward = stock_forward_backward(virtual=virtual)
        self.bars: list[Bar] = []
        super().__init__(schedule.label, model, example, settings)

    def start_data(self, iteration: int) -> None:
        self.data = self._stream(iteration)

    def run(self, step: Any, *, forward_only: bool, items: Sequence[Any] | None = None) -> list[dict[str, Any]]:
        if items is None:
            items = [next(self.data) for _ in range(self.microbatches_of_replica)]
        chunks, length = list(self.model.chunks), self.example.config.model.sequence_length
        iterators = [iter(items) for _ in chunks]
        with StockTimer(chunks, [_held_modules(chunk) for chunk in chunks], parallel_state.get_pipeline_model_parallel_rank()) as timer:
            reports = self.forward_backward(
                forward_step_func=step, data_iterator=iterators if len(chunks) > 1 else iterators[0],
                model=chunks if len(chunks) > 1 else chunks[0], num_microbatches=len(items),
                seq_length=length, decoder_seq_length=length, micro_batch_size=1, forward_only=forward_only,
            )
        if not forward_only:
            self.bars = timer.bars
        return reports

    def timeline(self, title: str) -> Timeline | None:
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = parallel_state.get_pipeline_model_parallel_world_size()
        every: list[list[Bar]] = [[]] * ranks
        dist.all_gather_object(every, self.bars, group=group)
        if parallel_state.get_pipeline_model_parallel_rank() != 0:
            return None
        return measured_timeline([bar for bars in every for bar in bars], title, ranks)


def measured_timeline(bars: Sequence[Bar], title: str, ranks: int) -> Timeline:
    """A timeline that begins at 0, out of bars on one clock."""
    origin = min((bar.start for bar in bars), default=0)
    shifted = [
        Bar(
            rank=bar.rank, kind=bar.kind, module=bar.module, vp_stage=bar.vp_stage, microbatch=bar.microbatch,
            sub_microbatch=bar.sub_microbatch, start=bar.start - origin, end=bar.end - origin,
        )
        for bar in bars
    ]
    return Timeline(title=title, ranks=ranks, bars=shifted)


def _held_modules(chunk: torch.nn.Module) -> str:
    stage: Any = unwrap(chunk, MegatronModule)
    return "+".join(stage.held_modules())


class _Sums(NamedTuple):
    first: float
    second: float
    of_ranks: float


def _reduce_report(reports: Sequence[Mapping[str, torch.Tensor]], key: str, of_rank: float = 0.0) -> _Sums:
    """Sums the pairs that the last pipeline ranks report, over all microbatches and replicas, and one number of every rank; the same on
    all ranks."""
    total = torch.zeros(3, dtype=torch.float64)
    total[2] = of_rank
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        for report in reports:
            total[:2] += report[key].detach().to("cpu", torch.float64)
    dist.all_reduce(total)
    return _Sums(*total.tolist())


def _is_finite(model: TrainingModel) -> bool:
    """Whether this rank's part of the gradient is: one pass over the buffers of Megatron's DDP."""
    sums = [buffer.grad_data.sum(dtype=torch.float32) for chunk in model.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def _parameter_scheduler(optimizer: MegatronOptimizer, spec: OptimizerSpec, iterations: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=spec.lr, min_lr=spec.min_lr, lr_warmup_steps=min(spec.warmup_iterations, max(iterations - 1, 0)),
        lr_decay_steps=iterations, lr_decay_style="cosine", start_wd=spec.weight_decay, end_wd=spec.weight_decay, wd_incr_steps=iterations,
        wd_incr_style="constant", use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True,
    )
