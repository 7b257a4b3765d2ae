"""The one text form of an action, which reads back exactly; used in printed programs, tests, errors and profiler ranges.

| text | action |
|---|---|
| ``F12`` ``B13`` ``W14`` | forward, backward (its input part when split), weight part of the stage with that id |
| ``isend5>1`` ``irecv5<0`` | post the send of message (tag) 5 to rank 1, the receive of message 5 from rank 0 |
| ``wait_send5>1`` ``wait_recv5<0`` | wait for them |
| ``isend5>1@2`` | the same, as part of the batched call number 2 |
"""

from __future__ import annotations

import re

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
