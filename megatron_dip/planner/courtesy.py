"""Manners of threads that plan beside training: they keep the interpreter's lock for moments only.

Compiled kernels run without the lock. What is left is Python: a thread that runs it is asked for the lock after the interpreter's switch
interval (5 ms by default, which training would wait at every call into torch that comes back), and a garbage collection keeps it until
it is through: a tenth of a second where a full one is set off by the many small objects of a plan.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Iterator

SWITCH_S = 0.0005
"""After so long a thread that runs Python is asked to let others run."""

_lock = threading.Lock()
_holders = 0
_was_enabled = False


def switch_often() -> None:
    """Shortens the interpreter's switch interval to :data:`SWITCH_S`, for all threads of the process."""
    if sys.getswitchinterval() > SWITCH_S:
        sys.setswitchinterval(SWITCH_S)


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Keeps automatic garbage collection off, for all threads, until the last block that asked for it ends.

    For blocks of Python that make many objects in a short time and no cycles. No object changes its generation by it: cycles that other
    threads make meanwhile are as young as ever, and the next collections find them.
    """
    global _holders, _was_enabled
    with _lock:
        if _holders == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders -= 1
            if _holders == 0 and _was_enabled:
                gc.enable()


YOUNG_EVERY = 20
"""Iterations from one collection of the young objects to the next."""
ALL_EVERY = 500
"""Iterations from one collection of all objects to the next; a multiple of the former. It takes some tenths of a second."""


class FixedCollections:
    """Garbage collections at fixed iterations, so that all ranks collect at the same time and none waits for another's collection.

    The automatic ones stay on beside them. They are rarely due then, and off while a thread plans (:func:`no_collections`): threads
    that plan all the time would else keep every cycle alive. Where the user has turned collection off (``gc.disable``, Megatron's
    ``--manual-gc``) it is the user's business, and nothing is collected here.

    Source: torchtitan's ``tools/utils.py``, ``GarbageCollection``.
    """

    def __init__(self) -> None:
        self._iterations = 0

    def step(self) -> None:
        """To be called once in every iteration, on every rank."""
        self._iterations += 1
        if self._iterations % YOUNG_EVERY == 0 and _is_wanted():
            gc.collect(2 if self._iterations % ALL_EVERY == 0 else 1)


def _is_wanted() -> bool:
    """Whether garbage collection is on, but for blocks that keep it off for a moment."""
    with _lock:
        return _was_enabled if _holders else gc.isenabled()
