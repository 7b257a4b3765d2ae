"""One memory strategy for every layer, as part of the costs: what a run with a fixed recompute setting costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_dip.cost.interface import CostModel, Part, PartCost
from megatron_dip.spec.profile import Strategy


class FixedStrategyCost:
    """Costs under which every layer uses strategy ``label`` and nothing is left to choose.

    Layers of modules that do not know the strategy, or that hold nothing, stay as they are.
    """

    def __init__(self, costs: CostModel, label: str) -> None:
        self.costs, self.label = costs, label
        self.p2p_latency_ns = costs.p2p_latency_ns
        self.p2p_bytes_per_second = costs.p2p_bytes_per_second

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        cost = self.costs.part(module, part, lengths)
        if part != "layer" or not lengths or cost.activation_bytes == 0.0:
            return cost
        strategy = self.costs.strategies(module, lengths).get(self.label)
        if strategy is None:
            return cost
        return PartCost(
            forward_ns=cost.forward_ns, backward_input_ns=cost.backward_input_ns + strategy.extra_forward * cost.forward_ns,
            backward_weight_ns=cost.backward_weight_ns, activation_bytes=strategy.activation * cost.activation_bytes,
            boundary_bytes=cost.boundary_bytes,
        )

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        return {"none": Strategy()}

    def static_bytes(self, module: str, num_layers: int, *, first: bool, last: bool) -> int:
        return self.costs.static_bytes(module, num_layers, first=first, last=last)

    def memory_capacity_bytes(self) -> int | None:
        return self.costs.memory_capacity_bytes()

    def holds_encoder_outputs(self) -> bool:
        return self.costs.holds_encoder_outputs()
