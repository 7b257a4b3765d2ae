"""The choice of a cut as a task that a process of its own can do: a run's cut held against the best one that is found.

In: a :class:`CutTask` (model, costs, a sample of the run's batches, the cut at hand). Out: a :class:`CutOutcome`. ``python -m
megatron_dip.planner.cut_choice`` reads the one, pickled, from its standard input and writes the other to its standard output: beside training
the choice then neither holds the interpreter nor competes for cores, since the process gives way to all others.

Limited in evaluations: equal tasks give equal outcomes.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.joint import ChoiceLimits
from megatron_dip.partition.offline import Batch
from megatron_dip.planner.partitioning import expected_ns, joint_partition
from megatron_dip.schedule.backward import SplitBackward
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition

COMPARED = 4
"""Batches of the sample, evenly spaced, on which the cut at hand and the one found are compared."""
_NICE = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTask:
    model: ModelSpec
    num_ranks: int
    batches: Sequence[Batch]
    """Sample: one replica's microbatches of several iterations."""
    costs: CostModel
    current: Partition
    split_backward: SplitBackward = False
    strategy: str | None = None
    chunks: Mapping[str, int]
    """K of modules that is not to be varied."""
    sizes: Mapping[str, int]
    """B of modules that is not to be varied."""
    limits: ChoiceLimits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CutOutcome:
    partition: Partition
    """The best one; the cut at hand where none is better."""
    chosen_ns: float
    """Expected time of an iteration on it, mean over the compared batches."""
    current_ns: float
    """The same on the cut at hand."""
    warnings: tuple[str, ...] = ()

    @property
    def gain(self) -> float:
        """Share of the iteration's time that the best cut would save."""
        return 1.0 - self.chosen_ns / self.current_ns


def choose_cut(task: CutTask) -> CutOutcome:
    """Raises InputError where no cut fits into memory."""
    choice = joint_partition(
        task.model, task.num_ranks, task.batches, task.costs, split_backward=task.split_backward, strategy=task.strategy, chunks=task.chunks,
        sizes=task.sizes, limits=task.limits,
    )
    count = min(COMPARED, len(task.batches))
    compared = [task.batches[index * len(task.batches) // count] for index in range(count)]

    def judge(partition: Partition) -> float:
        return expected_ns(
            task.model, task.num_ranks, compared, task.costs, partition, split_backward=task.split_backward, strategy=task.strategy
        )

    chosen_ns, current_ns = judge(choice.partition), judge(task.current)
    if chosen_ns >= current_ns:
        return CutOutcome(partition=task.current, chosen_ns=current_ns, current_ns=current_ns, warnings=choice.warnings)
    return CutOutcome(partition=choice.partition, chosen_ns=chosen_ns, current_ns=current_ns, warnings=choice.warnings)


class CutProcess:
    """A choice under way in a process of its own."""

    def __init__(self, task: CutTask, *, gives_way: bool = True) -> None:
        """Args:
        gives_way: to all other processes, beside training.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, str(_NICE if gives_way else 0)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        self._output: tuple[bytes, bytes] | None = None
        # Pickled here: costs go on learning. Handed over on a thread, since the process reads when it has started.
        payload = pickle.dumps(task)
        self._thread = threading.Thread(target=self._talk, args=(payload,), daemon=True, name="dip cut choice")
        self._thread.start()

    def _talk(self, payload: bytes) -> None:
        self._output = self._process.communicate(payload)

    def outcome(self, timeout_s: float = 0.0) -> CutOutcome | Exception | None:
        """What was found, or why nothing was; None: it is not done yet.

        Args:
            timeout_s: how long to wait for it.
        """
        self._thread.join(timeout_s)
        if self._output is None:
            return None
        out, errors = self._output
        if self._process.returncode != 0:
            return RuntimeError(errors.decode(errors="replace").strip().splitlines()[-1] if errors.strip() else f"status {self._process.returncode}")
        found = pickle.loads(out)
        assert isinstance(found, CutOutcome)
        return found

    def stop(self) -> None:
        """Ends the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._thread.join(5.0)


def main() -> int:
    os.nice(int(sys.argv[1]))
    task = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(choose_cut(task)))
    return 0


if __name__ == "__main__":
    # What is pickled must name this module by its own name, not ``__main__``.
    from megatron_dip.planner import cut_choice

    sys.exit(cut_choice.main())
