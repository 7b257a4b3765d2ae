"""The text form of actions reads back exactly and refuses everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.program.lower import lower
from megatron_dip.program.text import format_grid, format_program, parse_program
from megatron_dip.spec.action_text import format_action, parse_action
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Action
from tests.program.graphs import build_graph, random_order

number = st.integers(0, 10**6)
actions = st.one_of(
    st.builds(Action, op=st.sampled_from(["fw", "bw", "w"]), stage=number),
    st.builds(Action, op=st.sampled_from(["isend", "irecv", "wait_send", "wait_recv"]), peer=number, tag=number),
    st.builds(Action, op=st.sampled_from(["isend", "irecv"]), peer=number, tag=number, group=number),
)


@given(actions)
def test_every_action_reads_back(action: Action) -> None:
    assert parse_action(format_action(action)) == action


@given(st.lists(st.lists(actions, max_size=5), max_size=4))
def test_every_program_reads_back(rows: list[list[Action]]) -> None:
    assert parse_program(format_program(rows)) == rows


def test_the_form_of_a_small_program() -> None:
    graph = build_graph(2, [1], [[1]])
    rows = lower(graph, random_order(graph, 0)).actions()
    assert format_program(rows) == (
        "0: F0 isend0>1 irecv1<1 wait_recv1<1 B3 wait_send0>1\n"
        "1: irecv0<0 wait_recv0<0 F1 B2 isend1>0 wait_send1>0"
    )


@pytest.mark.parametrize("text", ["", "F", "f3", "isend3", "isend3<1", "irecv3>1", "wait_send3>1@2", "F-1", "X3"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="action"):
        parse_action(text)


def test_a_program_line_without_its_rank_is_refused() -> None:
    with pytest.raises(InputError, match="program line 1"):
        parse_program("0: F0\n2: F1")


def test_the_grid_marks_the_cell_of_each_rank_on_one_line() -> None:
    grid = format_grid([["F0", "F1", "B2"], ["F3"]], [1, 1], before=1, after=1)
    assert grid.splitlines() == ["rank 0   | rank 1", "  F0     |   F3", "> F1 <   | > end <", "  B2     |"]
