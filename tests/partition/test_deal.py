from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.partition.deal import SLACK, deal, undealt
from megatron_dip.partition.online import split
from megatron_dip.partition.second_pass import SecondPass, deal_by_plans, swap_pairs
from megatron_dip.partition.work import WorkEstimate
from megatron_dip.schedule.graph import build_task_graph
from megatron_dip.spec.errors import InputError
from tests.partition import naive_deal
from tests.strategies import Case, arrangements, vlm_case


@st.composite
def works(draw: st.DrawFn, max_replicas: int = 4, max_size: int = 4) -> tuple[list[list[int]], int]:
    """Works [N][K] and a number of replicas; many equal ones, some far heavier than the rest."""
    replicas, size, ranks = draw(st.integers(1, max_replicas)), draw(st.integers(1, max_size)), draw(st.integers(1, 3))
    entry = st.one_of(st.integers(0, 5), st.integers(0, 1000), st.sampled_from([0, 10**6]))
    row = st.lists(entry, min_size=ranks, max_size=ranks)
    return draw(st.lists(row, min_size=replicas * size, max_size=replicas * size)), replicas


@given(works())
def test_the_kernel_deals_as_its_slow_twin(case: tuple[list[list[int]], int]) -> None:
    work, replicas = case
    assert deal(np.array(work), replicas).replica_of.tolist() == naive_deal.deal(work, replicas)


