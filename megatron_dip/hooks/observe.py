"""``--dip-observe DIR``: the stock schedule runs as ever, and at the end it is said what DIP would have taken.

In: the calls that Megatron makes of its own schedule. Out: in the folder, for the first iterations, ``iteration_N.json`` (``megatron-dip/workload/1``: model,
sizes, device, one replica's batch) and ``iteration_N_measured.json`` (``megatron-dip/timeline/1``: when each pipeline rank ran which microbatch
forwards and backwards, for ``megatron-dip trace``); at the end a line.

How it looks on without taking part: the script's model provider is sketched once more before Megatron builds its model, the arguments of the model's
forward are read as they go in, and clocks stand around Megatron's ``forward_step`` and ``backward_step``. One gather over gloo an observed
iteration; on CUDA the observed iterations wait for the device at their end. Random states are put back.

DIP's time is planned on its best cut, by analytic costs scaled so that their sum is that of the measured stages. A stage of the stock schedule holds
parts of several modules, which its time does not tell apart: ``megatron-dip tune`` measures them.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dip.cost.measured import SlowedCost
from megatron_dip.models.provided import replaced
from megatron_dip.planner.cut_choice import CutProcess, CutTask
from megatron_dip.runtime.groups import PipelineGroups, new_process_groups
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.timeline import Bar, Timeline
from megatron_dip.spec.workload import Microbatch, Parallel, Training, Workload

logger = logging.getLogger(__name__)

_SKIPPED = 2
"""Iterations at the start, while allocators and caches warm up."""
_OBSERVED = 32
"""Iterations that are observed after these."""
_WAIT_S = 120.0
"""For the choice of DIP's cut, at the run's end."""
_BACKWARD = 1 << 20
"""Added to a microbatch's number for its backward, in records."""


class ObserveAction(argparse.Action):
    """Takes the flag's folder, and looks on from then: under the stock schedule Megatron calls nothing else of this package."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)
        install_observer()


def install_observer() -> None:
    """Puts an observer in front of the stock schedule and of Megatron's building of the model. Once a process."""
    from megatron.core.pipeline_parallel import schedules

    if schedules._forward_backward_func_override is not None:  # type: ignore[attr-defined]
        return
    observer = StockObserver()
    schedules._forward_backward_func_override = observer.schedule  # type: ignore[attr-defined]
    training = sys.modules.get("megatron.training.training")
    if training is not None:
        training.get_model = observer.building(training.get_model)  # type: ignore[attr-defined]


