"""Checks a finished plan from the outside: nothing here is shared with what made the plan.

In: a :class:`~megatron_dip.spec.plan.Plan`, and the microbatches if known. Out: what is wrong with it, and the makespan, starts and
peak memory computed afresh. A plan holds when

- every stage stands exactly once in the order of its own rank, and every chunk of a module is passed by every sub-microbatch;
- forward chains, backward chains (their mirror, as far down as something is trained), F before B before W are all among the
  dependencies, no gradient goes to a stage without a backward, and nobody waits in a circle;
- with start = max(end of the stage before on the rank, end of a dependency + lag) the last end is ``claimed_makespan``, no less than
  ``lower_bound``;
- memory, taken at starts and ends, never exceeds the capacity, peaks where ``peak_memory`` says and ends where it began;
- the actions run the stages in that order, post and await each message exactly once, on channels that are first-in-first-out for each
  directed pair of ranks, and do not deadlock when sends complete only once the receive is posted, whether posts wait for the message
  before them in their channel and hold up their rank (one hardware queue) or do not.

Limits: durations and memory figures themselves are taken as given (they are the cost model's).

Whether a plan holds is found out by compiled code (:mod:`megatron_dip.schedule.fast_check`), in a hundredth of the time. What is wrong with
one that does not is said by the plain Python here, which is that code's twin too: both decide alike.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from megatron_dip.schedule.fast_check import plan_holds
from megatron_dip.schedule.grid import cell_of, format_grid, plan_cells
from megatron_dip.spec.long import LongList
from megatron_dip.spec.plan import COMPUTE_OPS, Plan, PlanStage
from megatron_dip.spec.plan_columns import PlanColumns, columns_of, plan_of

_MAX_PROBLEMS = 20
"""Listed at most; one fault often shows in many places."""
_CELLS_AROUND = 5
"""Of the grid, before and behind a bad cell."""


class PlanInvalid(ValueError):
    """A plan does not hold. ``report`` says why."""

    def __init__(self, report: CheckReport, plan: Plan) -> None:
        self.report = report
        super().__init__("\n".join(["the plan does not hold:", *(f"- {problem}" for problem in report.problems), report.marked_grid(plan)]))


@dataclass(slots=True)
class CheckReport:
    """What a check found. Times in ns, memory in bytes; times and peaks are empty where the form was already broken."""

    problems: list[str] = field(default_factory=list)
    bad_stages: set[int] = field(default_factory=set)
    start: list[int] = field(default_factory=list)
    """[stages]"""
    makespan: int = 0
    peak_memory: list[int] = field(default_factory=list)
    """[ranks]"""

    def add(self, problem: str, *stages: int) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(problem)
        self.bad_stages.update(stages)

    def marked_grid(self, plan: Plan) -> str:
        """The part of the plan's grid around the first bad cell of each rank, bad cells marked; empty where no cell is to blame."""
        marked = {(rank, at) for rank, row in enumerate(plan.order) for at, stage in enumerate(row) if stage in self.bad_stages}
        if not marked or any(not 0 <= stage < len(plan.stages) for row in plan.order for stage in row):
            return ""
        left = max(0, min(at for _, at in marked) - _CELLS_AROUND)
        window = [row[left : left + 2 * _CELLS_AROUND + 1] for row in plan_cells(plan)]
        return format_grid(window, {(rank, at - left) for rank, at in marked})


def check_plan(plan: Plan, microbatches: Sequence[Mapping[str, Sequence[int]]] | None = None) -> CheckReport:
    """Checks everything and returns the report; raises PlanInvalid when there is a problem.

    Args:
        microbatches: the replica's microbatches, to hold the plan's instances and tokens against.
    """
    try:
        holds = plan_holds(columns_of(plan), microbatches)
    except OverflowError:  # numbers beyond 64 bits
        holds = None
    if holds is not None:
        return CheckReport(start=holds.start.tolist(), makespan=holds.makespan, peak_memory=holds.peak_memory)
    report = inspect_plan(plan, microbatches)
    if report.problems:
        raise PlanInvalid(report, plan)
    return report


