"""Times the layers of a model on the device at hand, and writes a profile that plan, simulate and training use.

Of a workload: real Megatron modules run forward, backward to the inputs and backward to the weights over a grid of instances and
tokens, warm; figures are medians. One process measures one tensor-parallel shard (parallel.tensor of the workload), without its
collectives; --busy lets several processes measure at once, as many as will share the machine in training. The grid spans what the
workload's microbatches hold, unless --counts and --lengths say otherwise.

Of an example's folder (examples/vlm/digits): all pipeline ranks rehearse training on other batches, and the profile holds what stages
and messages took in the mean. "megatron-dip train EXAMPLE --profile FILE" plans with it. Needs torch and Megatron-Core.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console

from megatron_dip.cli.output import print_json
from megatron_dip.cli.train_command import NEEDED
from megatron_dip.cost.collectives import groups, message_bandwidth
from megatron_dip.cost.device import load_device
from megatron_dip.spec.codec import check_writable, load_workload, save
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.profile import PointToPoint
from megatron_dip.spec.workload import Workload

if TYPE_CHECKING:
    from megatron_dip.spec.training import RunSettings

SUMMARY = "time a model's layers on this machine"
_MAX_LENGTHS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="WORKLOAD.json|EXAMPLE", help="whose modules and batch shapes to measure")
    parser.add_argument("--output", type=Path, required=True, metavar="PROFILE.json", help="where the profile goes (format megatron-dip/profile/1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to measure (default: cuda where there is one)")
    parser.add_argument("--seconds", type=float, metavar="S", help="of a workload: for each figure (default 0.3); of an example: in all (default 60)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of a CPU measurement (default: torch's; of an example's ranks: 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    layers = parser.add_argument_group("of a workload")
    layers.add_argument("--counts", metavar="vit=1+4+12,lm=1", help="instances in a stage to measure (default: powers of two up to the workload's most)")
    layers.add_argument("--lengths", metavar="vit=2704,lm=4096+8192", help="tokens in an instance to measure (default: shortest, middle and longest)")
    layers.add_argument("--busy", type=int, default=1, metavar="N", help="processes that measure at once; the first one's figures count (default 1)")
    stages = parser.add_argument_group("of an example")
    stages.add_argument("--pipeline", type=int, default=2, metavar="P", help="pipeline ranks (default 2)")
    stages.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor-parallel ranks (default 1)")
    stages.add_argument("--partition", type=Path, metavar="FILE", help="how the modules are cut (default: as training cuts them)")
    stages.add_argument("--split-backward", action="store_true", help="measure the backward's input and weight parts apart")
    stages.add_argument("--seed", type=int, default=1, help="training's; its data are left for training (default 1)")
    stages.add_argument("--workload", type=Path, metavar="FILE.json", help="write training's first batch there, on this profile, for plan and simulate")


def run(args: argparse.Namespace) -> int:
    check_writable(args.output, "--output")
    if args.seconds is not None and not 0 < args.seconds <= 3600:
        raise InputError("--seconds", args.seconds, "outside (0, 3600]", "give a number of seconds")
    if args.threads is not None and not 1 <= args.threads <= 4096:
        raise InputError("--threads", args.threads, "outside 1 to 4096", "give at most the machine's cores")
    if not 1 <= args.busy <= 4096:
        raise InputError("--busy", args.busy, "outside 1 to 4096", "give as many processes as will share the machine")
    is_example = args.source.is_dir()
    if args.workload is not None:
        if not is_example:
            raise InputError("--workload", str(args.workload), f"{args.source} is a workload already", "leave it out")
        check_writable(args.workload, "--workload")
    for package in ("torch", "megatron.core"):
        if find_spec(package.partition(".")[0]) is None:
            raise InputError("megatron-dip profile", package, "is not installed", 'install it: pip install "megatron-dip[train]"')
    return _profile_example(args) if is_example else _profile_layers(args)


def _profile_layers(args: argparse.Namespace) -> int:
    workload = load_workload(args.source)
    shapes = grid_shapes(workload, _parse_lists("--counts", args.counts), _parse_lists("--lengths", args.lengths))
    from megatron_dip.trainer.ranks import is_rank, run_ranks

    if args.busy > 1 and not is_rank():
        return run_ranks([sys.executable, "-m", "megatron_dip.cli.main", *sys.argv[1:]], args.busy, threads=args.threads or 1)
    import torch

    from megatron_dip.trainer.layer_profile import ProfileSettings, measure_model

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = ProfileSettings(
        device=device, dtype=workload.training.dtype, tensor=workload.parallel.tensor,
        sequence_parallel=workload.parallel.sequence_parallel and workload.parallel.tensor > 1,
        seconds=0.3 if args.seconds is None else args.seconds,
    )
    is_first = os.environ.get("RANK", "0") == "0"
    console = Console(stderr=True, quiet=not is_first)
    with console.status("building") as status:
        profile = measure_model(workload.model_spec, shapes, settings, _point_to_point(workload), status.update)
    if is_first:
        save(args.output, profile)
        points = sum(len(module.layer.points) for module in profile.modules.values())
        if args.json:
            print_json({"output": str(args.output), "modules": len(profile.modules), "layer_shapes": points, "device": device})
            return 0
        _say(f"wrote {args.output}: {len(profile.modules)} modules, {points} layer shapes on {device}")
    return 0


def _profile_example(args: argparse.Namespace) -> int:
    for option in ("counts", "lengths"):
        if getattr(args, option) is not None:
            raise InputError(f"--{option}", getattr(args, option), "given for an example, whose own batches are measured", "leave it out")
    from megatron_dip.spec.codec import load_example, load_partition
    from megatron_dip.spec.training import RunSettings, SchedulePlan
    from megatron_dip.spec.workload import Parallel
    from megatron_dip.trainer.launch import check_launch
    from megatron_dip.trainer.ranks import is_rank, run_rank, run_ranks

    config = load_example(args.source / "config.json")
    schedule = SchedulePlan(
        name="dip", partition=None if args.partition is None else load_partition(args.partition), split_backward=args.split_backward
    )
    import torch

    settings = RunSettings(
        schedule=schedule, parallel=Parallel(tensor=args.tensor, pipeline=args.pipeline), seed=args.seed, iterations=1,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"), num_microbatches=config.num_microbatches, data=config.data,
    )
    settings.validate()
    if not is_rank():
        check_launch(args.source, config, settings, NEEDED)
        command = [sys.executable, "-m", "megatron_dip.cli.main", *sys.argv[1:]]
        return run_ranks(command, settings.parallel.num_gpus, threads=args.threads or 1)
    run_rank(lambda: _rehearse(args, settings))


def _rehearse(args: argparse.Namespace, settings: RunSettings) -> None:
    from megatron_dip.trainer.rehearsal import profile_example

    found = profile_example(args.source, settings, 60.0 if args.seconds is None else args.seconds, (lambda text: None) if args.json else _say)
    if found is not None:
        save(args.output, found.profile)
        if args.json:
            print_json({"output": str(args.output), "stages": found.stages, "rounds": found.rounds, "gap_ns": found.gap_ns})
        else:
            _say(f"wrote {args.output}: {found.stages} stages measured in {found.rounds} rounds, {found.gap_ns / 1e6:.2f} ms between stages")
        if args.workload is not None:
            beside = os.path.relpath(args.output.resolve(), args.workload.resolve().parent)
            save(args.workload, msgspec.structs.replace(found.workload, profile=beside))
            if not args.json:
                _say(f"wrote {args.workload}")


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


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