class StockObserver:
    """Of one rank."""

    def __init__(self) -> None:
        self._description: Any = None
        self._groups: PipelineGroups | None = None
        self._offset_ns = 0
        self._iterations = 0
        self._batches: list[list[Microbatch]] = []
        self._lengths_ns: list[int] = []
        self._work_ns: list[int] = []
        """Of each observed iteration: first start to last end, and all stages' time."""
        self._process: CutProcess | None = None

    def building(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Megatron's ``get_model``, with a look at what the provider would build."""

        def get_model(model_provider_func: Any, *args: Any, **kwargs: Any) -> Any:
            if self._description is None:
                self._describe(model_provider_func)
            return stock(model_provider_func, *args, **kwargs)

        return get_model

    def _describe(self, provider: Any) -> None:
        from megatron_dip.models.provided import sketch_model
        from megatron_dip.models.registry import describe

        with torch.random.fork_rng():
            try:
                self._description = describe(sketch_model(provider, config=None, pg_collection=None), provider, {"config": None, "pg_collection": None})
            except Exception as error:  # whatever a script does when it is asked twice, its run goes on
                logger.warning("--dip-observe: nothing can be observed of this model: %s", error)

    def schedule(self, stock: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """What ``get_forward_backward_func`` gives."""

        def forward_backward(**arguments: Any) -> list[Any]:
            if arguments.get("forward_only") or self._description is None:
                return stock(**arguments)
            self._iterations += 1
            if not _SKIPPED < self._iterations <= _SKIPPED + _OBSERVED:
                return stock(**arguments)
            return self._observed(stock, arguments)

        return forward_backward

    def _observed(self, stock: Callable[..., list[Any]], arguments: dict[str, Any]) -> list[Any]:
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import schedules

        from megatron_dip.runtime.timing import clock_offset, gather_records, stage_timer

        if self._groups is None:
            self._groups = _make_groups()
            if torch.distributed.get_rank() == 0:
                atexit.register(self.say)
            self._offset_ns = clock_offset(self._groups)
        is_first = parallel_state.get_pipeline_model_parallel_rank() == 0
        seen: list[Microbatch] = []
        on_cpu = torch.cuda.current_device() == torch.device("cpu")
        timer = stage_timer(torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device()))
        counts = {0: 0, _BACKWARD: 0}

        def timed(function: Callable[..., Any], kind: int) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                timer.begin()
                result = function(*args, **kwargs)
                timer.end(kind + counts[kind])
                counts[kind] += 1
                return result

            return step

        step = arguments["forward_step_func"]
        arguments = {**arguments, "forward_step_func": self._reading(step, seen) if is_first else step}
        with replaced(schedules, "forward_step", timed(schedules.forward_step, 0)), \
                replaced(schedules, "backward_step", timed(schedules.backward_step, _BACKWARD)):
            losses = stock(**arguments)
        records = gather_records(timer.records(), self._groups, self._offset_ns)
        if records is not None and parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0:
            self._note(records, seen, chunks=len(arguments["model"]) if isinstance(arguments["model"], list) else 1)
        return losses

    def _reading(self, step: Callable[..., Any], seen: list[Microbatch]) -> Callable[..., Any]:
        """The user's forward_step, whose model's arguments are read where it is the first stage."""

        def forward_step(data_iterator: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            def read(module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
                try:
                    found = self._description.metadata(self._description.bind(given, named))
                except Exception as error:  # the stock schedule may well run what DIP cannot
                    logger.warning("--dip-observe: a microbatch cannot be read: %s", error)
                    return
                if found:
                    seen.append(found)

            first = not getattr(_inner(model), "vp_stage", None)
            handle = model.register_forward_pre_hook(read, with_kwargs=True) if first else None
            try:
                return step(data_iterator, model, *args, **kwargs)
            finally:
                if handle is not None:
                    handle.remove()

        return forward_step

    def _note(self, records: Sequence[Sequence[Any]], seen: list[Microbatch], chunks: int) -> None:
        """On the first rank: files of an iteration, and what the end will need of it."""
        from megatron.training import get_args

        from megatron_dip.hooks.arguments import options_from_args
        from megatron_dip.hooks.costs import detect_device
        from megatron_dip.spec.codec import save

        args = get_args()
        everything = [record for of_rank in records for record in of_rank]
        begin = min(record.start_ns for record in everything)
        self._lengths_ns.append(max(record.end_ns for record in everything) - begin)
        self._work_ns.append(sum(record.end_ns - record.start_ns for record in everything))
        if not seen:
            return
        self._batches.append(seen)
        iteration = int(getattr(args, "curr_iteration", self._iterations - 1)) + 1
        folder: Path = args.dip_observe
        spec: ModelSpec = self._description.model_spec
        try:
            folder.mkdir(parents=True, exist_ok=True)
            save(folder / f"iteration_{iteration:06d}.json", Workload(
                format="megatron-dip/workload/1", model=spec, parallel=_parallel(args), training=_training(args),
                device=options_from_args(args).device or detect_device(), microbatches=seen,
            ))
            if chunks == 1:
                save(folder / f"iteration_{iteration:06d}_measured.json", Timeline(
                    title=f"iteration {iteration}, stock schedule", ranks=len(records), bars=[
                        Bar(
                            rank=rank, kind="bw" if record.stage >= _BACKWARD else "fw", module="stage", vp_stage=0,
                            microbatch=record.stage % _BACKWARD, sub_microbatch=0, start=record.start_ns - begin, end=record.end_ns - begin,
                        )
                        for rank, of_rank in enumerate(records) for record in of_rank
                    ],
                ))
        except (OSError, InputError) as error:
            logger.warning("--dip-observe: %s could not be written: %s", folder, error)
        if iteration >= (getattr(args, "train_iters", None) or 0) or len(self._lengths_ns) == _OBSERVED:
            self._choose(args)

    def _choose(self, args: Any) -> None:
        """Begins the choice of DIP's cut, beside training or at its end."""
        from megatron_dip.hooks.arguments import options_from_args
        from megatron_dip.hooks.costs import make_costs
        from megatron_dip.hooks.cut import fixed_choices, given_partition

        options, spec = options_from_args(args), self._description.model_spec
        assert self._groups is not None
        ranks = self._groups.num_ranks
        try:
            fixed = fixed_choices(self._description, ranks)
            today = given_partition(spec, ranks, options)
            costs = make_costs(spec, args, options)
            analytic = sum(_work_ns(spec, batch, costs) for batch in self._batches)
            scale = sum(self._work_ns) / analytic if analytic > 0 else 1.0
            self._process = CutProcess(CutTask(
                model=spec, num_ranks=ranks, batches=self._batches, costs=SlowedCost(costs, scale), current=today, chunks=fixed.chunks,
                sizes=fixed.sizes,
            ), gives_way=len(self._lengths_ns) == _OBSERVED)
        except InputError as error:
            logger.warning("--dip-observe: what DIP would have taken cannot be said: %s", error)

    def say(self) -> None:
        """At the run's end."""
        if self._process is None and self._batches:
            from megatron.training import get_args

            self._choose(get_args())
        if self._process is None:
            return
        outcome = self._process.outcome(_WAIT_S)
        self._process.stop()
        if outcome is None or isinstance(outcome, Exception):
            logger.warning("--dip-observe: what DIP would have taken was not found out: %s", outcome or f"it took longer than {_WAIT_S:.0f} s")
            return
        stock_ns = sum(self._lengths_ns) / len(self._lengths_ns)
        ratio = stock_ns / outcome.chosen_ns
        compared = f"{ratio:.2f} times as fast" if ratio >= 1 else f"{1 / ratio:.2f} times as slow"
        logger.warning(
            "--dip-observe: the stock schedule took %.1f ms an iteration (mean of %d); DIP would have taken about %.1f ms, %s, with layers %s "
            "(planned by analytic costs that were scaled to the measured stages). `megatron-dip tune` measures more closely",
            stock_ns / 1e6, len(self._lengths_ns), outcome.chosen_ns / 1e6, compared, outcome.partition.chunks,
        )


def _make_groups() -> PipelineGroups:
    """Collective over all ranks."""
    from megatron.core import parallel_state

    ranks = torch.distributed.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group())
    return new_process_groups(ranks, parallel_state.get_data_parallel_rank(), backend="gloo")


def _work_ns(spec: ModelSpec, batch: Sequence[Microbatch], costs: Any) -> float:
    """Of a batch over all ranks, microbatches whole, as the stock schedule runs them."""
    total = 0.0
    for microbatch in batch:
        for module in spec.modules:
            lengths = microbatch.get(module.name)
            if lengths:
                for part, count in (("layer", module.num_layers), ("first", 1), ("last", 1)):
                    cost = costs.part(module.name, part, lengths)
                    total += count * (cost.forward_ns + cost.backward_input_ns + cost.backward_weight_ns)
    return total


def _parallel(args: Any) -> Parallel:
    return Parallel(
        tensor=args.tensor_model_parallel_size, pipeline=args.pipeline_model_parallel_size, context=args.context_parallel_size,
        sequence=bool(args.sequence_parallel),
    )


def _training(args: Any) -> Training:
    return Training(
        dtype="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32", distributed_optimizer=bool(args.use_distributed_optimizer),
        schedule="1f1b" if args.virtual_pipeline_model_parallel_size is None else "interleaved",
        virtual_pipeline=args.virtual_pipeline_model_parallel_size or 1,
    )


def _inner(model: Any) -> Any:
    while isinstance(getattr(model, "module", None), torch.nn.Module):
        model = model.module
    return model
