"""Loss functions of captured microbatches: run, recorded, and scaled as Megatron's ``forward_step_calc_loss`` does.

In: what the last stage of a microbatch's pass made, and the microbatch's captured call. Out: the loss to run backward from, and on the rank of the
loss what the loss function reports, by microbatch. Losses are scaled by 1 / num_microbatches, by tokens per microbatch, or left to
``finalize_model_grads`` when ``calculate_per_token_loss``. Not done: aux losses of MoE modules in sub-microbatches are not re-weighted.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import rerun_state_machine
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from megatron_dip.models.capture import CapturedCall
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import PlanStage


class IterationLoss:
    """Runs the captured loss functions, records what they report, and scales the losses as Megatron's forward_step_calc_loss does."""

    def __init__(
        self, calls: Sequence[CapturedCall], config: Any, num_microbatches: int, forward_only: bool, collect_non_loss_data: bool,
        context_parallel_size: int, device: torch.device,
    ) -> None:
        self._calls = calls
        self._config = config
        self._num_microbatches = num_microbatches
        self._forward_only = forward_only
        self._collect_non_loss_data = collect_non_loss_data
        self._context_parallel_size = context_parallel_size
        self._reports: dict[int, Any] = {}
        self.num_tokens = torch.zeros([], dtype=torch.int, device=device)

    def __call__(self, stage: PlanStage, result: Any) -> torch.Tensor | None:
        call = self._calls[stage.microbatch]
        if stage.microbatch in self._reports:
            raise InputError(
                f"sub_microbatch_size.{stage.module}", stage.sub_microbatch, "the module that ends in the loss is split within a microbatch",
                "make its sub-microbatch size as large as a microbatch's instances",
            )
        loss_function, output = call.resolved_loss_function(result), call.resolved_output(result)
        if loss_function is None:
            self._reports[stage.microbatch] = output
            loss = output
        elif self._collect_non_loss_data:
            self._reports[stage.microbatch] = loss_function(output, non_loss_data=True)
            return None
        else:
            with _validations_by_microbatch(stage.microbatch):
                returned = loss_function(output)
            if len(returned) == 3:
                loss, num_tokens, report = returned
                if not self._config.calculate_per_token_loss:
                    loss = loss / torch.clamp(num_tokens, min=1) / self._num_microbatches
                self.num_tokens += num_tokens
            elif len(returned) == 2:
                loss, report = returned
                loss = loss * self._context_parallel_size / self._num_microbatches
            else:
                raise InputError("loss function", len(returned), "returned this many values", "return (loss, report) or (loss, num_tokens, report)")
            self._reports[stage.microbatch] = report
        if self._forward_only:
            return None
        return loss if self._config.grad_scale_func is None else self._config.grad_scale_func(loss)

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
