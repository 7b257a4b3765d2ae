"""What a cost model answers; every planner and simulator part takes its costs through this one protocol.

Implemented by :class:`megatron_dip.cost.profile.ProfileCost` (measured or given costs, used as they are) and by
:class:`megatron_dip.cost.analytic.AnalyticCost` (operator graphs on a described device). Times are ns as floats here and become
integers when a stage is made; costs are per rank, that is for one tensor- and context-parallel shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from megatron_dip.spec.profile import Strategy

Part = Literal["layer", "first", "last"]
"""One transformer layer; embedding or stem of the first chunk; head, projector and loss of the last chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCost:
    """Cost of one part for all instances of a stage together, nothing recomputed."""

    forward_ns: float = 0.0
    backward_input_ns: float = 0.0
    backward_weight_ns: float = 0.0
    activation_bytes: float = 0.0
    """Held from forward to backward; where no backward follows, at most this for a moment."""
    boundary_bytes: float = 0.0
    """Message to the next chunk when this part is the chunk's last."""


class CostModel(Protocol):
    p2p_latency_ns: float
    p2p_bytes_per_second: float

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        """Cost of a part for instances of ``lengths`` tokens each. Zero cost where the module has no such part."""
        ...

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        """Memory strategies that a layer of the module may use, ``none`` among them, as shares of its own cost."""
        ...

    def static_bytes(self, module: str, num_layers: int, *, first: bool, last: bool) -> int:
        """Bytes that a chunk holds all the time (weights, gradients, optimizer state); 0 under a profile alone."""
        ...

    def memory_capacity_bytes(self) -> int | None:
        """Bytes that a rank may use, None = unlimited."""
        ...

    def counts_all_memory(self) -> bool:
        """Whether memory means all that a run holds: besides activations encoder outputs kept for the backbone, messages under way, captured
        inputs, and the layer that is being recomputed. True for analytic costs and in training; by the format of plans it is false under
        a profile alone."""
        ...

    def input_bytes(self, module: str, lengths: Sequence[int], *, at_first: bool) -> int:
        """Bytes of one microbatch's inputs of a module that a rank holds until its last stage of the microbatch; asked for only where
        all memory counts.

        Args:
            at_first: whether the rank has the module's embedding or stem.
        """
        ...
