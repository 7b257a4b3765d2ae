"""A cost model on top of another one: what a subclass does not change is the other's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_dip.cost.interface import CostModel, Part, PartCost
from megatron_dip.spec.profile import Strategy


class WrappedCost:
    """The costs of ``costs``, for subclasses to change some of."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.p2p_latency_ns = costs.p2p_latency_ns
        self.p2p_bytes_per_second = costs.p2p_bytes_per_second

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        return self.costs.part(module, part, lengths)

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        return self.costs.strategies(module, lengths)

    def static_bytes(self, module: str, num_layers: int, *, first: bool, last: bool) -> int:
        return self.costs.static_bytes(module, num_layers, first=first, last=last)

    def memory_capacity_bytes(self) -> int | None:
        return self.costs.memory_capacity_bytes()

    def counts_all_memory(self) -> bool:
        return self.costs.counts_all_memory()

    def input_bytes(self, module: str, lengths: Sequence[int], *, at_first: bool) -> int:
        return self.costs.input_bytes(module, lengths, at_first=at_first)
