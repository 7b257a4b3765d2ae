"""Task graphs: sizes, times, edges and memory of small models that can be counted by hand."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.interface import Part, PartCost
from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.online import split
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.schedule.candidates import LayerOption, layer_options, pair_candidates
from megatron_dip.schedule.graph import StageProblem, build_problem, build_task_graph, static_bytes
from megatron_dip.schedule.interleave import UNLIMITED
from megatron_dip.schedule.search import SearchOptions, search
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import BuiltModelSpec, ModelSpec, ModuleSpec, TrainableParts
from megatron_dip.spec.named import named_setup
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import Offload, Strategy
from megatron_dip.spec.tasks import BACKWARD, FORWARD, WEIGHT, TaskGraph
from megatron_dip.workloads.generators import default_parallel, make_workload
from tests import naive
from tests.strategies import cases, module


class Costs:
    """One layer: 10 / 6 / 4.5 ns and 9 bytes a token; a head of 100 / 50 / 50 ns and 4 bytes on ``lm``. Messages: 3 bytes a token."""

    p2p_latency_ns = 2.5
    p2p_bytes_per_second = 2e9

    def __init__(self, *, holds: bool = False) -> None:
        self.holds = holds

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        tokens = sum(lengths)
        if part == "layer":
            return PartCost(
                forward_ns=10.0 * tokens, backward_input_ns=6.0 * tokens, backward_weight_ns=4.5 * tokens, activation_bytes=9.0 * tokens,
                boundary_bytes=3.0 * tokens,
            )
        if part == "last" and module == "lm":
            return PartCost(forward_ns=100.0, backward_input_ns=50.0, backward_weight_ns=50.0, activation_bytes=4.0)
        return PartCost()

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        return {"none": Strategy(), "full": Strategy(extra_forward=1.0, activation=0.2)}

    def static_bytes(self, module: str, num_layers: int, *, first: bool, last: bool) -> int:
        return 100 * num_layers + 1000 * first + 10_000 * last

    def memory_capacity_bytes(self) -> int | None:
        return None

    def counts_all_memory(self) -> bool:
        return self.holds


def find(graph: TaskGraph, kind: int, name: str, rank: int, vp_stage: int = 0, microbatch: int = 0, sub: int = 0) -> int:
    mask = (
        (graph.kind == kind) & (graph.module == graph.module_names.index(name)) & (graph.rank == rank) & (graph.vp_stage == vp_stage)
        & (graph.microbatch == microbatch) & (graph.sub_microbatch == sub)
    )
    (task,) = np.flatnonzero(mask)
    return int(task)


def make(model: ModelSpec, num_ranks: int, microbatches, costs=None, chunks=None, sizes=None, **options):
    costs = costs or Costs()
    partition = even_partition(model, num_ranks, chunks or {}, sizes or {})
    return build_problem(model, partition, split(microbatches, model, partition, costs), costs, **options)


VLM = ModelSpec(modules=[module("vit", 3), module("lm", 4, role="backbone")])


def test_counts_times_edges_of_a_small_vlm():
    problem = make(VLM, 2, [{"vit": [2, 2, 2], "lm": [5]}, {"lm": [5]}], sizes={"vit": 2}, chunks={"lm": 2}, only_strategy="none")
    graph = problem.fastest
    # vit: 2 sub-microbatches x 1 chunk; lm: 2 x 2 chunks; 2 ranks; forward and backward.
    assert graph.num_tasks == (2 * 1 + 2 * 2) * 2 * 2
    vit = find(graph, FORWARD, "vit", 0)
    assert graph.duration_ns[vit] == 2 * 10 * 4  # 2 of 3 layers, 2 instances of 2 tokens
    assert graph.mem_start_bytes[vit] == 2 * 9 * 4
    back = find(graph, BACKWARD, "vit", 0)
    assert graph.duration_ns[back] == 2 * (6 + 4.5) * 4
    assert graph.mem_end_bytes[back] == -graph.mem_start_bytes[vit]
    second = find(graph, FORWARD, "vit", 1)
    assert naive.edges(graph, second) == [(vit, 9)]  # ceil(2.5 + 12 bytes / 2 bytes a ns)
    first_lm = find(graph, FORWARD, "lm", 0)
    other = find(graph, FORWARD, "vit", 1, sub=1)
    assert sorted(naive.edges(graph, first_lm)) == sorted([(second, 9), (other, 6)])  # the second part has one instance: ceil(2.5 + 3)
    assert naive.edges(graph, find(graph, FORWARD, "lm", 0, microbatch=1)) == []
    wrap = find(graph, FORWARD, "lm", 0, vp_stage=1)
    assert naive.edges(graph, wrap) == [(find(graph, FORWARD, "lm", 1), 10)]
    last = find(graph, FORWARD, "lm", 1, vp_stage=1)
    assert graph.duration_ns[last] == 50 + 100
    # The gradient for the encoder comes from the backbone's first stage on rank 0, by its message's size.
    edges = naive.edges(graph, find(graph, BACKWARD, "vit", 1))
    assert sorted(edges) == sorted([(find(graph, BACKWARD, "lm", 0), 9), (second, 0)])
    assert graph.dep_is_data.sum() == len(graph.dep_is_data) - problem.num_pairs


def test_stages_without_layers_are_passed_over():
    """The first and last stage of a module are there for its stem and its head."""
    model = ModelSpec(modules=[module("vit", 2), module("lm", 5, role="backbone")])
    partition = Partition(
        format="megatron-dip/partition/1", chunks={"vit": [[0, 2, 0, 0]], "lm": [[1, 1, 0, 0], [0, 1, 1, 1]]}, sub_microbatch_size={"vit": 2, "lm": 1}
    )
    costs = Costs()
    problem = build_problem(model, partition, split([{"vit": [2, 2], "lm": [5]}], model, partition, costs), costs, only_strategy="none")
    chain = [("vit", 0, 0), ("vit", 0, 1), ("vit", 0, 3), ("lm", 0, 0), ("lm", 0, 1), ("lm", 1, 1), ("lm", 1, 2), ("lm", 1, 3)]
    graph = problem.fastest
    place = [(graph.module_names[graph.module[t]], int(graph.vp_stage[t]), int(graph.rank[t])) for t in range(graph.num_tasks)]
    there = [t for t in range(graph.num_tasks) if problem.pair_of_task[t] >= 0]
    forward = {place[t]: t for t in there if graph.kind[t] == FORWARD}
    backward = {place[t]: t for t in there if graph.kind[t] == BACKWARD}
    assert sorted(forward, key=chain.index) == sorted(backward, key=chain.index) == chain
    for before, after in itertools.pairwise(chain):
        lag = 0 if before[2] == after[2] else {"vit": 9, "lm": 10 if after[0] == "lm" else 9}[before[0]]
        assert naive.edges(graph, forward[after]) == [(forward[before], lag)]
        assert sorted(naive.edges(graph, backward[before])) == sorted([(backward[after], lag), (forward[before], 0)])
    absent = [t for t in range(graph.num_tasks) if problem.pair_of_task[t] < 0]
    assert not graph.duration_ns[absent].any()
    assert not graph.mem_start_bytes[absent].any()


def test_split_backward_and_frozen_modules():
    frozen = ModelSpec(modules=[module("vit", 2, trainable=False), module("mid", 2), module("lm", 2, role="backbone", trainable=False)])
    graph = make(frozen, 1, [{"vit": [3], "mid": [3], "lm": [3]}], split_backward=True, only_strategy="none").fastest
    names = [graph.module_names[index] for index in graph.module]
    assert [(names[t], int(graph.kind[t])) for t in range(graph.num_tasks)] == [
        ("vit", FORWARD), ("mid", FORWARD), ("lm", FORWARD), ("mid", BACKWARD), ("lm", BACKWARD), ("mid", WEIGHT),
    ]
    assert graph.duration_ns.tolist() == [60, 60, 160, 36, 86, 27]  # frozen: input part alone
    assert graph.mem_start_bytes.tolist() == [27, 54, 58, 0, 0, 0]  # without a backward: one layer's at a time
    assert graph.mem_end_bytes.tolist() == [-27, 0, 0, -27, -58, -27]  # halves only where a weight part follows
    odd = make(ModelSpec(modules=[module("lm", 1, role="backbone")]), 1, [{"lm": [1]}], split_backward=True, only_strategy="none").fastest
    assert odd.mem_end_bytes.tolist() == [0, -6, -7]  # 13 bytes: floor of the half first


def partly_trained(*modules: ModuleSpec, **parts: TrainableParts) -> BuiltModelSpec:
    """Modules of which some parts are trained; those without an entry say it of themselves."""
    spec = ModelSpec(modules=list(modules))
    return BuiltModelSpec(modules=spec.modules, parts={m.name: parts.get(m.name, spec.trainable_parts(m.name)) for m in modules})


def stages_of(graph: TaskGraph, problem: StageProblem, name: str, kind: int) -> list[tuple[int, int]]:
    """(vp_stage, rank) of a module's stages of one kind that are there."""
    mask = (graph.module == graph.module_names.index(name)) & (graph.kind == kind) & (problem.pair_of_task >= 0)
    return sorted({(int(graph.vp_stage[task]), int(graph.rank[task])) for task in np.flatnonzero(mask)})


