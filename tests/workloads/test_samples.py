"""Samples of a user's data: read strictly, packed in order, none lost."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.spec.errors import InputError
from megatron_dip.workloads.huggingface import ImageRule
from megatron_dip.workloads.samples import STATISTICS, Sample, draw_samples, pack_samples, read_samples

RULE = ImageRule(patch=14, merge=2)
SAMPLES = st.lists(
    st.builds(
        Sample, text=st.integers(0, 300), images=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)).map(list), max_size=3)
    ),
    max_size=20,
)


@given(SAMPLES)
def test_packing_keeps_all_tokens_in_order_and_within_the_sequence(samples: list[Sample]) -> None:
    packed = pack_samples(samples, RULE, 1000, 1 << 20)
    vision = [length for sample in samples for width, height in sample.images for length in RULE.lengths(width, height).vision]
    tokens = sum(sample.text + sum(RULE.lengths(*size).text for size in sample.images) for sample in samples)
    assert [length for microbatch in packed for length in microbatch.get("vit", [])] == vision
    assert sum(microbatch["lm"][0] for microbatch in packed) == tokens
    assert all(0 < microbatch["lm"][0] <= 1000 for microbatch in packed)


def test_a_sample_longer_than_a_sequence_loses_its_last_images() -> None:
    (only,) = pack_samples([Sample(text=5, images=[[280, 280]] * 4)], RULE, 250, 10)
    assert only == {"vit": [400, 400], "lm": [205]}


@pytest.mark.parametrize("statistics", STATISTICS)
def test_drawn_samples_are_the_same_for_the_same_seed(statistics: str) -> None:
    first, again = (list(itertools.islice(draw_samples(statistics, 3), 50)) for _ in range(2))
    assert first == again
    assert any(sample.images for sample in first) == (statistics != "text")


@pytest.mark.parametrize(
    ("line", "said"),
    [('{"text": -1}', "line 2: text"), ('{"images": [[0, 5]]}', "line 2: images"), ('{"txet": 5}', "line 2"), ("[1]", "line 2"), ("{", "line 2"),
     ("{}", "neither text nor images"), ('{"text": 1e99}', "line 2")],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"text": 5}\n' + line + "\n")
    with pytest.raises(InputError, match=said):
        read_samples(path, "--data")
