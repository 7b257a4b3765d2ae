"""The cut of an example's run with ``--partition auto``: the kept one, or the joint choice on the example's own data.

In: schedule, example, settings. Out: a partition, the same on all ranks (one chooses and tells the others), and the review that says at the run's end whether
another would have been better. The loop is that of Megatron's scripts (:mod:`megatron_dip.iteration.cut_review`); an example's data are known
before its model is built, so that nothing need be assumed of them.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_dip.cost.interface import CostModel
from megatron_dip.iteration.cut_cache import default_cache_folder, find_cut
from megatron_dip.iteration.cut_review import SAMPLED_MICROBATCHES, CutReview
from megatron_dip.iteration.feedback import CostFeedback
from megatron_dip.partition.offline import Batch
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.training import RunSettings
from megatron_dip.spec.tuned import RunKey
from megatron_dip.trainer.systems import Example, whole_model

logger = logging.getLogger(__name__)

STRATEGY = "none"
"""The trainer recomputes nothing."""


def auto_partition(example: Example, settings: RunSettings, costs: CostModel) -> Partition:
    """Collective over all ranks. Raises InputError, on all of them, where no cut can be."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [_choose(example, settings, costs)]
        except InputError as error:
            told = [error]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    if isinstance(told[0], InputError):
        raise told[0]
    assert isinstance(told[0], Partition)
    return told[0]


def cut_review(example: Example, settings: RunSettings, partition: Partition, model: ModelSpec, feedback: CostFeedback) -> CutReview:
    return CutReview(
        model=model, partition=partition, costs=feedback.current_costs, profile=lambda: feedback.profile, strategy=STRATEGY,
        split_backward=settings.schedule.split_backward, key=run_key(example, settings), folder=default_cache_folder(),
    )


def run_key(example: Example, settings: RunSettings) -> RunKey:
    parallel = settings.parallel
    return RunKey(
        model=example.config.model.modules, pipeline=parallel.pipeline, tensor=parallel.tensor, context=parallel.context,
        sequence=parallel.sequence_parallel, numbers="fp32", device="cpu" if settings.device == "cpu" else torch.cuda.get_device_name(),
        memory_limit_bytes=None, data=[f"{name} {value}" for name, value in sorted(settings.data.items())],
    )


def _choose(example: Example, settings: RunSettings, costs: CostModel) -> Partition:
    """On one rank."""
    kept = find_cut(default_cache_folder(), run_key(example, settings))
    if kept is not None:
        logger.warning("DIP takes the cut that an earlier run of this kind has kept: layers %s", kept.partition.chunks)
        return kept.partition
    spec, ranks = example.config.model.modules, settings.parallel.pipeline
    chunks = {module.name: 1 for module in spec.modules} if ranks == 1 else {}
    choice = joint_partition(spec, ranks, _sample(example, settings), costs, strategy=STRATEGY, chunks=chunks)
    logger.warning(
        "DIP chose a cut by %s costs and the example's own data: layers %s, sub-microbatches %s", "analytic" if settings.schedule.profile is None else
        "the profile's", choice.partition.chunks, choice.partition.sub_microbatch_size,
    )
    return choice.partition


def _sample(example: Example, settings: RunSettings) -> list[Batch]:
    """The first replica's batches of the run's first iterations."""
    describe = whole_model(example, settings).describe().item_metadata
    replicas, count = settings.parallel.data, settings.num_microbatches
    iterations = max(2, math.ceil(SAMPLED_MICROBATCHES * replicas / count))
    return [[describe(item) for item in example.dataset.microbatches(index, count)[::replicas]] for index in range(iterations)]
