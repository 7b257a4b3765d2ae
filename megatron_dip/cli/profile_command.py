"""Times the layers of a workload's modules on the device at hand, and writes a profile that plan, simulate and training use.

Real Megatron modules run forward, backward to the inputs and backward to the weights over a grid of instances and tokens, warm;
figures are medians. One process measures one tensor-parallel shard (parallel.tensor of the workload), without its collectives. The
grid spans what the workload's microbatches hold, unless --counts and --lengths say otherwise. Needs torch and Megatron-Core.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from megatron_dip.cost.collectives import groups, message_bandwidth
from megatron_dip.cost.device import load_device
from megatron_dip.spec.codec import check_writable, load_workload, save
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.profile import PointToPoint
from megatron_dip.spec.workload import Workload

SUMMARY = "time a model's layers on this machine"
_MAX_LENGTHS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workload", type=Path, metavar="WORKLOAD.json", help="whose modules and batch shapes to measure")
    parser.add_argument("--output", type=Path, required=True, metavar="PROFILE.json", help="where the profile goes (format megatron-dip/profile/1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to measure (default: cuda where there is one)")
    parser.add_argument("--counts", metavar="vit=1+4+12,lm=1", help="instances in a stage to measure (default: powers of two up to the workload's most)")
    parser.add_argument("--lengths", metavar="vit=2704,lm=4096+8192", help="tokens in an instance to measure (default: shortest, middle and longest)")
    parser.add_argument("--seconds", type=float, default=0.3, metavar="S", help="time for the repetitions of each figure (default 0.3)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a CPU measurement (default: torch's)")


def run(args: argparse.Namespace) -> int:
    check_writable(args.output, "--output")
    if not 0 < args.seconds <= 600:
        raise InputError("--seconds", args.seconds, "outside (0, 600]", "give a number of seconds")
    if args.threads is not None and not 1 <= args.threads <= 4096:
        raise InputError("--threads", args.threads, "outside 1 to 4096", "give at most the machine's cores")
    workload = load_workload(args.workload)
    shapes = grid_shapes(workload, _parse_lists("--counts", args.counts), _parse_lists("--lengths", args.lengths))
    for package in ("torch", "megatron.core"):
        if find_spec(package.partition(".")[0]) is None:
            raise InputError("megatron-dip profile", package, "is not installed", 'install it: pip install "megatron-dip[train]"')
    import torch

    from megatron_dip.hooks.layer_profile import ProfileSettings, measure_model

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = ProfileSettings(
        device=device, dtype=workload.training.dtype, tensor=workload.parallel.tensor,
        sequence_parallel=workload.parallel.sequence_parallel and workload.parallel.tensor > 1, seconds=args.seconds,
    )
    console = Console(stderr=True)
    with console.status("building") as status:
        profile = measure_model(workload.model_spec, shapes, settings, _point_to_point(workload), status.update)
    save(args.output, profile)
    points = sum(len(module.layer.points) for module in profile.modules.values())
    Console().print(f"wrote {args.output}: {len(profile.modules)} modules, {points} layer shapes on {device}", soft_wrap=True, highlight=False, markup=False)
    return 0


def grid_shapes(
    workload: Workload, counts: dict[str, list[int]], lengths: dict[str, list[int]]
) -> dict[str, tuple[Sequence[int], Sequence[int]]]:
    """Module -> (instance counts, lengths) to measure: what is given, else what the workload's microbatches span."""
    names = [module.name for module in workload.model_spec.modules]
    for field, given in (("--counts", counts), ("--lengths", lengths)):
        for name in given:
            if name not in names:
                raise InputError(field, name, "the model has no such module", f"use {', '.join(names)}")
    shapes: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
    for name in names:
        batches = [microbatch[name] for microbatch in workload.microbatches if microbatch.get(name)]
        if not batches and not (name in counts and name in lengths):
            raise InputError("microbatches", name, "no microbatch has an instance of this module", "give --counts and --lengths for it")
        most = max(map(len, batches), default=1)
        powers = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
        seen = sorted({length for batch in batches for length in batch})
        middle = [seen[round(index * (len(seen) - 1) / (_MAX_LENGTHS - 1))] for index in range(_MAX_LENGTHS)] if seen else []
        shapes[name] = (counts.get(name, sorted({*powers, most})), lengths.get(name, sorted(set(middle))))
    return shapes


def _parse_lists(field: str, text: str | None) -> dict[str, list[int]]:
    """``vit=1+4,lm=1`` as sorted numbers by module."""
    found: dict[str, list[int]] = {}
    for entry in text.split(",") if text is not None else ():
        name, equals, numbers = entry.partition("=")
        values = numbers.split("+")
        if not equals or not name.strip() or not all(value.strip().isdecimal() and 0 < int(value) <= 10**8 for value in values):
            raise InputError(field, entry, "not of the form module=number+number", f"write {field} vit=1+4,lm=1")
        found[name.strip()] = sorted({int(value) for value in values})
    return found


def _point_to_point(workload: Workload) -> PointToPoint:
    """Message figures of the workload's device, or of a CPU where it names none."""
    device = load_device("cpu" if workload.device is None else workload.device)
    return PointToPoint(
        latency_ns=device.network_latency_us * 1e3, bytes_per_second=message_bandwidth(groups(workload.parallel).pipeline, device)
    )
