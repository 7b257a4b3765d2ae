"""AnalyticCost as planners use it: protocol, caching, frozen modules, bad sizes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.collectives import Group, collective_seconds
from megatron_dip.cost.device import load_device
from megatron_dip.cost.fixed import FixedStrategyCost
from megatron_dip.cost.modules import Kernels
from megatron_dip.cost.operators import LatencyRules
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.named import named_model, named_setup
from megatron_dip.spec.workload import Device, Parallel, Training

PARALLEL = Parallel(tensor=4, pipeline=4)


def vlm(**frozen: bool) -> ModelSpec:
    return ModelSpec(modules=[msgspec.structs.replace(m, trainable=not frozen.get(m.name, False)) for m in named_model("vlm-s").modules])


@pytest.fixture(scope="module")
def costs() -> AnalyticCost:
    return AnalyticCost(vlm(), PARALLEL, Training(), "h800")


def test_layers_of_the_paper_come_near_their_published_times() -> None:
    setup = named_setup("vlm-m")
    cost = AnalyticCost(setup.model, Parallel(tensor=8, pipeline=4), Training(), "h800")
    for module, lengths, published in (("vit", [2704] * 8, 6.75e6), ("lm", [8192], 10.5e6)):
        part = cost.part(module, "layer", lengths)
        assert part.forward_ns + part.backward_input_ns + part.backward_weight_ns == pytest.approx(published, rel=0.1)


@given(st.lists(st.integers(1, 20000), min_size=1, max_size=6), st.randoms())
def test_order_does_not_matter_and_nothing_is_negative(lengths: list[int], random: object) -> None:
    cost = AnalyticCost(vlm(), PARALLEL, Training(), "h800")
    shuffled = sorted(lengths, reverse=True)
    for module in ("vit", "lm"):
        for part in ("layer", "first", "last"):
            found = cost.part(module, part, lengths)  # type: ignore[arg-type]
            assert found == cost.part(module, part, shuffled)  # type: ignore[arg-type]
            assert min(found.forward_ns, found.backward_input_ns, found.backward_weight_ns, found.activation_bytes, found.boundary_bytes) >= 0


def test_modules_that_every_rank_runs_whole_cost_what_they_cost_undivided() -> None:
    """Context and sequence parallelism divide the language model alone, as in Megatron-LM's vision-language models."""
    divided = Parallel(tensor=4, pipeline=4, context=2)
    mixed = AnalyticCost(vlm(), divided, Training(), "h800", undivided=["vit"])
    whole = AnalyticCost(vlm(), msgspec.structs.replace(divided, context=1, sequence=False), Training(), "h800")
    all_divided = AnalyticCost(vlm(), divided, Training(), "h800")
    for part in ("layer", "first", "last"):
        vit, lm = mixed.part("vit", part, [2704] * 4), mixed.part("lm", part, [8192])  # type: ignore[arg-type]
        assert vit == whole.part("vit", part, [2704] * 4)  # type: ignore[arg-type]
        assert lm == all_divided.part("lm", part, [8192])  # type: ignore[arg-type]
    assert mixed.strategies("vit", [2704] * 4)["full"].activation == whole.strategies("vit", [2704] * 4)["full"].activation


def test_no_instance_costs_nothing(costs: AnalyticCost) -> None:
    assert costs.part("vit", "layer", []).forward_ns == 0


def test_more_work_never_takes_less_time(costs: AnalyticCost) -> None:
    times = [costs.part("vit", "layer", [2704] * n).forward_ns for n in (1, 2, 4, 8, 16, 48)]
    assert times == sorted(times)
    # A small stage is less efficient.
    assert times[0] > times[-1] / 48


def test_a_frozen_encoder_runs_forward_only() -> None:
    cost = AnalyticCost(vlm(vit=True), PARALLEL, Training(), "h800")
    frozen = cost.part("vit", "layer", [2704])
    assert frozen.forward_ns > 0
    assert frozen.backward_input_ns == frozen.backward_weight_ns == 0
    # What one layer needs for a moment: of a stage without a backward the plan counts one layer at a time.
    trained = AnalyticCost(vlm(), PARALLEL, Training(), "h800").part("vit", "layer", [2704])
    assert frozen.activation_bytes == trained.activation_bytes
    assert cost.part("lm", "layer", [8192]).backward_weight_ns > 0


