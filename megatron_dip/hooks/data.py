"""Data iterators with the next batches in view, and how many microbatches those will have.

In: Megatron's builder of data iterators; its calculator of microbatches. Out: the same iterators over a look-ahead; where the training
data tell lengths ahead, of a loader whose sampler deals indices to the replicas.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import num_microbatches_calculator, parallel_state

from megatron_dip.hooks.arguments import DipOptions, options_from_args
from megatron_dip.hooks.build import BuiltModel, training_model
from megatron_dip.hooks.costs import make_costs
from megatron_dip.iteration.index_deals import DealtSampler, IndexDeals, find_lengths
from megatron_dip.iteration.lookahead import LookaheadIterator
from megatron_dip.partition.work import WorkEstimate
from megatron_dip.spec.errors import InputError


def build_data_iterators(build: Callable[..., tuple[Any, Any, Any]], dataset_provider: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """Megatron's data iterators, with the next batches in view.

    The look-ahead stands below the iterator that the rerun state machine rewinds, so that a replay is served above it.
    """
    from megatron.training import get_args

    args = get_args()
    options = options_from_args(args)
    with _dealing_indices(args, options, training_model()):
        iterators = build(dataset_provider)
    keep_state = bool(getattr(args, "dataloader_save", None))
    if options.look_ahead:
        for of_one_use in iterators:
            for iterator in of_one_use if isinstance(of_one_use, list) else [of_one_use]:
                if iterator is not None:
                    iterator.iterable = LookaheadIterator(iterator.iterable, keep_state=keep_state)
    return iterators


@contextmanager
def _dealing_indices(args: Any, options: DipOptions, built: BuiltModel | None) -> Iterator[None]:
    """Around Megatron's builder: the first loader made, which is that of the training data, reads what its replica was dealt.

    Raises InputError where the flags ask for it and it cannot be.
    """
    from megatron.training import training

    build_loader = training.build_pretraining_data_loader
    wanted = options.balance in ("auto", "indices") and parallel_state.get_data_parallel_world_size() > 1
    if not wanted or built is None or getattr(args, "skip_train", False):
        yield
        return

    def build_dealt_loader(dataset: Any, consumed_samples: int) -> Any:
        training.build_pretraining_data_loader = build_loader  # validation and test data are read as ever
        loader = build_loader(dataset, consumed_samples)
        dealt = _dealt_loader(loader, args, options, built)
        if dealt is None and loader is not None and options.balance == "indices":
            raise InputError(
                "--dip-balance", "indices", f"the training data ({type(dataset).__name__}, --dataloader-type {args.dataloader_type}) do not tell "
                "how long their samples are", "give the data set a method instance_lengths(index), or use --dip-balance exchange",
            )
        return loader if dealt is None else dealt

    training.build_pretraining_data_loader = build_dealt_loader
    try:
        yield
    finally:
        training.build_pretraining_data_loader = build_loader


def _dealt_loader(loader: Any, args: Any, options: DipOptions, built: BuiltModel) -> torch.utils.data.DataLoader[Any] | None:
    """The same loader over a sampler that deals indices; None where lengths are not known ahead."""
    sampler, dataset = getattr(loader, "batch_sampler", None), find_lengths(getattr(loader, "dataset", None))
    if dataset is None or not hasattr(sampler, "data_parallel_rank"):
        return None
    replicas = parallel_state.get_data_parallel_world_size()
    # Not measured ones, which differ from replica to replica.
    costs = make_costs(built.description.model_spec, args, options)
    built.index_deals = IndexDeals(WorkEstimate(built.description.model_spec, built.partition, costs).of, replicas)
    sizes = _training_sizes(args, num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR)
    return torch.utils.data.DataLoader(
        loader.dataset, batch_sampler=DealtSampler(sampler, replicas, dataset.instance_lengths, sizes, built.index_deals),
        num_workers=loader.num_workers, collate_fn=loader.collate_fn, pin_memory=loader.pin_memory, worker_init_fn=loader.worker_init_fn,
        persistent_workers=loader.persistent_workers,
    )


def _training_sizes(args: Any, calculator: Any) -> Iterator[int]:
    """Microbatches of a replica in each training iteration from here on, as batch size ramp-up will have them."""
    foreseen, samples = copy.copy(calculator), args.consumed_train_samples
    while True:
        foreseen.update(samples, consistency_check=False, verbose=False)
        yield foreseen.get()
        samples += foreseen.get() * args.micro_batch_size * args.data_parallel_size


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