def check_columns(columns: PlanColumns, microbatches: Sequence[Mapping[str, Sequence[int]]] | None = None) -> None:
    """As :func:`check_plan`, for a plan as arrays."""
    if plan_holds(columns, microbatches) is None:
        check_plan(plan_of(columns), microbatches)


def inspect_plan(plan: Plan, microbatches: Sequence[Mapping[str, Sequence[int]]] | None = None) -> CheckReport:
    """As :func:`check_plan`, but never raises: the problems stand in the report."""
    report = CheckReport()
    _check_form(plan, report)
    if report.problems:
        return report
    _check_chains(plan, report)
    if microbatches is not None:
        _check_data(plan, microbatches, report)
    _check_times(plan, report)
    _check_memory(plan, report)
    _check_actions(plan, report)
    return report


def _name(stage: PlanStage) -> str:
    return f"stage {stage.id} ({cell_of(stage)} on rank {stage.rank})"


def _check_form(plan: Plan, report: CheckReport) -> None:
    """Sizes, ids and ranges: what every later check relies on."""
    count = len(plan.stages)
    if plan.ranks < 1:
        report.add(f"ranks = {plan.ranks}: no ranks")
        return
    for name, per_rank in (("memory_initial", plan.memory_initial), ("peak_memory", plan.peak_memory), ("order", plan.order),
                           ("actions", plan.actions), ("memory_capacity", plan.memory_capacity)):
        if per_rank is not None and len(per_rank) != plan.ranks:
            report.add(f"{name} has {len(per_rank)} entries for {plan.ranks} ranks")
    for index, stage in enumerate(plan.stages):
        if stage.id != index:
            report.add(f"stage at position {index} has id {stage.id}")
        if not 0 <= stage.rank < plan.ranks:
            report.add(f"{_name(stage)}: there is no such rank", index)
        if stage.duration < 0:
            report.add(f"{_name(stage)}: duration {stage.duration} ns", index)
        for dep in stage.deps:
            if not 0 <= dep.stage < count or dep.stage == index or dep.lag < 0:
                report.add(f"{_name(stage)}: impossible dependency on stage {dep.stage} with lag {dep.lag}", index)
    if report.problems:
        return
    seen = [0] * count
    for rank, row in enumerate(plan.order):
        for stage_id in row:
            if not 0 <= stage_id < count:
                report.add(f"order of rank {rank} names stage {stage_id}, which does not exist")
                continue
            seen[stage_id] += 1
            if plan.stages[stage_id].rank != rank:
                report.add(f"{_name(plan.stages[stage_id])} stands in the order of rank {rank}", stage_id)
    for stage, times in zip(plan.stages, seen, strict=True):
        if times != 1:
            report.add(f"{_name(stage)} stands {times} times in the order", stage.id)


