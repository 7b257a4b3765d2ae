"""A data iterator that can look at the next global batches before it hands them out, so that their plans are made ahead."""

from __future__ import annotations

import copy
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Read:
    """An item that was read and not handed out yet."""

    item: Any
    description: Any = None
    """What :meth:`LookaheadIterator.look_ahead` was told of it; None: it has not been asked for."""


class LookaheadIterator:
    """Hands out the items of ``source`` and lets the planner look ahead.

    It stands below Megatron's RerunDataIterator, so that a replay of an iteration is served above it. Where the source can save its
    state, so can this iterator: the state is the one that the source had when it had given just the items handed out so far. Other
    attributes are those of the source.

    Args:
        keep_state: whether ``save_state`` can be asked for; it costs a copy of the source's state for every batch that is read ahead.
    """

    def __init__(self, source: Iterable[Any], *, keep_state: bool = True) -> None:
        self._source = source
        self._keep_state = keep_state
        self._iterator = iter(source)
        self._ahead: deque[_Read] = deque()
        self._error: Exception | None = None
        """What the source raised where it was read ahead: raised when that item is due."""
        self._num_handed_out = 0
        self._states: deque[tuple[int, Any]] = deque()
        """Number of items read before -> the source's state then, at the batches' starts; the first is at or before what is handed out."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ahead:
            item = self._ahead.popleft().item
        elif self._error is not None:
            error, self._error = self._error, None
            raise error
        else:
            item = next(self._iterator)
        self._num_handed_out += 1
        return item

    def peek(self, count: int) -> list[Any]:
        """The next ``count`` items, which stay to be handed out; fewer when the source ends or fails before."""
        self._read(count)
        return [read.item for read in itertools.islice(self._ahead, count)]

    def look_ahead(self, sizes: Sequence[int], describe: Callable[[Any], Any]) -> list[list[Any]]:
        """Describes the items of the next batches, of ``sizes`` items; those that the source can fill. Every item is described once."""
        batches = []
        first = 0
        for size in sizes:
            self._read(first + size)
            if len(self._ahead) < first + size:
                break
            batch = list(itertools.islice(self._ahead, first, first + size))
            for read in batch:
                if read.description is None:
                    read.description = describe(read.item)
            batches.append([read.description for read in batch])
            first += size
        return batches

    def replace(self, items: Sequence[Any]) -> None:
        """Puts these items, of which the source knows nothing, in the place of as many next ones. They count as its own."""
        self._read(len(items))
        assert len(self._ahead) >= len(items), "only what is ahead can be replaced"
        for index, item in enumerate(items):
            self._ahead[index] = _Read(item)

    def _read(self, count: int) -> None:
        """Reads until ``count`` items are ahead. What is ahead before is taken for whole batches: here the source's state is kept."""
        if len(self._ahead) < count and self._keep_state and hasattr(self._source, "save_state"):
            while self._states and (not self._ahead or (len(self._states) > 1 and self._states[1][0] <= self._num_handed_out)):
                self._states.popleft()
            position = self._num_handed_out + len(self._ahead)
            if not self._states or self._states[-1][0] < position:
                self._states.append((position, copy.deepcopy(self._source.save_state())))
        while len(self._ahead) < count and self._error is None:
            try:
                self._ahead.append(_Read(next(self._iterator)))
            except Exception as error:
                self._error = error

    def _save_state(self) -> Any:
        """State of the source as of the last item handed out, for Megatron's dataloader checkpoints: exact at the ends of batches."""
        if not self._ahead:
            return self._source.save_state()  # type: ignore[attr-defined]
        position, state = [known for known in self._states if known[0] <= self._num_handed_out][-1]
        if position != self._num_handed_out:
            logger.warning(
                "the data loader's state is saved inside of a batch: after resuming from it, the last %d items will come again",
                self._num_handed_out - position,
            )
        return state

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_source" not in self.__dict__:
            raise AttributeError(name)
        attribute = getattr(self._source, name)
        if name != "save_state":
            return attribute
        if not self._keep_state:
            raise AttributeError(name)
        return self._save_state


def find_lookahead(data_iterator: Any) -> LookaheadIterator | None:
    """The look-ahead iterator at or below ``data_iterator`` (Megatron wraps iterators and keeps what they wrap in ``iterable``)."""
    while data_iterator is not None and not isinstance(data_iterator, LookaheadIterator):
        data_iterator = getattr(data_iterator, "iterable", None)
    return data_iterator
