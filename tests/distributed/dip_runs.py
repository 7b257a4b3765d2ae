"""DIP on the tiny vision-language model: what :func:`tests.distributed.tiny_vlm.run_case` takes to run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.profile import Profile
from megatron_dip.spec.workload import Microbatch
from tests.distributed.tiny_vlm import Case, forward_step, tiny_model

TIMES_NS = {"vit": (300_000, 900), "lm": (500_000, 1_500)}
"""Module -> forward ns of a layer at one instance, and for each token."""


def tiny_profile(case: Case) -> Profile:
    """Made-up costs that keep the planner's arithmetic honest: near enough to real ones for sensible orders."""
    import msgspec

    modules = {}
    for module in tiny_model(case).modules.modules:
        base, each = TIMES_NS[module.name]
        points = [
            {"instances": n, "tokens": 16 * n, "forward_ns": base + each * n, "backward_input_ns": base + each * n,
             "backward_weight_ns": base + each * n, "activation_bytes": 1000 * n, "boundary_bytes": 100 * n}
            for n in (1, 4)
        ]
        modules[module.name] = {"num_layers": module.num_layers, "layer": {"points": points}}
    raw = {"format": "megatron-dip/profile/1", "modules": modules, "p2p": {"latency_ns": 20_000, "bytes_per_second": 1e9}}
    return msgspec.convert(raw, Profile)


def even_cut(case: Case) -> Partition:
    from megatron_dip.partition.offline import even_partition

    return even_partition(
        tiny_model(case).modules, case.parallel.pipeline, {"vit": case.chunks[0], "lm": case.chunks[1]},
        {"vit": case.sub_microbatch_size, "lm": 1},
    )


class PlanMaker:
    """Plans the case's batches, deterministically."""

    def __init__(self, case: Case, partition: Partition) -> None:
        from megatron_dip.cost.profile import ProfileCost

        self._case = case
        self._partition = partition
        self._costs = ProfileCost(tiny_profile(case))

    def __call__(self, microbatches: Sequence[Microbatch], forward_only: bool) -> Plan:
        from megatron_dip.planner.iteration import PlanOptions, plan_iteration

        options = PlanOptions(
            evaluations=8, seed=self._case.seed, forward_only=forward_only, schedule=self._case.option("schedule", "dip"),
            split_backward=bool(self._case.option("split_backward")) and not forward_only,
        )
        return plan_iteration(tiny_model(self._case).modules, self._partition, microbatches, self._costs, options)


def build(case: Case, config: Any) -> Any:
    from megatron_dip.trainer.build import build_dip_model

    return build_dip_model(
        config, even_cut(case), overlap_grad_reduce=case.overlap_grad_reduce, distributed_optimizer=case.distributed_optimizer,
        overlap_param_gather=case.option("overlap_param_gather", False),
    )


_MADE: dict[int, tuple[Any, Any]] = {}
"""id of a model -> (model, its DipForwardBackward): one is made for a model and used for all of its steps."""


def dip_of(case: Case, model: Any, **options: Any) -> Any:
    from megatron_dip.iteration.forward_backward import DipForwardBackward, IterationSettings

    if id(model) not in _MADE:
        partition = even_cut(case)
        made = DipForwardBackward(
            staged_model=model.staged, chunks=model.chunks, partition=partition,
            settings=IterationSettings(
                device=torch.device("cpu"),
                **{
                    "metadata": model.staged.description.item_metadata, "plan_function": PlanMaker(case, partition), "timeout_s": 30.0,
                    **options,
                },
            ),
        )
        _MADE[id(model)] = (model, made)
    return _MADE[id(model)][1]


def forward_backward(case: Case, model: Any, items: Sequence[dict[str, torch.Tensor]], replica: int) -> list[dict[str, Any]]:
    return dip_of(case, model)(
        forward_step_func=forward_step, data_iterator=iter(items), model=model.chunks, num_microbatches=len(items), seq_length=48,
        micro_batch_size=1, forward_only=False,
    )