def test_a_frozen_backbone_passes_gradients_on_without_its_own() -> None:
    cost, trained = AnalyticCost(vlm(lm=True), PARALLEL, Training(), "h800"), AnalyticCost(vlm(), PARALLEL, Training(), "h800")
    frozen, whole = cost.part("lm", "layer", [8192]), trained.part("lm", "layer", [8192])
    assert frozen.backward_weight_ns == 0 < frozen.backward_input_ns
    assert frozen.backward_input_ns < whole.backward_input_ns + whole.backward_weight_ns
    assert cost.static_bytes("lm", 8, first=False, last=False) < trained.static_bytes("lm", 8, first=False, last=False) / 8


def test_backward_parts_add_up_to_the_whole_backward(costs: AnalyticCost) -> None:
    detail = costs.detail("lm", "layer", [8192])
    cost = detail.cost
    assert sum(detail.backward_exposed_ns.values()) == pytest.approx(cost.backward_input_ns + cost.backward_weight_ns)
    assert sum(detail.forward_exposed_ns.values()) == pytest.approx(cost.forward_ns)


def test_overlapped_collectives_make_the_backward_shorter() -> None:
    hidden = AnalyticCost(vlm(), PARALLEL, Training(), "h800")
    shown = AnalyticCost(vlm(), PARALLEL, Training(), "h800", kernels=Kernels(overlap_tensor_parallel=False))
    assert hidden.detail("lm", "layer", [8192]).backward_exposed_ns["tensor_parallel"] < shown.detail("lm", "layer", [8192]).backward_exposed_ns["tensor_parallel"]
    assert hidden.part("lm", "layer", [8192]).forward_ns == shown.part("lm", "layer", [8192]).forward_ns


def test_sequence_parallel_saves_activations() -> None:
    off = AnalyticCost(vlm(), Parallel(tensor=4, pipeline=4, sequence=False), Training(), "h800")
    on = AnalyticCost(vlm(), PARALLEL, Training(), "h800")
    assert on.part("lm", "layer", [8192]).activation_bytes < off.part("lm", "layer", [8192]).activation_bytes
    assert on.part("lm", "layer", [8192]).boundary_bytes == pytest.approx(off.part("lm", "layer", [8192]).boundary_bytes / 4)


def test_a_new_rule_empties_the_cache() -> None:
    rules = LatencyRules()
    cost = AnalyticCost(vlm(), PARALLEL, Training(), "h800", rules=rules)
    before = cost.part("lm", "layer", [8192]).forward_ns
    rules.register("lm.attention", lambda operator, device: 1e9)
    assert cost.part("lm", "layer", [8192]).forward_ns > before + 0.9e9
    assert cost.part("vit", "layer", [2704]).forward_ns < 1e9


def test_static_bytes_add_up_over_chunks(costs: AnalyticCost) -> None:
    whole = costs.static_bytes("lm", 32, first=True, last=True)
    parts = costs.static_bytes("lm", 8, first=True, last=False) + 2 * costs.static_bytes("lm", 8, first=False, last=False)
    parts += costs.static_bytes("lm", 8, first=False, last=True)
    assert parts == pytest.approx(whole, abs=4)
    spread = AnalyticCost(vlm(), Parallel(tensor=4, pipeline=4, data=8), Training(), "h800")
    assert spread.static_bytes("lm", 8, first=False, last=False) == pytest.approx(costs.static_bytes("lm", 8, first=False, last=False) * 7.5 / 18, rel=1e-6)


def test_capacity_is_the_devices_less_its_margin_or_what_is_given(costs: AnalyticCost) -> None:
    assert costs.memory_capacity_bytes() == int(79.6 * 2**30 * 0.92)
    assert AnalyticCost(vlm(), PARALLEL, Training(), "h800", memory_capacity_bytes=7).memory_capacity_bytes() == 7


def test_a_device_may_be_bare_figures() -> None:
    device = Device(peak_tflops=989, memory_gib=79.6, memory_tbs=3.35, nvlink_gbs=450, network_gbs=50)
    ours, named = AnalyticCost(vlm(), PARALLEL, Training(), device), AnalyticCost(vlm(), PARALLEL, Training(), "h100")
    assert ours.part("lm", "layer", [8192]) == named.part("lm", "layer", [8192])


