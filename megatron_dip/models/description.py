"""The neutral description of a multimodal model: all that runtime and training need to know of one.

A model becomes trainable under DIP by one class with the methods of :class:`ModelDescription`; nothing outside of it knows what a
module computes. :class:`megatron_dip.models.vlm.VlmDescription` is the one for the ViT + GPT model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.workload import Microbatch

VISION = "vit"
LANGUAGE = "lm"
"""Names of the modules of vision-language models, in partitions, profiles and flags."""

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSlice:
    """Where the output for a part of a microbatch's instances lies in the model's output for all of them."""

    dim: int
    start: int
    whole: int
    """Size of the whole output along ``dim``; the part's other sizes are the whole's."""


class ModelDescription(Protocol):
    @property
    def model_spec(self) -> ModelSpec:
        """The modules and how they feed each other."""
        ...

    @property
    def outermost(self) -> str:
        """The module whose first and last chunk stand at the ends of Megatron's chunk list, where its functions look for embedding and head."""
        ...

    @property
    def num_outputs(self) -> int | None:
        """How many values the whole model returns to forward_step; None = one tensor."""
        ...

    @property
    def undivided(self) -> tuple[str, ...]:
        """Modules whose microbatch cannot be divided into sub-microbatches."""
        ...

    def typical_microbatch(self, sequences: int, length: int) -> Microbatch:
        """What to expect of a microbatch before any data was seen.

        Args:
            sequences: of the run's micro batch size.
            length: tokens of a sequence.
        """
        ...

    def item_metadata(self, item: Any) -> Microbatch:
        """Instance lengths of one item of the data iterator, before forward_step reads it: what :meth:`metadata` will say of its batch.

        Raises InputError for an item of another form, or that cannot go through the model.
        """
        ...

    def metadata(self, batch: Any) -> Microbatch:
        """Instance lengths of a bound batch; empty where this rank was not given the data."""
        ...

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The batch of one microbatch: the arguments with which the user's forward_step calls the model, by name."""
        ...

    def num_instances(self, batch: Any) -> dict[str, int]:
        """Module -> its instances in a bound batch, to compare with the plan's."""
        ...

    def without_stem_inputs(self, batch: Any) -> Any:
        """A bound batch without what only the stems of encoders read (images): ranks other than the first need no more than its shape, which
        tensors on the meta device have."""
        ...

    def conditions(self, batch: Any) -> list[str]:
        """Arguments of a bound batch, by name, that the layers of all chunks depend on: all pipeline ranks must have been given them."""
        ...

    def build_chunk(self, partition: Partition, module: str, vp_stage: int, rank: int) -> torch.nn.Module:
        """The Megatron module of one chunk, with weights that do not depend on the partition."""
        ...

    def boundary(self, producer: PlanStage, consumer: PlanStage, batch: Any, first_instance: int) -> PayloadSpec:
        """The message between two forward stages, of one module or of two.

        Args:
            batch: of the stages' microbatch, from :meth:`bind`.
            first_instance: of the producer within the microbatch.
        """
        ...

    def output_slice(self, stage: PlanStage, batch: Any, first_instance: int) -> OutputSlice | None:
        """Where the output of a stage that ends in the loss lies in its microbatch's; None: the module's instances cannot be split there."""
        ...

    def run_chunk(
        self, chunk: torch.nn.Module, stage: PlanStage, batch: Any, first_instance: int, inputs: Mapping[str, Sequence[torch.Tensor]]
    ) -> torch.Tensor:
        """Runs one chunk on one sub-microbatch.

        Args:
            chunk: what :meth:`build_chunk` gave, perhaps inside Megatron's wrappers.
            batch: of the stage's microbatch, from :meth:`bind`.
            first_instance: of the module within the microbatch; the stage has ``stage.instances``.
            inputs: producing module -> its payloads in the order of their sub-microbatches; a chunk behind the first has one payload
                of its own module.

        Returns:
            The payload for every consumer; for a stage without consumers what the loss function takes.
        """
        ...


def unwrap(chunk: torch.nn.Module, kind: type[ModuleT]) -> ModuleT:
    """The module inside Megatron's wrappers (DDP, Float16Module), which is of class ``kind``.

    The wrappers only pass calls on; Float16Module would also convert inputs by the stage numbers of the stock pipeline.
    """
    while isinstance(inner := getattr(chunk, "module", None), torch.nn.Module):
        chunk = inner
    assert isinstance(chunk, kind), type(chunk)
    return chunk


def bind_arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, without ``self``; those that were not given are absent."""
    bound = inspect.signature(function).bind(None, *args, **kwargs).arguments
    bound.pop("self", None)
    return bound
