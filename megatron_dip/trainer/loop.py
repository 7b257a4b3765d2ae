"""The training loop of the examples: one rank's part of a run, from the process group to the last checkpoint."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from megatron_dip.spec.codec import encode, load_example, write_atomically
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.training import EvaluationFigures, ExampleConfig, IterationFigures, RunRecord, RunSettings, SchedulePlan
from megatron_dip.trainer.build import initialize_parallel
from megatron_dip.trainer.checkpoint import refuse_other_runs
from megatron_dip.trainer.systems import Example, StockSystem, System


def load_example_module(folder: Path, config: ExampleConfig, settings: RunSettings) -> Example:
    """Loads ``example.py`` of a folder and makes its data. Raises InputError for a module that lacks what training calls."""
    path = folder / "example.py"
    if not path.is_file():
        raise InputError("EXAMPLE", str(folder), "has no example.py", "name a folder such as examples/vlm/digits")
    spec = importlib.util.spec_from_file_location("megatron_dip_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    for names in (("Dataset",), ("forward_step",), ("evaluation_step", "evaluate")):
        if not any(hasattr(module, name) for name in names):
            raise InputError(str(path), " or ".join(names), "is not defined", "define it as examples/vlm/digits/example.py does")
    return Example(config=config, dataset=module.Dataset(config.model, settings.data, settings.seed), module=module)


def start_rank(settings: RunSettings) -> None:
    """Starts torch.distributed and Megatron's groups on this rank."""
    initialize_parallel(settings.parallel, device=settings.device, seed=settings.seed, timeout_s=settings.timeout_s)
    if settings.device == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def compare_settings(folder: Path, config: ExampleConfig, settings: RunSettings) -> None:
    """Raises InputError on all ranks where one of them was given another example or other settings than rank 0; all must call it.

    Paths may differ from machine to machine; whether there is one may not.
    """
    facts: dict[str, Any] = {
        "version of megatron_dip": importlib.metadata.version("megatron_dip"),
        "example.py": _content(folder / "example.py"),
        **{f"config.json: {field}": value for field, value in msgspec.to_builtins(config).items()},
        **msgspec.to_builtins(settings),
        **{f"{field} given": getattr(settings, field) is not None for field in ("save", "load", "record", "timelines")},
        "data": {field: value for field, value in settings.data.items() if field != "file"},
        "schedule": {**msgspec.to_builtins(settings.schedule), "profile": _content(settings.schedule.profile)},
    }
    for path in ("save", "load", "record", "timelines"):
        del facts[path]
    digests = {name: hashlib.sha256(msgspec.json.encode(msgspec.to_builtins(fact, str_keys=True), order="sorted")).digest() for name, fact in facts.items()}
    table = torch.tensor([list(digests[name]) for name in sorted(digests)], dtype=torch.uint8)
    tables = [torch.empty_like(table) for _ in range(dist.get_world_size())]
    dist.all_gather(tables, table)
    for rank, other in enumerate(tables):
        differing = [name for name, own, theirs in zip(sorted(digests), tables[0], other, strict=True) if not torch.equal(own, theirs)]
        if differing:
            raise InputError(
                f"rank {rank}", differing, "were given otherwise than to rank 0", "start all ranks with the same example, options and installation"
            )


