"""Data iterators with the next batches in view, and how many microbatches those will have.

In: Megatron's builder of data iterators; its calculator of microbatches. Out: the same iterators over a look-ahead.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from megatron_dip.hooks.arguments import options_from_args
from megatron_dip.iteration.lookahead import LookaheadIterator


def build_data_iterators(build: Callable[..., tuple[Any, Any, Any]], dataset_provider: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Megatron's data iterators, with the next batches in view.

    The look-ahead stands below the iterator that the rerun state machine rewinds, so that a replay is served above it.
    """
    from megatron.training import get_args

    args, iterators = get_args(), build(dataset_provider)
    keep_state = bool(getattr(args, "dataloader_save", None))
    if options_from_args(args).look_ahead:
        for of_one_use in iterators:
            for iterator in of_one_use if isinstance(of_one_use, list) else [of_one_use]:
                if iterator is not None:
                    iterator.iterable = LookaheadIterator(iterator.iterable, keep_state=keep_state)
    return iterators


def upcoming_microbatches(args: Any, calculator: Any, iterations: int) -> list[int]:
    """Number of microbatches in each of the iterations that follow the running one, as batch size ramp-up will have them.

    Args:
        args: Megatron's namespace, in which the running iteration is not counted yet.
        calculator: Megatron's calculator of microbatches.

    Returns:
        ``iterations`` numbers, or fewer where training ends before.
    """
    foreseen = copy.copy(calculator)
    samples = args.consumed_train_samples
    numbers = [foreseen.get()]
    for _ in range(min(iterations, args.train_iters - args.curr_iteration - 1)):
        samples += numbers[-1] * args.micro_batch_size * args.data_parallel_size
        foreseen.update(samples, consistency_check=False, verbose=False)
        numbers.append(foreseen.get())
    return numbers[1:]