@pytest.mark.parametrize("split_backward", [False, True])
def test_only_what_stands_behind_something_trained_has_a_backward(split_backward):
    batch = [{"vit": [2], "lm": [5]}, {"lm": [5]}]
    vision = (False,) * 4
    # Frozen ViT, trained projector: only the chunk with the part "last" has a backward.
    model = partly_trained(module("vit", 4), module("lm", 4, role="backbone"), vit=TrainableParts(False, vision, True))
    problem = make(model, 2, batch, chunks={"vit": 2}, only_strategy="none", split_backward=split_backward)
    graph = problem.fastest
    assert stages_of(graph, problem, "vit", BACKWARD) == [(1, 1)]
    assert stages_of(graph, problem, "vit", WEIGHT) == ([(1, 1)] if split_backward else [])
    schedule = search(problem, np.full(2, UNLIMITED), SearchOptions(evaluations=4)).schedule
    present, kept = problem.present(schedule)
    assert present.graph.num_tasks == len(kept) == (problem.pair_of_task >= 0).sum() < graph.num_tasks
    assert present.makespan_ns == schedule.makespan_ns
    assert (graph.duration_ns[problem.pair_of_task < 0] == 0).all()
    # A stage without a backward holds one layer for its own time; the last one has no layer in its backward.
    first, last = find(graph, FORWARD, "vit", 0), find(graph, FORWARD, "vit", 1, vp_stage=1)
    assert graph.mem_start_bytes[first] == -graph.mem_end_bytes[first] == 9 * 2
    assert graph.mem_start_bytes[last] + graph.mem_end_bytes[last] == 0  # the test's projector keeps nothing
    # Its gradient comes from the language model's first stage; nothing goes further.
    back = find(graph, BACKWARD, "vit", 1, vp_stage=1)
    assert sorted(source for source, _ in naive.edges(graph, back)) == sorted([find(graph, BACKWARD, "lm", 0), last])


