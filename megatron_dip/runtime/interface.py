"""What the executor needs of a model that is cut into chunks, and of the loss.

The executor knows stages, tensors and messages; it does not know modalities. A model adapter (:mod:`megatron_dip.models`) implements
:class:`StagedModel`. Tensors that travel are *payloads*: one for each data edge of the plan (producer stage -> consumer stage); the
gradient that comes back along the same edge has the payload's shape and dtype.

:class:`Compute` is the seam below the executor: :class:`~megatron_dip.runtime.compute.AutogradCompute` runs a StagedModel under
autograd; :class:`~megatron_dip.runtime.compute.SleepCompute` lets every stage sleep for its planned time, so that schedules of many
ranks can be measured with the real executor and real messages on a machine that could not compute for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_dip.runtime.offload import ActivationOffload
from megatron_dip.spec.plan import Plan, PlanStage

ChunkKey = tuple[str, int]
"""(module, vp_stage): one model chunk of this rank."""


@dataclass(frozen=True, slots=True)
class PayloadSpec:
    """Shape and dtype of one message, known from the plan and the batch metadata: nothing is exchanged at run time."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class BoundCall:
    """What a rank holds of a microbatch."""

    batch: Any
    """The model's own form of it."""
    reads_again: bool
    """Whether inputs of this rank's stems are left out, for which the call is to be captured once more."""
    num_instances: dict[str, int]
    """Module -> its instances."""


@dataclass(frozen=True, slots=True)
class OutputPart:
    """The model's output for a part of a microbatch, where the module that ends in the loss is split within it."""

    tensor: torch.Tensor
    dim: int
    """Along which the parts of a microbatch stand behind each other."""
    start: int
    whole: int
    """Size along ``dim`` of all parts together."""


@dataclass(slots=True)
class ForwardOutput:
    payloads: dict[int, torch.Tensor]
    """Consumer stage id -> payload, still attached to the autograd graph."""
    result: Any = None
    """What the loss function takes (an :class:`OutputPart`: with the microbatch's other parts); set on the stages that end in a loss
    (those without consumers)."""


class StagedModel(Protocol):
    """A model of which every rank holds some chunks. One object a rank."""

    @property
    def offload(self) -> ActivationOffload | None:
        """What moves the activations of layers that a plan offloads; None: the model has no such layers."""
        ...

    @property
    def chunk_keys(self) -> Sequence[ChunkKey]:
        """This rank's chunks in the canonical order, which is that of the chunk list handed to Megatron (``model``)."""
        ...

    def bind(self, call: Any) -> BoundCall:
        """What this rank's chunks need of a microbatch, of which the capture of the user's forward_step produced ``call``.

        Called for the next iteration's microbatches in their order. Stem inputs beyond a budget are left out of it; a stage that needs
        them asks for the call once more.
        """
        ...

    def begin_iteration(self, plan: Plan, microbatches: Sequence[BoundCall], recapture: Callable[[int], Any], *, forward_only: bool) -> None:
        """Takes the iteration's plan and what :meth:`bind` gave for each microbatch.

        Args:
            recapture: the call of a microbatch that reads again; to be asked for once.

        Raises InputError where they do not fit together. :meth:`end_iteration` follows in any case.
        """
        ...

    def payload(self, producer: PlanStage, consumer: PlanStage) -> PayloadSpec:
        """Spec of the message between two *forward* stages; same answer on both ranks. Called once for each edge, before any stage."""
        ...

    def forward(self, stage: PlanStage, inputs: Mapping[int, torch.Tensor], consumers: Sequence[PlanStage]) -> ForwardOutput:
        """Runs the stage's chunk.

        Args:
            inputs: producer stage id -> payload, for each data edge into the stage. A leaf; requires a gradient where the plan sends
                one back.
            consumers: the forward stages that take this stage's output; one payload each is expected.
        """
        ...

    def release(self, microbatch: int) -> None:
        """Drops the microbatch's inputs: its last forward stage on this rank has run."""
        ...

    def end_iteration(self) -> None:
        """Drops every reference to the iteration's data."""
        ...


class LossFunction(Protocol):
    def __call__(self, stage: PlanStage, result: Any) -> torch.Tensor | None:
        """Computes, records and scales the loss of a stage's microbatch; returns the scalar to differentiate (None: forward only)."""
        ...


@dataclass(frozen=True, slots=True)
class StageLinks:
    """A forward stage and everything the plan hangs on it."""

    forward: PlanStage
    backward: PlanStage | None
    """None: the plan has no backward for it (evaluation, frozen modules), so no graph need be kept."""
    weight: PlanStage | None
    consumers: tuple[PlanStage, ...]
    """Forward stages that take its output; none = it ends in the loss."""
    grad_inputs: tuple[int, ...]
    """Producers (forward stage ids) to whom its backward sends a gradient."""


class WeightDeferral(Protocol):
    """Splits a stage's backward in an input part (B) and a weight part (W)."""

    def collecting(self, stage: int) -> AbstractContextManager[None]:
        """Around the forward and the B of forward stage ``stage``: weight gradients are put off."""
        ...

    def run(self, stage: int) -> None:
        """Computes the weight gradients that were put off."""
        ...

    def assert_empty(self) -> None:
        """At the end of an iteration: nothing is put off any more."""
        ...


class Compute(Protocol):
    """What a compute action does. Tensors that come in are the executor's to give; those that go out may be sent or handed over as
    they are: detached, contiguous, of the shape that :meth:`payload` says."""

    def payload(self, producer: PlanStage, consumer: PlanStage) -> PayloadSpec:
        """Spec of the message between two *forward* stages (and of the gradient that comes back)."""
        ...

    def forward(self, links: StageLinks, inputs: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Runs a forward stage: producer stage id -> payload in, consumer stage id -> payload out."""
        ...

    def fetch_ahead(self, links: StageLinks, during: StageLinks | None) -> None:
        """Called one compute action before a backward: what it needs and what is not on the device begins to come.

        Args:
            links: of the backward.
            during: of the action before it, where that is another backward's (or its input part's).
        """
        ...

    def backward(self, links: StageLinks, grads: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Runs the backward of a stage, or its input part where the plan splits it.

        Consumer *forward* stage id -> gradient of that payload in (empty on a stage that ends in the loss), producer *forward* stage
        id -> gradient of its payload out (zeros where nothing flowed).
        """
        ...

    def weight(self, links: StageLinks) -> None:
        """Runs the weight part of a split backward."""
        ...

    def assert_empty(self) -> None:
        """Called at the end of an iteration: nothing may be kept for a backward that has not run."""
        ...
