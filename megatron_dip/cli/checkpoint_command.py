"""Say what a Megatron checkpoint holds, and under which cuts it loads.

A torch_dist checkpoint loads under every cut of the chunks, every parallel size, and the stock schedule, optimizer state included. A
checkpoint in the old torch format is one file for each rank: it loads under the cut and the sizes it was saved with and no others;
load it there and save with --ckpt-format torch_dist to convert it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from pathlib import Path

SUMMARY = "say what a checkpoint holds, and under which cuts it loads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("inspect",))
    parser.add_argument("path", type=Path, metavar="PATH", help="a folder that --save wrote, or one iteration's folder in it")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every tensor's shape and type")


def run(args: argparse.Namespace) -> int:
    from megatron_dip.hooks.checkpoint_files import read_checkpoint

    found = read_checkpoint(args.path)
    if args.json:
        tensors = {name: {"shape": list(shape), "dtype": dtype} for name, (shape, dtype) in found.tensors.items()}
        print(json.dumps({
            "folder": str(found.folder), "format": found.format, "iteration": found.iteration, "parallel": found.parallel, "tensors": tensors,
        }))
        return 0
    print(f"{found.folder}: {found.format}, iteration {found.iteration}")
    if found.format == "torch":
        print(f"loads only with tensor parallel size {found.parallel['tensor']}, pipeline parallel size {found.parallel['pipeline']} and the same cut")
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
    print("loads under every cut, every parallel size, and the stock schedule")
    return 0
