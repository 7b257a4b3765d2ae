"""Starts the ranks of a run on this machine and watches over them, where no torchrun does; ends a rank's process.

Every rank is a process with the variables that torchrun sets, in a session of its own together with what it starts (Megatron's writers
of checkpoints). When one ends badly the others are given a short time to say what they know and are then ended: a run never hangs on a
dead rank. Behind a run, however it ended, no process of these sessions is left: also where this process is killed, for a guard that
reads from a pipe of this process's then ends them.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from megatron_dip.spec.errors import EXIT_CODE, InputError

EXPECTED_WARNINGS = ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated")
"""What Megatron-Core says of every import without its optional packages."""

GRACE_S = 5.0
"""After a rank ended badly: time for the others to end by themselves."""

_GUARD = """
import os, signal, sys
sessions = set()
for line in sys.stdin:
    sessions.add(int(line))
    if line.startswith("0"):
        sys.exit()
for session in sessions:
    try:
        os.killpg(session, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""
"""Reads the sessions to end, one a line, until the pipe ends; behind a 0 there is nothing left to do."""


def is_rank() -> bool:
    """Whether torchrun, or :func:`run_ranks`, started this process as one rank of a run."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(command: Sequence[str], num_ranks: int, *, threads: int) -> int:
    """Runs ``command`` as ``num_ranks`` ranks; returns 0, or the exit code of the rank that ended badly first.

    Args:
        threads: of each rank's tensor operations.
    """
    environment = {
        **os.environ, "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
        # Host names do not resolve everywhere; these ranks talk over the loopback device.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", ",".join(f"ignore:{start}" for start in EXPECTED_WARNINGS)),
    }
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True, text=True, bufsize=1,
    )
    ranks: list[subprocess.Popen[bytes]] = []
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        for rank in range(num_ranks):
            ranks.append(subprocess.Popen(
                command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=subprocess.DEVNULL, start_new_session=True
            ))
            _tell(guard, ranks[-1].pid)
        return _watch(ranks)
    finally:
        _end(ranks)
        _tell(guard, 0)
        guard.wait()
        signal.signal(signal.SIGTERM, previous)


def run_rank(work: Callable[[], object], *, needed: Sequence[str] = ()) -> NoReturn:
    """Does a rank's work, says what went wrong, and ends this process with 0, with EXIT_CODE after a user's mistake, else with 1.

    The interpreter's ordinary end would wait for threads and groups that may hang on a dead rank. What it would do besides is done here:
    processes that were started by ``multiprocessing`` are ended, for they keep the run's output open.

    Args:
        needed: modules without which the work cannot begin; a missing one is named, with how to install it.
    """
    code = _run(work, needed)
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)


def _run(work: Callable[[], object], needed: Sequence[str]) -> int:
    name = f"rank {os.environ.get('RANK', '0')}"
    try:
        for module in needed:
            importlib.import_module(module)
    except ImportError as error:
        _say(f"{name}: {error.name} = cannot be imported ({error}): training needs it. Remedy: pip install 'megatron-dip[train]'.")
        return EXIT_CODE
    try:
        work()
    except InputError as error:
        _say(f"{name}: {error}")
        return EXIT_CODE
    except Exception:
        _say(f"{name}:\n{traceback.format_exc()}")
        return 1
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _say(error: str) -> None:
    """In one piece: ranks that fail together write to the same terminal."""
    sys.stderr.write(f"megatron-dip: error: {error}\n")


def _tell(guard: subprocess.Popen[str], session: int) -> None:
    assert guard.stdin is not None
    with contextlib.suppress(OSError):  # somebody killed the guard: the run goes on without it
        guard.stdin.write(f"{session}\n")
        guard.stdin.flush()
        if session == 0:
            guard.stdin.close()


def _watch(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    while True:
        codes = [rank.poll() for rank in ranks]
        bad = [(number, code) for number, code in enumerate(codes) if code]
        if bad:
            break
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)
    number, code = bad[0]
    deadline = time.monotonic() + GRACE_S
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)
    # A rank that was killed explains the complaints of the others, whichever was seen first.
    number, code = next(((n, rank.returncode) for n, rank in enumerate(ranks) if (rank.returncode or 0) < 0), (number, code))
    if code == EXIT_CODE:
        return code  # the rank has said what is wrong
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    _say(
        f"rank {number} {how}; the other ranks were ended. Remedy: see its output above; a run with --save goes on from its last checkpoint "
        "with --load."
    )
    return 1 if code < 0 else code


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends the ranks and everything that they started."""
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)  # a stopped process takes no other signal
    for rank in ranks:
        rank.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
