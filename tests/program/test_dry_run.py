"""The judge finds what was broken on purpose: dead ends, mismatched channels, lost and doubled actions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dip.program.dry_run import check_program, dry_run
from megatron_dip.program.lower import lower
from megatron_dip.program.program import IRECV, ISEND, WAIT_RECV, WAIT_SEND, Program, ProgramError
from tests.program.graphs import build_graph, random_graph, random_order
from tests.program.naive import naive_dry_run


def _program(seed: int = 0, num_ranks: int = 2) -> Program:
    graph = build_graph(num_ranks, [1, 2], [[2, 1], [1, 1], [0, 1]])
    return lower(graph, random_order(graph, seed))


def _swapped(program: Program, a: int, b: int) -> Program:
    arrays = {name: getattr(program, name).copy() for name in ("op", "stage", "peer", "message")}
    for array in arrays.values():
        array[[a, b]] = array[[b, a]]
    return dataclasses.replace(program, **arrays)


def _without(program: Program, a: int) -> Program:
    arrays = {name: np.delete(getattr(program, name), a) for name in ("op", "stage", "peer", "message")}
    offset = program.action_offset - (program.action_offset > a)
    return dataclasses.replace(program, action_offset=offset, **arrays)


def _first(program: Program, op: int) -> int:
    return int(np.flatnonzero(program.op == op)[0])


@pytest.mark.parametrize("op", [0, 1, ISEND, IRECV, WAIT_SEND, WAIT_RECV])
def test_a_lost_action_is_found(op: int) -> None:
    program = _program()
    with pytest.raises(ProgramError):
        check_program(_without(program, _first(program, op)))


def test_swapped_receives_of_one_channel_are_found_and_marked() -> None:
    program = _program()
    receives = [int(a) for a in np.flatnonzero(program.op == IRECV) if a < program.action_offset[1]]
    a, b = receives[0], receives[1]
    with pytest.raises(ProgramError, match=r"another order than the sends[\s\S]*> irecv\d+<1 <"):
        check_program(_swapped(program, a, b))


def test_a_wait_before_its_post_is_found() -> None:
    program = _program()
    post = _first(program, IRECV)
    wait = next(a for a in np.flatnonzero(program.op == WAIT_RECV) if program.message[a] == program.message[post])
    with pytest.raises(ProgramError, match="waited for twice or before it is posted"):
        check_program(_swapped(program, post, int(wait)))


def test_ranks_that_wait_for_each_other_are_reported_with_the_grid() -> None:
    program = _program()
    # Each rank waits for its first send right away, before it has posted any receive: rendezvous sends cannot end.
    order = []
    for first, last in zip(program.action_offset[:-1], program.action_offset[1:], strict=True):
        actions = list(range(first, last))
        receives = [a for a in actions if program.op[a] == IRECV]
        sends = [a for a in actions if program.op[a] in (ISEND, WAIT_SEND)]
        rest = [a for a in actions if a not in receives and a not in sends]
        order += sorted(sends, key=lambda a: (program.message[a], program.op[a])) + receives + rest
    stuck = dataclasses.replace(program, **{name: getattr(program, name)[order] for name in ("op", "stage", "peer", "message")})
    with pytest.raises(ProgramError, match=r"deadlock: ranks \[0, 1\] wait for each other[\s\S]*> wait_send\d+>1 <"):
        dry_run(stuck)
    assert not naive_dry_run(stuck)


@given(st.integers(0, 10_000), st.integers(2, 4), st.data())
@settings(max_examples=80, deadline=None)
def test_the_kernels_judge_shuffled_programs_as_their_slow_twin(seed: int, num_ranks: int, data: st.DataObject) -> None:
    graph = random_graph(seed, num_ranks)
    program = lower(graph, random_order(graph, seed))
    if len(program.op) < 2:
        return
    for _ in range(data.draw(st.integers(1, 4))):
        rank = data.draw(st.integers(0, num_ranks - 1))
        first, last = program.action_offset[rank : rank + 2]
        if last - first >= 2:
            a = data.draw(st.integers(int(first), int(last) - 2))
            program = _swapped(program, a, a + 1)
    try:
        check_program(program)
        dry_run(program)
    except ProgramError:
        return
    assert naive_dry_run(program)
