"""Indices dealt to replicas before data are read: the same samples in every step, none twice, alike on all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.iteration.index_deals import DealtSampler, IndexDeals, find_lengths
from megatron_dip.partition.deal import SLACK
from megatron_dip.spec.workload import Microbatch


class Sampler:
    """As Megatron's random one: a replica's indices of one epoch after the other, the rest of an epoch dropped, and it counts."""

    def __init__(self, total: int, consumed: int, size: int, replica: int, replicas: int) -> None:
        self.total_samples, self.consumed_samples, self.micro_batch_size = total, consumed, size
        self.data_parallel_rank, self.data_parallel_size = replica, replicas

    def __len__(self) -> int:
        return self.total_samples

    def __iter__(self) -> Iterator[list[int]]:
        row = self.micro_batch_size * self.data_parallel_size
        whole = self.total_samples - self.total_samples % row
        epoch, begun = divmod(self.consumed_samples, whole)
        order = np.random.default_rng(epoch).permutation(self.total_samples)[begun:whole].tolist()
        for first in range(0, len(order), row):
            mine = first + self.data_parallel_rank * self.micro_batch_size
            self.consumed_samples += row
            yield order[mine : mine + self.micro_batch_size]


class Documents:
    def instance_lengths(self, index: int) -> Mapping[str, Sequence[int]]:
        return {"vit": [16] * (index * 7919 % 13), "lm": [64]}


class Seeded:
    """As the wrapper in which Megatron seeds every sample."""

    def __init__(self, dataset: Documents) -> None:
        self.dataset = dataset


def estimate(microbatches: Sequence[Microbatch]) -> np.ndarray:
    return np.array([[1000 * sum(microbatch["vit"]) + sum(microbatch["lm"])] for microbatch in microbatches])


def cyclic(sampler: Sampler | DealtSampler) -> Iterator[list[int]]:
    while True:
        yield from sampler


@given(
    replicas=st.integers(2, 4), size=st.integers(1, 2), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), rows=st.integers(5, 20),
    rest=st.integers(0, 5), consumed_rows=st.integers(0, 30),
)
def test_every_step_reads_what_it_would(
    replicas: int, size: int, sizes: list[int], rows: int, rest: int, consumed_rows: int
) -> None:
    row = replicas * size
    total, consumed = rows * row + min(rest, row - 1), consumed_rows * row

    def stream(replica: int, is_dealt: bool) -> Iterator[list[int]]:
        sampler = Sampler(total, consumed, size, replica, replicas)
        if not is_dealt:
            return cyclic(sampler)
        return cyclic(DealtSampler(sampler, replicas, Documents().instance_lengths, iter(itertools.cycle(sizes)), IndexDeals(estimate, replicas)))

    read, dealt = ([stream(replica, is_dealt) for replica in range(replicas)] for is_dealt in (False, True))
    for step in sizes * 2:
        # Microbatches stay whole, and each is one replica's in the step whose it is.
        expected = sorted(next(one) for one in read for _ in range(step))
        assert sorted(next(one) for one in dealt for _ in range(step)) == expected


def test_loads_become_even_and_are_counted() -> None:
    deals = [IndexDeals(estimate, 4) for _ in range(4)]
    streams = [
        iter(DealtSampler(Sampler(1 << 12, 0, 1, replica, 4), 4, Documents().instance_lengths, itertools.repeat(16), deals[replica]))
        for replica in range(4)
    ]
    for _ in range(5):
        loads = [int(estimate([dict(Documents().instance_lengths(next(one)[0])) for _ in range(16)]).sum()) for one in streams]
        assert max(loads) * 4 <= sum(loads) * (1 + 2 * SLACK)
    figures = [one.figures(1.25) for one in deals]
    assert all(one == figures[0] for one in figures)
    assert figures[0].dealt + figures[0].left.get("even", 0) == 5
    assert figures[0].dealt >= 4
    assert figures[0].imbalance < figures[0].imbalance_before
    assert (figures[0].measured_imbalance, figures[0].bytes_sent) == (1.25, 0)


def test_other_estimates_have_other_fingerprints() -> None:
    def dearer(microbatches: Sequence[Microbatch]) -> np.ndarray:
        return 2 * estimate([{"vit": [], "lm": [], **microbatch} for microbatch in microbatches])

    def same(microbatches: Sequence[Microbatch]) -> np.ndarray:
        return dearer(microbatches) // 2

    prints = [IndexDeals(one, 2).fingerprint(["vit", "lm"]) for one in (dearer, same, same)]
    assert prints[0] != prints[1] == prints[2]


def test_what_cannot_be_estimated_is_read_as_ever(caplog: pytest.LogCaptureFixture) -> None:
    def broken(microbatches: Sequence[Microbatch]) -> np.ndarray:
        raise KeyError("audio")

    deals = IndexDeals(broken, 2)
    stream = iter(DealtSampler(Sampler(64, 0, 1, 1, 2), 2, Documents().instance_lengths, itertools.repeat(4), deals))
    plain = iter(Sampler(64, 0, 1, 1, 2))
    assert [next(stream) for _ in range(12)] == [next(plain) for _ in range(12)]
    assert deals.figures(1.0).left == {"unknown": 3}
    assert len(caplog.records) == 1


def test_a_data_set_that_tells_lengths_is_found_below_its_wrappers() -> None:
    documents = Documents()
    assert find_lengths(Seeded(documents)) is documents
    assert find_lengths([1, 2]) is None
    assert find_lengths(None) is None
