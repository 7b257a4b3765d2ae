"""What it costs that a send's wait holds up the sender's stages (simulated; docs/results/send_waits.md).

In: workload files. Each rank's actions of a plan run with stage times that deviate from the plan's; once as they are, once with waits
for sends that hold nothing up, and, as a control, once with every wait right behind its send. Messages take their planned time from when both ends are posted; a receive's post waits for the start of
the stage before it, a send's for the end of the stage before it, both for the message before them in their channel. Not modelled: shared
hardware queues.

    python scripts/simulate_send_waits.py vlm-s.json [...] --chunks 2 --evaluations 60
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import msgspec
import numpy as np

from megatron_dip.cli.plan_command import workload_costs
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.runtime.executor import PlanLinks
from megatron_dip.spec.codec import load_workload
from megatron_dip.spec.plan import Action, Plan


def makespan(plan: Plan, durations: list[float], *, waits_hold: bool) -> float:
    """ns until the last stage ends."""
    consumer = PlanLinks(plan).consumer_of_tag
    lag = {
        tag: next(dep.lag for dep in plan.stages[consumer[tag]].deps if dep.stage == producer) for tag, producer in plan.outputs.items()
    }
    place = [0] * plan.ranks
    free = [0.0] * plan.ranks
    """When the rank's last stage ends, or what it waits for comes."""
    began = [0.0] * plan.ranks
    posted: dict[tuple[str, int], float] = {}
    over: dict[int, float] = {}
    last: dict[tuple[int, str, int], int] = {}
    """(rank, op, peer) -> tag of the post before."""
    end = 0.0
    left = sum(map(len, plan.actions))
    while left:
        before = left
        for rank, actions in enumerate(plan.actions):
            while place[rank] < len(actions):
                action = actions[place[rank]]
                if action.op in ("isend", "irecv"):
                    assert isinstance(action.tag, int)
                    assert isinstance(action.peer, int)
                    earlier = last.get((rank, action.op, action.peer))
                    if earlier is not None and earlier not in over:
                        break
                    at = max(free[rank] if action.op == "isend" else began[rank], 0.0 if earlier is None else over[earlier])
                    posted[action.op, action.tag] = at
                    last[rank, action.op, action.peer] = action.tag
                    if ("isend", action.tag) in posted and ("irecv", action.tag) in posted:
                        over[action.tag] = max(posted["isend", action.tag], posted["irecv", action.tag]) + lag[action.tag]
                elif action.op in ("wait_send", "wait_recv"):
                    assert isinstance(action.tag, int)
                    if action.op == "wait_recv" or waits_hold:
                        if action.tag not in over:
                            break
                        free[rank] = max(free[rank], over[action.tag])
                else:
                    assert isinstance(action.stage, int)
                    began[rank] = free[rank]
                    free[rank] += durations[action.stage]
                    end = max(end, free[rank])
                place[rank] += 1
                left -= 1
        assert left < before, "the program does not come to its end"
    return end


def at_once(plan: Plan) -> Plan:
    """The plan with every wait for a send right behind it."""
    actions = [
        [
            one for action in row if action.op != "wait_send"
            for one in ((action, Action(op="wait_send", peer=action.peer, tag=action.tag)) if action.op == "isend" else (action,))
        ]
        for row in plan.actions
    ]
    return msgspec.structs.replace(plan, actions=actions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", type=Path)
    parser.add_argument("--chunks", type=int, default=2)
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--draws", type=int, default=50)
    args = parser.parse_args()
    for path in args.workloads:
        workload = load_workload(path)
        model = workload.model_spec
        partition = even_partition(
            model, workload.parallel.pipeline, {module.name: args.chunks for module in model.modules}, {module.name: 8 for module in model.modules}
        )
        plan = plan_iteration(
            model, partition, workload.replica_microbatches(0), workload_costs(workload), PlanOptions(evaluations=args.evaluations)
        )
        hasty = at_once(plan)
        planned = [float(stage.duration) for stage in plan.stages]
        assert makespan(plan, planned, waits_hold=False) <= plan.claimed_makespan * 1.001
        for deviation in (0.0, 0.05, 0.1, 0.2, 0.4):
            rng = np.random.default_rng(0)
            slower, control = [], []
            for _ in range(args.draws if deviation else 1):
                durations = (np.array(planned) * rng.lognormal(0.0, deviation, len(planned))).tolist()
                free = makespan(plan, durations, waits_hold=False)
                slower.append(makespan(plan, durations, waits_hold=True) / free - 1)
                control.append(makespan(hasty, durations, waits_hold=True) / free - 1)
            print(
                f"{path.stem:10s} deviation {100 * deviation:3.0f} %: waits for sends cost {100 * statistics.median(slower):.3f} % (median), "
                f"{100 * max(slower):.3f} % (most); right behind the sends {100 * statistics.median(control):.2f} %", flush=True
            )


if __name__ == "__main__":
    main()
