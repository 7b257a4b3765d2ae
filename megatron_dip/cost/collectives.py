"""How long collectives and messages take, by where the group's ranks stand.

Ranks are numbered as Megatron numbers them: tensor fastest, then context, data, pipeline. A group of ``size`` ranks ``stride`` apart
has ``gpus_per_node / stride`` members in a node (at least 1). A ring within a node is bound by NVLink; one across nodes by the
smaller of NVLink and the network cards of its members in one node, which it uses side by side.

Ring costs on n ranks and S bytes (the gathered size): all-gather and reduce-scatter (n - 1)/n * S / bandwidth, all-reduce twice that.
Latency: half a small all-reduce per pass within a node; across nodes a network latency for each node of the ring on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_dip.cost.device import DeviceDescription
from megatron_dip.spec.workload import Parallel

_RING_CHUNK_BYTES = 2**20
"""What a rank passes on at a time: a ring is full once each rank has one such piece."""

CollectiveKind = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks ``stride`` apart, ``size`` of them."""

    size: int
    stride: int

    def per_node(self, device: DeviceDescription) -> int:
        """Members in one node."""
        return max(1, min(self.size, device.gpus_per_node // self.stride))

    def within_node(self, device: DeviceDescription) -> bool:
        return self.per_node(device) == self.size


@dataclass(frozen=True, slots=True)
class Groups:
    """The process groups of a run."""

    tensor: Group
    context: Group
    data: Group
    """Data and context ranks together: those that share gradients."""
    pipeline: Group


def groups(parallel: Parallel) -> Groups:
    """Megatron's default order of ranks: tp-cp-dp-pp."""
    return Groups(
        tensor=Group(parallel.tensor, 1),
        context=Group(parallel.context, parallel.tensor),
        data=Group(parallel.data * parallel.context, parallel.tensor),
        pipeline=Group(parallel.pipeline, parallel.tensor * parallel.context * parallel.data),
    )


def collective_seconds(kind: CollectiveKind, size_bytes: float, group: Group, device: DeviceDescription) -> float:
    """Time of one collective over ``size_bytes`` (of the whole, gathered tensor)."""
    if group.size == 1 or size_bytes == 0.0:
        return 0.0
    efficiency = device.efficiency
    passes = 2.0 if kind == "all_reduce" else 1.0
    nvlink = device.nvlink_gbs * 1e9 * (efficiency.all_reduce if kind == "all_reduce" else efficiency.gather)
    latency = efficiency.collective_latency_us * 1e-6 * passes / 2.0
    if group.within_node(device):
        bandwidth = nvlink
        filled = min(1.0, size_bytes / group.size / _RING_CHUNK_BYTES)
        latency += passes * (group.size - 1) * efficiency.ring_hop_us * 1e-6 * filled
    else:
        per_node = group.per_node(device)
        bandwidth = device.network_gbs * 1e9 * efficiency.network * per_node
        if per_node > 1:
            bandwidth = min(bandwidth, device.nvlink_gbs * 1e9 * efficiency.gather)
        latency += passes * device.network_latency_us * 1e-6 * math.ceil(group.size / per_node)
    return latency + passes * (group.size - 1) / group.size * size_bytes / bandwidth


def message_bandwidth(group: Group, device: DeviceDescription) -> float:
    """Bytes per second of the slowest hop between neighbours of a pipeline group."""
    if group.within_node(device):
        return device.nvlink_gbs * 1e9 * device.efficiency.gather
    return device.network_gbs * 1e9 * device.efficiency.network