def _check_chains(plan: Plan, report: CheckReport) -> None:
    """Every sub-microbatch passes every chunk of its module, forwards in order and backwards mirrored."""
    segments: dict[tuple[str, int, int], dict[str, dict[tuple[int, int], PlanStage]]] = defaultdict(
        lambda: {"fw": {}, "bw": {}, "w": {}}
    )
    for stage in plan.stages:
        place = (stage.vp_stage, stage.rank)
        group = segments[stage.module, stage.microbatch, stage.sub_microbatch][stage.kind]
        if place in group:
            report.add(f"{_name(stage)}: the same as stage {group[place].id}", stage.id)
        group[place] = stage
    depends = LongList({dep.stage for dep in stage.deps} for stage in plan.stages)
    layers_of = {module: sum(map(sum, rows)) for module, rows in plan.chunks.items()}
    feeders: list[tuple[PlanStage, PlanStage]] = []
    for (module, microbatch, sub_microbatch), kinds in segments.items():
        label = f"{module} of microbatch {microbatch}.{sub_microbatch}"
        if module not in plan.chunks:
            report.add(f"{label}: chunks has no such module", *(s.id for s in kinds["fw"].values()))
            continue
        forward = [kinds["fw"][place] for place in sorted(kinds["fw"])]
        next_layer = 0
        for stage in forward:
            rows = plan.chunks[module]
            fits = 0 <= stage.vp_stage < len(rows) and stage.rank < len(rows[stage.vp_stage])
            if not fits or rows[stage.vp_stage][stage.rank] != stage.layers[1] or stage.layers[0] != next_layer:
                report.add(f"{_name(stage)}: layers {stage.layers} do not follow from chunks (next layer {next_layer})", stage.id)
            next_layer = stage.layers[0] + stage.layers[1]
        if next_layer != layers_of[module]:
            report.add(f"{label}: its forwards pass {next_layer} of {layers_of[module]} layers", *(s.id for s in forward))
        for before, after in itertools.pairwise(forward):
            if before.id not in depends[after.id]:
                report.add(f"{_name(after)} does not wait for {_name(before)}", after.id)
        for stage in forward[:1]:
            feeders.extend((plan.stages[dep.stage], stage) for dep in stage.deps)
        backward = [kinds["bw"][place] for place in sorted(kinds["bw"], reverse=True)]
        for stage in backward:
            for dep in stage.deps:
                if plan.stages[dep.stage].kind != "bw" and (dep.stage != kinds["fw"].get((stage.vp_stage, stage.rank), stage).id):
                    report.add(f"{_name(stage)} waits for {_name(plan.stages[dep.stage])}, which has no gradient for it", stage.id)
            if (stage.vp_stage, stage.rank) not in kinds["fw"]:
                report.add(f"{_name(stage)} has no forward", stage.id)
            elif kinds["fw"][stage.vp_stage, stage.rank].id not in depends[stage.id]:
                report.add(f"{_name(stage)} does not wait for its forward", stage.id)
        # Before the first part that is trained there is none, behind it every stage has one.
        if backward:
            lowest = (backward[-1].vp_stage, backward[-1].rank)
            missing = [stage for place, stage in kinds["fw"].items() if place >= lowest and place not in kinds["bw"]]
            if missing:
                report.add(f"{label}: {_name(missing[0])} has no backward, and stages before it have one", *(s.id for s in missing))
        for before, after in itertools.pairwise(backward):
            if before.id not in depends[after.id]:
                report.add(f"{_name(after)} does not wait for {_name(before)}", after.id)
        for place, stage in kinds["w"].items():
            if place not in kinds["bw"] or kinds["bw"][place].id not in depends[stage.id]:
                report.add(f"{_name(stage)} does not wait for its backward", stage.id)
        for kind in ("fw", "bw", "w"):
            for place, stage in kinds[kind].items():
                wanted = 0 if kind == "w" else stage.layers[1]
                if len(stage.strategy) != wanted:
                    report.add(f"{_name(stage)}: strategy has {len(stage.strategy)} entries for {wanted} layers", stage.id)
                twin = kinds["fw"].get(place)
                if twin is not None and (twin.layers, twin.tokens, twin.instances) != (stage.layers, stage.tokens, stage.instances):
                    report.add(f"{_name(stage)}: layers, tokens or instances differ from its forward's", stage.id)
                if kind == "bw" and twin is not None and twin.strategy != stage.strategy:
                    report.add(f"{_name(stage)}: strategy differs from its forward's", stage.id)
    for source, stage in feeders:
        if source.kind != "fw" or source.microbatch != stage.microbatch or source.module == stage.module:
            report.add(f"{_name(stage)} waits for {_name(source)}, which feeds it nothing", stage.id)
            continue
        source_kinds = segments[source.module, source.microbatch, source.sub_microbatch]
        if max(source_kinds["fw"]) != (source.vp_stage, source.rank):
            report.add(f"{_name(stage)} waits for {_name(source)}, which is not its module's last", stage.id)
        # Gradients flow back along every edge over which both sides have a backward.
        place = (stage.vp_stage, stage.rank)
        behind = segments[stage.module, stage.microbatch, stage.sub_microbatch]["bw"].get(place)
        ahead = source_kinds["bw"].get((source.vp_stage, source.rank))
        if ahead is not None and behind is not None and behind.id not in depends[ahead.id]:
            report.add(f"{_name(ahead)} does not wait for {_name(behind)}", ahead.id)
        if ahead is not None and behind is None:
            report.add(f"{_name(ahead)} gets no gradient: {_name(stage)} has no backward", ahead.id)