@given(works(max_replicas=6, max_size=6))
def test_a_deal_is_even_in_number_never_worse_than_no_deal_and_above_its_bound(case: tuple[list[list[int]], int]) -> None:
    work, replicas = case
    dealt = deal(np.array(work), replicas)
    assert sorted(itertools.chain(*dealt.shares())) == list(range(len(work)))
    assert {len(share) for share in dealt.shares()} == {len(work) // replicas}
    for replica, share in enumerate(dealt.shares()):
        assert all(dealt.replica_of[i] == replica for i in share)
        # Who stays keeps its place.
        assert all(i % replicas != replica or i == place * replicas + replica for place, i in enumerate(share))
        assert dealt.load_ns[replica] == max(sum(work[i][k] for i in share) for k in range(len(work[0])))
    assert dealt.bound_ns == naive_deal.bound(work, replicas) <= dealt.load_ns.max() <= dealt.load_before_ns.max()
    assert dealt.moves == sum(1 for i, replica in enumerate(dealt.replica_of) if replica != i % replicas)
    assert undealt(np.array(work), replicas).moves == 0


@given(works(max_replicas=2, max_size=4))
def test_two_replicas_are_never_far_from_the_best_deal(case: tuple[list[list[int]], int]) -> None:
    work, replicas = case
    best = min(
        max(naive_deal.loads(work, [0 if i in first else replicas - 1 for i in range(len(work))], replicas))
        for first in map(set, itertools.combinations(range(len(work)), len(work) // replicas))
    )
    # The bound is below the best of all deals; swaps of pairs are stuck above it at most by the largest work.
    dealt = deal(np.array(work), replicas)
    assert dealt.bound_ns <= best <= dealt.load_ns.max() <= best + max(map(max, work))


five = st.lists(st.integers(-50, 500), min_size=5, max_size=5)


@given(works(max_replicas=5), five, five, st.integers(0, 3000), st.integers(0, 3))
def test_pairs_swap_as_in_their_slow_twin(case: tuple[list[list[int]], int], beyond: list[int], surplus: list[int], fill: int, passes: int) -> None:
    work, replicas = case
    dealt = deal(np.array(work), replicas)
    found, expected = dealt.replica_of.copy(), dealt.replica_of.tolist()
    planned = [load + more for load, more in zip(dealt.load_ns.tolist(), beyond, strict=False)]
    mean = sum(planned) // replicas
    tried: set[tuple[int, int]] = set()
    for _ in range(passes + 1):
        keys = np.array(sorted(out * len(work) + into for out, into in tried), dtype=np.int64)
        swaps = swap_pairs(np.array(work), np.array(planned), np.array(surplus[:replicas]), fill, mean, mean + 2, keys, found)
        assert [tuple(swap) for swap in swaps.tolist()] == naive_deal.swap_pairs(work, planned, surplus, fill, mean, mean + 2, tried, expected)
        assert found.tolist() == expected
        tried |= {tuple(swap[:2]) for swap in swaps.tolist()}


@given(works(max_replicas=5), st.randoms(use_true_random=False))
def test_the_second_pass_never_slows_the_slowest_whatever_plans_take(case: tuple[list[list[int]], int], luck: Random) -> None:
    work, replicas = case
    dealt = deal(np.array(work), replicas)
    told: dict[tuple[int, ...], int] = {}

    def planned_time(share: Sequence[int]) -> int:
        told[tuple(sorted(share))] = 1 + max(map(sum, zip(*[work[i] for i in share], strict=True))) + luck.randrange(300)
        return told[tuple(sorted(share))]

    planned = deal_by_plans(np.array(work), dealt, planned_time, passes=5)
    shares = planned.dealt.shares()
    assert sorted(itertools.chain(*shares)) == list(range(len(work)))
    assert list(planned.planned_ns) == [told[tuple(sorted(share))] for share in shares]
    assert max(planned.planned_ns) <= max(told[tuple(sorted(share))] for share in dealt.shares())
    assert planned.dealt.load_ns.tolist() == naive_deal.loads(work, planned.dealt.replica_of.tolist(), replicas)


def test_a_swap_whose_plans_cannot_be_made_is_taken_back() -> None:
    work = np.array([[10], [10], [30], [10], [30], [10]])
    dealt = undealt(work, 2)
    second = SecondPass(work, dealt)
    assert not second.tell([90, 30])
    assert second.following() is not None
    assert not second.tell([0, 60])
    assert second.best is not None
    assert (second.best.dealt.replica_of.tolist(), second.best.planned_ns) == (dealt.replica_of.tolist(), (90, 30))


def test_replicas_with_a_heavy_microbatch_get_less_of_the_rest() -> None:
    """As in pipelines with few microbatches, which fill and drain at the pace of the heaviest."""
    work = np.random.default_rng(2).integers(100, 1000, (16 * 8, 1))

    def planned_time(share: Sequence[int]) -> int:
        return int(work[list(share)].sum() + 2 * work[list(share)].max())

    dealt = deal(work, 16)
    assert deal_by_plans(work, dealt, planned_time, passes=0).imbalance > 1.02
    assert deal_by_plans(work, dealt, planned_time).imbalance < 1.005


def test_few_moves_reach_what_a_deal_from_scratch_reaches() -> None:
    rng = np.random.default_rng(3)
    work = (1e6 * rng.lognormal(0, 0.5, (16 * 32, 1))).astype(np.int64)
    dealt = deal(work, 16)
    scratch = max(naive_deal.loads(work.tolist(), naive_deal.heaviest_first(work.tolist(), 16), 16))
    assert dealt.load_ns.max() <= scratch * (1 + SLACK)
    assert dealt.imbalance_before > 1.1
    assert dealt.moves < len(work) // 8


def test_dealing_by_plans_meets_what_work_does_not_say() -> None:
    rng = np.random.default_rng(5)
    work = rng.integers(100, 1000, (8 * 32, 1))
    surcharge = rng.integers(0, 200, 8 * 32)
    dealt = deal(work, 8)

    def planned_time(share: Sequence[int]) -> int:
        return int(work[list(share)].sum() + surcharge[list(share)].sum())

    first = deal_by_plans(work, dealt, planned_time, passes=0)
    second = deal_by_plans(work, dealt, planned_time)
    assert first.imbalance > 1.01
    assert second.imbalance < 1.005
    assert list(second.planned_ns) == [planned_time(share) for share in second.dealt.shares()]


@pytest.mark.parametrize(("work", "replicas"), [([[1]] * 5, 2), ([[1], [-1]], 2), ([[1 << 60]] * 4, 2), ([[1]], 0)])
def test_what_cannot_be_dealt_is_said(work: list[list[int]], replicas: int) -> None:
    with pytest.raises(InputError):
        deal(np.array(work), replicas)


def _assert_work_is_that_of_the_stages(case: Case) -> None:
    work = WorkEstimate(case.model, case.partition, case.costs()).of(case.microbatches)
    graph = build_task_graph(case.model, case.partition, split(case.microbatches, case.model, case.partition, case.costs()), case.costs())
    stages = np.zeros_like(work)
    np.add.at(stages, (graph.microbatch, graph.rank), graph.duration_ns)
    num_stages = np.zeros_like(work)
    np.add.at(num_stages, (graph.microbatch, graph.rank), 1)
    # Stages are rounded one by one.
    assert (np.abs(work - stages) <= (num_stages + 1) // 2 + 1).all()


def test_work_is_the_sum_of_the_stages() -> None:
    _assert_work_is_that_of_the_stages(vlm_case(num_ranks=3, chunks={"vit": 1, "lm": 1}))


@given(arrangements())
def test_work_is_the_sum_of_the_stages_of_any_model(case: Case) -> None:
    case.microbatches[:] = [microbatch for microbatch in case.microbatches if any(microbatch.values())]
    _assert_work_is_that_of_the_stages(case)
