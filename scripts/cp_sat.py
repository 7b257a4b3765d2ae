"""Solves a small task graph exactly with CP-SAT: JSON on standard input, JSON on standard output.

In: ``{"tasks": [[rank, duration], ...], "edges": [[task, task waited for, lag], ...], "horizon": ns, "seconds": s}``. Out:
``{"optimal": bool, "value": makespan, "bound": ns}``. A process of its own, since OR-tools and highspy cannot be loaded into one.
"""

from __future__ import annotations

import json
import sys

from ortools.sat.python import cp_model


def main() -> int:
    case = json.load(sys.stdin)
    model = cp_model.CpModel()
    horizon = case["horizon"]
    start = []
    intervals: dict[int, list[cp_model.IntervalVar]] = {}
    for rank, duration in case["tasks"]:
        start.append(model.new_int_var(0, horizon, ""))
        intervals.setdefault(rank, []).append(model.new_fixed_size_interval_var(start[-1], duration, ""))
    for task, before, lag in case["edges"]:
        model.add(start[task] >= start[before] + case["tasks"][before][1] + lag)
    for on_rank in intervals.values():
        model.add_no_overlap(on_rank)
    end = model.new_int_var(0, horizon, "")
    for task, (_, duration) in enumerate(case["tasks"]):
        model.add(end >= start[task] + duration)
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 2
    solver.parameters.max_time_in_seconds = case["seconds"]
    status = solver.solve(model)
    print(json.dumps({"optimal": status == cp_model.OPTIMAL, "value": solver.objective_value, "bound": solver.best_objective_bound}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
