"""Which cut a script's run trains under: the flags', the checkpoint's, a kept one, or the best analytic choice.

In: flags, the model's description, the checkpoint that ``--load`` names. Out: a :class:`RunCut`, the same on all ranks (one chooses and tells the
others). The order of ``--dip-partition auto``:

1. ``--dip-chunks``, ``--dip-sub-microbatch-size``: layers even, as these say.
2. The cut of the checkpoint, where it loads under no other (:func:`megatron_dip.checkouts.checkpoint_files.bound_cut`).
3. The cut that is kept for such a run: by ``megatron-dip tune``, or by a run that learned (:mod:`megatron_dip.iteration.cut_cache`).
4. The cut of the checkpoint, where the run that saved it was under DIP.
5. The joint choice on analytic costs and microbatches as the model's description expects them.
"""

from __future__ import annotations

import ast
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dip.checkouts.checkpoint_files import SIZES_ATTRIBUTE, SavedCut, saved_cut
from megatron_dip.hooks.arguments import DipOptions
from megatron_dip.hooks.costs import device_name, make_costs
from megatron_dip.iteration.cut_cache import cut_file, find_cut
from megatron_dip.models.description import ModelDescription
from megatron_dip.models.layout import check_enough_layers
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.spec.codec import load_partition
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import Profile
from megatron_dip.spec.tuned import RunKey

logger = logging.getLogger(__name__)

