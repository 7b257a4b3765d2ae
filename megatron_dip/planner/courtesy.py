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

    For blocks of Python that make many objects in a short time and no cycles. What was made meanwhile then counts as old: the first
    collection afterwards would otherwise look at all of it with the lock held. (Freezing and unfreezing moves lists of objects, not
    objects. A process that has frozen some itself keeps them frozen, and pays that collection.)
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
                if gc.get_freeze_count() == 0:
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()
