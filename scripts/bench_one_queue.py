"""What one hardware queue (CUDA_DEVICE_MAX_CONNECTIONS=1) costs: 144 plans timed on a model of the device, none of which may hang.

    python scripts/bench_one_queue.py --output docs/results/one_queue

Setups vlm-s, vlm-l and t2v-s, 1 and 2 chunks a rank and module, 4, 8 and 16 microbatches, sub-microbatches of 2, 4, 8 and all instances,
whole and split backwards; 40 schedules tried for each. Nothing here is measured: all times are the planner's and the model's.

* *foreseen*: the makespan under one queue over the plan's own, which is the one without the limit.
* *other times*: the same ratio with every stage's duration drawn anew within 10 % (three draws, the worst), since posts stand where they
  do for the planned times.
* *stages of many kernels*: every stage as 16 launches, behind the last of which its followers stand in the queue. What the planner's model
  leaves out.
* *scored*: the plan that is taken with ``hardware_queues=1``, over the makespan without the limit of the plan that is taken without it.

Writes OUTPUT.json with every plan and OUTPUT.md for people.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cli.plan_command import workload_costs
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.program.dry_run import check_program, dry_run
from megatron_dip.program.one_queue import program_makespan
from megatron_dip.program.program import NONE, Program, ProgramError, program_of
from megatron_dip.report.records import write_record
from megatron_dip.report.tables import markdown_table
from megatron_dip.spec.codec import resolve_workload
from megatron_dip.spec.plan import Plan
from megatron_dip.workloads.generators import make_workload

SETUPS = ("vlm-s", "vlm-l", "t2v-s")
LAUNCHES = 16
"""Of a stage in the finer model."""
DRAWS, SPREAD = 3, 0.1
EVALUATIONS = 40


_FINDINGS = """Before posts were placed by this device, 141 of 144 such plans hung on it. With every receive behind the last task before its
sender's on the line none hung, and they took 3.1 % (median) to 18.6 % (largest) longer.

What remains are tasks that wait until the channel of the message before theirs is free. Scoring the schedules that were found by it takes
little of that away, since little is there.

In the last column much is left: what follows a stage in the queue waits for nearly all of it, so a receive is posted at the stage's end,
and its sender's next message waits. Tried on 144 such plans, with all of a stage before its followers: receives as soon as their channel is
free (median 2.3 % as before, nine tenths 8.6 % instead of 11.5 %, largest 18 % instead of 21 %, one receive of each neighbour always on the
device); the line made for that device (median 5.1 %); sends that let tasks pass while their channel is busy (median 0.5 %, but up to 34 %,
on devices without the limit too). Whether devices behave so has not been measured.

Replicas that share experts: `HYPOTHESIS_PROFILE=long python -m pytest tests/properties/test_linked_replicas.py --timeout 3600` runs 5 000
random joint plans (2 to 8 ranks, 2 to 32 microbatches, 2 and 3 replicas) on devices with one hardware queue and without the limit. Its
cases of seeds 0 to 4999, run one after the other (`check_together` of `tests.planner.linked_cases.linked_case`): 0 hang; 277 of them have 8
ranks and 32 microbatches."""


@dataclass(frozen=True, slots=True)
class Case:
    setup: str
    chunks: int
    microbatches: int
    sub_microbatch: int
    split_backward: bool


def cases() -> Iterator[Case]:
    for setup, chunks, microbatches, size, split in itertools.product(SETUPS, (1, 2), (4, 8, 16), (2, 4, 8, 100), (False, True)):
        yield Case(setup, chunks, microbatches, size, split)


def planner(case: Case) -> Callable[[int | None], Plan]:
    """Makes the case's plan for a number of hardware queues."""
    workload = resolve_workload(make_workload(case.setup), Path(case.setup))
    model, costs = workload.model_spec, workload_costs(workload)
    names = [module.name for module in model.modules]
    partition = even_partition(model, workload.parallel.pipeline, dict.fromkeys(names, case.chunks), dict.fromkeys(names, case.sub_microbatch))

    def make(hardware_queues: int | None) -> Plan:
        return plan_iteration(model, partition, workload.microbatches[: case.microbatches], costs, PlanOptions(
            evaluations=EVALUATIONS, split_backward=case.split_backward, hardware_queues=hardware_queues, may_exceed_memory=True,
        ))

    return make


