"""What a simulated iteration came to: the object that ``megatron-dip simulate --json`` prints."""

from __future__ import annotations

import msgspec

from megatron_dip.spec.workload import ScheduleName


class Breakdown(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds of the iteration by cause, as means over the ranks; they add up to the iteration's time."""

    compute: float
    """Kernels, those of recomputation included."""
    tensor_parallel: float
    """Waiting for tensor- and context-parallel collectives that nothing hides."""
    data_parallel: float
    """Gradient and parameter collectives that nothing hides."""
    p2p: float
    """Waiting for pipeline messages: what the makespan would lose without them."""
    bubble: float
    """The rest of the idle time."""
    optimizer: float


class SimulationResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    iteration_time_s: float
    mfu: float | None
    """FLOPs that the model asks for (half of causal attention's pairs) over the peak; null where no device is given."""
    hfu: float | None
    """The same with recomputed FLOPs."""
    bubble_fraction: float
    """Idle time over all ranks' time within the pipeline's makespan."""
    peak_memory_bytes: list[int]
    """Of each pipeline rank."""
    breakdown_s: Breakdown
    schedule: ScheduleName
    chunks: dict[str, list[list[int]]]
    sub_microbatch_size: dict[str, int]
