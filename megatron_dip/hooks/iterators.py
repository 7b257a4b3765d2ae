"""A data iterator that can look at the next global batch before it hands it out, so that its plan is made one iteration ahead."""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any


class LookaheadIterator:
    """Hands out the items of ``source`` and lets the planner look ahead.

    It stands below Megatron's RerunDataIterator, so that a replay of an iteration is served above it. Other attributes are those of the
    source.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self._source = source
        self._iterator = iter(source)
        self._ahead: deque[Any] = deque()
        self._error: Exception | None = None
        """What the source raised where it was read ahead: raised when that item is due."""
        self._consumed_state: Any = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ahead:
            return self._ahead.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return next(self._iterator)

    def peek(self, count: int) -> list[Any]:
        """The next ``count`` items, which stay to be handed out; fewer when the source ends or fails before."""
        if not self._ahead and hasattr(self._source, "save_state"):
            # Everything read so far has been handed out: this is the state that a checkpoint must hold until the next batch is used up.
            self._consumed_state = copy.deepcopy(self._source.save_state())
        while len(self._ahead) < count and self._error is None:
            try:
                self._ahead.append(next(self._iterator))
            except Exception as error:
                self._error = error
        return list(itertools.islice(self._ahead, count))

    def save_state(self) -> Any:
        """State of the source as of the last whole batch handed out, for Megatron's dataloader checkpoints."""
        return self._consumed_state if self._ahead else self._source.save_state()  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_source" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._source, name)


def find_lookahead(data_iterator: Any) -> LookaheadIterator | None:
    """The look-ahead iterator at or below ``data_iterator`` (Megatron wraps iterators and keeps what they wrap in ``iterable``)."""
    while data_iterator is not None and not isinstance(data_iterator, LookaheadIterator):
        data_iterator = getattr(data_iterator, "iterable", None)
    return data_iterator
