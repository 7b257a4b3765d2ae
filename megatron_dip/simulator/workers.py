"""Processes that share out independent trials, so that a search over layouts uses more than one core.

In: a function and the values to try. Out: its results as they come. Workers are forked: what the function holds is not copied by hand, only
values and results travel. They end with the process that started them, whichever way it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from megatron_dip.spec.errors import InputError

_Value = TypeVar("_Value")
_Result = TypeVar("_Result")

_function: Callable[[Any], Any] | None = None
"""What a worker runs, set where it is forked."""


class Workers(Generic[_Value, _Result]):
    """Runs ``function`` on values, on up to ``count`` processes; with one, in this process.

    Args:
        function: what it changes besides stays with the process that runs it.
        count: processes.
    """

    def __init__(self, function: Callable[[_Value], _Result], count: int) -> None:
        self._run, self._count = function, count
        self._before = set(multiprocessing.active_children())
        self._pool: ProcessPoolExecutor | None = None
        if count > 1:
            self._pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork"), initializer=_begin, initargs=(function,))

    def __enter__(self) -> Workers[_Value, _Result]:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is None:
            return
        # Nobody waits for trials that are under way when something ends the search.
        for process in set(multiprocessing.active_children()) - self._before if error[0] is not None else ():
            process.kill()
        self._pool.shutdown(wait=error[0] is None, cancel_futures=True)

    def results(self, values: Iterator[_Value]) -> Iterator[_Result]:
        """Results in the order in which they are done. A value is taken when a process is free for it, so ``values`` may go by results.

        Raises:
            InputError: a process was ended from outside.
        """
        if self._pool is None:
            yield from map(self._run, values)
            return
        running: set[Future[_Result]] = set()
        try:
            while True:
                while len(running) < self._count and (value := next(values, None)) is not None:
                    running.add(self._pool.submit(_one, value))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except BrokenProcessPool as error:
            raise InputError("processes", self._count, "one of them was ended from outside", "free some memory and try again") from error


def cores(most: int) -> int:
    """Cores that this process may use, at most ``most``."""
    return min(most, len(os.sched_getaffinity(0)))


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # The parent hears Ctrl-C and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _one(value: Any) -> Any:
    assert _function is not None
    return _function(value)