def _check_data(plan: Plan, microbatches: Sequence[Mapping[str, Sequence[int]]], report: CheckReport) -> None:
    """Sub-microbatches, in order, hold each microbatch's instances exactly once."""
    shares: dict[tuple[int, str], dict[int, tuple[int, int]]] = defaultdict(dict)
    for stage in plan.stages:
        if stage.kind == "fw":
            shares[stage.microbatch, stage.module][stage.sub_microbatch] = (stage.instances, stage.tokens)
    for index, microbatch in enumerate(microbatches):
        for module, lengths in microbatch.items():
            at = 0
            parts = shares.pop((index, module), {})
            for number, (instances, tokens) in sorted(parts.items()):
                if instances < 1 or sum(lengths[at : at + instances]) != tokens:
                    report.add(f"{module} of microbatch {index}.{number}: {instances} instances with {tokens} tokens are not the data's")
                at += instances
            if at != len(lengths):
                report.add(f"{module} of microbatch {index}: the plan holds {at} of {len(lengths)} instances")
            if sorted(parts) != list(range(len(parts))):
                report.add(f"{module} of microbatch {index}: sub-microbatches are numbered {sorted(parts)}")
    for microbatch_index, module in shares:
        report.add(f"{module} of microbatch {microbatch_index}: the data has no such work")


def _check_times(plan: Plan, report: CheckReport) -> None:
    """Recomputes every start and end from the order alone."""
    count = len(plan.stages)
    waiting = [len(stage.deps) for stage in plan.stages]
    released: LongList[list[tuple[int, int]]] = LongList([] for _ in range(count))
    for stage in plan.stages:
        for dep in stage.deps:
            released[dep.stage].append((stage.id, dep.lag))
    before: list[int | None] = [None] * count
    for row in plan.order:
        for previous, stage_id in itertools.pairwise(row):
            released[previous].append((stage_id, 0))
            waiting[stage_id] += 1
            before[stage_id] = previous
    start = [0] * count
    ready = deque(stage_id for stage_id in range(count) if waiting[stage_id] == 0)
    done = 0
    makespan = 0
    while ready:
        stage_id = ready.popleft()
        done += 1
        end = start[stage_id] + plan.stages[stage_id].duration
        makespan = max(makespan, end)
        for follower, lag in released[stage_id]:
            start[follower] = max(start[follower], end + lag)
            waiting[follower] -= 1
            if waiting[follower] == 0:
                ready.append(follower)
    if done < count:
        stuck = [next(stage_id for stage_id in row if waiting[stage_id]) for row in plan.order if any(waiting[s] for s in row)]
        report.add("the order waits in a circle; first stuck: " + ", ".join(_name(plan.stages[s]) for s in stuck), *stuck)
        return
    report.start = start
    report.makespan = makespan
    if makespan != plan.claimed_makespan:
        report.add(f"claimed_makespan is {plan.claimed_makespan} ns, the order takes {makespan} ns")
    if plan.lower_bound > makespan:
        report.add(f"lower_bound {plan.lower_bound} ns lies above the makespan {makespan} ns")
    work = sum(stage.duration for stage in plan.stages)
    bubbles = 1.0 - work / (plan.ranks * makespan) if makespan else 0.0
    if abs(bubbles - plan.bubble_fraction) > 1e-6:
        report.add(f"bubble_fraction is {plan.bubble_fraction}, the order has {bubbles:.9f}")


def _check_memory(plan: Plan, report: CheckReport) -> None:
    """A rank runs one stage after the other, so its memory follows from its order without times."""
    for rank, row in enumerate(plan.order):
        held = peak = plan.memory_initial[rank]
        for stage_id in row:
            stage = plan.stages[stage_id]
            held += stage.mem_delta_start
            if plan.memory_capacity is not None and held > plan.memory_capacity[rank] >= peak:
                report.add(f"{_name(stage)} takes the rank to {held} bytes of {plan.memory_capacity[rank]}", stage_id)
            peak = max(peak, held)
            held += stage.mem_delta_end
            peak = max(peak, held)
        report.peak_memory.append(peak)
        if plan.memory_capacity is not None and peak > plan.memory_capacity[rank]:
            report.add(f"rank {rank} peaks at {peak} bytes of {plan.memory_capacity[rank]}")
        if peak != plan.peak_memory[rank]:
            report.add(f"peak_memory of rank {rank} is {plan.peak_memory[rank]}, the order peaks at {peak}")
        if held != plan.memory_initial[rank]:
            report.add(f"rank {rank} ends with {held - plan.memory_initial[rank]} bytes not given back")


