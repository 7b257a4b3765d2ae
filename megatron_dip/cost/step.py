"""What a training step costs beside the pipeline: optimizer, gradient and parameter collectives of the data-parallel ranks.

Source of the optimizer's passes: Megatron-LM's mixed-precision Adam (unscale and check in fp16, norm, clip, fused Adam, copy to the
training's number format, zeroing), each a pass over fp32 arrays. Under the distributed optimizer a rank updates its share only.
"""

from __future__ import annotations

from megatron_dip.cost.collectives import CollectiveKind, Group, collective_seconds
from megatron_dip.cost.device import DeviceDescription
from megatron_dip.cost.operators import GraphBuilder, LatencyRules, Operator, OperatorGraph, time_graph
from megatron_dip.spec.workload import Training

_PASSES = (("norm", 4.0), ("clip", 8.0), ("adam", 28.0), ("copy", 6.0))
"""Bytes moved per fp32 parameter of the rank's share."""


def optimizer_graph(parameters: float, training: Training, replicas: int) -> OperatorGraph:
    """The optimizer's passes over ``parameters`` of one rank; ``replicas`` ranks share them under the distributed optimizer."""
    builder = GraphBuilder("optimizer")
    share = parameters / replicas if training.distributed_optimizer else parameters
    passes = [("unscale", 8.0), *_PASSES] if training.dtype == "fp16" else list(_PASSES)
    previous: tuple[str, ...] = ()
    for name, width in passes:
        done = builder.tensor(name, 0.0)
        builder.add(Operator(name=f"optimizer.{name}", kind="adam", cause="optimizer", inputs=previous, outputs=(done,),
                             memory_bytes=width * share))
        previous = (done,)
    builder.add(Operator(name="optimizer.zero", kind="adam", cause="optimizer", inputs=previous, memory_bytes=4.0 * parameters))
    return builder.graph()


def optimizer_seconds(parameters: float, training: Training, replicas: int, device: DeviceDescription, rules: LatencyRules) -> float:
    return time_graph(optimizer_graph(parameters, training, replicas), device, rules).total_ns / 1e9 if parameters else 0.0


def bucket_parameters(replicas: int) -> float:
    """Parameters whose gradients travel together (Megatron-LM's default of ``--ddp-bucket-size``)."""
    return max(40e6, 1e6 * replicas)


def gradient_seconds(parameters: float, training: Training, group: Group, device: DeviceDescription) -> float:
    """Sum of fp32 gradients over the replicas: reduce-scatter under the distributed optimizer, else all-reduce."""
    kind: CollectiveKind = "reduce_scatter" if training.distributed_optimizer else "all_reduce"
    return collective_seconds(kind, 4.0 * parameters, group, device)


def parameter_seconds(parameters: float, training: Training, group: Group, device: DeviceDescription) -> float:
    """All-gather of updated parameters under the distributed optimizer."""
    if not training.distributed_optimizer:
        return 0.0
    return collective_seconds("all_gather", (4.0 if training.dtype == "fp32" else 2.0) * parameters, group, device)
