"""A loss whose microbatch runs in parts: gradients and value of the whole where it is a sum, a message where it is none."""

from __future__ import annotations

import itertools

import pytest
import torch

from megatron_dip.iteration.output_parts import OutputParts
from megatron_dip.runtime.interface import OutputPart
from megatron_dip.spec.errors import InputError

BOUNDS = (0, 2, 3, 7)


def parts_of(whole: torch.Tensor) -> list[OutputPart]:
    return [OutputPart(whole[:, start:end], 1, start, whole.shape[1]) for start, end in itertools.pairwise(BOUNDS)]


def squares(output: torch.Tensor) -> torch.Tensor:
    return ((output - 0.5).square() * torch.arange(7)).sum() / 7


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_gradients_and_value_are_those_of_the_whole_in_any_order(order: tuple[int, ...]) -> None:
    values = torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    whole = values.clone().requires_grad_()
    squares(whole).backward()
    leaf = values.clone().requires_grad_()
    parts, found = OutputParts(), parts_of(leaf)
    for number in order:
        assert not parts.is_complete
        loss = squares(parts.add(found[number]))
        loss.backward()
    assert parts.is_complete
    torch.testing.assert_close(loss, squares(values))
    torch.testing.assert_close(leaf.grad, whole.grad)
    parts.check_sum(squares, "dit")


def test_a_loss_that_is_no_sum_is_refused() -> None:
    parts = OutputParts()
    for part in parts_of(torch.randn(3, 7, generator=torch.Generator().manual_seed(1))):
        parts.add(part)
    with pytest.raises(InputError, match="no sum over the instances of dit"):
        parts.check_sum(lambda output: output.mean().square(), "dit")
