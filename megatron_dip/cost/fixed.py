"""Memory strategies that are fixed or left out, as part of the costs: what a run with a fixed recompute setting costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_dip.cost.interface import CostModel, Part, PartCost
from megatron_dip.cost.wrapped import WrappedCost
from megatron_dip.spec.profile import Strategy


class FixedStrategyCost(WrappedCost):
    """Costs under which every layer uses strategy ``label`` and nothing is left to choose.

    Layers of modules that do not know the strategy, or that hold nothing or have no backward, stay as they are.
    """

    def __init__(self, costs: CostModel, label: str) -> None:
        super().__init__(costs)
        self.label = label

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        cost = self.costs.part(module, part, lengths)
        if part != "layer" or not lengths or cost.activation_bytes == 0.0 or cost.backward_input_ns + cost.backward_weight_ns == 0.0:
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


class WithoutOffload(WrappedCost):
    """Costs under which no layer is offloaded."""

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        return {name: strategy for name, strategy in self.costs.strategies(module, lengths).items() if strategy.offload is None}


class FixedLeast(FixedStrategyCost):
    """Costs under which every layer uses at least strategy ``label``; what keeps less is left to choose."""

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        given = self.costs.strategies(module, lengths)
        least = given.get(self.label)
        if least is None:
            return given
        return {"none": Strategy()} | {
            name: Strategy(
                extra_forward=max(0.0, strategy.extra_forward - least.extra_forward), activation=strategy.activation / least.activation,
                offload=strategy.offload,
            )
            for name, strategy in given.items() if name not in ("none", self.label) and strategy.activation < least.activation
        }