def test_a_frozen_language_model_with_text_alone_has_no_backward():
    model = partly_trained(module("vit", 2), module("lm", 2, role="backbone", trainable=False))
    problem = make(model, 2, [{"vit": [2], "lm": [5]}, {"lm": [5]}], only_strategy="none")
    graph = problem.fastest
    backwards = graph.microbatch[(graph.kind == BACKWARD) & (graph.module == graph.module_names.index("lm"))]
    assert set(backwards.tolist()) == {0}
    assert stages_of(graph, problem, "vit", BACKWARD) == [(0, 0), (0, 1)]


def test_an_adapter_in_one_layer_needs_gradients_from_there_on():
    parts = TrainableParts(False, (False, False, False, True, False, False), False)
    model = partly_trained(module("lm", 6, role="backbone"), lm=parts)
    problem = make(model, 2, [{"lm": [5]}], only_strategy="none", split_backward=True)  # ranks with layers 0 to 2, and 3 to 5
    graph = problem.fastest
    assert stages_of(graph, problem, "lm", BACKWARD) == [(0, 1)]
    assert stages_of(graph, problem, "lm", WEIGHT) == [(0, 1)]
    problem = make(model, 3, [{"lm": [5]}], only_strategy="full")  # layers 2 and 3 together: of the first of them nothing is kept
    graph = problem.fastest
    assert stages_of(graph, problem, "lm", BACKWARD) == [(0, 1), (0, 2)]
    middle = find(graph, FORWARD, "lm", 1)
    assert problem.strategies(middle, 0) == ["none", "full"]
    assert graph.mem_start_bytes[middle] + graph.mem_end_bytes[middle] == 9
    assert graph.mem_start_bytes[middle] == 45  # one frozen layer for a moment
    assert graph.duration_ns[find(graph, BACKWARD, "lm", 1)] == round(5 * (6 + 4.5) + 5 * 10)


