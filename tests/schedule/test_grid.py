"""Grids print and read back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.schedule.grid import Cell, format_grid, parse_grid
from megatron_dip.spec.errors import InputError

cell = st.builds(
    Cell, module=st.sampled_from(["vit", "lm", "audio-2", "m.1"]), vp_stage=st.integers(0, 12), kind=st.sampled_from(["fw", "bw", "w"]),
    microbatch=st.integers(0, 300), sub_microbatch=st.integers(0, 12),
)


@given(cells=st.lists(st.lists(cell, max_size=6), min_size=1, max_size=12), marked=st.sets(st.tuples(st.integers(0, 11), st.integers(0, 5))))
def test_a_grid_reads_back_with_and_without_marks(cells: list[list[Cell]], marked: set[tuple[int, int]]) -> None:
    assert parse_grid(format_grid(cells, marked)) == cells


def test_the_text_is_what_the_documentation_says() -> None:
    cells = [[Cell("vit", 0, "fw", 3, 1), Cell("lm", 0, "fw", 3, 0)], [Cell("vit", 0, "fw", 3, 1)]]
    assert format_grid(cells, {(1, 0)}) == "rank 0 | vit:0F3.1   lm:0F3.0\nrank 1 | >vit:0F3.1<\n"


@pytest.mark.parametrize(("text", "problem"), [
    ("rank 1 | lm:0F0.0", "does not start with 'rank 0"), ("lm:0F0.0", "does not start"), ("rank 0 | lm:0X0.0", "not a cell"),
    ("rank 0 | lm:0F0", "not a cell"), ("rank 0 |\nrank 0 |", "does not start with 'rank 1"),
])
def test_a_broken_grid_names_its_line(text: str, problem: str) -> None:
    with pytest.raises(InputError, match="line .*" + problem):
        parse_grid(text)
