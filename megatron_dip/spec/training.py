"""How an example is trained: the ``megatron-dip/example/1`` format, the ``config.json`` of an example's folder.

The folder also holds ``example.py``, which brings the data and Megatron's ``forward_step``; see :mod:`megatron_dip.hooks.training`
for what that module must define. The command line beats the file.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec

EXAMPLE_FORMAT = "megatron-dip/example/1"


class ImageSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How an image becomes patches for the vision module and tokens for the backbone."""

    size: int
    """Height and width in pixels."""
    channels: int
    patch: int
    """Height and width of a patch in pixels."""
    merge: int
    """Patches along one side that become one token of the backbone."""
    token_id: int
    """Id of the token that an image's embeddings replace, ``tokens`` times in a row."""

    @property
    def patches(self) -> int:
        """Sequence length of one image in the vision module."""
        return (self.size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of one image in the backbone."""
        return (self.size // (self.patch * self.merge)) ** 2

    def validate(self, where: str) -> None:
        for field in ("size", "channels", "patch", "merge"):
            if getattr(self, field) < 1:
                raise InputError(f"{where}.{field}", getattr(self, field), "must be at least 1", "give a positive whole number")
        if self.size % (self.patch * self.merge):
            raise InputError(
                f"{where}.size", self.size, f"is no multiple of patch * merge = {self.patch * self.merge}",
                "change the image size, the patch or the merge",
            )


class VisionLanguageModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The model: its modules, and how images enter it."""

    modules: ModelSpec
    image: ImageSpec
    sequence_length: int
    """Tokens of a packed sequence of the backbone."""


class OptimizerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    lr: float
    min_lr: float = 0.0
    """Reached at the last iteration along a cosine."""
    warmup_iterations: int = 0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 = no clipping."""

    def validate(self, where: str) -> None:
        if not 0 < self.lr < 10:
            raise InputError(f"{where}.lr", self.lr, "outside (0, 10)", "give a learning rate such as 8e-4")
        if not 0 <= self.min_lr <= self.lr:
            raise InputError(f"{where}.min_lr", self.min_lr, f"outside [0, lr = {self.lr}]", "give a value up to lr")
        for field in ("warmup_iterations", "weight_decay", "clip_grad"):
            if getattr(self, field) < 0:
                raise InputError(f"{where}.{field}", getattr(self, field), "negative", "give 0 or more")


class ExampleConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: Literal["megatron-dip/example/1"]
    model: VisionLanguageModel
    virtual_pipeline: dict[str, int]
    """Module -> chunks on each rank (K). The layers are spread over them as evenly as their measured or estimated times allow."""
    sub_microbatch_size: dict[str, int]
    """Module -> instances in a full sub-microbatch (B)."""
    optimizer: OptimizerSpec
    num_microbatches: int
    """Of all replicas together, an iteration."""
    iterations: int
    data: dict[str, Any]
    """Handed to the example's ``Dataset``, which knows its fields."""

    def validate(self) -> None:
        """Raises InputError, naming the field, for values that cannot be trained."""
        self.model.modules.validate("model")
        self.model.image.validate("model.image")
        self.optimizer.validate("optimizer")
        names = [module.name for module in self.model.modules.modules]
        for field in ("virtual_pipeline", "sub_microbatch_size"):
            given: dict[str, int] = getattr(self, field)
            if sorted(given) != sorted(names):
                raise InputError(field, sorted(given), f"must name the modules {names}", "give one number for each module")
            for name, value in given.items():
                if value < 1:
                    raise InputError(f"{field}.{name}", value, "must be at least 1", "give a positive whole number")
        for field in ("num_microbatches", "iterations"):
            if getattr(self, field) < 1:
                raise InputError(field, getattr(self, field), "must be at least 1", "give a positive whole number")
        if self.model.sequence_length < 2:
            raise InputError("model.sequence_length", self.model.sequence_length, "must be at least 2", "give the packed length")
