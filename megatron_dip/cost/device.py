"""Devices: what a GPU (or CPU) and its links can do, and which share of it operators of a given shape reach.

What comes in: a named data file of ``cost/devices/``, a user's own file of the same form (``megatron-dip/device/1``), or the bare
figures of a workload (:class:`megatron_dip.spec.workload.Device`), to which the efficiencies of an H100 are then applied.
What goes out: a frozen :class:`DeviceDescription` whose methods give rates in operations and bytes per second.

Efficiency depends on the shape: a matrix product by its rows and its inner size, attention by length and by heads. Rates are those of
kernel benchmarks times ``training``, since kernels in training run slower than alone (clocks, neighbours). Links are one way, per GPU.
Not modelled: contention between a collective and the kernels beside it, and topology beyond node / network.
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import msgspec

from megatron_dip.spec.codec import decode, read_file
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Device

DEVICE_FORMAT = "megatron-dip/device/1"
FALLBACK_DEVICE = "h100"
"""Whose efficiencies bare figures get."""


class GemmEfficiency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Share of the peak that a matrix product reaches, by its rows m; interpolated over log m, flat outside."""

    rows: list[int]
    efficiency: list[float]
    fill: float = 128.0
    """Inner size that a product loses to its prologue and epilogue: the share k / (k + fill), relative to a k of 4096."""


