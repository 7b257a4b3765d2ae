"""What is to be trained and on which machine: the ``megatron-dip/workload/1`` format.

A microbatch maps a module's name to the sequence length (tokens) of each of its instances; a module that is absent, or whose list
is empty, has no work in that microbatch. ``microbatches`` is the global batch: number i goes to replica i mod ``parallel.data``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.profile import Profile

WORKLOAD_FORMAT = "megatron-dip/workload/1"

ScheduleName = Literal["dip", "1f1b", "interleaved", "nnscaler", "optimus", "bigmac", "entrain", "three-phase", "fsdp2"]
Microbatch = dict[str, list[int]]
"""Module name -> sequence length of each of its instances."""


class Parallel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Parallel sizes, Megatron's words."""

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    sequence: bool | None = None
    """Sequence parallel; absent = tensor > 1."""

    @property
    def sequence_parallel(self) -> bool:
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def num_gpus(self) -> int:
        return self.tensor * self.pipeline * self.data * self.context


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    distributed_optimizer: bool = True
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    schedule: ScheduleName = "dip"
    virtual_pipeline: int = 1
    """Chunks a rank in the ``interleaved`` schedule."""
    split_backward: bool = False
    """Plan the backward's input and weight parts apart (zero bubble)."""


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A GPU and its links, one way, per GPU."""

    peak_tflops: float
    """Dense, in the training's number format."""
    memory_gib: float
    memory_tbs: float
    """Device memory bandwidth, 10^12 bytes per second."""
    nvlink_gbs: float
    """Within a node, 10^9 bytes per second."""
    network_gbs: float
    """Between nodes, 10^9 bytes per second."""


class Workload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    format: Literal["megatron-dip/workload/1"]
    model: str | ModelSpec
    """A named setup (see :mod:`megatron_dip.spec.named`) or the modules themselves."""
    parallel: Parallel = msgspec.field(default_factory=Parallel)
    training: Training = msgspec.field(default_factory=Training)
    device: str | Device | None = None
    """Named device or its figures; may be absent when a profile is given."""
    profile: str | Profile | None = None
    """Path (relative to the file) or the profile itself; replaces the analytic cost."""
    memory_capacity_bytes: int | None = None
    microbatches: list[Microbatch]
