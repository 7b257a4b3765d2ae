"""Timelines of the playground: the same work under every system, named by what is in a stage."""

from __future__ import annotations

from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.offline import even_partition
from megatron_dip.simulator.playground import SYSTEMS, playground_timelines
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import Workload


def even(workload: Workload, costs: CostModel) -> Partition:
    return even_partition(workload.model_spec, workload.parallel.pipeline, {"lm": 2}, {"vit": 2})


def test_all_systems_train_the_same_batch() -> None:
    found = playground_timelines(2, 3, 2, even, tensor=4, device="h100", evaluations=2, seed=0)
    assert list(found) == list(SYSTEMS)
    for timeline in found.values():
        assert timeline.ranks == 2
        assert {bar.microbatch for bar in timeline.bars} == {0, 1, 2}
        assert {name for bar in timeline.bars for name in bar.module.split("+")} == {"vit", "lm"}
    assert all(bar.module in ("vit", "lm") for bar in found["DIP"].bars)
    assert found["DIP"].makespan <= found["1F1B"].makespan


def test_without_images_the_encoder_has_no_stage() -> None:
    found = playground_timelines(2, 2, 0, even, tensor=4, device="h100", evaluations=2, seed=0)
    assert all(bar.module == "lm" for bar in found["DIP"].bars)
