"""Lists and dicts of tens of thousands of entries that are let go slice by slice.

Freeing a plan's stages in one go holds the interpreter's lock for as long as it takes, whichever thread drops the last reference: some
milliseconds, in which training cannot issue work. Here the entries go in a loop of Python, between whose steps other threads run.
Otherwise these are the list and dict that formats and annotations ask for.
"""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

SLICE = 256
"""Entries freed at once: some hundredths of a millisecond."""


class LongList(list[T]):
    def __del__(self) -> None:
        while self:
            del self[-SLICE:]


class LongDict(dict[K, V]):
    def __del__(self) -> None:
        while self:
            self.popitem()