WHOLE = 1 << 20
"""Sub-microbatch size of a module that is not divided."""
_DATA_FLAGS = (
    "micro_batch_size", "seq_length", "encoder_seq_length", "decoder_seq_length", "dataloader_seq_length", "data_path", "train_data_path",
    "data_args_path", "per_split_data_args_path", "dataset_config", "mock_data", "sft", "dataloader_type", "img_h", "img_w", "patch_dim",
    "max_num_tiles", "use_tiling", "use_thumbnail", "packing_seq_length",
)
"""Of Megatron's namespace (of some scripts): what a microbatch is."""
_MOST_MICROBATCHES = 64
"""Of an expected batch, for the analytic choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCut:
    partition: Partition
    origin: str
    """Where it is from, in words for the log."""
    profile: Profile | None = None
    """Measured costs that it was chosen by."""


@dataclass(frozen=True, slots=True)
class FixedChoices:
    """What no choice of a cut may vary."""

    chunks: Mapping[str, int]
    """Module -> K."""
    sizes: Mapping[str, int]
    """Module -> B."""


def find_run_cut(args: Any, options: DipOptions, description: ModelDescription, num_ranks: int) -> RunCut:
    """Collective over all ranks where nothing is given by hand. Raises InputError, on all of them, where no cut can be."""
    spec = description.model_spec
    if not options.auto_partition:
        return RunCut(partition=given_partition(spec, num_ranks, options), origin="by the flags")
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    told: list[Any] = [None]
    if world == 1 or torch.distributed.get_rank() == 0:
        try:
            told = [_choose(args, options, description, num_ranks)]
        except InputError as error:
            told = [error]
    if world > 1:
        torch.distributed.broadcast_object_list(told, src=0)
    found = told[0]
    if isinstance(found, InputError):
        raise found
    assert isinstance(found, RunCut)
    return found


def given_partition(spec: ModelSpec, num_ranks: int, options: DipOptions) -> Partition:
    """The cut that the flags ask for. Raises InputError where it does not fit the model."""
    if options.partition is not None:
        partition = load_partition(options.partition)
    else:
        sizes = {module.name: options.sub_microbatch_size.get(module.name, WHOLE) for module in spec.modules}
        unknown = [name for name in options.sub_microbatch_size if name not in sizes]
        if unknown:
            raise InputError("--dip-sub-microbatch-size", unknown, "the model has no such module", f"use some of {list(sizes)}")
        partition = even_partition(spec, num_ranks, options.chunks, sizes)
    return _checked(partition, spec, num_ranks)


def fixed_choices(description: ModelDescription, num_ranks: int) -> FixedChoices:
    spec = description.model_spec
    chunks: dict[str, int] = {}
    if num_ranks == 1:
        # Nobody waits for anybody, and tied embeddings may not lie in two chunks of one rank.
        chunks = {module.name: 1 for module in spec.modules}
    return FixedChoices(chunks=chunks, sizes=dict.fromkeys(description.undivided, WHOLE))


def run_key(args: Any, options: DipOptions, spec: ModelSpec, num_ranks: int) -> RunKey:
    """What decides whether a kept cut fits this run."""
    given = {name: getattr(args, name, None) for name in _DATA_FLAGS}
    numbers = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    fp8 = getattr(args, "fp8", None)
    return RunKey(
        model=spec, pipeline=num_ranks, tensor=args.tensor_model_parallel_size, context=args.context_parallel_size,
        sequence=bool(args.sequence_parallel), numbers=f"{numbers} fp8 {fp8}" if fp8 else numbers, device=options.device or device_name(),
        memory_limit_bytes=options.memory_limit_bytes,
        data=[Path(sys.argv[0]).name, *(f"--{name.replace('_', '-')} {value}" for name, value in given.items() if value is not None)],
    )


def _choose(args: Any, options: DipOptions, description: ModelDescription, num_ranks: int) -> RunCut:
    """On one rank."""
    spec = description.model_spec
    saved = saved_cut(args)
    if saved is not None and saved.is_bound:
        return RunCut(partition=_of_checkpoint(saved, spec, num_ranks), origin="of the checkpoint, which loads under no other")
    key = run_key(args, options, spec, num_ranks)
    kept = find_cut(options.cache, key)
    if kept is not None:
        by = "megatron-dip tune" if kept.source == "tune" else "an earlier run"
        return RunCut(
            partition=_checked(kept.partition, spec, num_ranks), origin=f"kept by {by} in {cut_file(options.cache, key)}", profile=kept.profile
        )
    if saved is not None:
        try:
            return RunCut(partition=_of_checkpoint(saved, spec, num_ranks), origin="of the checkpoint")
        except InputError as error:
            logger.warning("the checkpoint's cut is not taken: %s", error)
    return _analytic_choice(args, options, description, num_ranks)


def _analytic_choice(args: Any, options: DipOptions, description: ModelDescription, num_ranks: int) -> RunCut:
    spec = description.model_spec
    fixed = fixed_choices(description, num_ranks)
    length = getattr(args, "decoder_seq_length", None) or getattr(args, "seq_length", None) or 1024
    per_step = getattr(args, "micro_batch_size", 1) * getattr(args, "data_parallel_size", 1)
    count = max(1, min(_MOST_MICROBATCHES, (getattr(args, "global_batch_size", None) or 8 * per_step) // per_step))
    microbatch = description.typical_microbatch(getattr(args, "micro_batch_size", 1), length)
    costs = make_costs(spec, args, options)
    try:
        choice = joint_partition(spec, num_ranks, [[microbatch] * count], costs, chunks=fixed.chunks, sizes=fixed.sizes)
        partition = _checked(choice.partition, spec, num_ranks)
    except InputError as error:
        logger.warning("no cut fits by analytic costs (%s): modules are cut evenly", error)
        return RunCut(partition=given_partition(spec, num_ranks, options), origin="even")
    expected = ", ".join(f"{len(lengths)} instances of {lengths[0]} tokens of {name}" for name, lengths in microbatch.items())
    basis = "the measured costs of --dip-profile" if options.profile is not None else "analytic costs"
    return RunCut(
        partition=partition, origin=f"chosen by {basis} for {count} microbatches of {expected}, since none is kept for such a run; `megatron-dip "
        "tune` chooses by measured costs and the script's own data",
    )


def _of_checkpoint(saved: SavedCut, spec: ModelSpec, num_ranks: int) -> Partition:
    """Raises InputError where it does not fit this run's model and ranks."""
    try:
        chunks = ast.literal_eval(saved.chunks)
        sizes = {} if saved.sizes is None else ast.literal_eval(saved.sizes)
        partition = Partition(chunks=chunks, sub_microbatch_size={name: int(sizes.get(name, WHOLE)) for name in chunks})
    except (ValueError, SyntaxError, AttributeError, TypeError) as error:
        raise InputError("--load", saved.chunks, f"the checkpoint's note of its cut cannot be read ({error})", "give --dip-partition FILE") from error
    return _checked(partition, spec, num_ranks, where="--load")


def note_cut(args: Any, partition: Partition) -> None:
    """Puts what :func:`_of_checkpoint` reads beside the cut into Megatron's namespace, which every checkpoint holds."""
    setattr(args, SIZES_ATTRIBUTE, str(partition.sub_microbatch_size))


def _checked(partition: Partition, spec: ModelSpec, num_ranks: int, where: str = "--dip-partition") -> Partition:
    partition.validate({module.name: module.num_layers for module in spec.modules}, num_ranks, where=where)
    check_enough_layers(partition)
    return partition
