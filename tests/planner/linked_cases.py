"""Replicas that share experts, drawn by a seed: small and big ones, with batches that differ in their encoders' work."""

from __future__ import annotations

import random
from dataclasses import dataclass

from megatron_dip.cost.profile import ProfileCost
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.planner.linked import union_of
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.profile import ModuleProfile, PointToPoint, Profile, ProfileGrid, ProfilePoint, Strategy
from megatron_dip.spec.workload import Microbatch
from tests.strategies import module


@dataclass(frozen=True, slots=True)
class LinkedCase:
    joint: Plan
    replicas: list[list[Microbatch]]


def _costs(time_ns: int) -> ModuleProfile:
    points = [
        ProfilePoint(
            instances=n, tokens=n, forward_ns=time_ns * n, backward_input_ns=time_ns * n, backward_weight_ns=time_ns * n, activation_bytes=1.0,
            boundary_bytes=1.0,
        )
        for n in (1, 4)
    ]
    return ModuleProfile(num_layers=8, layer=ProfileGrid(points=points), strategies={"none": Strategy()})


def linked_case(seed: int) -> LinkedCase:
    """Two or three replicas on 2 to 8 pipeline ranks with 2 to 32 microbatches each; half of all cases are big."""
    rng = random.Random(seed)
    big = rng.random() < 0.5
    num_ranks = rng.choice([2, 4, 8] if big else [2, 3, 4])
    num_microbatches = rng.choice([16, 24, 32] if big else [2, 3, 4, 6, 8])
    model = ModelSpec(modules=[module("vit", 8), module("lm", 8, role="backbone")])
    profile = Profile(
        format="megatron-dip/profile/1", modules={name: _costs(rng.choice([300, 1000, 3000])) for name in ("vit", "lm")},
        p2p=PointToPoint(latency_ns=rng.choice([5, 50, 500, 5000]), bytes_per_second=1e9),
    )
    chunks = {"vit": 1 if num_ranks == 8 else rng.choice([1, 2]), "lm": 1 if num_ranks == 8 else rng.choice([1, 2])}
    partition = even_partition(model, num_ranks, chunks, {"vit": rng.choice([1, 2, 100]), "lm": 1})
    replicas: list[list[Microbatch]] = []
    for _ in range(rng.choice([2, 2, 3])):
        images = [rng.choice([0, 0, 1, 2, 5]) for _ in range(num_microbatches)]
        replicas.append([{**({"vit": [1] * count} if count else {}), "lm": [1]} for count in images])
    options = PlanOptions(evaluations=rng.choice([1, 5, 40]), seed=seed, split_backward=rng.random() < 0.3)
    return LinkedCase(plan_iteration(model, partition, union_of(replicas), ProfileCost(profile), options), replicas)
