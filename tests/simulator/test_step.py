"""The simulated step: its parts add up, uniform models give the closed forms, published steps come out."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.device import load_device
from megatron_dip.cost.fixed import FixedStrategyCost
from megatron_dip.cost.modules import Kernels
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.schedule.result import Schedule
from megatron_dip.simulator.measured_steps import load_measured_steps, predict_step
from megatron_dip.simulator.step import SCHEDULES, SimulateOptions, make_costs, model_flops, simulate, simulate_whole
from megatron_dip.spec.codec import resolve_workload
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.named import named_model
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.simulation import SimulationResult
from megatron_dip.spec.workload import Microbatch, Parallel, Training, Workload
from megatron_dip.workloads.generators import make_workload
from tests.strategies import Case, cases, vlm_case

MEASURED = Path(__file__).parents[2] / "docs" / "results" / "measured"

QUICK = SimulateOptions(evaluations=20)
IMAGES = (6, 2, 0, 9, 4, 1, 3, 5)


def workload(**changes: object) -> Workload:
    microbatches: list[Microbatch] = [{"vit": [2704] * n, "lm": [8192]} for n in IMAGES]
    fields = {
        "format": "megatron-dip/workload/1", "model": named_model("vlm-s"), "parallel": Parallel(tensor=4, pipeline=4), "device": "h800",
        "microbatches": microbatches, **changes,
    }
    return Workload(**fields)  # type: ignore[arg-type]


def partition(num_ranks: int = 4) -> Partition:
    return even_partition(named_model("vlm-s"), num_ranks, {"lm": 2}, {"vit": 4})


def parts(result: SimulationResult) -> dict[str, float]:
    return msgspec.to_builtins(result.breakdown_s)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recompute", ["auto", "full"])
def test_the_parts_of_every_schedule_add_up(schedule: str, recompute: str) -> None:
    given = workload(training=Training(recompute=recompute))  # type: ignore[arg-type]
    result = simulate(given, schedule, partition=partition(), options=QUICK)  # type: ignore[arg-type]
    assert result.schedule == schedule
    assert sum(parts(result).values()) == pytest.approx(result.iteration_time_s)
    assert min(parts(result).values()) > -1e-9
    assert result.mfu is not None
    assert result.hfu is not None
    assert 0 < result.mfu <= result.hfu < 1
    if recompute == "full":
        assert result.hfu > 1.2 * result.mfu
    assert 0 <= result.bubble_fraction < 1
    assert len(result.peak_memory_bytes) == (1 if schedule == "fsdp2" else 4)
    for name, rows in result.chunks.items():
        copies = 4 if schedule == "three-phase" and name == "vit" else 1
        assert sum(map(sum, rows)) == copies * named_model("vlm-s").module(name).num_layers


def test_the_result_has_exactly_the_documented_fields() -> None:
    result = msgspec.json.decode(msgspec.json.encode(simulate(workload(), "1f1b", options=QUICK)))
    assert list(result) == [
        "iteration_time_s", "mfu", "hfu", "bubble_fraction", "peak_memory_bytes", "breakdown_s", "schedule", "chunks", "sub_microbatch_size",
    ]
    assert list(result["breakdown_s"]) == ["compute", "tensor_parallel", "data_parallel", "p2p", "bubble", "optimizer"]


def uniform(pipeline: int, count: int, virtual: int = 1, **changes: object) -> Workload:
    """A model of equal layers without embedding and head."""
    module = ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=8, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16)
    training = Training(schedule="interleaved" if virtual > 1 else "1f1b", virtual_pipeline=virtual, recompute="none")
    fields = {
        "format": "megatron-dip/workload/1", "model": ModelSpec(modules=[module]), "parallel": Parallel(pipeline=pipeline), "training": training,
        "device": "h100", "microbatches": [{"lm": [2048]}] * count, **changes,
    }
    return Workload(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(("virtual", "count"), [(1, 4), (1, 16), (2, 16)])
def test_uniform_stages_have_the_closed_form_of_1f1b(virtual: int, count: int) -> None:
    given = uniform(4, count, virtual)
    result = simulate(given)
    costs = make_costs(given, SimulateOptions())
    layer = costs.part("lm", "layer", [2048])
    stage = 2 * (layer.forward_ns + layer.backward_input_ns + layer.backward_weight_ns) / 1e9
    shown = parts(result)
    assert shown["compute"] == pytest.approx(count * stage, rel=1e-5)
    # The bubble of (interleaved) 1F1B: (p - 1) / v stages.
    assert shown["bubble"] == pytest.approx(3 / virtual * stage, rel=0.02)
    assert result.iteration_time_s == pytest.approx(sum(shown.values()))


def test_one_rank_has_no_bubble() -> None:
    shown = parts(simulate(uniform(1, 4)))
    assert shown["bubble"] == pytest.approx(0, abs=1e-9)
    assert shown["p2p"] == pytest.approx(0, abs=1e-9)
    assert shown["data_parallel"] == 0


def test_blocking_messages_cost_more() -> None:
    given = uniform(4, 16, 2)
    free, blocked = simulate(given), simulate(given, options=SimulateOptions(blocking_messages=True))
    assert blocked.iteration_time_s > free.iteration_time_s
    assert parts(blocked)["compute"] == pytest.approx(parts(free)["compute"], rel=1e-5)
    assert parts(blocked)["p2p"] > parts(free)["p2p"]


def test_the_slowest_replica_sets_the_pace() -> None:
    light: Microbatch = {"vit": [2704], "lm": [8192]}
    heavy: Microbatch = {"vit": [2704] * 8, "lm": [8192]}
    both = workload(parallel=Parallel(tensor=4, pipeline=4, data=2), microbatches=[light, heavy] * 4)
    alone = workload(parallel=Parallel(tensor=4, pipeline=4, data=2), microbatches=[heavy] * 8)
    slow, even = simulate(both, "nnscaler", options=QUICK), simulate(alone, "nnscaler", options=QUICK)
    assert slow.iteration_time_s == pytest.approx(even.iteration_time_s)
    assert slow.mfu is not None
    assert even.mfu is not None
    assert slow.mfu < even.mfu


def test_data_parallel_collectives_hide_unless_told_not_to() -> None:
    given = workload(parallel=Parallel(tensor=4, pipeline=4, data=4))
    hidden = simulate(given, "1f1b", options=QUICK)
    shown = simulate(given, "1f1b", options=SimulateOptions(overlap_data_parallel=False))
    assert 0 < parts(hidden)["data_parallel"] < parts(shown)["data_parallel"]


def test_buckets_travel_within_the_last_pass() -> None:
    """With one microbatch a chunk's backward is the whole backward: all but the last bucket's gradients hide behind it where links are fast."""
    one = msgspec.structs.replace(uniform(1, 1), parallel=Parallel(data=2), microbatches=[{"lm": [8192]}] * 2)
    hidden = simulate(one, "1f1b").breakdown_s.data_parallel
    shown = simulate(one, "1f1b", options=SimulateOptions(overlap_data_parallel=False)).breakdown_s.data_parallel
    assert 0 < hidden < 0.5 * shown


def test_the_distributed_optimizer_shares_the_update() -> None:
    parallel = Parallel(tensor=4, pipeline=4, data=4)
    shared = simulate(workload(parallel=parallel), "1f1b", options=QUICK)
    whole = simulate(workload(parallel=parallel, training=Training(distributed_optimizer=False)), "1f1b", options=QUICK)
    assert parts(shared)["optimizer"] < parts(whole)["optimizer"]
    assert max(shared.peak_memory_bytes) < max(whole.peak_memory_bytes)


def test_a_profile_stands_for_the_device() -> None:
    case = vlm_case(num_microbatches=6)
    given = Workload(
        format="megatron-dip/workload/1", model=case.model, parallel=Parallel(pipeline=2), profile=case.profile, microbatches=case.microbatches,
    )
    result = simulate(given, "dip", partition=case.partition, options=QUICK)
    assert (result.mfu, result.hfu) == (None, None)
    shown = parts(result)
    assert shown["tensor_parallel"] == shown["optimizer"] == shown["data_parallel"] == 0
    # vit: 4 layers of 3000 ns an image, 9 images; lm: 4 layers of 900 and a head of 600, 6 microbatches; on 2 ranks.
    assert shown["compute"] == pytest.approx((4 * 3000 * 7 + (4 * 900 + 600) * 6) / 2 / 1e9)


def test_memory_that_does_not_suffice_is_an_error() -> None:
    for schedule in SCHEDULES:
        with pytest.raises(InputError) as caught:
            simulate(workload(memory_capacity_bytes=10**10), schedule, partition=partition(), options=QUICK)
        assert caught.value.field == "memory_capacity_bytes"


def test_dip_needs_a_partition_and_schedules_have_names() -> None:
    with pytest.raises(InputError, match="partition"):
        simulate(workload(), "dip", options=QUICK)
    with pytest.raises(InputError, match="cannot be simulated"):
        simulate(workload(), "hope", options=QUICK)  # type: ignore[arg-type]


def test_recomputation_frees_memory_and_takes_time() -> None:
    none = simulate(uniform(4, 16))
    full = simulate(uniform(4, 16, training=Training(schedule="1f1b", recompute="full")))
    assert full.iteration_time_s > 1.2 * none.iteration_time_s
    assert max(full.peak_memory_bytes) < max(none.peak_memory_bytes)
    assert full.mfu is not None
    assert full.hfu is not None
    # A forward more: 4 thirds of the FLOPs.
    assert full.hfu / full.mfu == pytest.approx(4 / 3, rel=0.01)


def test_model_flops_are_those_of_the_global_batch() -> None:
    given = uniform(2, 6, parallel=Parallel(tensor=2, pipeline=2, data=3))
    costs = AnalyticCost(given.model_spec, given.parallel, given.training, "h100")
    each = 6 * 2048 * (4 * 1024**2 + 3 * 1024 * 4096) + 3 * 2 * 2048**2 * 1024
    assert model_flops(given, costs) == pytest.approx(6 * 8 * each)


def test_fsdp_waits_for_the_heaviest_gpu_of_each_round() -> None:
    parallel = Parallel(pipeline=2)
    even = simulate(uniform(2, 2, parallel=parallel), "fsdp2")
    uneven = simulate(uniform(2, 2, parallel=parallel, microbatches=[{"lm": [2048]}, {"lm": [512]}]), "fsdp2")
    assert uneven.iteration_time_s == pytest.approx(even.iteration_time_s, rel=1e-5)
    assert uneven.bubble_fraction > even.bubble_fraction + 0.2


def test_published_steps_come_out() -> None:
    """Korthikanti et al. 2022: mean error up to 3 %, none above 8 % (here four of the eight; all are in the validation script)."""
    found = load_measured_steps(MEASURED / "korthikanti_2022.json")
    device = load_device(found.device)
    steps = [step for step in found.steps if step.name.startswith(("22B", "175B"))]
    errors = [abs(predict_step(step, device).iteration_time_s / step.measured_s - 1) for step in steps]
    assert len(errors) == 4
    assert max(errors) < 0.08
    assert sum(errors) / 4 < 0.03


def test_the_b200_steps_come_out() -> None:
    """No step further off than the record says, and the mean of all below 5 %; the fullest rank's memory to 3 %."""
    device = load_device("b200")
    steps = load_measured_steps(MEASURED / "simumax_b200.json").steps
    results = [predict_step(step, device) for step in steps]
    errors = [abs(result.iteration_time_s / step.measured_s - 1) for result, step in zip(results, steps, strict=True)]
    assert sum(errors) / len(errors) < 0.05
    assert max(errors) < 0.11
    for result, step in zip(results, steps, strict=True):
        if step.name.startswith("TP 1 PP 2"):
            assert max(result.peak_memory_bytes) == pytest.approx(66.55 * 2**30, rel=0.03)


