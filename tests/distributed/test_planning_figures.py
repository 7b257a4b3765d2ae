"""Figures about planning come from the ranks of a replica, and the first replica's reach the job's last rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.distributed.launcher import launch

pytestmark = pytest.mark.distributed


def _tell(rank: int, num_ranks: int) -> dict[str, Any]:
    from megatron_dip.iteration.planning_figures import PlanningFigures, measure_iteration, tell_last_rank
    from megatron_dip.runtime.groups import new_process_groups
    from megatron_dip.runtime.timing import StageRecord

    # Two replicas of two pipeline ranks, as Megatron lays them out: data-parallel ranks are neighbours.
    replica, stage = rank % 2, rank // 2
    groups = new_process_groups((replica, replica + 2), replica, timeout_s=30)
    # The second pipeline rank's clock is 1000 ns behind.
    records = [StageRecord(0, 100 - 1000 * stage, 130 - 1000 * stage), StageRecord(1, 150 - 1000 * stage, 200 + 10 * rank - 1000 * stage)]
    measured = measure_iteration(records, groups, 1000 * stage)
    figures = None
    if rank == groups.control_ranks[0]:
        values = {field.name: 10.0 * replica + number for number, field in enumerate(dataclasses.fields(PlanningFigures))}
        figures = PlanningFigures(**values)
    told = tell_last_rank(figures, groups)
    return {"makespan": measured.makespan_ns, "bubbles": measured.bubble_fraction, "told": None if told is None else told.scalars()}


def test_the_last_rank_hears_the_first_replica() -> None:
    results = launch(_tell, 4)
    assert [result["makespan"] for result in results] == [120, 130, 120, 130]
    busy = [30 + 50 + 10 * rank for rank in range(4)]
    for rank, result in enumerate(results):
        replica = rank % 2
        assert result["bubbles"] == pytest.approx(1 - (busy[replica] + busy[replica + 2]) / (2 * result["makespan"]))
    assert [result["told"] for result in results[:3]] == [None] * 3
    assert list(results[3]["told"].values()) == [float(number) for number in range(13)]
    assert "dip/planned-time" in results[3]["told"]
