"""Collectives by hand: rings within and across nodes."""

from __future__ import annotations

import pytest

from megatron_dip.cost.collectives import Group, collective_seconds, groups, message_bandwidth
from megatron_dip.cost.device import load_device
from megatron_dip.spec.workload import Parallel

DEVICE = load_device("a100")
LATENCY = DEVICE.efficiency.collective_latency_us * 1e-6


def test_ranks_are_numbered_tensor_context_data_pipeline() -> None:
    found = groups(Parallel(tensor=4, context=2, data=3, pipeline=5))
    assert (found.tensor, found.context) == (Group(4, 1), Group(2, 4))
    assert (found.data, found.pipeline) == (Group(6, 4), Group(5, 24))


def test_a_ring_within_a_node() -> None:
    bandwidth = 300e9 * DEVICE.efficiency.gather
    assert collective_seconds("all_gather", 8e9, Group(8, 1), DEVICE) == pytest.approx(LATENCY / 2 + 7e9 / bandwidth)
    assert collective_seconds("reduce_scatter", 8e9, Group(8, 1), DEVICE) == collective_seconds("all_gather", 8e9, Group(8, 1), DEVICE)
    bandwidth = 300e9 * DEVICE.efficiency.all_reduce
    assert collective_seconds("all_reduce", 8e9, Group(8, 1), DEVICE) == pytest.approx(LATENCY + 14e9 / bandwidth)


def test_a_ring_across_nodes_uses_the_cards_of_its_members_in_a_node() -> None:
    card = 25e9 * DEVICE.efficiency.network
    alone = collective_seconds("all_gather", 16e9, Group(16, 8), DEVICE)
    assert alone == pytest.approx(LATENCY / 2 + 16 * DEVICE.network_latency_us * 1e-6 + 15e9 / card)
    assert Group(16, 8).per_node(DEVICE) == 1
    four = collective_seconds("all_gather", 16e9, Group(16, 2), DEVICE)
    assert four == pytest.approx(LATENCY / 2 + 4 * DEVICE.network_latency_us * 1e-6 + 15e9 / (4 * card))
    # Eight cards together are faster than NVLink's share of a ring never is.
    assert collective_seconds("all_gather", 16e9, Group(16, 1), DEVICE) >= 15e9 / (300e9 * DEVICE.efficiency.gather)


def test_one_rank_sends_nothing() -> None:
    assert collective_seconds("all_reduce", 1e12, Group(1, 1), DEVICE) == 0.0
    assert collective_seconds("all_reduce", 0.0, Group(8, 1), DEVICE) == 0.0


def test_messages_go_by_the_slowest_hop() -> None:
    assert message_bandwidth(groups(Parallel(tensor=2, pipeline=4)).pipeline, DEVICE) == 300e9 * DEVICE.efficiency.gather
    assert message_bandwidth(groups(Parallel(tensor=4, pipeline=4)).pipeline, DEVICE) == 25e9 * DEVICE.efficiency.network
