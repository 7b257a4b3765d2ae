"""Collections stay off while anybody asks for it, and come back only where they were on."""

from __future__ import annotations

import gc
import sys
import threading

import pytest

from megatron_dip.planner.courtesy import SWITCH_S, no_collections, switch_often


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


def test_what_was_made_meanwhile_counts_as_old_and_what_a_user_froze_stays_frozen() -> None:
    with no_collections():
        made: list[list[int]] = [[] for _ in range(100)]
    young = {id(item) for generation in (0, 1) for item in gc.get_objects(generation=generation)}
    assert not any(id(item) in young for item in made)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with no_collections():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


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
