"""What is to be trained and on which machine: the ``megatron-dip/workload/1`` format.

A microbatch maps a module's name to the sequence length (tokens) of each of its instances; a module that is absent, or whose list
is empty, has no work in that microbatch. ``microbatches`` is the global batch: number i goes to replica i mod ``parallel.data``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.profile import Profile

WORKLOAD_FORMAT: Literal["megatron-dip/workload/1"] = "megatron-dip/workload/1"

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

    @property
    def model_spec(self) -> ModelSpec:
        """The modules of a resolved workload (:func:`megatron_dip.spec.codec.load_workload`)."""
        assert isinstance(self.model, ModelSpec), self.model
        return self.model

    def replica_microbatches(self, replica: int) -> list[Microbatch]:
        """The share of one data-parallel replica: microbatches ``replica``, ``replica + data``, ..."""
        return self.microbatches[replica :: self.parallel.data]

    def validate(self) -> None:
        """Raises InputError for what no machine could train. The workload is resolved: model and profile stand in it."""
        model = self.model_spec
        model.validate()
        names = {module.name for module in model.modules}
        for field in ("tensor", "pipeline", "data", "context"):
            _check_count(f"parallel.{field}", getattr(self.parallel, field), _MAX_PARALLEL)
        _check_count("training.virtual_pipeline", self.training.virtual_pipeline, _MAX_PARALLEL)
        if self.memory_capacity_bytes is not None:
            _check_count("memory_capacity_bytes", self.memory_capacity_bytes, _MAX_BYTES)
        if isinstance(self.device, Device):
            for field in Device.__struct_fields__:
                value = getattr(self.device, field)
                if not _MIN_DEVICE_FIGURE <= value <= _MAX_DEVICE_FIGURE:
                    raise InputError(f"device.{field}", value, "not a positive number of a real device", "check the figure and its unit")
        if isinstance(self.profile, Profile):
            self.profile.validate()
            check_measured(model, self.profile)
        elif self.device is None:
            raise InputError("device", None, "missing, and there is no profile", 'name a device ("h800"), give its figures or give a profile')
        if not self.microbatches:
            raise InputError("microbatches", [], "no microbatches", "give at least one")
        if len(self.microbatches) < self.parallel.data:
            raise InputError(
                "microbatches", len(self.microbatches), f"too few for {self.parallel.data} data-parallel replicas",
                "give every replica at least one (number i goes to replica i mod parallel.data)",
            )
        for index, microbatch in enumerate(self.microbatches):
            for name, lengths in microbatch.items():
                if name not in names:
                    raise InputError(f"microbatches[{index}].{name}", lengths, "the model has no such module", f"use {sorted(names)}")
                for position, length in enumerate(lengths):
                    _check_count(f"microbatches[{index}].{name}[{position}]", length, _MAX_TOKENS)
            if not any(microbatch.values()):
                raise InputError(f"microbatches[{index}]", microbatch, "no module has an instance in it", "fill it or leave it out")
        check_consumers(model, self.microbatches)


def check_measured(model: ModelSpec, profile: Profile, where: str = "profile") -> None:
    """Raises InputError where a profile is not one of this model."""
    for module in model.modules:
        measured = profile.modules.get(module.name)
        if measured is None:
            raise InputError(f"{where}.modules", sorted(profile.modules), f"module {module.name!r} is missing", "add its costs to the profile")
        if measured.num_layers != module.num_layers:
            raise InputError(
                f"{where}.modules.{module.name}.num_layers", measured.num_layers, f"the model's module has {module.num_layers}",
                "give both the same number of layers",
            )


def check_consumers(model: ModelSpec, microbatches: Sequence[Microbatch]) -> None:
    """Raises InputError where an encoder has instances in a microbatch in which no module that it feeds has any.

    Such an encoder would end in no loss. Backbones and decoders may end in one, so theirs need nobody behind them.
    """
    fed = {module.name: model.consumers_of(module.name) for module in model.modules if module.role == "encoder"}
    for index, microbatch in enumerate(microbatches):
        for name, consumers in fed.items():
            if microbatch.get(name) and consumers and not any(microbatch.get(consumer) for consumer in consumers):
                raise InputError(
                    f"microbatches[{index}].{name}", microbatch[name],
                    f"{name} feeds {' and '.join(consumers)}, which {'have' if len(consumers) > 1 else 'has'} no instance in this microbatch",
                    f"give {' or '.join(consumers)} an instance or leave out those of {name}",
                )


_MAX_PARALLEL = 1 << 16
_MAX_BYTES = 10**15
_MAX_TOKENS = 10**7
_MIN_DEVICE_FIGURE, _MAX_DEVICE_FIGURE = 1e-4, 1e9


def _check_count(field: str, value: int, high: int) -> None:
    if not 1 <= value <= high:
        raise InputError(field, value, f"outside 1 to {high}", "give a positive whole number of a real run")
