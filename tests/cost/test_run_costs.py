"""Costs of a run: a limit on memory means the same whether times are measured or analytic, and layers cost what they are built of."""

from __future__ import annotations

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.fixed import FixedLeast, WithoutOffload
from megatron_dip.cost.interface import CostModel
from megatron_dip.cost.modules import Kernels
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.cost.run import RunCosts
from megatron_dip.partition.offline import even_partition
from megatron_dip.schedule.graph import static_bytes
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.profile import ModuleProfile, Offload, Strategy
from megatron_dip.spec.workload import Parallel, Training
from tests.strategies import grid, profile

LM = ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=4, hidden_size=64, ffn_hidden_size=256, num_attention_heads=4, vocab_size=128)
MODEL = ModelSpec(modules=[LM])


def test_a_limit_means_all_memory_with_measured_and_with_analytic_costs() -> None:
    strategies = {"none": Strategy(), "offload": Strategy(offload=Offload(bytes_per_second=1e9, activation=0.1))}
    measured: CostModel = ProfileCost(profile({"lm": ModuleProfile(num_layers=4, layer=grid(1.0, 1.0, 1.0), strategies=strategies)}), 1000)
    analytic: CostModel = AnalyticCost(MODEL, Parallel(pipeline=2), Training(), "h100", memory_capacity_bytes=1000)
    built = {("lm", 2, True, False): 300, ("lm", 2, False, True): 400}
    partition = even_partition(MODEL, 2, {}, {})
    for costs in (RunCosts(measured, MODEL, built), RunCosts(analytic, MODEL, built)):
        assert static_bytes(MODEL, partition, costs) == [300, 400]
        assert costs.memory_capacity_bytes() == 1000
        assert costs.counts_all_memory()
        assert costs.input_bytes("lm", [10, 5], at_first=False) == 28 * 15
        assert "offload" in costs.strategies("lm", [5])
    assert list(RunCosts(WithoutOffload(analytic), MODEL, built).strategies("lm", [5])) == ["none", "full"]


def test_what_the_user_asks_to_recompute_is_the_least() -> None:
    costs = AnalyticCost(MODEL, Parallel(), Training(), "h100", kernels=Kernels(attention="unfused"))
    given, least = costs.strategies("lm", [4096]), FixedLeast(costs, "selective")
    layer, whole = least.part("lm", "layer", [4096]), costs.part("lm", "layer", [4096])
    assert layer.activation_bytes == given["selective"].activation * whole.activation_bytes
    left = least.strategies("lm", [4096])
    assert "selective" not in left
    assert left["none"] == Strategy()
    # Full recomputation keeps, and takes in the end, what it did.
    assert abs(left["full"].activation * layer.activation_bytes - given["full"].activation * whole.activation_bytes) < 1
    again = layer.backward_input_ns + left["full"].extra_forward * layer.forward_ns
    assert abs(again - whole.backward_input_ns - given["full"].extra_forward * whole.forward_ns) < 1