def _content(path: str | Path | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def build_system(schedule: SchedulePlan, example: Example, settings: RunSettings) -> System:
    if schedule.name == "dip":
        from megatron_dip.trainer.dip_system import DipSystem

        return DipSystem(schedule, example, settings)
    return StockSystem(schedule, example, settings)


def train(folder: Path, settings: RunSettings, log: Callable[[str], None]) -> None:
    """Trains an example on this rank of a run; ``log`` is called on rank 0 alone."""
    example = load_example_module(folder, load_example(folder / "config.json"), settings)
    start_rank(settings)
    compare_settings(folder, example.config, settings)
    say = log if dist.get_rank() == 0 else lambda _: None
    system = build_system(settings.schedule, example, settings)
    for sentence in system.warnings():
        say(f"warning: {sentence}")
    _Run(system, settings, say).train()


class _Run:
    """The loop and its figures."""

    def __init__(self, system: System, settings: RunSettings, say: Callable[[str], None]) -> None:
        self.system = system
        self.settings = settings
        self.say = say
        self.iterations: list[IterationFigures] = []
        self.evaluations: list[EvaluationFigures] = []
        self.training_s = 0.0

    def train(self) -> None:
        settings, system = self.settings, self.system
        sizes = settings.parallel
        self.say(
            f"{system.label}: pipeline {sizes.pipeline} x tensor {sizes.tensor} x data {sizes.data} on {settings.device}, "
            f"{settings.iterations} iterations of {settings.num_microbatches} microbatches, seed {settings.seed}"
        )
        load = None if settings.load is None else Path(settings.load)
        if settings.save is not None:
            refuse_other_runs(Path(settings.save), load)
        first = 0
        if load is not None:
            first = system.load(load, settings.load_iteration)
            if first >= settings.iterations:
                raise InputError(
                    "--iterations", settings.iterations, f"nothing is left to train: the checkpoint was saved behind iteration {first}",
                    f"give more than {first}, or an earlier checkpoint with --load-iteration",
                )
            self.say(f"loaded {load}: going on behind iteration {first}, with the learning rates of {settings.iterations} iterations")
        system.start_data(first)
        for iteration in range(first, settings.iterations):
            self._step(iteration)
            done = iteration + 1
            last = done == settings.iterations
            if settings.save is not None and (last or (settings.save_interval and done % settings.save_interval == 0)):
                system.save(Path(settings.save), done)
                self._write_record()
                self.say(f"saved iteration {done} to {settings.save}")
            if last or (settings.evaluate_interval and done % settings.evaluate_interval == 0):
                self._evaluate(done)
        if settings.record is not None:
            self._write_record()
            self.say(f"wrote {settings.record}")
        if settings.timelines is not None:
            system.write_timelines(Path(settings.timelines))
            self.say(f"wrote the last iteration's timelines to {settings.timelines}")
        system.end()
        counts = system.plan_counts()
        if counts is not None:
            self.say(
                f"plans: {counts.taken} taken, {sum(counts.fallbacks.values())} of them quick ones in place of late or failed ones; "
                f"{counts.waited_ns / 1e9:.1f} s of waiting for them in {self.training_s:.1f} s of training"
            )

    def _step(self, iteration: int) -> None:
        began = time.perf_counter()
        step = self.system.train_step()
        seconds = time.perf_counter() - began
        self.training_s += seconds
        plan = self.system.last_plan()
        figures = IterationFigures(
            iteration=iteration + 1, loss=step.loss, grad_norm=step.grad_norm, seconds=seconds, pipeline_seconds=step.pipeline_s,
            planned_ns=None if plan is None else plan.claimed_makespan, planning_ns=None if plan is None else plan.planning_ns,
        )
        self.iterations.append(figures)
        done = iteration + 1
        if done % self.settings.log_interval == 0 or done in (1, self.settings.iterations):
            planned = "" if plan is None else f" | plan {plan.claimed_makespan / 1e9:.2f} s, made in {plan.planning_ns / 1e6:.0f} ms"
            balance = self.system.balance()
            if balance is not None:
                planned += f" | replicas {balance.imbalance_before:.3f} -> {balance.imbalance:.3f}, measured {balance.measured_imbalance:.3f}"
            self.say(
                f"iteration {done:4d}/{self.settings.iterations} | loss {step.loss:.4f} | gradient norm {step.grad_norm:.2f} | "
                f"{seconds:.2f} s, pipeline {step.pipeline_s:.2f} s{planned}"
            )

    def _evaluate(self, done: int) -> None:
        scores = self.system.score()
        right, asked = next(iter(scores.values()))
        self.evaluations.append(
            EvaluationFigures(iteration=done, training_seconds=self.training_s, right=right, asked=asked, scores=scores)
        )
        told = ", ".join(f"{right} of {asked} {what} ({100 * right / max(asked, 1):.1f} %)" for what, (right, asked) in scores.items())
        self.say(f"held out: {told} behind iteration {done}, {self.training_s:.0f} s of training")

    def _write_record(self) -> None:
        settings, counts = self.settings, self.system.plan_counts()
        if settings.record is not None and dist.get_rank() == 0:
            record = RunRecord(
                schedule=self.system.label, settings=settings, iterations=self.iterations, evaluations=self.evaluations,
                late_plans=0 if counts is None else sum(counts.fallbacks.values()),
                waited_for_plans_s=0.0 if counts is None else counts.waited_ns / 1e9,
                balance=self.system.balance(),
            )
            write_atomically(settings.record, encode(record))
