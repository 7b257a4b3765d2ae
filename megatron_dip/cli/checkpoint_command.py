"""Say what a Megatron checkpoint holds and under which cuts it loads, or convert it to the other format.

A torch_dist checkpoint loads under every cut of the chunks, every parallel size, and the stock schedule, optimizer state included, but for
that of --use-distributed-optimizer in its default format, which inspect tells. Missing and cut off files are found. A
checkpoint in the old torch format is one file for each rank: it loads under the cut and the sizes it was saved with and no others.

convert makes torch_dist of torch, and torch of torch_dist. It starts your training script on as many processes as the old format has
files, with Megatron's own --ckpt-convert-* flags: the script builds the model, loads, saves in the other format, and ends. Give the
arguments of your run behind the script's name.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

SUMMARY = "say what a checkpoint holds and under which cuts it loads, or convert it"

_PATH_HELP = "a folder that --save wrote, or one iteration's folder in it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser("inspect", help="say what it holds", allow_abbrev=False)
    inspect.add_argument("path", type=Path, metavar="PATH", help=_PATH_HELP)
    inspect.add_argument("--json", action="store_true", help="print one JSON object with every tensor's shape and type")
    convert = actions.add_parser("convert", help="torch to torch_dist, or torch_dist to torch", allow_abbrev=False)
    convert.add_argument("path", type=Path, metavar="PATH", help=_PATH_HELP)
    convert.add_argument("target", type=Path, metavar="TARGET", help="the folder to make, for --load")
    convert.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: without GPUs, over gloo; the layers must be local ones")
    convert.add_argument("script", type=Path, metavar="SCRIPT", help="the training script of your Megatron-LM checkout")
    convert.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments, as in training")


def run(args: argparse.Namespace) -> int:
    return _inspect(args.path, args.json) if args.action == "inspect" else _convert(args)


def _convert(args: argparse.Namespace) -> int:
    from megatron_dip.checkouts.conversion import convert

    written = convert(args.path, args.target, args.script, args.arguments, args.device)
    print(f"{written.folder}: {written.format}, iteration {written.iteration}; load it with --load {args.target} --ckpt-format {written.format}")
    return 0


def _inspect(path: Path, as_json: bool) -> int:
    from megatron_dip.checkouts.checkpoint_files import read_checkpoint

    found = read_checkpoint(path)
    if as_json:
        tensors = {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in found.tensors.items()}
        print(json.dumps({
            "folder": str(found.folder), "format": found.format, "iteration": found.iteration, "parallel": found.parallel, "tensors": tensors,
        }))
        return 0
    print(f"{found.folder}: {found.format}, iteration {found.iteration}")
    if found.format == "torch":
        sizes = ", ".join(f"{name} parallel size {size}" for name, size in found.parallel.items())
        print(f"loads only with {sizes} and the same cut; `megatron-dip checkpoint convert` makes torch_dist of it")
        return 0
    counts: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for name, (shape, _) in found.tensors.items():
        part = name if name.startswith("optimizer") else name.split(".")[0]
        part = "optimizer state" if part.startswith("optimizer") else part
        counts[part] += 1
        numbers[part] += math.prod(shape)
    for part in sorted(counts):
        print(f"  {part:20s} {counts[part]:6d} tensors  {numbers[part]:15,d} numbers")
    if found.has_bound_optimizer:
        print(
            "weights load under every cut, every parallel size, and the stock schedule; optimizer state in this format loads with any number of replicas, "
            "but only under the cut, tensor and pipeline size it was saved with (elsewhere: --no-load-optim; a run that saves with "
            "--dist-ckpt-optim-fully-reshardable is bound to nothing)"
        )
    else:
        print("loads under every cut, every parallel size, and the stock schedule")
    return 0
