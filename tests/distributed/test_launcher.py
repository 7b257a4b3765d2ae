"""The test launcher itself: values in rank order, tracebacks of failing ranks, an end to ranks that hang."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launcher import launch, launch_all

pytestmark = pytest.mark.distributed


def _sum_of_ranks(rank: int, num_ranks: int, offset: int) -> int:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return int(value)


def _fail_on_rank_one(rank: int, num_ranks: int) -> int:
    if rank == 1:
        raise ValueError("rank one is wrong")
    return rank


def _end_or_hang(rank: int, num_ranks: int) -> None:
    if rank == 0:
        os._exit(7)
    time.sleep(600)


def test_values_come_in_rank_order() -> None:
    assert launch(_sum_of_ranks, 2, 10) == [21, 21]


def test_a_failing_rank_fails_the_launch_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match="rank one is wrong"):
        launch(_fail_on_rank_one, 2)


def test_dead_and_hanging_ranks_are_told_apart_and_killed() -> None:
    dead, hanging = launch_all(_end_or_hang, 2, timeout_s=3.0)
    assert (dead.exit_code, hanging.exit_code) == (7, None)
    assert not dead.ok
    assert not hanging.ok
