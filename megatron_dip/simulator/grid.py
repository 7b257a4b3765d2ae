"""The ways to share a number of GPUs between data, tensor and pipeline parallelism."""

from __future__ import annotations

from megatron_dip.cost.analytic import check_parallel
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Parallel, Workload


def grid_parallels(workload: Workload, gpus: int, field: str = "--gpus") -> list[Parallel]:
    """Every (data, tensor, pipeline) whose product with the context size is ``gpus`` and that the model and the batch allow.

    Tensor sizes go up to 8, the GPUs of a node; there is at least one microbatch a replica.
    """
    context = workload.parallel.context
    if gpus % context:
        raise InputError(field, gpus, f"is no multiple of parallel.context = {context}", "change one of them")
    found = []
    shared = gpus // context
    for tensor in (1, 2, 4, 8):
        for pipeline in range(1, shared // tensor + 1):
            data, rest = divmod(shared, tensor * pipeline)
            if rest or data > len(workload.microbatches) or pipeline > sum(m.num_layers for m in workload.model_spec.modules):
                continue
            parallel = Parallel(tensor=tensor, pipeline=pipeline, data=data, context=context)
            try:
                check_parallel(workload.model_spec, parallel)
            except InputError:
                continue
            found.append(parallel)
    return found
