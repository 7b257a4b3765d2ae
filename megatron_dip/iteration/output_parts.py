"""The model's output of a microbatch whose instances run in parts: what the loss function is given, part by part.

The user's loss function knows whole microbatches. For each part it is called with the output of all instances, in which those of other
parts stand as they are so far (zeros until they ran) and take no gradient. Where the loss is a sum over instances, divided by something
that does not depend on the output, the parts' gradients are then those of the whole, and the call for the last part to run gives the
whole loss and what is reported of it. That the loss is such a sum is looked at once in a run (:meth:`OutputParts.check_sum`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from megatron_dip.runtime.interface import OutputPart
from megatron_dip.spec.errors import InputError

TOLERANCE = 1e-3
"""Of the largest loss compared: how far the parts' shares may be from adding up."""


class OutputParts:
    """The parts of one microbatch, as they come."""

    def __init__(self) -> None:
        self._whole: torch.Tensor | None = None
        self._filled = 0
        self._last: OutputPart | None = None

    def add(self, part: OutputPart) -> torch.Tensor:
        """The output of the whole microbatch, attached to the graph where ``part`` stands."""
        shape = list(part.tensor.shape)
        length = shape[part.dim]
        shape[part.dim] = part.whole
        if self._whole is None:
            self._whole = part.tensor.new_zeros(shape)
        end = part.start + length
        before, after = self._whole.narrow(part.dim, 0, part.start), self._whole.narrow(part.dim, end, part.whole - end)
        whole = torch.cat([before, part.tensor, after], dim=part.dim)
        self._whole.narrow(part.dim, part.start, length).copy_(part.tensor.detach())
        self._filled += length
        self._last = part
        return whole

    @property
    def is_complete(self) -> bool:
        return self._last is not None and self._filled == self._last.whole

    @torch.no_grad()
    def check_sum(self, loss_of: Callable[[torch.Tensor], torch.Tensor], module: str) -> None:
        """Raises InputError unless the loss changes by the last part in the same way whatever the other parts hold.

        Args:
            loss_of: whole output -> loss.
        """
        assert self._last is not None
        assert self._whole is not None
        last = self._last
        length = last.tensor.shape[last.dim]
        alone, without = torch.zeros_like(self._whole), self._whole.clone()
        alone.narrow(last.dim, last.start, length).copy_(last.tensor.detach())
        without.narrow(last.dim, last.start, length).zero_()
        every, others = float(loss_of(self._whole)), float(loss_of(without))
        only, nothing = float(loss_of(alone)), float(loss_of(torch.zeros_like(self._whole)))
        scale = max(abs(every), abs(others), abs(only), abs(nothing))
        if abs((every - others) - (only - nothing)) > TOLERANCE * scale:
            raise InputError(
                "loss function", getattr(loss_of, "__name__", "loss"),
                f"is no sum over the instances of {module}, which are split within a microbatch: a part changes it by {every - others:.6g} "
                f"beside the others and by {only - nothing:.6g} alone",
                f"make sub_microbatch_size.{module} as large as a microbatch's instances, or let the loss be a sum over them",
            )