class AttentionEfficiency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Share of the peak that causal fused attention (forward, half the FLOPs counted) reaches, by length and heads."""

    lengths: list[int]
    heads: list[int]
    """Batch times heads of the measurements."""
    efficiency: list[list[float]]
    """[heads][lengths]"""
    backward: float = 0.8
    """The backward's efficiency over the forward's."""


class DeviceEfficiency(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    gemm: GemmEfficiency
    attention: AttentionEfficiency
    training: float = 0.9
    """Rate of arithmetic in training over that of the same kernel alone."""
    memory: float = 0.8
    """Share of the memory bandwidth that element-wise kernels reach."""
    kernel_overhead_us: float = 2.0
    """Gap between two kernels."""
    all_reduce: float = 0.75
    """Bus bandwidth of a large all-reduce within a node over the NVLink figure."""
    gather: float = 0.75
    """The same for all-gather and reduce-scatter."""
    network: float = 0.85
    """Share of the network figure that a collective or a message reaches."""
    overlap_loss: float = 0.3
    """Of the time that a collective runs beside a kernel, the share that the kernel loses to it."""
    collective_latency_us: float = 20.0
    """Time of a small all-reduce within a node; all-gather and reduce-scatter take half."""
    ring_hop_us: float = 0.0
    """What each further rank adds to a large all-gather or reduce-scatter within a node before the ring is full, beyond its bytes; of an
    all-reduce each pass adds it."""


class DeviceDescription(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A device file. Bandwidths are decimal (10^9 and 10^12 bytes per second), memory is binary (2^30)."""

    format: Literal["megatron-dip/device/1"]
    name: str
    source: str
    """Where the figures come from, and which of them are assumptions."""
    peak_tflops: float
    memory_gib: float
    memory_tbs: float
    nvlink_gbs: float
    network_gbs: float
    host_gbs: float = 25.0
    """Between the device's and the CPU's memory (PCIe), as reached."""
    gpus_per_node: int = 8
    network_latency_us: float = 10.0
    """Of a point-to-point message."""
    memory_margin: float = 0.08
    """Share of the memory that fragmentation, the CUDA context, communication buffers and working sets take."""
    efficiency: DeviceEfficiency

    def validate(self, where: str = "device") -> None:
        """Raises InputError for rates, sizes and shares that cannot be."""
        for field in ("peak_tflops", "memory_gib", "memory_tbs", "nvlink_gbs", "network_gbs", "host_gbs"):
            _check_rate(f"{where}.{field}", getattr(self, field))
        if self.gpus_per_node < 1:
            raise InputError(f"{where}.gpus_per_node", self.gpus_per_node, "must be at least 1", "give the GPUs of one node")
        _check_latency(f"{where}.network_latency_us", self.network_latency_us)
        _check_share(f"{where}.memory_margin", self.memory_margin, low=0.0, high=0.9)
        efficiency, at = self.efficiency, f"{where}.efficiency"
        for field in ("training", "memory", "all_reduce", "gather", "network"):
            _check_share(f"{at}.{field}", getattr(efficiency, field), low=1e-3, high=1.5)
        _check_share(f"{at}.overlap_loss", efficiency.overlap_loss, low=0.0, high=1.0)
        for field in ("kernel_overhead_us", "collective_latency_us", "ring_hop_us"):
            _check_latency(f"{at}.{field}", getattr(efficiency, field))
        gemm, attention = efficiency.gemm, efficiency.attention
        _check_axis(f"{at}.gemm.rows", gemm.rows)
        _check_table(f"{at}.gemm.efficiency", gemm.efficiency, len(gemm.rows))
        _check_positive(f"{at}.gemm.fill", gemm.fill, zero=True)
        _check_axis(f"{at}.attention.lengths", attention.lengths)
        _check_axis(f"{at}.attention.heads", attention.heads)
        _check_share(f"{at}.attention.backward", attention.backward, low=1e-3, high=2.0)
        if len(attention.efficiency) != len(attention.heads):
            raise InputError(f"{at}.attention.efficiency", len(attention.efficiency), "needs one row for each entry of heads",
                             f"give {len(attention.heads)} rows")
        for index, row in enumerate(attention.efficiency):
            _check_table(f"{at}.attention.efficiency[{index}]", row, len(attention.lengths))

    def memory_bytes(self) -> int:
        """What a rank may plan with: the device's memory without the margin."""
        return int(self.memory_gib * 2**30 * (1.0 - self.memory_margin))

    def gemm_rate(self, rows: float, inner: float) -> float:
        """FLOP/s of a matrix product with ``rows`` rows and inner size ``inner``."""
        gemm = self.efficiency.gemm
        share = _interpolate(gemm.rows, gemm.efficiency, max(rows, 1.0))
        fill = inner / (inner + gemm.fill) * (4096.0 + gemm.fill) / 4096.0
        return self.peak_tflops * 1e12 * self.efficiency.training * min(1.0, share * fill)

    def attention_rate(self, length: float, heads: float, *, causal: bool, backward: bool) -> float:
        """FLOP/s of fused attention over sequences of ``length``; ``heads`` = heads of this shard times sequences.

        A full (not causal) attention does, per block of queries, the work of a causal one of twice the length, so the causal table
        serves both. The heads stay: that has twice the blocks, but uneven ones, of which the longest takes twice the mean.
        """
        table = self.efficiency.attention
        if not causal:
            length *= 2.0
        by_heads = [_interpolate(table.lengths, row, length) for row in table.efficiency]
        share = by_heads[0]
        if len(by_heads) > 1:
            # Heads beyond the table fill the device further: continue the last slope, up to the best share ever measured.
            upper = next((i for i in range(1, len(table.heads) - 1) if heads <= table.heads[i]), len(table.heads) - 1)
            low, high = math.log(table.heads[upper - 1]), math.log(table.heads[upper])
            position = (math.log(max(heads, 0.25)) - low) / (high - low)
            share = by_heads[upper - 1] * (by_heads[upper] / by_heads[upper - 1]) ** position
        share = min(share, max(max(row) for row in table.efficiency))
        # Below the shortest length of the table the share falls with the length (fewer keys for each block of queries).
        share *= min(1.0, length / table.lengths[0])
        if backward:
            share *= table.backward
        return self.peak_tflops * 1e12 * self.efficiency.training * max(share, 1e-3)

    def memory_rate(self) -> float:
        """Bytes per second of element-wise kernels."""
        return self.memory_tbs * 1e12 * self.efficiency.memory


