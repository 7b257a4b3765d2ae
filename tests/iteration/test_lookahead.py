"""Looking ahead changes nothing for who consumes the data, and checkpoints see only what was consumed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.rerun_state_machine import RerunDataIterator

from megatron_dip.iteration.lookahead import LookaheadIterator, find_lookahead


class Source:
    """A loader that counts what was read from it, with a state as Megatron's energon loader has one."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.read = 0
        self.name = "source"

    def __iter__(self) -> Iterator[int]:
        while self.read < self.length:
            self.read += 1
            yield self.read - 1

    def save_state(self) -> dict[str, int]:
        return {"read": self.read}


def test_items_come_in_order_whether_peeked_or_not() -> None:
    iterator = LookaheadIterator(Source(7))
    assert [next(iterator), next(iterator)] == [0, 1]
    assert iterator.peek(3) == [2, 3, 4]
    assert iterator.peek(3) == [2, 3, 4]
    assert [next(iterator) for _ in range(4)] == [2, 3, 4, 5]
    assert list(iterator) == [6]


def test_peeking_beyond_the_end_loses_nothing() -> None:
    iterator = LookaheadIterator(Source(3))
    assert iterator.peek(4) == [0, 1, 2]
    assert list(iterator) == [0, 1, 2]


def _broken() -> Iterator[int]:
    yield 0
    yield 1
    raise OSError("disk gone")


def test_an_error_of_the_source_comes_when_its_item_is_due() -> None:
    iterator = LookaheadIterator(_broken())
    assert iterator.peek(4) == [0, 1]
    assert iterator.peek(4) == [0, 1]
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(iterator)
    assert list(iterator) == []


def test_the_state_is_that_of_the_last_batch_handed_out() -> None:
    iterator = LookaheadIterator(Source(100))
    for consumed in range(0, 12, 4):
        batch = [next(iterator) for _ in range(4)]
        assert batch == list(range(consumed, consumed + 4))
        iterator.peek(4)
        assert iterator.save_state() == {"read": consumed + 4}


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), look_ahead=st.integers(1, 3), saved=st.integers(0, 7), seed=st.integers(0, 99))
def test_items_that_change_replicas_are_handed_out_once_also_by_a_run_that_goes_on(
    sizes: list[int], look_ahead: int, saved: int, seed: int
) -> None:
    """Two replicas that deal every batch: the state behind a batch is the one behind what its own source gave, whoever trained it."""
    random = np.random.default_rng(seed)
    expected = [sorted(range(2 * sum(sizes[:step]), 2 * sum(sizes[: step + 1]))) for step in range(len(sizes))]

    def train(first_step: int, states: list[dict[str, int]]) -> tuple[list[list[int]], list[list[dict[str, int]]]]:
        """What both handed out together in each step, and their states behind it."""
        sources = [Source(1000) for _ in range(2)]
        for source, state in zip(sources, states, strict=True):
            source.read = state["read"]
        # Replica r of two reads number 2 i + r of the data set.
        iterators = [LookaheadIterator(Numbered(source, replica)) for replica, source in enumerate(sources)]
        steps, behind = [], []
        for step in range(first_step, len(sizes)):
            own = [iterator.peek(sizes[step]) for iterator in iterators]
            dealt = random.permutation([item for items in own for item in items]).tolist()
            for iterator, share in zip(iterators, (dealt[: sizes[step]], dealt[sizes[step] :]), strict=True):
                iterator.replace(share)
            steps.append(sorted(next(iterator) for iterator in iterators for _ in range(sizes[step])))
            for iterator in iterators:
                for ahead in range(1, look_ahead + 1):
                    iterator.peek(sum(sizes[step + 1 : step + 1 + ahead]))
            behind.append([iterator.save_state() for iterator in iterators])
        return steps, behind

    whole, states = train(0, [{"read": 0}] * 2)
    assert whole == expected
    step = saved % len(sizes)
    assert train(step + 1, states[step])[0] == expected[step + 1 :]


class Numbered:
    """A source's items as numbers in the data set that two replicas share."""

    def __init__(self, source: Source, replica: int) -> None:
        self.source, self.replica = source, replica

    def __iter__(self) -> Iterator[int]:
        return (2 * item + self.replica for item in self.source)

    def save_state(self) -> dict[str, int]:
        return self.source.save_state()


def test_batches_of_foreseen_sizes_are_described_once() -> None:
    iterator = LookaheadIterator(Source(9))
    described = []

    def describe(item: int) -> str:
        described.append(item)
        return f"<{item}>"

    assert next(iterator) == 0
    assert iterator.look_ahead([1, 2], describe) == [["<1>"], ["<2>", "<3>"]]
    assert next(iterator) == 1
    assert iterator.look_ahead([2, 3, 2], describe) == [["<2>", "<3>"], ["<4>", "<5>", "<6>"], ["<7>", "<8>"]]
    assert iterator.look_ahead([2, 3, 3], describe) == [["<2>", "<3>"], ["<4>", "<5>", "<6>"]]  # the source cannot fill the last one
    assert described == list(range(1, 9))
    assert list(iterator) == list(range(2, 9))


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_state_is_exact_however_far_ahead_is_read(iterations: int) -> None:
    iterator = LookaheadIterator(Source(1000))
    sizes = [2, 2, 4, 6, 8, 8, 8, 8]
    consumed = 0
    for number, size in enumerate(sizes[:-iterations]):
        assert [next(iterator) for _ in range(size)] == list(range(consumed, consumed + size))
        consumed += size
        iterator.look_ahead(sizes[number + 1 : number + 1 + iterations], lambda item: item)
        iterator.look_ahead(sizes[number + 1 : number + 1 + iterations], lambda item: item)  # as after an iteration that is run again
        assert iterator.save_state() == {"read": consumed}


def test_a_state_inside_of_a_batch_is_the_one_before_it_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    iterator = LookaheadIterator(Source(100))
    iterator.look_ahead([4, 4], lambda item: item)
    assert [next(iterator) for _ in range(6)] == list(range(6))
    assert iterator.save_state() == {"read": 4}
    assert "the last 2 items will come again" in caplog.text


def test_a_source_that_cannot_save_gives_no_state() -> None:
    iterator = LookaheadIterator(iter(range(4)))
    assert iterator.look_ahead([2], str) == [["0", "1"]]
    assert not hasattr(iterator, "save_state")  # Megatron then says so


def test_no_state_is_copied_unless_it_can_be_asked_for() -> None:
    class Dear(Source):
        def save_state(self) -> dict[str, int]:
            raise AssertionError("a worker process would have to be asked")

    iterator = LookaheadIterator(Dear(9), keep_state=False)
    assert iterator.look_ahead([2, 2], str) == [["0", "1"], ["2", "3"]]
    assert not hasattr(iterator, "save_state")


def test_other_attributes_are_the_sources() -> None:
    iterator = LookaheadIterator(Source(1))
    assert iterator.name == "source"
    with pytest.raises(AttributeError):
        _ = iterator.missing


def test_it_is_found_below_megatrons_wrapper() -> None:
    lookahead = LookaheadIterator(Source(4))
    assert find_lookahead(RerunDataIterator(lookahead)) is lookahead
    assert find_lookahead(lookahead) is lookahead
    assert find_lookahead(iter([1])) is None
    assert find_lookahead(None) is None
