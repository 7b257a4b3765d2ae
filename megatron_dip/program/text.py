"""The one text form of actions, which reads back exactly; used in tests, errors, profiler ranges and printed programs.

| text | action |
|---|---|
| ``F12`` ``B13`` ``W14`` | forward, backward (its input part when split), weight part of the stage with that id |
| ``isend5>1`` ``irecv5<0`` | post the send of message (tag) 5 to rank 1, the receive of message 5 from rank 0 |
| ``wait_send5>1`` ``wait_recv5<0`` | wait for them |
| ``isend5>1@2`` | the same, as part of the batched call number 2 |

A program is one line a rank: ``0: F0 isend0>1 ...``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import COMPUTE_OPS, Action

_LETTER = {"fw": "F", "bw": "B", "w": "W"}
_OP = {letter: op for op, letter in _LETTER.items()}
_PATTERN = re.compile(r"(?:([FBW])(\d+))|(?:(isend|irecv|wait_send|wait_recv)(\d+)([<>])(\d+)(?:@(\d+))?)")


def format_action(action: Action) -> str:
    """The text form of one action."""
    if action.op in COMPUTE_OPS:
        return f"{_LETTER[action.op]}{action.stage}"
    arrow = ">" if action.op in ("isend", "wait_send") else "<"
    group = "" if action.group is msgspec.UNSET else f"@{action.group}"
    return f"{action.op}{action.tag}{arrow}{action.peer}{group}"


def parse_action(text: str) -> Action:
    """Reads :func:`format_action`'s text back. Raises InputError for anything else."""
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise InputError("action", text, "is not the text of an action", "write F3, B3, W3, isend7>1, irecv7<0, wait_send7>1 or wait_recv7<0")
    letter, stage, op, tag, arrow, peer, group = match.groups()
    if letter is not None:
        return Action(op=_OP[letter], stage=int(stage))  # type: ignore[arg-type]
    if (arrow == ">") != op.endswith("send"):
        raise InputError("action", text, f"{op} cannot point {arrow!r}", "use > for sends and < for receives")
    if group is not None and op.startswith("wait"):
        raise InputError("action", text, "a wait stands in no group", "leave the @ part out")
    return Action(op=op, tag=int(tag), peer=int(peer), group=msgspec.UNSET if group is None else int(group))  # type: ignore[arg-type]


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
