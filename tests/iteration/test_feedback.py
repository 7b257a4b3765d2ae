"""The loop from measured stages back to costs, on a machine that is simulated stage by stage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.interface import CostModel, Part, PartCost
from megatron_dip.cost.measured import SlowedCost
from megatron_dip.cost.wrapped import WrappedCost
from megatron_dip.iteration.feedback import PROFILED_FIRST, SPEED_ITERATIONS, CostFeedback
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.runtime.timing import StageRecord
from megatron_dip.spec.codec import load_profile
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.profile import PointToPoint
from megatron_dip.spec.workload import Parallel, Training

SIZES = {"hidden_size": 256, "ffn_hidden_size": 1024, "num_attention_heads": 4, "num_query_groups": 4}
MODEL = ModelSpec(modules=[
    ModuleSpec(name="vit", kind="vit", role="encoder", num_layers=4, **SIZES),  # type: ignore[arg-type]
    ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=8, vocab_size=512, **SIZES),  # type: ignore[arg-type]
])
PARTITION = even_partition(MODEL, 2, {"vit": 1, "lm": 2}, {"vit": 2, "lm": 1})
BATCH = [{"vit": [64] * images, "lm": [512]} for images in (4, 2, 2, 4)]
LATENCY_NS = 40_000.0


class Machine(WrappedCost):
    """What stages really take: not what the analytic costs say, by another factor for each module and part."""

    def __init__(self, costs: CostModel) -> None:
        super().__init__(costs)
        self.p2p_latency_ns = LATENCY_NS

    def part(self, module: str, part: Part, lengths: object) -> PartCost:
        cost = self.costs.part(module, part, lengths)  # type: ignore[arg-type]
        factor = {"vit": 3.0, "lm": 1.7}[module] * {"layer": 1.0, "first": 2.0, "last": 0.5}[part]
        return PartCost(
            forward_ns=factor * cost.forward_ns, backward_input_ns=1.2 * factor * cost.backward_input_ns,
            backward_weight_ns=1.2 * factor * cost.backward_weight_ns, activation_bytes=cost.activation_bytes, boundary_bytes=cost.boundary_bytes,
        )


def analytic() -> AnalyticCost:
    return AnalyticCost(MODEL, Parallel(pipeline=2), Training(dtype="fp32"), "cpu")


def planned(costs: CostModel, strategy: str | None = "none") -> Plan:
    return plan_iteration(MODEL, PARTITION, BATCH, costs, PlanOptions(evaluations=40, strategy=strategy))


def executed(plan: Plan, truth: CostModel, slower: Callable[[int], float] = lambda rank: 1.0, pause_ns: int = 0) -> list[list[StageRecord]]:
    """When the plan's stages run on a machine, by the order of the plan alone.

    Args:
        slower: rank -> times as long.
        pause_ns: between two stages of a rank, which no stage's time shows.
    """
    spans: dict[int, tuple[int, int]] = {}
    free = [0] * plan.ranks
    place = [0] * plan.ranks
    while any(place[rank] < len(plan.order[rank]) for rank in range(plan.ranks)):
        for rank in range(plan.ranks):
            if place[rank] == len(plan.order[rank]):
                continue
            stage = plan.stages[plan.order[rank][place[rank]]]
            if any(dep.stage not in spans for dep in stage.deps):
                continue
            lengths = [stage.tokens // stage.instances] * stage.instances
            parts: list[tuple[Part, int]] = [
                ("layer", stage.layers[1]), ("first", int(stage.vp_stage == 0 and rank == 0)),
                ("last", int(stage.vp_stage == PARTITION.num_chunks(stage.module) - 1 and rank == plan.ranks - 1)),
            ]
            took = 0.0
            for part, count in parts:
                cost = truth.part(stage.module, part, lengths)
                took += count * (cost.forward_ns if stage.kind == "fw" else cost.backward_input_ns + cost.backward_weight_ns)
            if stage.kind == "bw":
                shares = truth.strategies(stage.module, lengths)
                took += sum(shares[name].extra_forward for name in stage.strategy) * truth.part(stage.module, "layer", lengths).forward_ns
            lag = {True: 0, False: round(truth.p2p_latency_ns)}
            ready = max((spans[dep.stage][1] + lag[plan.stages[dep.stage].rank == rank] for dep in stage.deps), default=0)
            start = max(free[rank] + pause_ns, ready)
            spans[stage.id] = (start, start + round(took * slower(rank)))
            free[rank] = spans[stage.id][1]
            place[rank] += 1
    return [[StageRecord(stage, *spans[stage]) for stage in order] for order in plan.order]


def makespan(records: list[list[StageRecord]]) -> int:
    every = [record for of_rank in records for record in of_rank]
    return max(record.end_ns for record in every) - min(record.start_ns for record in every)


def feedback(**arguments: object) -> CostFeedback:
    return CostFeedback(groups=None, partition=PARTITION, model=MODEL, costs=analytic(), **arguments)  # type: ignore[arg-type]


def train(loop: CostFeedback, truth: CostModel, iterations: int, slower: Callable[[int], float] = lambda rank: 1.0, pause_ns: int = 0) -> float:
    """Predicted over measured makespan of the last of the iterations, in each of which the loop is told of all ranks."""
    ratio = 0.0
    for _ in range(iterations):
        plan = planned(loop.current_costs())
        records = executed(plan, truth, slower, pause_ns)
        ratio = plan.claimed_makespan / makespan(records)
        loop.learn(plan, records)
        loop.follow(plan, 0, records[0])
    return ratio


def test_plans_come_to_foretell_the_machine_they_run_on() -> None:
    truth = Machine(analytic())
    loop = feedback()
    first = planned(loop.current_costs())
    assert first.claimed_makespan < 0.6 * makespan(executed(first, truth))
    assert train(loop, truth, 6) == pytest.approx(1.0, abs=0.02)


def test_a_message_that_takes_longer_is_corrected_towards_what_it_takes() -> None:
    truth = Machine(analytic())
    loop = feedback(p2p=PointToPoint(latency_ns=1000.0, bytes_per_second=1e12))
    train(loop, truth, 1)
    before = loop.current_costs().p2p_latency_ns
    train(loop, truth, 12)
    after = loop.current_costs().p2p_latency_ns
    assert abs(after - LATENCY_NS) < 0.1 * abs(before - LATENCY_NS)


def test_waiting_that_no_stage_shows_lengthens_the_plans() -> None:
    truth = Machine(analytic())
    loop = feedback()
    longest = max(record.end_ns - record.start_ns for of_rank in executed(planned(truth), truth) for record in of_rank)
    ratio = train(loop, truth, 8, pause_ns=longest // 2)
    assert loop.factor > 1.05
    assert ratio == pytest.approx(1.0, abs=0.06)


def test_a_machine_that_slows_is_followed_before_the_next_fit() -> None:
    truth = Machine(analytic())
    loop = feedback()
    train(loop, truth, 6)
    slow = SlowedCost(truth, 1.5)
    ratios = []
    for _ in range(SPEED_ITERATIONS):
        plan = planned(loop.current_costs())
        records = executed(plan, slow)
        ratios.append(plan.claimed_makespan / makespan(records))
        loop.follow(plan, 0, records[0])
    assert ratios[0] < 0.75
    assert ratios[-1] == pytest.approx(1.0, abs=0.03)


def test_a_new_fit_holds_the_speed_that_it_was_measured_at() -> None:
    """What stages took beyond the fit before is no part of the next one."""
    slow = SlowedCost(Machine(analytic()), 1.5)
    loop, of_slow = feedback(), feedback()
    train(loop, Machine(analytic()), 6)
    train(of_slow, slow, 6)
    for _ in range(SPEED_ITERATIONS):
        plan = planned(loop.current_costs())
        loop.follow(plan, 0, executed(plan, slow)[0])
    assert loop.factor > 1.4
    assert of_slow.profile is not None
    loop.use_profile(of_slow.profile)
    plan = planned(loop.current_costs())
    assert plan.claimed_makespan == pytest.approx(makespan(executed(plan, slow)), rel=0.04)


def test_recomputed_layers_are_not_learned_as_slow_ones() -> None:
    truth = Machine(analytic())
    loop = feedback()
    for _ in range(6):
        plan = planned(loop.current_costs(), strategy="full")
        records = executed(plan, truth)
        loop.learn(plan, records)
    plan = planned(loop.current_costs())
    assert plan.claimed_makespan == pytest.approx(makespan(executed(plan, truth)), rel=0.03)


def test_bytes_and_limits_stay_those_given() -> None:
    loop = feedback()
    train(loop, Machine(analytic()), 2)
    given, learned = analytic(), loop.current_costs()
    assert learned.memory_capacity_bytes() == given.memory_capacity_bytes()
    assert learned.part("lm", "layer", [512]).activation_bytes == given.part("lm", "layer", [512]).activation_bytes
    assert learned.strategies("lm", [512]) == given.strategies("lm", [512])
    assert learned.static_bytes("lm", 2, first=True, last=False) == given.static_bytes("lm", 2, first=True, last=False)


def test_a_slow_rank_is_named_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    loop = feedback()
    with caplog.at_level(logging.WARNING):
        train(loop, Machine(analytic()), 12, slower=lambda rank: 1.6 if rank == 1 else 1.0)
    assert list(loop.slow_ranks()) == [1]
    assert sum("pipeline rank 1 takes" in record.getMessage() for record in caplog.records) == 1


def test_drift_is_said_once_and_only_where_there_is_any(caplog: pytest.LogCaptureFixture) -> None:
    truth = Machine(analytic())
    loop = feedback()
    with caplog.at_level(logging.WARNING):
        train(loop, truth, PROFILED_FIRST + 4)
        assert loop.drift == pytest.approx(1.0, abs=0.02)
        assert not caplog.records
        train(loop, SlowedCost(truth, 1.5), 8)
    assert loop.drift == pytest.approx(1.5, abs=0.03)
    assert sum("times as long as when" in record.getMessage() for record in caplog.records) == 1


def test_a_run_that_resumes_plans_with_what_was_measured(tmp_path: Path) -> None:
    truth = Machine(analytic())
    file = tmp_path / "costs" / "profile.json"
    train(feedback(state_file=file), truth, 4)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    resumed = feedback(profile=load_profile(file))
    plan = planned(resumed.current_costs())
    assert plan.claimed_makespan == pytest.approx(makespan(executed(plan, truth)), rel=0.02)
    kept = resumed.profile
    train(resumed, truth, 1)
    assert resumed.profile is kept, "one iteration outweighed a whole run"


def test_costs_change_whole_and_plans_are_forgotten_with_each_fit() -> None:
    seen: list[CostModel] = []
    forgotten: list[int] = []
    loop = feedback(forget=lambda: forgotten.append(len(seen)))
    truth = Machine(analytic())
    plan = planned(loop.current_costs())
    records = executed(plan, truth)
    loop.learn(plan, records)
    assert forgotten == [0]

    class Watched(list[StageRecord]):
        """Reads the costs in the middle of the loop's own reading, as a planner's thread may."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            seen.append(loop.current_costs())
            planned(seen[-1])
            return super().__iter__()

    before = loop.current_costs()
    loop.follow(plan, 0, Watched(records[0]))
    assert seen
    assert all(costs is before for costs in seen)
    assert loop.current_costs() is not before


def test_only_due_iterations_are_gathered_where_reading_costs() -> None:
    read: list[int] = []
    loop = feedback(read_every_iteration=False)
    truth = Machine(analytic())
    plan = planned(loop.current_costs())
    every = [record for of_rank in executed(plan, truth) for record in of_rank]

    def own_records() -> list[StageRecord]:
        read.append(iteration)
        return every

    for iteration in range(40):  # noqa: B007 - read by own_records
        loop.after_iteration(plan, own_records)
    assert read == [1, 2, 3, 4, 5, 6, 7, 8, 10, 20, 30]
