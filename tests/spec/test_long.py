"""Long containers are lists and dicts to everyone else, and everything in them is let go with them."""

from __future__ import annotations

import weakref

import msgspec
import pytest

from megatron_dip.spec.long import SLICE, LongDict, LongList


class Entry:
    pass


@pytest.mark.parametrize("count", [0, 1, SLICE, 3 * SLICE + 5])
def test_all_entries_go_with_their_container(count: int) -> None:
    entries = [Entry() for _ in range(count)]
    gone = [weakref.ref(entry) for entry in entries]
    several, by_number = LongList(entries), LongDict(enumerate(entries))
    kept = entries[:1]
    del entries, several, by_number
    assert [ref() for ref in gone if ref() is not None] == kept


def test_they_are_the_list_and_dict_that_formats_ask_for() -> None:
    several, by_number = LongList([3, 1]), LongDict({3: 1})
    assert several == [3, 1]
    assert by_number == {3: 1}
    assert msgspec.json.encode([several, by_number]) == msgspec.json.encode([[3, 1], {3: 1}])

