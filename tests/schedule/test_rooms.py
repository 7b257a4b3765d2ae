"""What recomputed and offloaded layers need for a moment: counted layer by layer, and where offloading fits no more."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.cost.interface import PartCost
from megatron_dip.schedule.candidates import layer_options
from megatron_dip.schedule.rooms import layer_place, layer_rooms
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
        leaving = moved(label)
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
    layers = [label for label, count in sorted(mix, key=lambda pair: layer_place(STRATEGIES[pair[0]])) for _ in range(count)]
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
    np.testing.assert_array_equal(rooms.forward, [2 * 48, 0])
    np.testing.assert_array_equal(rooms.ahead, [48, 48])
    np.testing.assert_array_equal(rooms.between, [0, 0])  # the stage's input is in the part that stays


def test_a_copy_hides_behind_the_whole_backward() -> None:
    slow = {"none": Strategy(), "offload": Strategy(offload=Offload(bytes_per_second=64e9 / 18, activation=0.0))}
    options = {option.label: option for option in layer_options(LAYER, slow, has_backward=True, weight_beside=True)}
    assert options["offload"].forward_ns == 18.0
    assert options["offload"].backward_input_ns == 10.0
    options = {option.label: option for option in layer_options(LAYER, slow, has_backward=True)}
    assert options["offload"].backward_input_ns == 18.0