def _check_actions(plan: Plan, report: CheckReport) -> None:
    """Messages against dependencies, each rank's list by itself, then all ranks together."""
    expected: dict[tuple[int, int], int] = {}
    consumer_of: dict[int, int] = {}
    for consumer, tags in plan.inputs.items():
        for tag in tags:
            if tag not in plan.outputs:
                report.add(f"inputs of stage {consumer} name tag {tag}, which outputs lacks")
            elif tag in consumer_of:
                report.add(f"tag {tag} goes to stage {consumer_of[tag]} and to stage {consumer}")
            elif not (0 <= consumer < len(plan.stages) and 0 <= plan.outputs[tag] < len(plan.stages)):
                report.add(f"tag {tag} names a stage that does not exist")
            else:
                consumer_of[tag] = consumer
                if (plan.outputs[tag], consumer) in expected:
                    report.add(f"stage {plan.outputs[tag]} feeds stage {consumer} with two messages", consumer)
                expected[plan.outputs[tag], consumer] = tag
    report_unawaited = set(plan.outputs) - set(consumer_of)
    if report_unawaited:
        report.add(f"no stage awaits tags {sorted(report_unawaited)[:5]}")
    if report.problems:
        return
    for stage in plan.stages:
        local = sorted(plan.local_inputs.get(stage.id, []))
        wanted_local = []
        for dep in stage.deps:
            source = plan.stages[dep.stage]
            if source.rank != stage.rank:
                if expected.pop((dep.stage, stage.id), None) is None:
                    report.add(f"{_name(stage)} depends on {_name(source)}, but no message goes there", stage.id)
            elif not _is_own_forward_or_backward(source, stage):
                wanted_local.append(dep.stage)
        if local != sorted(wanted_local):
            report.add(f"{_name(stage)}: local_inputs are {local}, its data on the rank come from {sorted(wanted_local)}", stage.id)
    for (source_id, consumer), tag in expected.items():
        report.add(f"tag {tag} goes from stage {source_id} to stage {consumer} without a dependency", consumer)
    if report.problems:
        return
    for rank in range(plan.ranks):
        _check_rank_actions(plan, rank, consumer_of, report)
    for one_queue in (False, True):
        if not report.problems:
            _dry_run(plan, report, one_queue)


def _is_own_forward_or_backward(source: PlanStage, stage: PlanStage) -> bool:
    """Whether the edge is a stage pair's own (F to B, B to W): activations stay in place, nothing is handed over."""
    same = (source.module, source.vp_stage, source.microbatch, source.sub_microbatch) == (
        stage.module, stage.vp_stage, stage.microbatch, stage.sub_microbatch,
    )
    return same and (source.kind, stage.kind) in (("fw", "bw"), ("bw", "w"), ("fw", "w"))


