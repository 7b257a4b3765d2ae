"""Runs a function on N gloo processes and gives back what each returned.

``launch(function, num_ranks, *args)`` calls ``function(rank, num_ranks, *args)`` in N processes that share a gloo process group. The
function must be importable (a module-level function of a test file); arguments and results travel by pickle. Processes come from a
fork server that has torch and Megatron-Core imported already, so a launch takes tenths of a second and starts from clean state each
time. Each process runs one thread; all are killed when the time limit passes, so a deadlock is a failed test and not a hang.
"""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

PRELOADED = ["torch", "torch.distributed", "numba", "megatron.core.parallel_state", "megatron.core.models.gpt"]
RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    # Host names do not resolve in every container; the ranks of a test talk over the loopback device.
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCHDYNAMO_DISABLE": "1",
}


@dataclass(frozen=True, slots=True)
class RankResult:
    """How one rank ended: with a value, or with an error, or neither (it died or was killed at the time limit)."""

    rank: int
    value: Any
    error: str | None
    """Traceback of the exception that ended the rank."""
    error_message: str | None
    """``TypeName: message`` of that exception."""
    exit_code: int | None
    """Of the process; None = killed at the time limit."""

    @property
    def ok(self) -> bool:
        return self.error is None and self.exit_code == 0


def _rank_main(connection: Any, function: Callable[..., Any], rank: int, num_ranks: int, store: str, timeout_s: float, args: tuple) -> None:
    os.environ.update(RANK_ENVIRONMENT)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), MASTER_ADDR="127.0.0.1")
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=datetime.timedelta(seconds=timeout_s)
        )
        payload = pickle.dumps((function(rank, num_ranks, *args), None, None))
    except BaseException as error:
        payload = pickle.dumps((None, traceback.format_exc(), f"{type(error).__name__}: {error}"))
        connection.send_bytes(payload)
        connection.close()
        # A peer may be waiting for this rank: leave as a failed process does, without the collective shutdown.
        os._exit(1)
    connection.send_bytes(payload)
    connection.close()
    if dist.is_initialized():
        dist.destroy_process_group()


def launch_all(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 90.0) -> list[RankResult]:
    """Like :func:`launch`, but returns each rank's end, good or bad, for tests that expect ranks to fail or die."""
    os.environ.update({name: os.environ.get(name, value) for name, value in RANK_ENVIRONMENT.items()})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    deadline = time.monotonic() + timeout_s
    received: dict[int, tuple[Any, str | None, str | None]] = {}
    with tempfile.TemporaryDirectory(prefix="gloo-store-") as folder:
        store = os.path.join(folder, "store")
        processes, connections = [], {}
        try:
            for rank in range(num_ranks):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_rank_main, args=(sender, function, rank, num_ranks, store, timeout_s, args), daemon=False)
                process.start()
                sender.close()
                processes.append(process)
                connections[receiver] = rank
            open_connections = dict(connections)
            while open_connections and time.monotonic() < deadline:
                for ready in wait(list(open_connections), timeout=max(0.0, deadline - time.monotonic())):
                    rank = open_connections.pop(ready)
                    with contextlib.suppress(EOFError):  # a rank that died without a word: its exit code says so
                        received[rank] = pickle.loads(ready.recv_bytes())
            for process in processes:
                process.join(max(0.1, min(10.0, deadline - time.monotonic())))
        finally:
            killed = set()
            for rank, process in enumerate(processes):
                if process.is_alive():
                    killed.add(rank)
                    process.kill()
                process.join()
            for connection in connections:
                connection.close()
    results = []
    for rank, process in enumerate(processes):
        value, error, message = received.get(rank, (None, None, None))
        results.append(RankResult(rank, value, error, message, None if rank in killed else process.exitcode))
    return results


def launch(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 90.0) -> list[Any]:
    """Runs ``function(rank, num_ranks, *args)`` on every rank and returns the values in rank order.

    Raises AssertionError with every rank's traceback when a rank fails, dies, or is still running after ``timeout_s`` seconds.
    """
    results = launch_all(function, num_ranks, *args, timeout_s=timeout_s)
    failed = [result for result in results if not result.ok]
    if failed:
        lines = [f"{len(failed)} of {num_ranks} ranks of {function.__name__} failed:"]
        for result in failed:
            how = f"killed after {timeout_s} s" if result.exit_code is None else f"exit code {result.exit_code}"
            lines.append(f"--- rank {result.rank} ({how})\n{result.error or 'no message'}")
        raise AssertionError("\n".join(lines))
    return [result.value for result in results]
