"""Whether another cut would be better for the run, found out while it trains: for the trainer and for Megatron's scripts alike.

In: the batches that were trained and the costs that were learned. Out: log lines, and the better cut in the cut cache for the next start (weights never
move within a run). The choice runs in a process that gives way to all others (:mod:`megatron_dip.planner.cut_choice`): once costs are settled, again
after so many iterations that ten times as much is known, and at the run's end. One rank does this, the planner rank of the first replica.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_dip.cost.interface import CostModel
from megatron_dip.iteration.cut_cache import find_cut, keep_cut
from megatron_dip.planner.cut_choice import CutOutcome, CutProcess, CutTask
from megatron_dip.schedule.backward import SplitBackward
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import Profile
from megatron_dip.spec.tuned import Expected, RunKey, TunedCut
from megatron_dip.spec.workload import Microbatch

logger = logging.getLogger(__name__)

SAMPLED_MICROBATCHES = 256
"""Of the run's batches, kept for the choice."""
REVIEWED_AT = (20, 200, 2000)
"""Trained iterations (of this start) after which the choice is made."""
LEAST_ITERATIONS = 10
"""Trained iterations below which costs are too little known for a choice at the run's end."""
GAIN = 0.03
"""Share of the iteration's time at which a better cut is worth a line in the log before the run's end."""
_FINISH_S = 120.0
"""How long the run's end waits for the choice."""


class CutReview:
    """
    Args:
        costs: what plans are made with now.
        profile: what was measured so far.
        chunks, sizes: K and B of modules that cannot be varied.
        key: what the run is, for the cut cache; None: nothing is kept.
        folder: of the cut cache.
    """

    def __init__(
        self, *, model: ModelSpec, partition: Partition, costs: Callable[[], CostModel], profile: Callable[[], Profile | None],
        split_backward: SplitBackward = False, strategy: str | None = None, chunks: Mapping[str, int] | None = None,
        sizes: Mapping[str, int] | None = None, key: RunKey | None = None, folder: Path | None = None,
    ) -> None:
        self._model, self._partition, self._costs, self._profile = model, partition, costs, profile
        self._split_backward: SplitBackward = split_backward
        self._strategy, self._chunks, self._sizes = strategy, dict(chunks or {}), dict(sizes or {})
        self._key, self._folder = key, folder
        self._random = random.Random(0)
        self._seen = 0
        self._sample: list[Sequence[Microbatch]] = []
        self._process: CutProcess | None = None
        self._reviewed: Sequence[Sequence[Microbatch]] = ()
        """Batches of the choice under way."""
        self._due = list(REVIEWED_AT)
        self.outcome: CutOutcome | None = None
        """Of the last choice that was made."""

    def after_iteration(self, batch: Sequence[Microbatch]) -> None:
        """To be called behind each training iteration with its batch; never waits."""
        self._seen += 1
        room = max(2, math.ceil(SAMPLED_MICROBATCHES / max(1, len(batch))))
        if len(self._sample) < room:
            self._sample.append(batch)
        elif (place := self._random.randrange(self._seen)) < room:
            self._sample[place] = batch
        if self._process is not None:
            self._take(0.0)
        if self._process is None and self._due and self._seen >= self._due[0]:
            self._due = [due for due in self._due if due > self._seen]
            self._start()

    def begin_last(self) -> None:
        """To be called behind the run's last iteration: the choice begins by all that was learned."""
        if self._seen >= LEAST_ITERATIONS:
            self.stop()
            self._start(gives_way=False)

    def finish(self) -> CutOutcome | None:
        """At the run's end, whatever ends it: says what the last choice found, for which it waits :data:`_FINISH_S` at most."""
        if self._process is not None:
            self._take(_FINISH_S, at_end=True)
            self.stop()
        return self.outcome

    def stop(self) -> None:
        """Ends the choice under way."""
        if self._process is not None:
            self._process.stop()
            self._process = None

    def _start(self, *, gives_way: bool = True) -> None:
        self._reviewed = list(self._sample)
        self._process = CutProcess(CutTask(
            model=self._model, num_ranks=self._partition.num_ranks, batches=self._reviewed, costs=self._costs(), current=self._partition,
            split_backward=self._split_backward, strategy=self._strategy, chunks=self._chunks, sizes=self._sizes,
        ), gives_way=gives_way)

    def _take(self, timeout_s: float, *, at_end: bool = False) -> None:
        assert self._process is not None
        outcome = self._process.outcome(timeout_s)
        if outcome is None:
            if at_end:
                logger.warning("whether another cut would be better was not found out within %d s", _FINISH_S)
            return
        self._process = None
        if isinstance(outcome, Exception):
            logger.warning("whether another cut would be better could not be found out: %s", outcome)
            return
        self.outcome = outcome
        if outcome.gain > GAIN or (at_end and outcome.gain > 0):
            logger.warning(
                "by the costs measured so far another cut would make iterations %.1f %% shorter (%.1f instead of %.1f ms planned): layers %s, "
                "sub-microbatches %s%s", 100 * outcome.gain, outcome.chosen_ns / 1e6, outcome.current_ns / 1e6, outcome.partition.chunks,
                outcome.partition.sub_microbatch_size, "" if self._key is None else "; the next start with --dip-partition auto takes it",
            )
        elif at_end:
            logger.warning("by the costs measured so far no other cut is better than the one that ran")
        self._keep(outcome)

    def _keep(self, outcome: CutOutcome) -> None:
        """For the next start, unless a rehearsal has tried more and this is no better."""
        if self._key is None or self._folder is None:
            return
        kept = find_cut(self._folder, self._key)
        if kept is not None and kept.source == "tune" and outcome.gain <= GAIN:
            return
        keep_cut(self._folder, TunedCut(
            key=self._key, source="training", partition=outcome.partition, profile=self._profile(),
            batches=[list(batch) for batch in self._reviewed], expected=Expected(chosen_ns=outcome.chosen_ns, today_ns=outcome.current_ns),
        ))
