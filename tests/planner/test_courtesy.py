"""Collections stay off while anybody asks for it, and come back only where they were on."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest

from megatron_dip.planner.courtesy import ALL_EVERY, SWITCH_S, YOUNG_EVERY, FixedCollections, no_collections, switch_often


def test_collections_stay_off_until_the_last_holder_is_through() -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with no_collections():
            entered.set()
            leave.wait()

    assert gc.isenabled()
    other = threading.Thread(target=hold)
    with no_collections():
        other.start()
        entered.wait()
    assert not gc.isenabled()
    leave.set()
    other.join()
    assert gc.isenabled()


def test_an_error_brings_them_back_and_a_users_own_setting_stays() -> None:
    with pytest.raises(ZeroDivisionError), no_collections():
        _ = 1 // 0
    assert gc.isenabled()
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


class _Node:
    """One half of a cycle."""

    def __init__(self) -> None:
        self.other: _Node | None = None


def cycle() -> weakref.ref[_Node]:
    one, two = _Node(), _Node()
    one.other, two.other = two, one
    return weakref.ref(one)


@pytest.fixture
def many_old_objects() -> Iterator[None]:
    """As a training process has: a full collection is then due only after a quarter as many new ones have grown old."""
    ballast = [[i] for i in range(200_000)]
    gc.collect()
    yield
    del ballast


@pytest.mark.usefixtures("many_old_objects")
def test_cycles_that_are_made_beside_planning_are_collected() -> None:
    """Threads take turns in planning, without a moment between them, while the main thread makes garbage."""
    collections = FixedCollections()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with no_collections():
                _ = [[] for _ in range(1000)]

    threads = [threading.Thread(target=work) for _ in range(2)]
    made: list[weakref.ref[_Node]] = []
    with no_collections():
        for thread in threads:
            thread.start()
        for _ in range(5 * YOUNG_EVERY):
            made += [cycle() for _ in range(20)]
            collections.step()
        assert not gc.isenabled()
        stop.set()
        for thread in threads:
            thread.join()
    assert sum(ref() is not None for ref in made) == 0


@pytest.mark.usefixtures("many_old_objects")
def test_planning_makes_nothing_older_than_it_is() -> None:
    """A cycle made beside a block without collections is found by a collection of the young objects."""
    with no_collections():
        made = [cycle() for _ in range(1000)]
    gc.collect(1)
    assert sum(ref() is not None for ref in made) == 0


def test_old_cycles_are_collected_now_and_then() -> None:
    made = cycle()
    one = made()
    gc.collect()  # it is old now
    del one
    collections = FixedCollections()
    for _ in range(ALL_EVERY):
        collections.step()
    assert made() is None


def test_who_turned_collection_off_collects_himself() -> None:
    collections = FixedCollections()
    gc.disable()
    try:
        made = cycle()
        for _ in range(ALL_EVERY):
            with no_collections():
                collections.step()
        assert made() is not None
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_switch_interval_is_only_shortened() -> None:
    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(0.005)
        switch_often()
        assert sys.getswitchinterval() == pytest.approx(SWITCH_S)
        sys.setswitchinterval(0.0001)
        switch_often()
        assert sys.getswitchinterval() == pytest.approx(0.0001)
    finally:
        sys.setswitchinterval(before)
