"""Operator graphs against the formulas of the papers: FLOPs, activations, parameters."""

from __future__ import annotations

import pytest

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.memory import bytes_per_parameter, layer_parameters, module_parameters
from megatron_dip.cost.modules import Connector, Kernels
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.named import NAMED_SETUPS, named_model
from megatron_dip.spec.workload import Parallel, Training

OLD = Kernels(attention="unfused", dropout=True)
H, A, S, B = 2048, 16, 1024, 2


def gpt(**changes: object) -> ModuleSpec:
    fields = {
        "name": "lm", "kind": "lm", "role": "backbone", "num_layers": 4, "hidden_size": H, "ffn_hidden_size": 4 * H,
        "num_attention_heads": A, "vocab_size": 51200, "gated_mlp": False, **changes,
    }
    return ModuleSpec(**fields)  # type: ignore[arg-type]


def costs(module: ModuleSpec, tensor: int = 1, sequence: bool = False, context: int = 1, kernels: Kernels | None = None, **training: object) -> AnalyticCost:
    parallel = Parallel(tensor=tensor, context=context, sequence=sequence)
    return AnalyticCost(ModelSpec(modules=[module]), parallel, Training(**training), "a100", kernels=kernels)  # type: ignore[arg-type]


@pytest.mark.parametrize("tensor", [1, 4])
def test_a_gpt_layers_flops(tensor: int) -> None:
    detail = costs(gpt(), tensor, kernels=OLD).detail("lm", "layer", [S] * B)
    products = 24 * B * S * H**2
    attention = 4 * B * S**2 * H
    assert detail.forward_flops * tensor == pytest.approx(products + attention)
    fused = costs(gpt(), tensor).detail("lm", "layer", [S] * B)
    # Fused causal attention skips half of the pairs.
    assert fused.forward_flops * tensor == pytest.approx(products + attention / 2)
    assert fused.backward_flops == pytest.approx(2 * fused.forward_flops)


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (8, False), (8, True)])
@pytest.mark.parametrize("selective", [False, True])
def test_activations_are_korthikantis_formula(tensor: int, sequence: bool, selective: bool) -> None:
    cost = costs(gpt(), tensor, sequence, kernels=OLD, dtype="fp16")
    held = cost.part("lm", "layer", [S] * B).activation_bytes
    if selective:
        held *= cost.strategies("lm", [S] * B)["selective"].activation
    scores = 0 if selective else 5 * A * S / H
    whole = 10 / tensor if sequence else 10
    assert held == pytest.approx(S * B * H * (whole + 24 / tensor + scores / tensor))
    full = cost.strategies("lm", [S] * B)["full"].activation
    assert full * cost.part("lm", "layer", [S] * B).activation_bytes == pytest.approx(2 * S * B * H / (tensor if sequence else 1))


def test_fused_attention_offers_no_selective_recompute() -> None:
    assert "selective" not in costs(gpt()).strategies("lm", [S])
    assert "selective" in costs(gpt(), kernels=OLD).strategies("lm", [S])