@pytest.mark.parametrize(("parallel", "field"), [
    (Parallel(tensor=3), "parallel.tensor"), (Parallel(tensor=0), "parallel.tensor"), (Parallel(pipeline=-1), "parallel.pipeline"),
    (Parallel(tensor=64), "parallel.tensor"), (Parallel(sequence=True), "parallel.sequence"),
])
def test_impossible_sizes_are_refused(parallel: Parallel, field: str) -> None:
    with pytest.raises(InputError) as caught:
        AnalyticCost(vlm(), parallel, Training(), "h800")
    assert caught.value.field == field


def test_an_unknown_module_is_named(costs: AnalyticCost) -> None:
    with pytest.raises(InputError, match="use one of"):
        costs.part("audio", "layer", [5])


def test_a_fixed_strategy_stands_in_the_costs(costs: AnalyticCost) -> None:
    fixed = FixedStrategyCost(costs, "full")
    plain, full = costs.part("lm", "layer", [8192]), fixed.part("lm", "layer", [8192])
    assert full.backward_input_ns == pytest.approx(plain.backward_input_ns + plain.forward_ns)
    assert full.activation_bytes < plain.activation_bytes / 10
    assert fixed.part("lm", "last", [8192]) == costs.part("lm", "last", [8192])
    assert list(fixed.strategies("lm", [8192])) == ["none"]
    assert FixedStrategyCost(costs, "none").part("lm", "layer", [8192]) == plain


def test_an_audio_module_can_be_costed() -> None:
    audio = ModuleSpec(name="audio", kind="audio", role="encoder", num_layers=4, hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16)
    model = ModelSpec(modules=[audio, named_model("vlm-s").module("lm")])
    cost = AnalyticCost(model, PARALLEL, Training(), "h800")
    assert cost.part("audio", "first", [1500]).forward_ns > 0
    assert cost.part("audio", "last", [1500]).boundary_bytes == pytest.approx(1500 * 4096 * 2 / 4)


def test_collectives_in_pieces_beside_products_hide_all_but_one_piece() -> None:
    """Under sequence parallel; what has no product to hide behind (the embedding's, the logits') stays."""
    given = {"model": vlm(), "parallel": PARALLEL, "training": Training(), "device": "h100"}
    whole, pieces = AnalyticCost(**given), AnalyticCost(**given, kernels=Kernels(split_tensor_parallel=True))  # type: ignore[arg-type]
    before, after = (costs.detail("lm", "layer", [8192]) for costs in (whole, pieces))
    gap = whole.device.efficiency.kernel_overhead_us * 1e3
    collectives = 4
    alone = before.forward_exposed_ns["tensor_parallel"] - collectives * gap
    assert after.forward_exposed_ns["tensor_parallel"] == pytest.approx(alone / PARALLEL.tensor + collectives * gap)
    assert after.cost.forward_ns < before.cost.forward_ns
    assert after.cost.backward_input_ns < before.cost.backward_input_ns
    assert after.cost.activation_bytes == before.cost.activation_bytes
    for part in ("first", "last"):
        assert pieces.part("lm", part, [8192]) == whole.part("lm", part, [8192])  # type: ignore[arg-type]


def test_each_further_rank_of_a_ring_adds_its_hop() -> None:
    device = load_device("b200")
    still = msgspec.structs.replace(device, efficiency=msgspec.structs.replace(device.efficiency, ring_hop_us=0.0))
    for size in (2, 8):
        longer = collective_seconds("all_gather", 1e9, Group(size, 1), device) - collective_seconds("all_gather", 1e9, Group(size, 1), still)
        assert longer == pytest.approx((size - 1) * device.efficiency.ring_hop_us * 1e-6)
    assert collective_seconds("all_gather", 1.0, Group(8, 1), device) == pytest.approx(collective_seconds("all_gather", 1.0, Group(8, 1), still))


def test_a_layer_that_takes_hours_is_an_error() -> None:
    """Times of whole iterations must fit into 64 bits of ns."""
    slow = Device(peak_tflops=1e-4, memory_gib=80, memory_tbs=3.35, nvlink_gbs=450, network_gbs=50)
    cost = AnalyticCost(vlm(), PARALLEL, Training(), slow)
    with pytest.raises(InputError, match=r"vit\.layer") as caught:
        cost.part("vit", "layer", [10**7])
    assert "tokens" in str(caught.value)