def load_device(device: str | Device | DeviceDescription | None, where: str = "device") -> DeviceDescription:
    """The description of a named device, of a file (``*.json``), or of bare figures. Raises InputError."""
    if isinstance(device, DeviceDescription):
        device.validate(where)
        return device
    if isinstance(device, Device):
        base = _named(FALLBACK_DEVICE)
        description = msgspec.structs.replace(
            base, name="custom", source=f"figures of the workload; efficiencies of {FALLBACK_DEVICE}",
            peak_tflops=device.peak_tflops, memory_gib=device.memory_gib, memory_tbs=device.memory_tbs, nvlink_gbs=device.nvlink_gbs,
            network_gbs=device.network_gbs,
        )
        description.validate(where)
        return description
    if device is None:
        raise InputError(where, None, "missing", f"name a device ({', '.join(device_names())}), give its figures, or give a profile")
    if device.endswith(".json"):
        try:
            description = decode(read_file(device), DeviceDescription, Path(device).name, DEVICE_FORMAT)
        except InputError as error:
            raise InputError(f"{where}: {error.field}", error.value, error.problem, error.remedy) from error
        description.validate(where)
        return description
    if device.lower() not in device_names():
        raise InputError(where, device, "unknown device", f"use one of {', '.join(device_names())}, a device file (*.json), or its figures")
    return _named(device.lower())


@cache
def device_names() -> tuple[str, ...]:
    """Names of the built-in devices."""
    folder = resources.files("megatron_dip.cost").joinpath("devices")
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json")))


@cache
def _named(name: str) -> DeviceDescription:
    text = resources.files("megatron_dip.cost").joinpath("devices").joinpath(f"{name}.json").read_bytes()
    description = msgspec.json.decode(text, type=DeviceDescription)
    description.validate(f"devices/{name}.json")
    return description


def _interpolate(axis: list[int], values: list[float], at: float) -> float:
    """Linear over the logarithm of ``axis``, flat outside."""
    if at <= axis[0]:
        return values[0]
    for index in range(1, len(axis)):
        if at <= axis[index]:
            share = math.log(at / axis[index - 1]) / math.log(axis[index] / axis[index - 1])
            return values[index - 1] + share * (values[index] - values[index - 1])
    return values[-1]


def _check_positive(field: str, value: float, *, zero: bool = False) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise InputError(field, value, "must be a positive number" if not zero else "must not be negative", "check the figure and its unit")


_LEAST_RATE, _MOST_RATE = 1e-4, 1e9
"""Times on devices far outside of these do not fit into 64 bits of ns."""


def _check_rate(field: str, value: float) -> None:
    _check_positive(field, value)
    if not _LEAST_RATE <= value <= _MOST_RATE:
        raise InputError(field, value, f"outside [{_LEAST_RATE:g}, {_MOST_RATE:g}]", "check the figure and its unit")


_MAX_LATENCY_US = 1e6


def _check_latency(field: str, value: float) -> None:
    _check_positive(field, value, zero=True)
    if value > _MAX_LATENCY_US:
        raise InputError(field, value, f"over {_MAX_LATENCY_US:g}, a second", "give microseconds")


def _check_share(field: str, value: float, *, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(field, value, f"outside [{low:g}, {high:g}]", "give a share (1 = all of it)")


def _check_axis(field: str, axis: list[int]) -> None:
    if not axis or axis[0] < 1 or any(b <= a for a, b in itertools.pairwise(axis)):
        raise InputError(field, axis, "must be a growing list of positive numbers", "sort it and remove repetitions")


def _check_table(field: str, values: list[float], size: int) -> None:
    if len(values) != size:
        raise InputError(field, values, f"has {len(values)} entries for an axis of {size}", "give one share for each entry of the axis")
    for value in values:
        _check_share(field, value, low=1e-4, high=1.5)