@settings(max_examples=40)
@given(cases(), st.booleans(), st.randoms(use_true_random=False))
def test_partly_trained_models_plan_check_and_keep_every_limit(case, split_backward, random):
    costs = case.costs()
    parts = {
        m.name: TrainableParts(random.random() < 0.3, tuple(random.random() < 0.3 for _ in range(m.num_layers)), random.random() < 0.5)
        for m in case.model.modules
    }
    model = BuiltModelSpec(modules=case.model.modules, parts=parts)
    plan = plan_iteration(model, case.partition, case.microbatches, costs, PlanOptions(evaluations=20, split_backward=split_backward))
    trained_before: dict[tuple[str, int], bool] = {}
    for microbatch, lengths in enumerate(case.microbatches):
        for name in model.topological():
            if lengths.get(name):
                trained_before[name, microbatch] = any(
                    trained_before[source, microbatch] or parts[source].any for source in model.inputs_of(name) if lengths.get(source)
                )
    backwards = {(s.module, s.vp_stage, s.rank, s.microbatch, s.sub_microbatch) for s in plan.stages if s.kind == "bw"}
    for stage in plan.stages:
        if stage.kind == "fw":
            first, count = stage.layers
            own = parts[stage.module]
            rows = case.partition.chunks[stage.module]
            at_last = (stage.vp_stage, stage.rank) == (len(rows) - 1, case.partition.num_ranks - 1)
            needed = trained_before[stage.module, stage.microbatch] or own.first or any(own.layers[: first + count]) or (at_last and own.last)
            assert needed == ((stage.module, stage.vp_stage, stage.rank, stage.microbatch, stage.sub_microbatch) in backwards)
    # Gradients go only to stages that have a backward, and every plan that fits the leanest way fits its limit.
    for tag, source in plan.outputs.items():
        if plan.stages[source].kind == "bw":
            (taker,) = (plan.stages[stage] for stage, tags in plan.inputs.items() if tag in tags)
            assert taker.kind == "bw"
    limit = max(1, max(plan.peak_memory) * 3 // 4)
    tight = case.costs(limit)
    with contextlib.suppress(InputError):
        lean = plan_iteration(model, case.partition, case.microbatches, tight, PlanOptions(evaluations=20, split_backward=split_backward))
        assert max(lean.peak_memory) <= limit


def test_forward_only_has_only_forwards():
    graph = make(VLM, 2, [{"vit": [2], "lm": [5]}], forward_only=True).fastest
    assert set(graph.kind.tolist()) == {FORWARD}
    assert (graph.mem_start_bytes + graph.mem_end_bytes == 0).all()


def test_held_outputs_count_on_rank_0_until_the_taker_is_done():
    plain, holding = (make(VLM, 2, [{"vit": [2, 2], "lm": [5]}], Costs(holds=holds)).fastest for holds in (False, True))
    start, end = holding.mem_start_bytes - plain.mem_start_bytes, holding.mem_end_bytes - plain.mem_end_bytes
    assert {t: int(start[t]) for t in np.flatnonzero(start)} == {find(plain, FORWARD, "vit", 0, sub=s): 6 for s in (0, 1)}
    assert {t: int(end[t]) for t in np.flatnonzero(end)} == {find(plain, BACKWARD, "lm", 0): -12}
    frozen = ModelSpec(modules=[module("vit", 3, trainable=False), module("lm", 4, role="backbone")])
    graph = make(frozen, 2, [{"vit": [2], "lm": [5]}], Costs(holds=True)).fastest
    assert graph.mem_end_bytes[find(graph, FORWARD, "lm", 0)] == -6


def test_static_bytes_by_rank():
    partition = even_partition(VLM, 2, {"lm": 2}, {})
    assert static_bytes(VLM, partition, Costs()) == [200 + 1000 + 200 + 1000, 100 + 10_000 + 200 + 10_000]


@pytest.mark.parametrize("split_backward", [False, True])
def test_a_choice_changes_times_and_memory_as_its_candidate_says(split_backward):
    problem = make(VLM, 2, [{"vit": [2], "lm": [5]}], split_backward=split_backward)
    lean = problem.graph(problem.leanest())
    vit = find(lean, FORWARD, "vit", 0)
    assert lean.mem_start_bytes[vit] == round(2 * 9 * 2 * 0.2)
    assert lean.duration_ns[vit] == problem.fastest.duration_ns[vit]
    assert lean.duration_ns[find(lean, BACKWARD, "vit", 0)] == problem.fastest.duration_ns[find(lean, BACKWARD, "vit", 0)] + 2 * 10 * 2
    assert problem.strategies(vit, int(problem.leanest()[vit])) == ["full", "full"]
    per_rank = (lean.mem_start_bytes + lean.mem_end_bytes).reshape(-1, 2).sum(axis=0)
    assert per_rank.tolist() == [0, 0]
    full = build_task_graph(VLM, even_partition(VLM, 2, {}, {}), problem.sub_microbatches, Costs(), split_backward=split_backward, strategy="full")
    assert full.duration_ns.tolist() == lean.duration_ns.tolist()
    assert full.mem_start_bytes.tolist() == lean.mem_start_bytes.tolist()


@settings(max_examples=60)
@given(cases(), st.booleans())
def test_memory_returns_to_zero_and_every_stage_is_there(case, split_backward):
    costs = case.costs()
    subs = split(case.microbatches, case.model, case.partition, costs)
    problem = build_problem(case.model, case.partition, subs, costs, split_backward=split_backward)
    for graph in (problem.fastest, problem.graph(problem.leanest())):
        left = np.zeros(graph.num_ranks, dtype=np.int64)
        np.add.at(left, graph.rank, graph.mem_start_bytes + graph.mem_end_bytes)
        assert not left.any()
    backward = case.model.backward_modules()
    expected = sum(
        case.partition.num_chunks(sub.module) * case.partition.num_ranks
        * (1 + backward[sub.module] + (split_backward and backward[sub.module] and case.model.module(sub.module).trainable))
        for sub in subs
    )
    assert problem.fastest.num_tasks == expected


def test_options_drop_what_is_no_better():
    layer = PartCost(forward_ns=10, backward_input_ns=10, activation_bytes=100)
    strategies = {
        "none": Strategy(), "useless": Strategy(extra_forward=0.5), "full": Strategy(extra_forward=1.0, activation=0.1),
        "worse": Strategy(extra_forward=1.2, activation=0.1), "offload": Strategy(offload=Offload(bytes_per_second=8e9, activation=0.2)),
    }
    options = layer_options(layer, strategies, has_backward=True)
    assert [option.label for option in options] == ["none", "offload", "full"]
    # 80 bytes at 8 bytes a ns beside 10 ns of compute: hidden in both directions.
    assert (options[1].forward_ns, options[1].backward_input_ns, options[1].activation_bytes) == (10, 10, 20.0)
    assert [option.label for option in layer_options(layer, strategies, has_backward=False)] == ["none"]


@settings(max_examples=60)
@given(st.integers(0, 7), st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20)), min_size=1, max_size=3, unique_by=lambda item: item[1]))
def test_candidates_lie_on_the_exact_front(num_layers, raw):
    raw = sorted(raw)
    options = [LayerOption(str(index), float(time), 0.0, float(size)) for index, (time, size) in enumerate(raw)]
    everything = {(0, 0)}
    for _ in range(num_layers):
        everything = {(t + option.forward_ns, s + option.activation_bytes) for t, s in everything for option in options}
    front = {(t, s) for t, s in everything if not any(o != (t, s) and o[0] <= t and o[1] <= s for o in everything)}
    found = pair_candidates(options, num_layers)
    times, sizes = found.forward_ns.tolist(), found.activation_bytes.tolist()
    assert set(zip(times, sizes, strict=True)) <= front
    assert times[0] == min(t for t, _ in front)
    assert sizes[-1] == min(s for _, s in front)
    assert len(times) == min(len(front), 10) or (len(front) > 10 and 2 <= len(times) <= 12)
    assert times == sorted(times)
    assert all(len(found.strategy_list(index)) == num_layers for index in range(len(times)))


