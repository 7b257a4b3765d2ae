"""A cut that was chosen for a kind of run, with what it was chosen from: the ``megatron-dip/tuned/1`` format of the cut cache.

One file for each key. A file fits a run whose key is equal to its own, letter by letter; nothing that is merely alike is taken.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import Profile
from megatron_dip.spec.workload import Microbatch

TUNED_FORMAT: Literal["megatron-dip/tuned/1"] = "megatron-dip/tuned/1"


class RunKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a cut was chosen for. The number of replicas is no part of it, nor what only moves weights (learning rate, seeds)."""

    model: ModelSpec
    pipeline: int
    tensor: int
    context: int
    sequence: bool
    """Sequence parallelism."""
    numbers: str
    """Number format of the layers, such as ``bf16`` or ``bf16 fp8 hybrid``."""
    device: str
    """Name of the device that trains, as torch gives it, or ``cpu``."""
    memory_limit_bytes: int | None
    data: list[str]
    """Script and flags that say what a microbatch is, such as ``--micro-batch-size 1``."""

    def digest(self) -> str:
        """16 hexadecimal digits, equal for equal keys."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:16]


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Planned time of an iteration, mean over batches of the sample."""

    chosen_ns: float
    """On the chosen cut."""
    today_ns: float
    """On the cut that ran while this was found out."""
    stock_ns: float | None = None
    """Under Megatron's schedule, one chain of all modules' layers cut by parameters; None: not asked for, or cannot run."""


class TunedCut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: Literal["megatron-dip/tuned/1"] = TUNED_FORMAT
    key: RunKey
    source: Literal["tune", "training"]
    """A rehearsal, or a run that learned while it trained. A run does not replace what a rehearsal found, unless it is better by what it measured."""
    partition: Partition
    profile: Profile | None
    """Measured costs that it was chosen by."""
    batches: list[list[Microbatch]]
    """One replica's microbatches of the iterations that it was chosen on."""
    expected: Expected

    def validate(self, where: str = "tuned") -> None:
        """Raises InputError for a cut that does not fit the key's own model."""
        self.key.model.validate(f"{where}.key.model")
        layers = {module.name: module.num_layers for module in self.key.model.modules}
        self.partition.validate(layers, self.key.pipeline, f"{where}.partition")
        if not any(self.batches):
            raise InputError(f"{where}.batches", self.batches, "no microbatch", "tune again")
