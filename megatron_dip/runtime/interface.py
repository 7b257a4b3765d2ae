"""What the executor needs of a model that is cut into chunks, and of the loss.

The executor knows stages, tensors and messages; it does not know modalities. A model adapter (:mod:`megatron_dip.models`) implements
:class:`StagedModel`. Tensors that travel are *payloads*: one for each data edge of the plan (producer stage -> consumer stage); the
gradient that comes back along the same edge has the payload's shape and dtype. The executor owns autograd: it detaches what arrives,
makes it require a gradient where the plan has a backward for it, keeps outputs until the backward, and sends leaf gradients back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_dip.spec.plan import Plan, PlanStage


@dataclass(frozen=True, slots=True)
class PayloadSpec:
    """Shape and dtype of one message, known from the plan and the batch metadata: nothing is exchanged at run time."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class StagedModel(Protocol):
    """A model of which every rank holds some chunks. One object a rank."""

    def begin_iteration(self, plan: Plan, microbatches: Sequence[Any], *, forward_only: bool) -> None:
        """Takes the iteration's plan and, for each microbatch, what the capture of the user's forward_step produced."""
        ...

    def payload(self, producer: PlanStage, consumer: PlanStage) -> PayloadSpec:
        """Spec of the message between two *forward* stages; same answer on both ranks."""
        ...

    def forward(self, stage: PlanStage, inputs: Mapping[int, torch.Tensor], consumers: Sequence[PlanStage]) -> ForwardOutput:
        """Runs the stage's chunk.

        Args:
            inputs: producer stage id -> payload, for each data edge into the stage.
            consumers: the forward stages that take this stage's output.
        """
        ...

    def end_iteration(self) -> None:
        """Drops every reference to the iteration's data."""
        ...


@dataclass(slots=True)
class ForwardOutput:
    payloads: dict[int, torch.Tensor]
    """Consumer stage id -> payload, still attached to the autograd graph."""
    result: Any = None
    """What the loss function takes; set on the stages that end in a loss (those without consumers)."""


class LossFunction(Protocol):
    def __call__(self, stage: PlanStage, result: Any) -> torch.Tensor | None:
        """Computes, records and scales the loss of a stage's microbatch; returns the scalar to differentiate (None: forward only)."""
        ...