def test_published_memory_comes_out() -> None:
    """175B of Korthikanti et al. 2022: activations of the first rank under interleaved 1F1B, 66.84 and 12.35 GiB."""
    path = MEASURED / "korthikanti_2022.json"
    plain, lean = (step for step in load_measured_steps(path).steps if step.name.startswith("175B"))
    peaks = {}
    for step, label, published in ((plain, "none", 66.84), (lean, "selective", 12.35)):
        costs = AnalyticCost(step.model, step.parallel, step.training, "a100", memory_capacity_bytes=10**15, kernels=Kernels(attention="unfused", dropout=True))
        given = Workload(format="megatron-dip/workload/1", model=step.model, parallel=step.parallel, training=step.training, device="a100",
                         microbatches=[step.microbatch] * 16)
        result = simulate(given, costs=FixedStrategyCost(costs, label))
        static = sum(costs.static_bytes("lm", row[0], first=index == 0, last=False) for index, row in enumerate(result.chunks["lm"]))
        peaks[label] = (result.peak_memory_bytes[0] - static) / 2**30
        # The peak also holds working sets and message buffers.
        assert published <= peaks[label] < published + 4


def test_bad_measured_steps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    with pytest.raises(InputError, match="cannot be read"):
        load_measured_steps(path)
    path.write_text('{"format": "megatron-dip/measured-steps/2"}')
    with pytest.raises(InputError, match="measured-steps/1"):
        load_measured_steps(path)
    path.write_text('{"format": "megatron-dip/measured-steps/1", "source": "x", "device": "a100", "steps": []}')
    with pytest.raises(InputError, match="no steps"):
        load_measured_steps(path)


