"""Measured training steps, and what the simulator says to each: the ``megatron-dip/measured-steps/1`` format.

A step is a run that somebody timed: model, parallel sizes, schedule, implementation, seconds an iteration. All microbatches are alike.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import msgspec

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.device import DeviceDescription
from megatron_dip.cost.fixed import FixedStrategyCost
from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.modules import Kernels
from megatron_dip.simulator.step import SimulateOptions, simulate
from megatron_dip.spec.codec import decode, read_file
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.simulation import SimulationResult
from megatron_dip.spec.workload import Microbatch, Parallel, Training, Workload

MEASURED_STEPS_FORMAT = "megatron-dip/measured-steps/1"


class MeasuredStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    name: str
    model: ModelSpec
    parallel: Parallel
    training: Training
    """Its schedule and recompute setting are those of the run."""
    microbatch: Microbatch
    num_microbatches: int
    """Of the global batch."""
    kernels: Kernels = msgspec.field(default_factory=Kernels)
    blocking_messages: bool = False
    overlap_data_parallel: bool = True
    measured_s: float
    held_out: bool = False
    """Never fitted."""


class MeasuredSteps(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: Literal["megatron-dip/measured-steps/1"]
    source: str
    device: str
    steps: list[MeasuredStep]


def load_measured_steps(path: str | Path) -> MeasuredSteps:
    """Reads a file of measured steps. Raises InputError."""
    path = Path(path)
    found = decode(read_file(path), MeasuredSteps, path.name, MEASURED_STEPS_FORMAT)
    if not found.steps:
        raise InputError(f"{path.name}: steps", [], "no steps", "give at least one")
    for index, step in enumerate(found.steps):
        try:
            _validate_step(step, found.device)
        except InputError as error:
            raise InputError(f"{path.name}: steps[{index}] ({step.name}): {error.field}", error.value, error.problem, error.remedy) from None
    return found


_MAX_MICROBATCHES = 1 << 16


def _validate_step(step: MeasuredStep, device: str) -> None:
    """Raises InputError for steps that nobody can have run."""
    if not (math.isfinite(step.measured_s) and 0 < step.measured_s < 1e6):
        raise InputError("measured_s", step.measured_s, "no time of an iteration", "give seconds")
    if not 1 <= step.num_microbatches <= _MAX_MICROBATCHES:
        raise InputError("num_microbatches", step.num_microbatches, f"outside 1 to {_MAX_MICROBATCHES}", "give the global batch's number")
    step_workload(step, device).validate()
    for module in step.model.modules:
        if not step.microbatch.get(module.name):
            raise InputError(f"microbatch.{module.name}", step.microbatch.get(module.name), "the module has no instance", "give its lengths")


def step_workload(step: MeasuredStep, device: str) -> Workload:
    return Workload(
        format="megatron-dip/workload/1", model=step.model, parallel=step.parallel, training=step.training, device=device,
        microbatches=[step.microbatch] * step.num_microbatches,
    )


def step_costs(step: MeasuredStep, device: DeviceDescription) -> CostModel:
    """The step's costs; what was measured did fit, so memory is not limited."""
    costs = AnalyticCost(
        step.model, step.parallel, step.training, device, memory_capacity_bytes=10**15, microbatches=[step.microbatch], kernels=step.kernels,
    )
    return costs if step.training.recompute == "auto" else FixedStrategyCost(costs, step.training.recompute)


def predict_step(step: MeasuredStep, device: DeviceDescription) -> SimulationResult:
    """The simulator's answer to one measured step."""
    options = SimulateOptions(
        kernels=step.kernels, blocking_messages=step.blocking_messages, overlap_data_parallel=step.overlap_data_parallel, replicas=1,
    )
    return simulate(step_workload(step, device.name), options=options, costs=step_costs(step, device))
