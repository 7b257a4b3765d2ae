"""Checks a plan with code that shares nothing with the planner.

Recomputes times and memory, holds chains, dependencies, messages and actions against each other and runs all ranks' actions dry.
Prints every problem and the schedule as a grid with the bad cells marked. Exit code 0: the plan holds; 1: it does not; 2: the file
cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_dip.cli.output import print_json
from megatron_dip.cli.plan_command import workload_costs
from megatron_dip.partition.work import deal_batch
from megatron_dip.schedule.checker import inspect_plan
from megatron_dip.spec.codec import load_plan, load_workload
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition

SUMMARY = "check a plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, metavar="PLAN.json", help="what to check (format megatron-dip/plan/1)")
    parser.add_argument("--workload", type=Path, metavar="FILE", help="hold the plan's instances and tokens against this workload's")
    parser.add_argument("--replica", type=int, default=0, metavar="N", help="whose microbatches the plan is for (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    plan = load_plan(args.plan)
    microbatches = None
    if args.workload is not None:
        workload = load_workload(args.workload)
        if not 0 <= args.replica < workload.parallel.data:
            raise InputError("--replica", args.replica, f"there are {workload.parallel.data} replicas", "give a number from 0")
        microbatches = workload.replica_microbatches(args.replica)
    report = inspect_plan(plan, microbatches)
    if args.workload is not None and report.problems and workload.parallel.data > 1:
        # Not as read: then as dealt, under the plan's own cut.
        partition = Partition(chunks=plan.chunks, sub_microbatch_size=plan.sub_microbatch_size)
        dealt = deal_batch(workload.microbatches, workload.parallel.data, workload.model_spec, partition, workload_costs(workload))
        if dealt is not None:
            report = inspect_plan(plan, [workload.microbatches[number] for number in dealt.shares()[args.replica]])
    if args.json:
        print_json({
            "holds": not report.problems, "problems": report.problems, "stages": len(plan.stages), "ranks": plan.ranks, "makespan_ns": report.makespan,
            "peak_memory_bytes": report.peak_memory,
        })
        return 1 if report.problems else 0
    if report.problems:
        print(f"{args.plan}: does not hold", file=sys.stderr)
        for problem in report.problems:
            print(f"- {problem}", file=sys.stderr)
        print(report.marked_grid(plan), end="", file=sys.stderr)
        return 1
    peaks = ", ".join(f"{peak / 1e9:.2f}" for peak in report.peak_memory)
    print(f"{args.plan}: holds. {len(plan.stages)} stages on {plan.ranks} ranks, {report.makespan / 1e9:.6f} s, peak GB {peaks}")
    return 0