@given(cases())
@hypothesis_settings(max_examples=25)
def test_any_arrangement_of_modules_adds_up_under_every_schedule(case: Case) -> None:
    given_case = Workload(
        format="megatron-dip/workload/1", model=case.model, parallel=Parallel(pipeline=case.partition.num_ranks), profile=case.profile,
        microbatches=case.microbatches,
    )
    for schedule in SCHEDULES:
        if schedule == "fsdp2":
            continue
        refused = None
        try:
            result = simulate(given_case, schedule, partition=case.partition, options=QUICK)
        except InputError as error:
            refused = error
        if refused is not None:
            # Baselines may have fewer layers than stages; DIP runs what its partition covers.
            assert schedule != "dip", refused
            assert refused.field == "parallel.pipeline"
            continue
        assert sum(parts(result).values()) == pytest.approx(result.iteration_time_s, abs=1e-12)
        assert min(parts(result).values()) >= -1e-12


def judge(schedule: Schedule) -> list[int]:
    """Holds a schedule against the rules of a pipeline, by plain loops; returns the peak of live bytes of each rank."""
    graph = schedule.graph
    assert sorted(task for tasks in schedule.order for task in tasks.tolist()) == list(range(graph.num_tasks))
    start, end = schedule.start_ns.tolist(), schedule.end_ns.tolist()
    assert all(end[task] - start[task] == graph.duration_ns[task] for task in range(graph.num_tasks))
    for task in range(graph.num_tasks):
        for edge in range(graph.dep_offset[task], graph.dep_offset[task + 1]):
            assert start[task] >= end[graph.dep_task[edge]] + graph.dep_lag_ns[edge]
    peaks = []
    for rank, tasks in enumerate(schedule.order):
        assert all(graph.rank[task] == rank for task in tasks)
        assert all(start[after] >= end[before] for before, after in itertools.pairwise(tasks.tolist()))
        # At equal times an end comes before a start.
        events = sorted([(end[task], 0, graph.mem_end_bytes[task]) for task in tasks] + [(start[task], 1, graph.mem_start_bytes[task]) for task in tasks])
        held = list(itertools.accumulate(int(change) for *_, change in events))
        assert held[-1] == 0
        peaks.append(max(held))
    assert schedule.makespan_ns == max(end)
    return peaks