def test_a_gradient_is_as_large_as_the_message_that_it_answers() -> None:
    """A projector's output is smaller than a layer's: the last stage's gradient goes back with the layer's bytes all the same."""
    setup, workload = named_setup("vlm-s"), make_workload("vlm-s", num_microbatches=2)
    costs = AnalyticCost(setup.model, default_parallel(setup), workload.training, setup.device, microbatches=workload.microbatches)
    cut = even_partition(setup.model, 4, {}, {"vit": 4, "lm": 1})
    problem = build_problem(setup.model, cut, split(workload.microbatches, setup.model, cut, costs), costs)
    graph = problem.fastest
    backward_of = dict(zip(problem.pair_forward.tolist(), problem.pair_backward.tolist(), strict=True))
    lags = {
        (task, int(graph.dep_task[edge])): int(graph.dep_lag_ns[edge])
        for task in range(graph.num_tasks) for edge in range(graph.dep_offset[task], graph.dep_offset[task + 1]) if graph.dep_is_data[edge]
    }
    answered = 0
    for (taker, giver), lag in lags.items():
        back = (backward_of.get(giver, -1), backward_of.get(taker, -1))
        if taker < problem.num_pairs and min(back) >= 0:
            assert lags[back] == lag
            answered += 1
    assert answered > 10
    assert len(set(lags.values())) >= 3
