"""Fits a device's efficiencies to measurements and reports the error before and after, also on a part that is held out.

Measurements are files of measured training steps (format megatron-dip/measured-steps/1), or profiles of layers
(format megatron-dip/profile/1) together with --workload, which says what model and parallel sizes they are of: one for all profiles,
or one for each in their order. Steps say themselves
whether they are held out; of a profile every fourth batch shape is, its forward and its backward. The fitted device goes to a file
that --device and workloads take.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from megatron_dip.cli.output import print_json, progress, tables
from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.calibration import WIDTHS, Calibration, ErrorSummary, calibrate
from megatron_dip.cost.device import DeviceDescription, load_device
from megatron_dip.cost.interface import Part
from megatron_dip.cost.modules import Kernels
from megatron_dip.simulator.measured_steps import MEASURED_STEPS_FORMAT, MeasuredStep, load_measured_steps, predict_step
from megatron_dip.spec.codec import check_outputs, format_of, load_profile, load_workload, read_file, write_atomically
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.profile import PROFILE_FORMAT, Profile
from megatron_dip.spec.workload import Workload

SUMMARY = "fit a device's efficiencies to measurements"
_HOLD_OUT_EVERY = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("measurements", type=Path, nargs="+", metavar="FILE.json", help="measured steps or profiles")
    parser.add_argument("--device", required=True, metavar="NAME|FILE.json", help="device to start from")
    parser.add_argument("--output", type=Path, required=True, metavar="DEVICE.json", help="where the fitted device goes")
    parser.add_argument("--workload", type=Path, nargs="+", default=[], metavar="WORKLOAD.json",
                        help="model, parallel sizes and number format of the profiles; one, or one for each profile")
    parser.add_argument("--attention", choices=("fused", "unfused"), default="unfused",
                        help="attention of the profiles' layers; local Megatron layers, which 'profile' times, are unfused (default unfused)")
    parser.add_argument("--parameters", default="training,memory", metavar="A,B", help=f"what to fit, of {', '.join(WIDTHS)} (default training,memory)")
    parser.add_argument("--freedom", type=float, default=1.0, metavar="X",
                        help="factor on how far parameters may move; 10 for a device whose figures are guesses (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPoint:
    """One measured time of a profile."""

    module: str
    part: Part
    lengths: tuple[int, ...]
    backward: bool
    seconds: float
    shape: int
    """Number of the batch shape in the profile."""

    @property
    def is_held_out(self) -> bool:
        return self.shape % _HOLD_OUT_EVERY == _HOLD_OUT_EVERY - 1


def run(args: argparse.Namespace) -> int:
    if not 0 < args.freedom <= 1000:
        raise InputError("--freedom", args.freedom, "outside (0, 1000]", "give a factor such as 1 or 10")
    check_outputs({"--output": args.output}, [*args.measurements, *args.workload])
    device = load_device(args.device, "--device")
    steps: list[MeasuredStep] = []
    profiles: list[tuple[list[LayerPoint], Workload]] = []
    workloads = [load_workload(path) for path in args.workload]
    kinds = [format_of(read_file(path)) for path in args.measurements]
    if len(workloads) > 1 and len(workloads) != kinds.count(PROFILE_FORMAT):
        raise InputError("--workload", len(workloads), f"are not as many as the {kinds.count(PROFILE_FORMAT)} profiles", "give one for all, or one for each")
    for path, kind in zip(args.measurements, kinds, strict=True):
        if kind == MEASURED_STEPS_FORMAT:
            steps.extend(load_measured_steps(path).steps)
        elif kind == PROFILE_FORMAT:
            if not workloads:
                raise InputError("--workload", None, f"missing, and {path} is a profile", "give the workload that the profile is of")
            workload = workloads[0] if len(workloads) == 1 else workloads[len(profiles)]
            profiles.append((profile_points(load_profile(path), workload, path), workload))
        else:
            raise InputError(str(path), kind, "holds no measurements", f"give files of {MEASURED_STEPS_FORMAT} or {PROFILE_FORMAT}")
    points = [point for of_profile, _ in profiles for point in of_profile]
    measured = [step.measured_s for step in steps] + [point.seconds for point in points]
    fitted = [not step.held_out for step in steps] + [not point.is_held_out for point in points]
    kernels = Kernels(attention=args.attention)

    def predict(candidate: DeviceDescription) -> list[float]:
        found = [predict_step(step, candidate).iteration_time_s for step in steps]
        return found + [seconds for of_profile, workload in profiles for seconds in predict_points(of_profile, workload, candidate, kernels)]

    names = [name.strip() for name in args.parameters.split(",") if name.strip()]
    if not names:
        raise InputError("--parameters", args.parameters, "names no parameter", f"give some of {', '.join(WIDTHS)}")
    source = "Fitted by megatron-dip calibrate on " + ", ".join(path.name for path in args.measurements) + f" ({', '.join(names)})."
    with progress(f"fitting {', '.join(names)} to {sum(fitted)} measurements"):
        found = calibrate(
            device, predict, measured, fitted, names, source=source, widths={name: args.freedom * width for name, width in WIDTHS.items()},
        )
    write_atomically(args.output, msgspec.json.format(msgspec.json.encode(found.device), indent=1) + b"\n")
    if args.json:
        print_json({
            "output": str(args.output), "parameters": {name: {"before": before, "after": after} for name, (before, after) in found.values.items()},
            "fitted": {"before": asdict(found.fitted_before), "after": asdict(found.fitted_after)},
            "held_out": {"before": asdict(found.held_out_before), "after": asdict(found.held_out_after)},
        })
        return 0
    out = tables()
    _print(out, found)
    out.print(f"wrote {args.output}", soft_wrap=True)
    return 0


def profile_points(profile: Profile, workload: Workload, path: Path) -> list[LayerPoint]:
    """Forward and backward of every batch shape of a profile; ``path`` names it in messages."""
    points: list[LayerPoint] = []
    shape = 0
    names = [module.name for module in workload.model_spec.modules]
    for name, module in profile.modules.items():
        if name not in names:
            raise InputError(f"{path.name}: modules", name, "the workload's model has no such module", f"use {names}")
        for part, grid in (("layer", module.layer), ("first", module.first), ("last", module.last)):
            for point in grid.points if grid is not None else ():
                # Instances of equal length, as profiles are measured.
                base, longer = divmod(point.tokens, point.instances)
                lengths = tuple(base + (index < longer) for index in range(point.instances))
                backward = point.backward_input_ns + point.backward_weight_ns
                points += [
                    LayerPoint(module=name, part=part, lengths=lengths, backward=is_backward, seconds=nanoseconds / 1e9, shape=shape)  # type: ignore[arg-type]
                    for is_backward, nanoseconds in ((False, point.forward_ns), (True, backward)) if nanoseconds > 0
                ]
                shape += 1
    return points


def predict_points(points: Sequence[LayerPoint], workload: Workload, device: DeviceDescription, kernels: Kernels) -> list[float]:
    """Seconds that the operator graphs say for each point."""
    costs = AnalyticCost(
        workload.model_spec, workload.parallel, workload.training, device, microbatches=workload.microbatches, kernels=kernels,
    )
    found = []
    for point in points:
        cost = costs.part(point.module, point.part, point.lengths)
        nanoseconds = cost.backward_input_ns + cost.backward_weight_ns if point.backward else cost.forward_ns
        # A part that the model does not know costs the gap between kernels.
        found.append(max(nanoseconds, device.efficiency.kernel_overhead_us * 1e3, 1.0) / 1e9)
    return found


def _print(console: Console, found: Calibration) -> None:
    table = Table("parameter", "before", "after")
    for name, (before, after) in found.values.items():
        table.add_row(name, f"{before:.4g}", f"{after:.4g}")
    console.print(table)
    errors = Table("measurements", "count", "mean error before", "after", "largest before", "after")
    rows: tuple[tuple[str, ErrorSummary, ErrorSummary], ...] = (
        ("fitted", found.fitted_before, found.fitted_after), ("held out", found.held_out_before, found.held_out_after),
    )
    for name, old, new in rows:
        errors.add_row(name, str(old.count), f"{old.mean:.2%}", f"{new.mean:.2%}", f"{old.worst:.2%}", f"{new.worst:.2%}")
    console.print(errors)