@pytest.mark.parametrize("setup", ["vlm-s", "vlm-m", "t2v-s", "vlm-l", "t2v-l"])
def test_every_schedule_of_every_named_model_keeps_the_rules(setup: str) -> None:
    """What is simulated could run: order, dependencies, message times and memory, by a judge that shares no code with the schedulers."""
    given = resolve_workload(make_workload(setup, seed=3, num_microbatches=8), Path(setup))
    model, ranks = given.model_spec, given.parallel.pipeline
    costs = make_costs(given, QUICK)
    cut = even_partition(model, ranks, {}, {module.name: 4 for module in model.modules[:-1]})
    capacity = costs.memory_capacity_bytes()
    assert capacity is not None
    simulated: list[str] = []
    for schedule in SCHEDULES:
        if schedule == "fsdp2":
            continue
        with contextlib.suppress(InputError):  # memory that does not suffice
            found = simulate_whole(given, schedule, partition=cut, options=QUICK, costs=costs)
            simulated.append(schedule)
        if simulated[-1:] != [schedule]:
            continue
        assert found.schedule is not None
        live = judge(found.schedule)
        parameters = [0.0] * ranks
        for name, rows in found.result.chunks.items():
            for row in rows:
                for rank, layers in enumerate(row):
                    parameters[rank] += 2 * costs.chunk_parameters(name, layers, first=False, last=False)  # type: ignore[attr-defined]
        for rank in range(ranks):
            held = found.initial_bytes[rank] + live[rank]
            assert parameters[rank] < found.initial_bytes[rank]
            assert held <= found.result.peak_memory_bytes[rank], (schedule, rank)
            assert held <= capacity, (schedule, rank)
        makespan = sum(parts(found.result)[part] for part in ("compute", "tensor_parallel", "p2p", "bubble"))
        assert makespan == pytest.approx(found.schedule.makespan_ns / 1e9), schedule
    assert {"dip", "1f1b"} <= set(simulated)


