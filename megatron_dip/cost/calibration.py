"""Fits a device's efficiencies to measurements, and says how far predictions were off before and after, also where nothing was fitted.

In: a device, a function that predicts a list of times for any device, the measured times, and which of them may be fitted. Out: a
:class:`Calibration`. Method: Gauss-Newton on the logarithms of predicted over measured, each parameter held to its old value by a
width that says how well it is known beforehand; so a few measurements move few parameters, and little.

Parameters are shares and gaps of :class:`megatron_dip.cost.device.DeviceEfficiency`, one number each for all measurements; there is
none for a single row. Not fitted: the tables over rows and lengths (they are kernel benchmarks), latencies, and what the operators are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.device import DeviceDescription
from megatron_dip.spec.errors import InputError

WIDTHS: dict[str, float] = {
    "training": 0.06, "memory": 0.08, "overlap_loss": 0.5, "gather": 0.1, "all_reduce": 0.1, "network": 0.15, "kernel_overhead_us": 0.5,
}
"""Parameter -> how far its logarithm may stand from the old value's without reason (one standard deviation)."""
_ERROR = 0.03
"""Error of a single prediction that is nobody's fault: measurement spread and what the model leaves out."""
_STEPS = 12

Predict = Callable[[DeviceDescription], Sequence[float]]
"""Device -> predicted seconds of every measurement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """Relative errors |predicted / measured - 1| of some measurements."""

    count: int
    mean: float
    worst: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    device: DeviceDescription
    """With the fitted parameters."""
    values: dict[str, tuple[float, float]]
    """Parameter -> before, after."""
    fitted_before: ErrorSummary
    fitted_after: ErrorSummary
    held_out_before: ErrorSummary
    held_out_after: ErrorSummary


def calibrate(
    device: DeviceDescription, predict: Predict, measured: Sequence[float], fitted: Sequence[bool], parameters: Sequence[str] = ("training", "memory"),
    *, widths: Mapping[str, float] = WIDTHS, source: str = "",
) -> Calibration:
    """Fits ``parameters`` on the measurements that ``fitted`` marks; the others are held out.

    Raises:
        InputError: an unknown parameter, nothing to fit on, or measurements that are no times.
    """
    for name in parameters:
        if name not in widths:
            raise InputError("--parameters", name, "is no parameter", f"use some of {', '.join(widths)}")
    for index, value in enumerate(measured):
        if not math.isfinite(value) or value <= 0:
            raise InputError(f"measurements[{index}]", value, "is no time", "give positive seconds")
    mask = np.asarray(fitted, dtype=bool)
    if not mask.any():
        raise InputError("measurements", len(measured), "none of them may be fitted", "mark some, or give more of them")
    log_measured = np.log(np.asarray(measured, dtype=float))
    start = np.log([max(_value(device, name), 1e-6) for name in parameters])
    sigma = np.array([widths[name] for name in parameters])

    def residual(at: NDArray[np.float64]) -> NDArray[np.float64]:
        predicted = np.log(np.asarray(predict(with_efficiencies(device, dict(zip(parameters, np.exp(at), strict=True)))), dtype=float))
        return np.concatenate(((predicted - log_measured)[mask] / _ERROR, (at - start) / sigma))

    at, error = start, residual(start)
    for _ in range(_STEPS):
        step_size = 1e-3
        jacobian = np.stack([(residual(at + step_size * unit) - error) / step_size for unit in np.eye(len(parameters))], axis=1)
        step = np.linalg.lstsq(jacobian, -error, rcond=None)[0]
        while np.abs(step).max() > 1e-5:
            trial = residual(at + step)
            if trial @ trial < error @ error:
                break
            step = step / 2.0
        else:
            break
        settled = error @ error - trial @ trial < 1e-3 * (error @ error)
        at, error = at + step, trial
        if settled:
            break
    values = {name: (_value(device, name), float(np.exp(value))) for name, value in zip(parameters, at, strict=True)}
    after = with_efficiencies(device, {name: pair[1] for name, pair in values.items()})
    if source:
        after = msgspec.structs.replace(after, source=f"{device.source} {source}")
    before_ratio = np.asarray(predict(device)) / np.asarray(measured)
    after_ratio = np.asarray(predict(after)) / np.asarray(measured)
    return Calibration(
        device=after, values=values, fitted_before=summarise(before_ratio[mask]), fitted_after=summarise(after_ratio[mask]),
        held_out_before=summarise(before_ratio[~mask]), held_out_after=summarise(after_ratio[~mask]),
    )


def with_efficiencies(device: DeviceDescription, values: Mapping[str, float]) -> DeviceDescription:
    """The device with other efficiencies, each kept within what the file format allows."""
    limits = {"training": 1.5, "memory": 1.5, "overlap_loss": 1.0, "gather": 1.5, "all_reduce": 1.5, "network": 1.5}
    kept = {name: min(value, limits.get(name, math.inf)) for name, value in values.items()}
    return msgspec.structs.replace(device, efficiency=msgspec.structs.replace(device.efficiency, **kept))


def summarise(ratios: NDArray[np.float64] | Sequence[float]) -> ErrorSummary:
    """Errors of predicted / measured; zeros where there is nothing."""
    errors = np.abs(np.asarray(ratios, dtype=float) - 1.0)
    if not len(errors):
        return ErrorSummary(count=0, mean=0.0, worst=0.0)
    return ErrorSummary(count=len(errors), mean=float(errors.mean()), worst=float(errors.max()))


def _value(device: DeviceDescription, name: str) -> float:
    return float(getattr(device.efficiency, name))
