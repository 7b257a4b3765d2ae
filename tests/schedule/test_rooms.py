"""What recomputed and offloaded layers need for a moment: counted layer by layer, and where offloading fits no more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.cost.interface import PartCost
from megatron_dip.schedule.candidates import layer_options, pair_candidates
from megatron_dip.schedule.rooms import layer_place, layer_rooms, offloaded_places
from megatron_dip.spec.profile import Offload, Strategy

STRATEGIES = {
    "none": Strategy(), "selective": Strategy(extra_forward=0.1, activation=0.5), "full": Strategy(extra_forward=1.0, activation=0.125),
    "offload": Strategy(offload=Offload(bytes_per_second=1e9, activation=0.0)),
    "part": Strategy(offload=Offload(bytes_per_second=1e9, activation=0.25)),
}
LAYER = PartCost(forward_ns=10.0, backward_input_ns=10.0, backward_weight_ns=10.0, activation_bytes=64.0, boundary_bytes=8.0)


def peaks(layers: list[str]) -> tuple[int, int]:
    """The most that a forward and a backward hold, layer by layer; what the backward's first layers need is there before it."""

    def kept(label: str) -> int:
        strategy = STRATEGIES[label]
        return int(64 * strategy.activation * (1.0 if strategy.offload is None else strategy.offload.activation))

    def moved(label: str) -> int:
        return 64 - kept(label) if STRATEGIES[label].offload is not None else 0

    forward, live, leaving = 0, 0, 0
    for label in layers:
        live += kept(label)
        forward = max(forward, live + moved(label) + leaving)
        leaving = moved(label) or leaving
    offloaded = [index for index, label in enumerate(layers) if moved(label)]
    there = {offloaded[-1]} if offloaded else set()
    backward = live + sum(moved(layers[index]) for index in there)
    for index in reversed(range(len(layers))):
        if index in there:
            there |= {max((other for other in offloaded if other < index), default=index)}
        again = 64 - kept(layers[index]) if STRATEGIES[layers[index]].extra_forward else 0
        backward = max(backward, live + again + sum(moved(layers[other]) for other in there))
        live -= kept(layers[index])
        there.discard(index)
    return forward, backward


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(["none", "selective", "full", "offload"]), st.integers(1, 4), min_size=1), st.booleans())
def test_rooms_are_what_layers_need_one_by_one(counts: dict[str, int], split: bool) -> None:
    mix = tuple(counts.items())
    rooms = layer_rooms(LAYER, STRATEGIES, [mix], split=split)
    recomputed = [label for label, count in sorted(mix, key=lambda pair: layer_place(STRATEGIES[pair[0]])) for _ in range(count)]
    turn = ["none"] * sum(label in ("none", "offload") for label in recomputed)
    for place in offloaded_places(counts.get("offload", 0), len(turn)):
        turn[place] = "offload"
    layers = [label for label in recomputed if label not in ("none", "offload")] + turn
    held = sum({"none": 64, "selective": 32, "full": 8, "offload": 0}[label] for label in layers)
    forward, backward = peaks(layers)
    assert held + int(rooms.forward[0]) == max(forward, held)
    found = held + int(rooms.backward[0] + rooms.ahead[0])
    assert found == backward if not split else found >= backward
    assert int(rooms.ahead[0]) == (64 if "offload" in counts else 0)
    assert int(rooms.between[0]) == (8 if layers[0] == "offload" else 0)
    assert int(rooms.weight[0]) == (sum(32 * counts.get(label, 0) for label in ("offload",)) + 16 * counts.get("selective", 0)
                                    + 28 * counts.get("full", 0) if split else 0)


def test_a_part_that_stays_is_not_under_way() -> None:
    rooms = layer_rooms(LAYER, STRATEGIES, [(("part", 3),), (("part", 1), ("none", 2))], split=False)
    np.testing.assert_array_equal(rooms.forward, [2 * 48, 48])
    np.testing.assert_array_equal(rooms.ahead, [48, 48])
    np.testing.assert_array_equal(rooms.between, [0, 0])  # the stage's input is in the part that stays


def stage_ns(layers: list[str], copy: float) -> tuple[float, float]:
    """When a stage's forward and backward are over, layer by layer, with copies one after the other on a stream of their own."""
    now, link, copied = 0.0, 0.0, 0.0
    for label in layers:
        now += 10.0
        if label == "offload":
            now = max(now, copied)  # the layer before it is let go
            copied = link = max(now, link) + copy
    forward = max(now, copied)
    now, link = 0.0, 0.0
    places = [index for index, label in enumerate(layers) if label == "offload"]
    there = {places[-1]: 0.0} if places else {}
    for index in reversed(range(len(layers))):
        if index in there:
            now = max(now, there[index])
            below = [place for place in places if place < index]
            if below:
                there[below[-1]] = link = max(now, link) + copy
        now += 20.0 + (10.0 if layers[index] == "full" else 0.0)
    return forward, max(now, len(places) * copy)


@settings(max_examples=200)
@given(st.integers(1, 12), st.sampled_from([3.0, 9.0, 18.0, 33.0]))
def test_a_stage_takes_as_long_as_its_layers_or_its_copies(num_layers: int, copy: float) -> None:
    known = {"none": Strategy(), "full": STRATEGIES["full"], "offload": Strategy(offload=Offload(bytes_per_second=64e9 / copy, activation=0.0))}
    options = layer_options(LAYER, known, has_backward=True, spread=True)
    assert options[0].label == "none"
    found = pair_candidates(options, num_layers, limit=1000, weight_ns=10.0)
    for index in range(len(found.counts)):
        forward, backward = stage_ns(found.strategy_list(index), copy)
        assert found.forward_ns[index] == pytest.approx(forward)
        assert found.backward_input_ns[index] + 10.0 * num_layers == pytest.approx(backward)