@pytest.mark.parametrize("split_backward", [False, True])
def test_dip_is_simulated_as_it_is_planned(split_backward: bool) -> None:
    given = workload(training=Training(split_backward=split_backward))
    costs = make_costs(given, QUICK)
    plan = plan_iteration(
        given.model_spec, partition(), given.microbatches, costs, PlanOptions(evaluations=QUICK.evaluations, split_backward=split_backward)
    )
    result = simulate(given, "dip", partition=partition(), options=QUICK, costs=costs)
    # The same search, but that the planner spends half of it on plans without offloading.
    assert result.bubble_fraction == pytest.approx(plan.bubble_fraction, abs=0.01)
    assert sum(parts(result)[part] for part in ("compute", "tensor_parallel", "p2p", "bubble")) == pytest.approx(plan.claimed_makespan / 1e9, rel=0.01)
    # The plan counts every message and captured input, the simulator two messages and the working set of its largest part.
    if not split_backward:  # plans alone count what a split backward keeps for its weight part
        assert result.peak_memory_bytes == pytest.approx(plan.peak_memory, rel=0.02)


@given(
    rate=st.sampled_from(["peak_tflops", "memory_tbs", "nvlink_gbs", "network_gbs"]), factor=st.floats(1.01, 20.0),
    schedule=st.sampled_from(["1f1b", "interleaved", "fsdp2"]), device=st.sampled_from(["a100", "h20", "h800"]), setup=st.sampled_from(["vlm-s", "t2v-s"]),
)
@hypothesis_settings(max_examples=30)
def test_a_faster_device_is_never_slower(rate: str, factor: float, schedule: str, device: str, setup: str) -> None:
    slow = load_device(device)
    fast = msgspec.structs.replace(slow, **{rate: getattr(slow, rate) * factor})
    given = resolve_workload(make_workload(setup, seed=1, num_microbatches=8), Path(setup))
    given = msgspec.structs.replace(given, parallel=Parallel(tensor=4, pipeline=4, data=2), memory_capacity_bytes=10**12)
    times = []
    for description in (slow, fast):
        costs = AnalyticCost(
            given.model_spec, given.parallel, given.training, description, memory_capacity_bytes=10**12, microbatches=given.microbatches
        )
        for name, lengths in given.microbatches[0].items():
            times += [(name, costs.part(name, part, lengths)) for part in ("layer", "first", "last")]  # type: ignore[arg-type]
    half = len(times) // 2
    for (name, before), (_, after) in zip(times[:half], times[half:], strict=True):
        for figure in ("forward_ns", "backward_input_ns", "backward_weight_ns"):
            assert getattr(after, figure) <= getattr(before, figure) * (1 + 1e-9), (name, figure)
        assert after.activation_bytes == before.activation_bytes
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for description in (slow, fast):
            path = Path(folder) / "device.json"
            path.write_bytes(msgspec.json.encode(description))
            found.append(simulate(msgspec.structs.replace(given, device=str(path)), schedule, options=QUICK).iteration_time_s)  # type: ignore[arg-type]
    assert found[1] <= found[0] * (1 + 1e-9)
