#!/usr/bin/env python
"""A long run of the tiny example, in which nothing may grow: resident memory, open files, threads, live tensors, kept plans.

    python scripts/soak.py --iterations 2000 --output docs/results/soak

Two pipeline ranks on this machine's CPU. Every data item holds a reference cycle and 256 KiB, which only garbage collection gives back.
Held-out items are scored and a checkpoint is written now and then. Figures rise and fall with the collections of all objects, which are
ALL_EVERY iterations apart; so the most of the last ALL_EVERY iterations is held against the most of those behind the first ALL_EVERY. What
it grows by must stay below a limit. Exit code 1 where it does not.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dip.planner.courtesy import ALL_EVERY, YOUNG_EVERY
from megatron_dip.report.tables import markdown_table
from megatron_dip.spec.codec import write_atomically
from megatron_dip.trainer.ranks import is_rank, run_rank, run_ranks

if TYPE_CHECKING:
    from megatron_dip.trainer.systems import System

EXAMPLE = Path(__file__).parents[1] / "examples" / "vlm" / "tiny"
LIMITS = {"resident MB": 40.0, "open files": 2.0, "threads": 2.0, "live tensors": 100.0, "tracked objects": 20_000.0, "plans kept": 1.0,
          "plans waiting": 1.0}
"""Figure -> most growth over the run that counts as level."""
UNITS = 1 << 20
IN_AN_ITEM = 1 << 18
"""Bytes that each data item's cycle keeps."""


class _Item(dict[str, Any]):
    """Refers to itself, as items of real data sets do by their readers."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.owner = self
        self.payload = bytearray(IN_AN_ITEM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="iterations between looks (default 50)")
    parser.add_argument("--output", type=Path, required=True, help="record without suffix")
    args = parser.parse_args()
    if args.iterations < 3 * ALL_EVERY:
        raise SystemExit(f"soak: error: --iterations = {args.iterations}: fewer than three times {ALL_EVERY}. Remedy: give more.")
    if is_rank():
        run_rank(lambda: soak(args))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SOAK_FOLDER"] = folder
        began = time.monotonic()
        code = run_ranks([sys.executable, *sys.argv], 2, threads=1)
        if code:
            return code
        looks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(2)]
    return _write(args, looks, time.monotonic() - began)


def soak(args: argparse.Namespace) -> None:
    """One rank's run; leaves its figures in the folder that the environment names."""
    import torch.distributed as dist

    from megatron_dip.spec.codec import load_example
    from megatron_dip.spec.training import RunSettings, SchedulePlan
    from megatron_dip.spec.workload import Parallel
    from megatron_dip.trainer.loop import build_system, load_example_module, start_rank

    folder = Path(os.environ["SOAK_FOLDER"])
    config = load_example(EXAMPLE / "config.json")
    settings = RunSettings(
        schedule=SchedulePlan(name="dip"), parallel=Parallel(pipeline=2), device="cpu", seed=1, iterations=args.iterations,
        num_microbatches=config.num_microbatches, data=config.data,
    )
    example = load_example_module(EXAMPLE, config, settings)
    microbatches = example.dataset.microbatches
    example.dataset.microbatches = lambda *place: [_Item(item) for item in microbatches(*place)]  # type: ignore[method-assign]
    start_rank(settings)
    system = build_system(settings.schedule, example, settings)
    looks = []
    began = time.monotonic()
    for iteration in range(1, args.iterations + 1):
        system.train_step()
        if iteration % (args.iterations // 4) == 0:
            system.score()
            system.save(folder / "saved", iteration)
        if iteration % args.every == 0:
            looks.append({"iteration": iteration, "seconds": time.monotonic() - began, **look(system)})
            if dist.get_rank() == 0:
                print(looks[-1], flush=True)
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(looks))


def look(system: System) -> dict[str, float]:
    """The figures of this process now."""
    import psutil
    import torch

    process = psutil.Process()
    objects = gc.get_objects()
    tensors = sum(issubclass(type(item), torch.Tensor) for item in objects)
    counts = system.plan_counts()
    return {
        "resident MB": process.memory_info().rss / UNITS, "open files": process.num_fds(), "threads": process.num_threads(),
        "live tensors": tensors, "tracked objects": len(objects), "plans kept": 0 if counts is None else counts.kept,
        "plans waiting": 0 if counts is None else counts.waiting,
    }


def most(looks: list[dict[str, float]], name: str, first: int) -> float:
    """Of the looks in ALL_EVERY iterations behind iteration ``first``."""
    return max(entry[name] for entry in looks if first < entry["iteration"] <= first + ALL_EVERY)


def _write(args: argparse.Namespace, ranks: list[list[dict[str, float]]], seconds: float) -> int:
    rows, is_level = [], True
    for rank, looks in enumerate(ranks):
        for name, limit in LIMITS.items():
            first, last = most(looks, name, ALL_EVERY), most(looks, name, args.iterations - ALL_EVERY)
            is_level &= last - first <= limit
            rows.append([str(rank), name, f"{first:.0f}", f"{last:.0f}", f"{last - first:+.0f}", f"{limit:g}"])
    import torch

    items = args.iterations * 4 * IN_AN_ITEM / UNITS
    text = "\n".join([
        "# A long run stays level", "",
        f"`python scripts/soak.py --iterations {args.iterations} --every {args.every} --output {args.output}` on {os.cpu_count()} cores, shared; "
        f"one run, {seconds:.0f} s; megatron_dip {importlib.metadata.version('megatron_dip')}, torch {torch.__version__}, Python {sys.version.split()[0]}.", "",
        f"Two pipeline ranks, examples/vlm/tiny. Every item holds a reference cycle with {IN_AN_ITEM // 1024} KiB: {items:.0f} MiB a rank over the run "
        f"would stay if cycles were not collected. Four scorings and four checkpoints. All objects are collected every {ALL_EVERY} iterations, "
        f"young ones every {YOUNG_EVERY}: items that live at a young collection stay until the next collection of all.", "",
        markdown_table(
            ["rank", "figure", f"most in {ALL_EVERY + 1} to {2 * ALL_EVERY}", f"most in the last {ALL_EVERY}", "growth", "limit"], rows
        ),
        "", "Level." if is_level else "NOT level.", "",
    ])
    write_atomically(args.output.with_suffix(".md"), text.encode())
    write_atomically(args.output.with_suffix(".json"), json.dumps({"ranks": ranks}, indent=1).encode())
    print(text)
    return 0 if is_level else 1


if __name__ == "__main__":
    sys.exit(main())
