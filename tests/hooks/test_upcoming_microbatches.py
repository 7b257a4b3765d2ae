"""How many microbatches the next iterations will have, by Megatron's own calculators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from megatron.core.num_microbatches_calculator import ConstantNumMicroBatchesCalculator, RampupBatchsizeNumMicroBatchesCalculator

from megatron_dip.hooks.data import upcoming_microbatches


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("iterations", [0, 1, 3, 9])
def test_ramp_up_is_foreseen_as_training_will_see_it(data: int, iterations: int) -> None:
    calculator = RampupBatchsizeNumMicroBatchesCalculator(8, 1, data, False, 1, 2, 2, 12)
    args = SimpleNamespace(consumed_train_samples=0, micro_batch_size=1, data_parallel_size=data, train_iters=9, curr_iteration=0)
    actual, foreseen = [], []
    for iteration in range(args.train_iters):  # as Megatron's train()
        calculator.update(args.consumed_train_samples, consistency_check=True)
        args.curr_iteration = iteration
        actual.append(calculator.get())
        foreseen.append(upcoming_microbatches(args, calculator, iterations))
        assert calculator.get() == actual[-1]
        args.consumed_train_samples += data * calculator.get()
    assert actual[:6] == [size // data for size in (2, 2, 4, 6, 8, 8)]
    for iteration, numbers in enumerate(foreseen):
        assert numbers == actual[iteration + 1 : iteration + 1 + iterations]


def test_a_constant_number_stays() -> None:
    args = SimpleNamespace(consumed_train_samples=80, micro_batch_size=2, data_parallel_size=2, train_iters=13, curr_iteration=10)
    assert upcoming_microbatches(args, ConstantNumMicroBatchesCalculator(16, 2, 2, False, 0), 3) == [4, 4]