def lags_of(plan: Plan, program: Program) -> NDArray[np.int64]:
    """[M] lag of each message."""
    lags = {(dep.stage, stage.id): dep.lag for stage in plan.stages for dep in stage.deps}
    return np.array([lags[edge] for edge in zip(program.producer.tolist(), program.consumer.tolist(), strict=True)], np.int64)


def in_launches(program: Program, duration_ns: NDArray[np.int64], count: int) -> tuple[Program, NDArray[np.int64]]:
    """The program with every stage as ``count`` launches one behind the other, and their durations."""
    times = np.where(program.stage != NONE, count, 1)
    index = np.repeat(np.arange(len(times)), times)
    part = np.arange(len(index)) - np.repeat(np.cumsum(times) - times, times)
    stage = program.stage[index]
    bounds = duration_ns[:, None] * np.arange(count + 1) // count
    return dataclasses.replace(
        program, action_offset=np.concatenate(([0], np.cumsum(times)))[program.action_offset], op=program.op[index], peer=program.peer[index],
        message=program.message[index], stage=np.where(stage == NONE, NONE, stage * count + part).astype(np.int32),
    ), np.diff(bounds, axis=1).reshape(-1)


def measure(case: Case) -> dict[str, Any]:
    make = planner(case)
    plan = make(None)
    program = program_of(plan)
    row: dict[str, Any] = {**dataclasses.asdict(case), "stages": len(plan.stages), "messages": len(plan.outputs), "hangs": False}
    try:
        check_program(program)
        dry_run(program)
    except ProgramError:
        row["hangs"] = True
        return row
    duration, lag = np.array([stage.duration for stage in plan.stages], np.int64), lags_of(plan, program)
    free = program_makespan(program, duration, lag, one_queue=False)
    row["unlimited_over_claimed"] = free / plan.claimed_makespan
    row["foreseen"] = program_makespan(program, duration, lag, one_queue=True) / plan.claimed_makespan
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(DRAWS):
        other = np.round(duration * rng.uniform(1 - SPREAD, 1 + SPREAD, len(duration))).astype(np.int64)
        ratios.append(program_makespan(program, other, lag, one_queue=True) / program_makespan(program, other, lag, one_queue=False))
    row["other_times"] = max(ratios)
    fine, fine_ns = in_launches(program, duration, LAUNCHES)
    row["many_kernels"] = program_makespan(fine, fine_ns, lag, one_queue=True) / plan.claimed_makespan
    scored = make(1)
    scored_program = program_of(scored)
    row["scored"] = program_makespan(
        scored_program, np.array([stage.duration for stage in scored.stages], np.int64), lags_of(scored, scored_program), one_queue=True
    ) / plan.claimed_makespan
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for setup in (*SETUPS, "all"):
        of_setup = [row for row in rows if setup in (row["setup"], "all") and not row["hangs"]]
        line = [setup, f"{sum(row['hangs'] for row in rows if setup in (row['setup'], 'all'))} of {sum(setup in (row['setup'], 'all') for row in rows)}"]
        line.append(f"{max(abs(row['unlimited_over_claimed'] - 1) for row in of_setup):.1%}")
        for figure in ("foreseen", "scored", "other_times", "many_kernels"):
            ratios = sorted(row[figure] - 1 for row in of_setup)
            line.append(f"{statistics.median(ratios):.2%}, {ratios[int(len(ratios) * 0.9)]:.2%}, {ratios[-1]:.2%}")
        lines.append(line)
    return markdown_table(["setup", "hang", "unlimited / plan - 1", "foreseen", "scored", "other times", "stages of many kernels"], lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="without suffix")
    args = parser.parse_args()
    rows = [measure(case) for case in cases()]
    write_record(args.output, "One hardware queue", [
        "144 plans (see the script's first lines) on a model of a device with one hardware queue. Simulated, not measured: no GPU was at hand. "
        "Each column: median, nine tenths, largest, above the makespan without the limit.",
        table(rows),
        _FINDINGS,
    ], {"plans": rows})
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
