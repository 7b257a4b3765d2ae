"""Whole programs as text: one line a rank (``0: F0 isend0>1 ...``, reads back exactly), and as a grid with the bad cell marked.

The form of a single action is :mod:`megatron_dip.spec.action_text`.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dip.spec.action_text import format_action, parse_action
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Action


def format_program(actions: Sequence[Sequence[Action]]) -> str:
    """All ranks' actions, one line a rank."""
    return "\n".join(f"{rank}: {' '.join(map(format_action, row))}".rstrip() for rank, row in enumerate(actions))


def parse_program(text: str) -> list[list[Action]]:
    """Reads :func:`format_program`'s text back."""
    rows = []
    for index, line in enumerate(line for line in text.splitlines() if line.strip()):
        head, colon, rest = line.partition(":")
        if not colon or head.strip() != str(index):
            raise InputError(f"program line {index}", line, f"does not begin with '{index}:'", "write one line for each rank, in order")
        rows.append([parse_action(word) for word in rest.split()])
    return rows


def format_grid(cells: Sequence[Sequence[str]], marked: Sequence[int], *, before: int = 6, after: int = 3) -> str:
    """A window of every rank's actions, one column a rank, the row of each rank's marked cell on one line between ``>`` and ``<``.

    Args:
        cells: text of each rank's actions.
        marked: for each rank the index of the cell to mark (its length = behind the last action, -1 = nothing to mark: the beginning
            is shown).
    """
    rows = range(-before, after + 1)
    columns = []
    for texts, mark in zip(cells, marked, strict=True):
        centre = before if mark < 0 else mark
        column = []
        for row in rows:
            index = centre + row
            text = texts[index] if 0 <= index < len(texts) else "end" if index == len(texts) else ""
            column.append(f"> {text} <" if index == mark else f"  {text}")
        columns.append(column)
    widths = [max(8, *(len(text) for text in column)) for column in columns]
    lines = [" | ".join(f"rank {rank}".ljust(width) for rank, width in enumerate(widths)).rstrip()]
    for line in zip(*columns, strict=True):
        if any(text.strip() for text in line):
            lines.append(" | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    return "\n".join(lines)
