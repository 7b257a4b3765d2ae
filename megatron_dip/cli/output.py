"""What commands share of talking to people and programs: tables and JSON on standard output, progress on standard error."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

_WIDTH = 160
"""Columns where no terminal says how wide it is: whole tables."""
_EVERY_S = 10.0
"""Between lines of progress where no terminal shows it changing."""


def tables() -> Console:
    """Standard output. Square brackets in names are what they are, no markup."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH, markup=False, highlight=False)


def messages() -> Console:
    """Standard error."""
    return Console(stderr=True, markup=False, highlight=False)


def print_json(value: Any) -> None:
    """One JSON object on one line of standard output."""
    print(msgspec.json.encode(value).decode())


@contextlib.contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being done until the block ends; gives a function that changes it.

    On a terminal the line changes in place. Elsewhere it is a line for the beginning and then one every ten seconds at most, so that nobody
    takes a long command for a hanging one.
    """
    console = messages()
    if console.is_terminal:
        with console.status(Text(text)) as status:
            yield lambda changed: status.update(Text(changed))
        return
    said = time.monotonic()
    console.print(f"megatron-dip: {text}", soft_wrap=True)

    def change(changed: str) -> None:
        nonlocal said
        if time.monotonic() - said >= _EVERY_S:
            said = time.monotonic()
            console.print(f"megatron-dip: {changed}", soft_wrap=True)

    yield change
