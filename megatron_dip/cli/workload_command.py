"""Writes workloads of the paper's setups, by name and seed: batches with the statistics of public data sets.

Data: 'packed' draws documents (LAION-2B, OBELICS, MMC4, ScienceQA) into 8192-token sequences, or clips (InternVid, MMTrail,
ShareGPT4Video) into 16 s of video with the paper's spread of 4.15 between the heaviest and the lightest microbatch; 'uniform' draws
the number of images between two bounds; 'dynamic' is the paper's run of 40 iterations in which those bounds move. Means and limits of
the data sets are sourced; shapes of distributions and the mix of data sets are assumed (megatron_dip/workloads/generators.py).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from megatron_dip.cost.device import load_device
from megatron_dip.spec.codec import check_writable, encode, resolve_workload, write_atomically
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.named import MAX_IMAGES, NAMED_SETUPS, named_setup
from megatron_dip.spec.workload import Workload
from megatron_dip.workloads.generators import DATA_KINDS, default_parallel, make_workload

SUMMARY = "write workloads by name and seed"

_MAX_FILES = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(NAMED_SETUPS)}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    parser.add_argument("--microbatches", type=int, default=32, metavar="N", help="of each data-parallel replica (default 32)")
    parser.add_argument("--data", choices=DATA_KINDS, default="packed", help="default packed")
    parser.add_argument("--images", type=int, nargs=2, default=(0, MAX_IMAGES), metavar=("LOW", "HIGH"),
                        help=f"bounds of --data uniform (default 0 {MAX_IMAGES})")
    parser.add_argument("--iteration", type=int, default=1, metavar="I", help="which iteration's batch, from 1 (default 1)")
    parser.add_argument("--iterations", type=int, metavar="N", help="write N files, from --iteration on, into the directory --output")
    for name in ("tensor", "pipeline", "data-parallel"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="instead of the setup's own size")
    parser.add_argument("--device", metavar="NAME", help="instead of the setup's own device")
    parser.add_argument("--output", type=Path, metavar="PATH", help="file to write (default: standard output), or directory with --iterations")


def run(args: argparse.Namespace) -> int:
    if args.iterations is None:
        data = encode(_workload(args, args.iteration))
        if args.output is None:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            check_writable(args.output, "--output")
            write_atomically(args.output, data)
        return 0
    if not 1 <= args.iterations <= _MAX_FILES:
        raise InputError("--iterations", args.iterations, f"outside 1 to {_MAX_FILES}", "give the number of files")
    if args.output is None:
        raise InputError("--output", None, "missing", "name the directory that takes the files")
    if args.output.exists() and not args.output.is_dir():
        raise InputError("--output", str(args.output), "is not a directory", "name a directory for the files of --iterations")
    files = [(iteration, encode(_workload(args, iteration))) for iteration in range(args.iteration, args.iteration + args.iterations)]
    args.output.mkdir(parents=True, exist_ok=True)
    for iteration, data in files:
        write_atomically(args.output / f"{args.name}-{iteration:05d}.json", data)
    return 0


def _workload(args: argparse.Namespace, iteration: int) -> Workload:
    own = default_parallel(named_setup(args.name, "NAME"))
    given = {"tensor": args.tensor, "pipeline": args.pipeline, "data": args.data_parallel}
    parallel = msgspec.structs.replace(own, **{name: value for name, value in given.items() if value is not None})
    workload = make_workload(
        args.name, seed=args.seed, num_microbatches=args.microbatches * max(1, parallel.data), data=args.data, iteration=iteration,
        images=(args.images[0], args.images[1]), parallel=parallel,
    )
    if args.device is not None:
        load_device(args.device, "--device")
        workload = msgspec.structs.replace(workload, device=args.device)
    resolve_workload(workload, Path("the command line"))
    return workload
