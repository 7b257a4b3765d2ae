"""What planning costs beyond the search at scale, and how long it keeps the interpreter's lock.

    python scripts/bench_scale.py --output docs/results/scale

VLM-XL on even cuts, one schedule searched, planned on one thread. All figures are CPU time of the planning thread, which other load on the
machine does not lengthen. *beyond the search*: sub-microbatches, task graph, bound, lowering, dry runs, arrays, check, packing and the
plan's objects for the planner rank's own executor. *received*: what every other rank does with the message: unpacking, lowering, check,
objects. *plain check*: the checker in plain Python, which every plan went through before.

*held*: another thread asks for the interpreter every 0.2 ms; the most CPU time that the planning thread used between two of its turns, the
least of the repeats, since the machine's own pauses are in it too. It is what training would have waited. *between* the phases the longest
hold is the end: the plan's objects are let go, all at once; in a run the training thread does that, once an iteration.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner import iteration, message
from megatron_dip.planner.courtesy import switch_often
from megatron_dip.planner.iteration import PlanOptions
from megatron_dip.report.records import write_record
from megatron_dip.report.tables import markdown_table
from megatron_dip.schedule import backward
from megatron_dip.schedule.checker import inspect_plan
from megatron_dip.schedule.search import search
from megatron_dip.spec.named import named_setup
from megatron_dip.spec.workload import Parallel
from megatron_dip.workloads.generators import make_workload

SETUP = "vlm-xl-16k"
SIZES = {"vit": 8, "lm": 1}
_BEAT_S = 0.0002
_PHASES = (
    (iteration, "split", "sub-microbatches"), (iteration, "build_problem", "task graph"), (backward, "problem_bound_ns", "bound"),
    (iteration, "_lower", "lowering and dry runs"), (iteration, "_make_columns", "arrays"),
    (iteration, "check_columns", "check"), (message, "plan_of", "objects"), (message, "lower_columns", "received: lowering"),
    (message, "check_columns", "received: check"),
)


class Phases:
    """CPU seconds of the named phases, and which one runs."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.now = "between"
        for owner, function, name in _PHASES:
            setattr(owner, function, self.timed(getattr(owner, function), name))

    def timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, self.now, began = self.now, name, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.now = outer
                self.spent[name] = self.spent.get(name, 0.0) + time.thread_time() - began

        return timed


def held(work: Callable[[], object], phases: Phases) -> dict[str, float]:
    """Phase -> the longest hold of the interpreter in it, ms of the thread's CPU time."""
    thread = threading.Thread(target=work)
    thread.start()
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    worst: dict[str, float] = {}
    before, phase = 0.0, phases.now
    while thread.is_alive():
        time.sleep(_BEAT_S)
        try:
            now = time.clock_gettime(clock)
        except OSError:  # it has ended
            break
        for name in {phase, phases.now}:
            worst[name] = max(worst.get(name, 0.0), 1e3 * (now - before))
        before, phase = now, phases.now
    thread.join()
    return worst


def measure(ranks: int, microbatches: int, repeats: int, phases: Phases) -> dict[str, Any]:
    setup = named_setup(SETUP)
    workload = make_workload(SETUP, num_microbatches=microbatches, parallel=Parallel(tensor=setup.tensor, pipeline=ranks))
    costs = AnalyticCost(
        setup.model, workload.parallel, workload.training, setup.device, microbatches=workload.microbatches, memory_capacity_bytes=10**15
    )
    partition = even_partition(setup.model, ranks, {module.name: 1 for module in setup.model.modules}, SIZES)

    timed_search = phases.timed(search, "search")

    def plan() -> message.PackedPlan:
        return message.pack_plan(iteration.plan_columns(
            setup.model, partition, workload.microbatches, costs, PlanOptions(evaluations=1), search=timed_search
        ))

    plan()  # compiles, or loads what was compiled
    phases.spent.clear()
    began = time.thread_time()
    packed = plan()
    total = time.thread_time() - began
    of_phase = dict(phases.spent)
    began = time.thread_time()
    message.unpack_plan(packed.data)
    received = time.thread_time() - began
    began = time.thread_time()
    assert not inspect_plan(packed.plan, workload.microbatches).problems
    plain = time.thread_time() - began
    stages, size = len(packed.plan.stages), len(packed.data)
    del packed
    gaps: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, gap in held(plan, phases).items():
            gaps.setdefault(name, []).append(gap)
    return {
        "ranks": ranks, "microbatches": microbatches, "stages": stages, "message_bytes": size, "total_s": total,
        "beyond_search_s": total - of_phase["search"], "received_s": received, "plain_check_s": plain, "phases_s": of_phase,
        "held_ms": {name: min(of_repeats) for name, of_repeats in gaps.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    switch_often()
    phases = Phases()
    rows = [measure(ranks, microbatches, args.repeats, phases) for ranks, microbatches in ((16, 64), (32, 512))]
    names = ["search", *(name for _, _, name in _PHASES if not name.startswith("received"))]
    table = markdown_table(
        ["ranks", "microbatches", "stages", "beyond the search s", *names, "plain check s", "received s", "message MB", "held ms, and in"],
        [
            [
                row["ranks"], row["microbatches"], row["stages"], f"{row['beyond_search_s']:.2f}",
                *(f"{row['phases_s'].get(name, 0.0):.3f}" for name in names), f"{row['plain_check_s']:.2f}", f"{row['received_s']:.2f}",
                f"{row['message_bytes'] / 1e6:.1f}",
                "{1}: {0:.1f}".format(*max((gap, name) for name, gap in row["held_ms"].items())),
            ]
            for row in rows
        ],
    )
    assert __doc__ is not None
    write_record(args.output, "Planning at scale", ["\n\n".join(__doc__.split("\n\n")[2:]), table], {"rows": rows})


if __name__ == "__main__":
    main()