def _check_rank_actions(plan: Plan, rank: int, consumer_of: Mapping[int, int], report: CheckReport) -> None:
    sent = {tag for tag, source in plan.outputs.items() if plan.stages[source].rank == rank}
    received = {tag for tag, consumer in consumer_of.items() if plan.stages[consumer].rank == rank}
    computed: list[int] = []
    done: set[int] = set()
    posted: dict[str, set[int]] = {"isend": set(), "irecv": set()}
    awaited: dict[str, set[int]] = {"wait_send": set(), "wait_recv": set()}
    closed_groups: set[int] = set()
    open_group: int | None = None
    for position, action in enumerate(plan.actions[rank]):
        at = f"action {position} of rank {rank} ({action.op}"
        group = None if action.group is msgspec.UNSET else action.group
        if open_group is not None and group != open_group:
            closed_groups.add(open_group)
        if group is not None and group in closed_groups:
            report.add(f"{at}): group {group} is not consecutive")
        open_group = group
        if action.op in COMPUTE_OPS:
            stage_id = action.stage
            if not isinstance(stage_id, int) or not 0 <= stage_id < len(plan.stages) or plan.stages[stage_id].kind != action.op:
                report.add(f"{at} {stage_id}): not a stage of that kind")
                continue
            missing = [tag for tag in plan.inputs.get(stage_id, []) if tag not in awaited["wait_recv"]]
            if missing:
                report.add(f"{at} {stage_id}): runs before it has waited for tags {missing[:5]}", stage_id)
            computed.append(stage_id)
            done.add(stage_id)
            continue
        tag, peer = action.tag, action.peer
        at = f"{at} tag {tag})"
        if not isinstance(tag, int) or tag not in consumer_of:
            report.add(f"{at}: no such message")
            continue
        sending = action.op in ("isend", "wait_send")
        if tag not in (sent if sending else received):
            report.add(f"{at}: the message is not this rank's")
            continue
        other = plan.stages[consumer_of[tag] if sending else plan.outputs[tag]].rank
        if peer != other:
            report.add(f"{at}: peer is {peer}, the message's other end is rank {other}")
        if action.op in ("isend", "irecv"):
            if tag in posted[action.op]:
                report.add(f"{at}: posted twice")
            posted[action.op].add(tag)
            if sending and plan.outputs[tag] not in done:
                report.add(f"{at}: sent before stage {plan.outputs[tag]} has made it", plan.outputs[tag])
        else:
            if tag in awaited[action.op]:
                report.add(f"{at}: waited for twice")
            awaited[action.op].add(tag)
            if tag not in posted["isend" if sending else "irecv"]:
                report.add(f"{at}: waited for before it was posted")
    if computed != plan.order[rank]:
        report.add(f"the compute actions of rank {rank} are not its order", *(s for s, o in zip(computed, plan.order[rank], strict=False) if s != o))
    for label, seen, wanted in (("sends", posted["isend"], sent), ("receives", posted["irecv"], received),
                                ("waits for sends", awaited["wait_send"], sent), ("waits for receives", awaited["wait_recv"], received)):
        if seen != wanted:
            report.add(f"{label} of rank {rank}: tags {sorted(seen ^ wanted)[:5]} are missing or too many")


def _dry_run(plan: Plan, report: CheckReport, one_queue: bool) -> None:
    """Runs all ranks' actions: per directed pair the n-th send meets the n-th receive; a send completes once its receive is posted.

    With one queue a rank gets past a post only once the post before it in its direction and with its peer has completed.
    """
    sends: dict[tuple[int, int], list[int]] = defaultdict(list)
    receives: dict[tuple[int, int], list[int]] = defaultdict(list)
    position = [0] * plan.ranks
    matched: set[int] = set()
    progress = True
    while progress:
        progress = False
        for rank in range(plan.ranks):
            actions = plan.actions[rank]
            while position[rank] < len(actions):
                action = actions[position[rank]]
                if action.op in ("wait_send", "wait_recv") and action.tag not in matched:
                    break
                if action.op in ("isend", "irecv"):
                    assert isinstance(action.tag, int)
                    assert isinstance(action.peer, int)
                    pair = (rank, action.peer) if action.op == "isend" else (action.peer, rank)
                    mine, theirs = (sends[pair], receives[pair]) if action.op == "isend" else (receives[pair], sends[pair])
                    if one_queue and mine and mine[-1] not in matched:
                        break
                    mine.append(action.tag)
                    if len(theirs) >= len(mine):
                        if theirs[len(mine) - 1] != action.tag:
                            report.add(
                                f"channel from rank {pair[0]} to rank {pair[1]}: message {len(mine) - 1} is sent as tag {sends[pair][len(mine) - 1]} "
                                f"and received as tag {receives[pair][len(mine) - 1]}"
                            )
                            return
                        matched.add(action.tag)
                position[rank] += 1
                progress = True
    for rank in range(plan.ranks):
        if position[rank] < len(plan.actions[rank]):
            action = plan.actions[rank][position[rank]]
            device = " on a device with one hardware queue" if one_queue else ""
            report.add(f"deadlock{device}: rank {rank} stands at action {position[rank]} ({action.op} tag {action.tag} with rank {action.peer})")
