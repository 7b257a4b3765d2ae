"""Loss functions of captured microbatches: run, recorded, and scaled as Megatron's ``forward_step_calc_loss`` does.

In: what the last stage of a microbatch's pass made, and the microbatch's captured call. Out: the loss to run backward from, and on the rank of the
loss what the loss function reports, by microbatch. Losses are scaled by 1 / num_microbatches, by tokens per microbatch, or left to
``finalize_model_grads`` when ``calculate_per_token_loss``. A microbatch whose instances run in parts is told of once, by the last of
them (:mod:`megatron_dip.iteration.output_parts`). Not done: aux losses of MoE modules in sub-microbatches are not re-weighted.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import rerun_state_machine
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from megatron_dip.iteration.output_parts import OutputParts
from megatron_dip.models.capture import CapturedCall
from megatron_dip.runtime.interface import OutputPart
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import PlanStage


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What a loss function made of a microbatch's output."""

    loss: torch.Tensor | None
    """Scaled; None where it was asked for other data."""
    report: Any
    num_tokens: torch.Tensor | None = None


def _detached(report: Any) -> Any:
    """The report without the graphs of its tensors, which would outlive their microbatch until the end of the iteration."""
    if isinstance(report, torch.Tensor):
        return report.detach()
    if type(report) is dict:
        return {key: _detached(value) for key, value in report.items()}
    if type(report) in (tuple, list):
        return type(report)(_detached(value) for value in report)
    return report


def _not_none(loss: torch.Tensor | None) -> torch.Tensor:
    assert loss is not None
    return loss


class IterationLoss:
    """Runs the captured loss functions, records what they report, and scales the losses as Megatron's forward_step_calc_loss does."""

    def __init__(
        self, calls: Sequence[CapturedCall], config: Any, num_microbatches: int, forward_only: bool, collect_non_loss_data: bool,
        context_parallel_size: int, device: torch.device, is_known_as_sum: bool,
    ) -> None:
        self.is_known_as_sum = is_known_as_sum
        """Whether it was seen already that losses of parts add up to their microbatch's."""
        self._parts: dict[int, OutputParts] = {}
        """Microbatch -> its output, where only a part of it has run."""
        self._calls = dict(enumerate(calls))
        """By microbatch, until :meth:`release`."""
        self._config = config
        self._num_microbatches = num_microbatches
        self._forward_only = forward_only
        self._collect_non_loss_data = collect_non_loss_data
        self._context_parallel_size = context_parallel_size
        self._reports: dict[int, Any] = {}
        self.num_tokens = torch.zeros([], dtype=torch.int, device=device)

    def __call__(self, stage: PlanStage, result: Any) -> torch.Tensor | None:
        is_whole = True
        if isinstance(result, OutputPart):
            parts = self._parts.setdefault(stage.microbatch, OutputParts())
            result = parts.add(result)
            is_whole = parts.is_complete
            if not is_whole and (self._forward_only or self._collect_non_loss_data):
                return None  # the last part to run speaks for all
            if is_whole and not self._forward_only and not self.is_known_as_sum:
                self.is_known_as_sum = True
                parts.check_sum(lambda whole: _not_none(self._evaluate(stage.microbatch, whole).loss), stage.module)
        outcome = self._evaluate(stage.microbatch, result)
        if is_whole:
            self._parts.pop(stage.microbatch, None)
            self._reports[stage.microbatch] = _detached(outcome.report)
            if outcome.num_tokens is not None:
                self.num_tokens += outcome.num_tokens
        if self._forward_only or outcome.loss is None:
            return None
        return outcome.loss if self._config.grad_scale_func is None else self._config.grad_scale_func(outcome.loss)

    def release(self, microbatch: int) -> None:
        """Drops the captured call: its last forward stage on this rank has run."""
        del self._calls[microbatch]

    def _evaluate(self, microbatch: int, result: Any) -> _Outcome:
        """Calls the microbatch's loss function and scales its loss."""
        call = self._calls[microbatch]
        loss_function, output = call.resolved_loss_function(result), call.resolved_output(result)
        if loss_function is None:
            return _Outcome(loss=output, report=output)
        if self._collect_non_loss_data:
            return _Outcome(loss=None, report=loss_function(output, non_loss_data=True))
        with _validations_by_microbatch(microbatch):
            returned = loss_function(output)
        if len(returned) == 3:
            loss, num_tokens, report = returned
            if not self._config.calculate_per_token_loss:
                loss = loss / torch.clamp(num_tokens, min=1) / self._num_microbatches
            return _Outcome(loss=loss, report=report, num_tokens=num_tokens)
        if len(returned) == 2:
            loss, report = returned
            return _Outcome(loss=loss * self._context_parallel_size / self._num_microbatches, report=report)
        raise InputError("loss function", len(returned), "returned this many values", "return (loss, report) or (loss, num_tokens, report)")

    def reports(self) -> list[Any]:
        """In the order of microbatches."""
        return [self._reports[microbatch] for microbatch in sorted(self._reports)]


@contextlib.contextmanager
def _validations_by_microbatch(microbatch: int) -> Iterator[None]:
    """Results that the loss function has validated are counted by microbatch, not in the order of losses.

    Megatron's rerun state machine knows a result again, in the same iteration run a second time, by its number. A run that was started
    again from a checkpoint may have another plan, and so another order.
    """
    machine = rerun_state_machine._GLOBAL_RERUN_STATE_MACHINE
    if machine is None:  # asked for, it would be made, with a warning
        yield
        return
    counts = machine.validation_counts
    machine.validation_counts = defaultdict(lambda: microbatch)
    try:
        yield
    finally:
        machine.validation_counts = counts


def set_auxiliary_loss_scale(config: Any, num_microbatches: int, context_parallel_size: int, device: torch.device) -> None:
    """Megatron sets these before every forward of every stage; they are constant within an iteration."""
    scalers: list[tuple[Any, str, int]] = []
    if getattr(config, "num_moe_experts", None) is not None:
        scalers.append((MoEAuxLossAutoScaler, "moe_grad_scale_func", context_parallel_size))
    if getattr(config, "mtp_num_layers", None) is not None:
        scalers.append((MTPLossAutoScaler, "mtp_grad_scale_func", 1))
    for scaler, own_function, factor in scalers:
        one = torch.ones(1, device=device)
        scale = one if config.grad_scale_func is None else config.grad_scale_func(one)
        if (own := getattr(config, own_function, None)) is not None:  # from 0.19
            scale = torch.as_tensor(own(), device=device)
        scaler.set_loss_scale(scale if config.calculate_per_token_loss else scale * factor / num_microbatches)
