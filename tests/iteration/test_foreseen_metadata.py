"""What is known of items ahead is what will be known of their batch, and knowing it changes nothing."""

from __future__ import annotations

import functools
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.iteration.capture_batch import BatchCapture
from megatron_dip.iteration.foreseen_metadata import HOOK, ForeseenMetadata, script_function
from megatron_dip.iteration.randomness import DrawPlace
from megatron_dip.models.capture import CapturedCall
from megatron_dip.runtime.interface import BoundCall
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Microbatch

CHUNK = torch.nn.Linear(1, 1)


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """As scripts do that pad their samples: what an item holds is known here alone; it draws random numbers and spoils the item."""
    item = next(data_iterator)
    padded = item.pop("padded")
    count = int(item["count"])
    item["count"] += 100
    noise = torch.rand(1) + random.random() + np.random.rand()  # noqa: NPY002 - as scripts do
    return model(padded[:count], noise), lambda output: output


def by_call(call: CapturedCall) -> Microbatch:
    images = call.args[0]
    return {"lm": [10 + 4 * len(images)], **({"vit": [4] * len(images)} if len(images) else {})}


def by_form(item: Any) -> Microbatch:
    raise InputError("data_iterator", type(item).__name__, "is of another form", "give another")


def item_of(images: int) -> dict[str, Any]:
    return {"padded": torch.zeros(4, 2), "count": torch.tensor(images)}


def foreseen(call_metadata: Any = by_call, item_metadata: Any = by_form) -> ForeseenMetadata:
    return ForeseenMetadata(CHUNK, item_metadata, call_metadata, None)


@given(counts=st.lists(st.integers(0, 4), min_size=1, max_size=6))
def test_any_number_of_images_is_seen_ahead_as_the_batch_says_it(counts: list[int]) -> None:
    capture = BatchCapture(
        chunk=CHUNK, metadata=by_form, call_metadata=by_call, call_conditions=None, num_outputs=None,
        bind=lambda call: BoundCall(call, reads_again=False, num_instances={}),
    )
    items = [item_of(count) for count in counts]
    look = foreseen()
    ahead = [look(forward_step, item, place) for place, item in enumerate(items)]
    batch = capture(forward_step, iter(items), len(items), DrawPlace(seed=0, iteration=0, evaluation=0, replica=0))
    assert batch.error is None
    assert ahead == batch.microbatches


def drawn() -> tuple[float, ...]:
    return float(torch.rand(1)), random.random(), float(np.random.rand())  # noqa: NPY002 - as scripts do


def test_an_item_and_the_random_numbers_stay_as_they_were() -> None:
    def start() -> None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002

    item = item_of(3)
    start()
    expected = drawn()
    start()
    assert foreseen()(forward_step, item, 0) == {"vit": [4, 4, 4], "lm": [22]}
    assert drawn() == expected
    assert set(item) == {"padded", "count"}
    assert int(item["count"]) == 3


def test_a_scripts_own_word_counts_first() -> None:
    script: dict[str, Any] = {HOOK: lambda item: {"lm": [7], "vit": []}}
    own = types.FunctionType(forward_step.__code__, script)
    for step in (own, functools.partial(own), functools.wraps(own)(functools.partial(own))):
        assert foreseen()(step, item_of(1), 0) == {"lm": [7]}
    script[HOOK] = lambda item: {"lm": 7}
    said = foreseen()(own, item_of(1), 0)
    assert isinstance(said, InputError)
    assert HOOK in str(said)
    assert script_function(forward_step, HOOK) is None


def test_where_forward_step_cannot_run_ahead_the_items_form_serves() -> None:
    def fails(data_iterator: Any, model: Any) -> Any:
        raise OSError("the store is away")

    form: Any = lambda item: {"lm": [5]}  # noqa: E731
    assert foreseen(item_metadata=form)(fails, item_of(1), 0) == {"lm": [5]}
    with pytest.raises(OSError, match="away"):
        raise foreseen()(fails, item_of(1), 0)  # type: ignore[misc]


def test_a_rank_without_data_learns_by_the_items_form() -> None:
    form: Any = lambda item: {"lm": [5]}  # noqa: E731
    assert foreseen(call_metadata=lambda call: {}, item_metadata=form)(forward_step, item_of(1), 0) == {"lm": [5]}
