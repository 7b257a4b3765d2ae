"""From a script's model provider to this rank's chunks: sketch, description, partition, costs.

In: Megatron's namespace and the script's provider. Out: chunks for Megatron's wrappers, and what their first iteration will need.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.checkouts.checkpoint_files import CUT_ATTRIBUTE, check_loadable
from megatron_dip.hooks.arguments import DipOptions, options_from_args
from megatron_dip.hooks.costs import make_costs
from megatron_dip.hooks.cut import WHOLE, RunCut, find_run_cut, given_partition, note_cut
from megatron_dip.hooks.rehearsal import Rehearsal, rehearsal_partition
from megatron_dip.iteration.cut_review import CutReview
from megatron_dip.iteration.feedback import CostFeedback
from megatron_dip.iteration.forward_backward import DipForwardBackward
from megatron_dip.iteration.index_deals import IndexDeals
from megatron_dip.models.description import LANGUAGE, ModelDescription, unwrap
from megatron_dip.models.layout import chunk_order
from megatron_dip.models.provided import sketch_model
from megatron_dip.models.registry import describe
from megatron_dip.runtime.interface import ChunkKey
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class BuiltModel:
    """A model that was cut here, from its building to its first iteration and on."""

    first_chunk: torch.nn.Module
    """Kept, so that no other model can come to have its identity."""
    description: ModelDescription
    cut: RunCut
    options: DipOptions
    args: Any
    """Megatron's namespace."""
    keys: tuple[ChunkKey, ...]
    forward_backward: DipForwardBackward | None = None
    feedback: CostFeedback | None = None
    """Of measured stages; None: costs stay as they are given."""
    index_deals: IndexDeals | None = None
    """Where this rank reads training data and their indices are dealt to the replicas."""
    rehearsal: Rehearsal | None = None
    """In place of training."""
    review: CutReview | None = None
    """Of the cut, on the rank that does it."""
    iterations: int = 0
    """Trained since the start of this process."""
    last_plan: Plan | None = None
    """Of the training iteration before."""

    @property
    def partition(self) -> Partition:
        return self.cut.partition


_built: dict[int, BuiltModel] = {}
"""By the identity of a rank's first chunk, inside Megatron's wrappers."""


def built_model(chunks: Sequence[torch.nn.Module]) -> BuiltModel | None:
    """The model whose chunks these are, inside Megatron's wrappers; None: it was not built here."""
    return _built.get(id(unwrap(chunks[0], torch.nn.Module)))


def training_model() -> BuiltModel | None:
    """The one model that was built here; None: there is none, or not one alone."""
    return next(iter(_built.values())) if len(_built) == 1 else None


def build_chunks(
    args: Any, model_provider: Callable[..., MegatronModule], model_type: Any = None, config: Any = None, pg_collection: Any = None
) -> list[torch.nn.Module]:
    """This rank's chunks of the model that a script's provider describes, in the order that Megatron's functions need.

    Args:
        args: Megatron's namespace.

    Raises:
        InputError: for models that cannot be cut, and for cuts that do not fit the model.
    """
    options = options_from_args(args)
    arguments = {"config": config, "pg_collection": pg_collection}
    sketch = sketch_model(model_provider, **arguments)
    description = describe(sketch, model_provider, arguments)
    spec = description.model_spec
    ranks = parallel_state.get_pipeline_model_parallel_world_size()
    rank = parallel_state.get_pipeline_model_parallel_rank()
    if options.rehearse is not None:
        given_partition(spec, options.rehearse_ranks or ranks, options)  # flags that ask for what cannot be are said before anything is measured
        cut = RunCut(partition=rehearsal_partition(spec, ranks), origin="for a rehearsal")
    else:
        cut = find_run_cut(args, options, description, ranks)
    partition = cut.partition
    setattr(args, CUT_ATTRIBUTE, str(partition.chunks))
    note_cut(args, partition)
    check_loadable(args, str(partition.chunks))
    outermost = description.outermost
    if ranks == 1 and partition.num_chunks(outermost) > 1 and spec.module(outermost).tied_embeddings:
        raise InputError(
            "--dip-chunks", f"{outermost}={partition.num_chunks(outermost)}", "embedding and head share a weight and would lie in two chunks of one rank",
            f"use {outermost}=1, more pipeline ranks, or --untie-embeddings-and-output-weights",
        )
    if parallel_state.get_expert_model_parallel_world_size() > 1:
        _check_expert_parallel(spec, sketch.config)
    keys = chunk_order(partition, rank, outermost)
    chunks = []
    for module, vp_stage in keys:
        chunk = description.build_chunk(partition, module, vp_stage, rank)
        chunk.model_type = model_type
        if pg_collection is not None and not hasattr(chunk, "pg_collection"):
            chunk.pg_collection = pg_collection  # the training loop asks for it, and a MimoModel has none
        chunks.append(chunk)
    make_costs(spec, args, options)  # what is wrong with the flags is said before training starts
    _built[id(chunks[0])] = BuiltModel(
        chunks[0], description, cut, options, args, keys
    )
    if torch.distributed.get_rank() == 0:
        logger.warning(
            "DIP cuts %s into layers %s, sub-microbatches %s (%s)", ", ".join(m.name for m in spec.modules), partition.chunks,
            {name: "whole" if size >= WHOLE else size for name, size in partition.sub_microbatch_size.items()}, cut.origin,
        )
    return chunks


def _check_expert_parallel(spec: ModelSpec, config: TransformerConfig) -> None:
    """Raises InputError for models whose replicas would not exchange tokens alike."""
    size = parallel_state.get_expert_model_parallel_world_size()
    if not spec.module(LANGUAGE).trainable:
        raise InputError(
            "--expert-model-parallel-size", size, "with a frozen language model only replicas with images run its backward, in which all of "
            "them exchange tokens", "use --expert-model-parallel-size 1",
        )
    dispatcher = config.moe_token_dispatcher_type
    if len(spec.modules) > 1 and dispatcher == "allgather":
        raise InputError(
            "--moe-token-dispatcher-type", dispatcher, "takes equal numbers of tokens on all replicas, and sequences are as long as their images "
            "make them", "use --moe-token-dispatcher-type alltoall",
        )
