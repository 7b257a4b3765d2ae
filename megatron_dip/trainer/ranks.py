"""Starts the ranks of a run on this machine and watches over them, where no torchrun does.

Every rank is a process with the variables that torchrun sets. When one ends badly the others are given a short time to say what they
know and are then ended: a run never hangs on a dead rank.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from megatron_dip.spec.errors import EXIT_CODE

EXPECTED_WARNINGS = ("Transformer Engine and Apex are not installed", "Apex is not installed", "full scope is deprecated")
"""What Megatron-Core says of every import without its optional packages."""

GRACE_S = 5.0
"""After a rank ended badly: time for the others to end by themselves."""


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
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=subprocess.DEVNULL)
        for rank in range(num_ranks)
    ]
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return _watch(ranks)
    finally:
        _end(ranks)
        signal.signal(signal.SIGTERM, previous)


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
    print(
        f"megatron-dip: error: rank {number} {how}; the other ranks were ended. Remedy: see its output above; "
        "a run with --save goes on from its last checkpoint with --load.",
        file=sys.stderr,
    )
    return 1 if code < 0 else code


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            # A stopped process takes no other signal.
            rank.kill()
    for rank in ranks:
        rank.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