def test_grouped_queries_and_gated_mlp_count() -> None:
    module = gpt(num_query_groups=4, gated_mlp=True)
    flops = costs(module).detail("lm", "layer", [S]).forward_flops
    assert flops == pytest.approx(2 * S * (2 * H * H + 2 * H * H // 4 + 3 * H * 4 * H) + 2 * S**2 * H)
    assert layer_parameters(module) == 2 * H * H + 2 * H * H // 4 + 3 * H * 4 * H


def test_packed_instances_attend_within_themselves() -> None:
    cost = costs(gpt())
    packed, whole = cost.detail("lm", "layer", [S] * 4), cost.detail("lm", "layer", [4 * S])
    assert whole.forward_flops - packed.forward_flops == pytest.approx(2 * H * ((4 * S) ** 2 - 4 * S**2))
    assert packed.cost.activation_bytes == pytest.approx(whole.cost.activation_bytes)
    assert packed.cost.forward_ns < whole.cost.forward_ns


def test_context_parallel_shares_the_work() -> None:
    alone, shared = costs(gpt()).detail("lm", "layer", [8 * S]), costs(gpt(), context=2).detail("lm", "layer", [8 * S])
    assert shared.forward_flops == pytest.approx(alone.forward_flops / 2)
    assert shared.cost.activation_bytes == pytest.approx(alone.cost.activation_bytes / 2)
    assert shared.cost.forward_ns > alone.cost.forward_ns / 2


def test_head_and_embedding_stand_where_the_vocabulary_is() -> None:
    cost = costs(gpt())
    assert cost.detail("lm", "last", [S]).forward_flops == pytest.approx(2 * S * H * 51200)
    assert cost.detail("lm", "first", [S]).forward_flops == 0
    assert cost.part("lm", "first", [S]).forward_ns > 0
    bare = costs(gpt(vocab_size=None))
    assert bare.part("lm", "first", [S]).forward_ns == bare.part("lm", "last", [S]).forward_ns == 0


def test_a_feeding_language_model_has_a_projector_and_no_head() -> None:
    setup = NAMED_SETUPS["t2v-s"]
    cost = AnalyticCost(setup.model, Parallel(tensor=4, pipeline=4), Training(), "h800")
    width = setup.model.module("dit").hidden_size
    assert cost.detail("lm", "last", [128]).forward_flops * 4 == pytest.approx(2 * 128 * 4096 * width)
    assert cost.part("lm", "last", [128]).boundary_bytes == pytest.approx(128 * width * 2 / 4)
    assert cost.part("dit", "last", [1024]).boundary_bytes == 0


def test_an_images_message_to_the_language_model_is_merged() -> None:
    cost = AnalyticCost(named_model("vlm-s"), Parallel(tensor=4, pipeline=4), Training(), "h800")
    assert cost.part("vit", "last", [2704] * 3).boundary_bytes == pytest.approx(3 * 169 * 4096 * 2 / 4)


def test_a_known_connector_merges_and_widens_as_it_is() -> None:
    model, parallel = named_model("vlm-s"), Parallel(tensor=4, pipeline=4)
    guessed = AnalyticCost(model, parallel, Training(), "h800").part("vit", "last", [2704])
    known = AnalyticCost(model, parallel, Training(), "h800", connectors={"vit": Connector(merge=16, hidden=4096)}).part("vit", "last", [2704])
    assert known == guessed
    plain = AnalyticCost(model, parallel, Training(), "h800", connectors={"vit": Connector(merge=1, hidden=8192)}).part("vit", "last", [2704])
    assert plain.boundary_bytes == 16 * guessed.boundary_bytes
    # Between its layers: 8192 numbers for each token, before and behind the activation function, over four ranks.
    one = AnalyticCost(model, parallel, Training(), "h800", connectors={"vit": Connector(merge=1, hidden=None)}).part("vit", "last", [2704])
    assert plain.activation_bytes - one.activation_bytes == pytest.approx(2 * 2704 * 8192 * 2 / 4)


def test_turned_queries_and_keys_stay_beside_the_product_that_values_are_a_view_of() -> None:
    model, parallel, training = named_model("vlm-s"), Parallel(tensor=4, pipeline=4), Training()
    plain = AnalyticCost(model, parallel, training, "h800")
    turned = AnalyticCost(model, parallel, training, "h800", kernels=Kernels(rotary=frozenset({"lm"})))
    spec = model.module("lm")
    head = spec.hidden_size // spec.num_attention_heads
    numbers = 8192 * ((spec.num_attention_heads + spec.query_groups) * head / 4 + 4 * head)
    extra = turned.part("lm", "layer", [8192]).activation_bytes - plain.part("lm", "layer", [8192]).activation_bytes
    assert extra == pytest.approx(2 * numbers)
    assert turned.part("vit", "layer", [2704]) == plain.part("vit", "layer", [2704])


def test_masks_are_a_byte_for_each_pair_of_positions() -> None:
    model, parallel = named_model("vlm-s"), Parallel(tensor=4, pipeline=4)
    kept = [
        AnalyticCost(model, parallel, Training(), "h800", kernels=Kernels(attention="unfused", masks=masks)).part("vit", "layer", [2704] * 3)
        for masks in (False, True)
    ]
    assert kept[1].activation_bytes - kept[0].activation_bytes == pytest.approx(3 * 2704**2)


def test_cross_attention_sees_the_microbatches_context() -> None:
    model = named_model("t2v-s")
    parallel = Parallel(tensor=4, pipeline=4)
    short = AnalyticCost(model, parallel, Training(), "h800", microbatches=[{"lm": [64], "dit": [1024]}])
    long = AnalyticCost(model, parallel, Training(), "h800", microbatches=[{"lm": [512], "dit": [1024]}])
    extra = long.detail("dit", "layer", [1024]).forward_flops - short.detail("dit", "layer", [1024]).forward_flops
    hidden = model.module("dit").hidden_size
    assert extra * 4 == pytest.approx((512 - 64) * (2 * 2 * hidden**2 + 4 * 1024 * hidden))


def test_a_dit_layer_is_costed_with_and_without_fused_attention() -> None:
    model, parallel = named_model("t2v-s"), Parallel(tensor=4, pipeline=4)
    fused = AnalyticCost(model, parallel, Training(), "h800").detail("dit", "layer", [2048])
    unfused = AnalyticCost(model, parallel, Training(), "h800", kernels=Kernels(attention="unfused")).detail("dit", "layer", [2048])
    # Full attention: the same FLOPs, but the scores are kept.
    assert unfused.forward_flops == pytest.approx(fused.forward_flops)
    heads = model.module("dit").num_attention_heads / 4
    assert unfused.cost.activation_bytes - fused.cost.activation_bytes == pytest.approx(2 * heads * 2048 * (2048 + 128), rel=0.02)


def test_a_dit_is_modulated_by_its_timestep() -> None:
    model, parallel, clips = named_model("t2v-s"), Parallel(tensor=4, pipeline=4), [1024, 2048]
    found = AnalyticCost(model, parallel, Training(), "h800")
    hidden, tokens = model.module("dit").hidden_size, sum(clips)
    layer, first = found.graphs("dit", "layer", clips), found.graphs("dit", "first", clips)
    assert layer is not None
    assert first is not None
    names = [operator.name for operator in layer.forward.operators]
    for before, after in (("attention_norm", "attention_modulate"), ("proj", "attention_gate"), ("mlp_norm", "mlp_modulate"), ("fc2", "mlp_gate")):
        assert names.index(f"dit.{before}") < names.index(f"dit.{after}")
    saved = {name: tensor.bytes for name, tensor in layer.forward.tensors.items() if tensor.saved}
    # Scale, shift and gate need what they multiply in the backward: a shard of the stream in bf16 each.
    assert saved["attention_norm"] == saved["attention_modulate"] == saved["mlp_norm"] == saved["mlp_modulate"] == tokens * hidden * 2 / 4
    assert not any("modulate" in operator.name for operator in found.graphs("lm", "layer", [128]).forward.operators)  # type: ignore[union-attr]
    # One timestep a clip: an embedding of two products and one to six vectors.
    flops = sum(operator.flops for operator in first.forward.operators if operator.name.startswith("dit.time"))
    assert flops == 2 * len(clips) * hidden * (256 + 7 * hidden) / 4


@pytest.mark.parametrize(("setup", "module", "billions"), [
    ("vlm-s", "lm", 8.0), ("vlm-m", "lm", 32.5), ("vlm-l", "lm", 72.7), ("vlm-l", "vit", 22.6), ("vlm-xl-8k", "lm", 175), ("t2v-s", "dit", 4.9),
    ("t2v-l", "dit", 29.0),
])
def test_named_models_have_their_sizes(setup: str, module: str, billions: float) -> None:
    model = named_model(setup)
    spec = model.module(module)
    consumers = model.consumers_of(module)
    found = module_parameters(spec, model.module(consumers[0]) if consumers else None)
    assert found / 1e9 == pytest.approx(billions, rel=0.03)


def test_bytes_of_a_parameter() -> None:
    assert bytes_per_parameter(Training(distributed_optimizer=False), trainable=True, replicas=8) == 18
    assert bytes_per_parameter(Training(), trainable=True, replicas=8) == 6 + 12 / 8
    assert bytes_per_parameter(Training(dtype="fp32"), trainable=True, replicas=1) == 16
    assert bytes_per_parameter(Training(), trainable=False, replicas=8) == 2


def test_what_tensor_parallel_ranks_hold_of_a_first_chunk() -> None:
    model = named_model("t2v-l")
    one, eight = (AnalyticCost(model, Parallel(tensor=size), Training(), "h800") for size in (1, 8))
    hidden, first = model.module("dit").hidden_size, {"first": True, "last": False}
    whole = [costs.chunk_parameters("dit", 0, **first) for costs in (one, eight)]
    # The stem stands whole on every rank, the timestep's products are split.
    assert whole == [hidden * (64 + 256 + 7 * hidden), hidden * (64 + (256 + 7 * hidden) / 8)]
    assert one.chunk_parameters("lm", 0, **first) == 8 * eight.chunk_parameters("lm", 0, **first)
