"""A short rehearsal of a run, for ``megatron-dip tune``: the script's own data and layers are measured, and the cut for the run is chosen.

In: the flags of the run, ``--dip-rehearse FOLDER``, and the first iterations of training. Out: in the folder ``partition.json``, ``profile.json`` and
``report.txt``; in the cut cache what ``--dip-partition auto`` finds; then the processes end. Nothing is saved of the model.

The rehearsal trains under a cut that tells embedding, layers and head apart (two chunks a rank where layers suffice). Plans take turns with
sub-microbatches of all sizes, from whole to single instances, and with whole and split backwards where layers can do both, so that the costs of all
of them are measured. It runs on the pipeline ranks of the run, or on one for as many (``--dip-rehearse-ranks``), which must hold all layers.

Not measured: the optimizer; memory (it is counted from the built weights and the layers' shapes); on one rank, messages (they take what the
device's description says).
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dip.hooks.arguments import DipOptions
from megatron_dip.hooks.cut import WHOLE, FixedChoices, fixed_choices, given_partition, run_key
from megatron_dip.iteration.cut_cache import cut_file, keep_cut
from megatron_dip.iteration.feedback import CostFeedback
from megatron_dip.iteration.forward_backward import DipForwardBackward
from megatron_dip.models.description import ModelDescription
from megatron_dip.partition.offline import even_partition, largest_count
from megatron_dip.planner.cut_choice import COMPARED, CutOutcome, CutTask, choose_cut
from megatron_dip.planner.partitioning import expected_ns
from megatron_dip.schedule.backward import SplitBackward
from megatron_dip.simulator.baselines import run_baseline
from megatron_dip.spec.codec import save
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.tuned import Expected, TunedCut
from megatron_dip.spec.workload import Microbatch

logger = logging.getLogger(__name__)

SAMPLED_MICROBATCHES = 256
"""Read from the script's data at least, where it has as many."""
_ROUNDS = 3
"""Measured iterations of each form of plan."""
_LEAST_ITERATIONS = 16
_CHUNKS = 2
_STOCK = "1f1b"


@dataclass(frozen=True, slots=True)
class PlanForm:
    """How one of the rehearsal's plans is made."""

    sub_microbatch_size: dict[str, int]
    split_backward: bool


def rehearsal_partition(spec: ModelSpec, num_ranks: int) -> Partition:
    """The cut of the rehearsal, equal on all ranks. On one rank a middle chunk has layers alone; tied embeddings must stay in one chunk there."""
    chunks = {}
    for module in spec.modules:
        wanted = _CHUNKS if num_ranks > 1 else 1 if module.tied_embeddings else _CHUNKS + 1
        chunks[module.name] = wanted if module.num_layers >= wanted * num_ranks else 1
    return even_partition(spec, num_ranks, chunks, dict.fromkeys(chunks, WHOLE))


class Rehearsal:
    """Of one rank."""

    def __init__(
        self, args: Any, options: DipOptions, description: ModelDescription, forward_backward: DipForwardBackward, feedback: CostFeedback,
        partition: Partition, model: ModelSpec, *, splits: bool, speaks: bool,
    ) -> None:
        """Args:
        partition: of the rehearsal.
        model: as it was built.
        splits: whether the layers can split backwards.
        speaks: whether this rank chooses and writes.
        """
        assert options.rehearse is not None
        self._args, self._options, self._folder = args, options, options.rehearse
        self._spec, self._model, self._ranks = description.model_spec, model, options.rehearse_ranks or partition.num_ranks
        self._fixed: FixedChoices = fixed_choices(description, self._ranks)
        self._forward_backward, self._feedback, self._partition = forward_backward, feedback, partition
        self._splits, self._speaks = splits, speaks
        self._batches: list[list[Microbatch]] = []
        self._forms = itertools.cycle([PlanForm(dict(partition.sub_microbatch_size), False)])
        self._left: int | None = None
        """Iterations to go; None: the data are yet to be looked at."""

    def next_form(self) -> PlanForm:
        """Of the plan that is made now; called on the planner's thread."""
        return next(self._forms)

    def before_iteration(self, forward_step: Any, data_iterator: Any, num_microbatches: int) -> None:
        """Looks at the data before the first iteration; collective over a replica's ranks."""
        if self._left is not None:
            return
        count = max(2, math.ceil(SAMPLED_MICROBATCHES / num_microbatches))
        iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
        # Below the iterator that keeps what it gave for a replay of the iteration.
        iterator = getattr(iterator, "iterable", iterator)
        self._batches = self._forward_backward.sample(forward_step, iterator, num_microbatches, count)
        forms = self._plan_forms()
        self._forms = itertools.cycle(forms)
        told = torch.tensor([len(forms)])
        torch.distributed.broadcast(told, self._forward_backward.groups.control_ranks[0], group=self._forward_backward.groups.control)
        self._left = max(_LEAST_ITERATIONS, (1 + _ROUNDS) * int(told))

    def after_iteration(self) -> None:
        """Behind the last iteration: chooses and writes, then ends this process on every rank."""
        assert self._left is not None
        self._left -= 1
        if self._left:
            return
        if self._speaks:
            self._choose()
        torch.distributed.barrier()
        sys.exit(0)

    def _plan_forms(self) -> list[PlanForm]:
        sizes: dict[str, list[int]] = {}
        for module in self._partition.chunks:
            most = max(1, largest_count(module, self._batches))
            halves = [WHOLE, math.ceil(most / 2), math.ceil(most / 4), 1]
            sizes[module] = [WHOLE] if module in self._fixed.sizes else [size for index, size in enumerate(halves) if size not in halves[:index]]
        rounds = max(len(of_module) for of_module in sizes.values())
        return [
            PlanForm({module: of_module[index % len(of_module)] for module, of_module in sizes.items()}, split)
            for split in ((False, True) if self._splits else (False,)) for index in range(rounds)
        ]

    def _choose(self) -> None:
        costs, profile = self._feedback.current_costs(), self._feedback.profile
        today = given_partition(self._spec, self._ranks, self._options)
        split: SplitBackward = "auto" if self._splits and self._options.split_backward is not False else False
        outcome = choose_cut(CutTask(
            model=self._model, num_ranks=self._ranks, batches=self._batches, costs=costs, current=today, split_backward=split,
            chunks=self._fixed.chunks, sizes=self._fixed.sizes,
        ))
        count = min(COMPARED, len(self._batches))
        compared = [self._batches[index * len(self._batches) // count] for index in range(count)]
        whole_ns = None
        if split:
            whole_ns = expected_ns(self._model, self._ranks, compared, costs, outcome.partition)
        stock = [run_baseline(_STOCK, self._model, self._ranks, batch, costs) for batch in compared]
        times = [result.makespan_ns for result in stock if result is not None and result.fits]
        stock_ns = sum(times) / len(times) if len(times) == len(stock) else None
        tuned = TunedCut(
            key=run_key(self._args, self._options, self._spec, self._ranks), source="tune", partition=outcome.partition, profile=profile,
            batches=self._batches, expected=Expected(chosen_ns=outcome.chosen_ns, today_ns=outcome.current_ns, stock_ns=stock_ns),
        )
        kept = keep_cut(self._options.cache, tuned)
        self._folder.mkdir(parents=True, exist_ok=True)
        save(self._folder / "partition.json", outcome.partition)
        if profile is not None:
            save(self._folder / "profile.json", profile)
        report = report_text(outcome, tuned.expected, self._batches, whole_ns)
        (self._folder / "report.txt").write_text(report)
        print(f"{report}\nwritten: {self._folder}/partition.json, profile.json, report.txt; {cut_file(self._options.cache, tuned.key)}", flush=True)
        assert kept == cut_file(self._options.cache, tuned.key)


def report_text(outcome: CutOutcome, expected: Expected, batches: Sequence[Sequence[Microbatch]], whole_ns: float | None) -> str:
    """Args:
    whole_ns: expected time on the chosen cut with whole backwards alone; None: no others were planned.
    """
    partition = outcome.partition
    rows = [
        ("chosen cut", f"{expected.chosen_ns / 1e6:.1f} ms"),
        ("today's flags", f"{expected.today_ns / 1e6:.1f} ms, {expected.today_ns / expected.chosen_ns - 1:+.1%}"),
    ]
    if expected.stock_ns is not None:
        rows.append(("stock 1F1B, layers cut by parameters", f"{expected.stock_ns / 1e6:.1f} ms, {expected.stock_ns / expected.chosen_ns - 1:+.1%}"))
    if whole_ns is not None:
        rows.append(("chosen cut, backwards whole", f"{whole_ns / 1e6:.1f} ms, {whole_ns / expected.chosen_ns - 1:+.1%}"))
    sizes = {name: "whole" if size >= WHOLE else size for name, size in partition.sub_microbatch_size.items()}
    count = sum(map(len, batches))
    lines = [
        f"expected iteration, by costs measured in the rehearsal and {count} microbatches of the script's data (pipeline alone, no optimizer)",
        *(f"  {name:38s} {value}" for name, value in rows),
        f"layers by chunk and rank {partition.chunks}, sub-microbatches {sizes}", *outcome.warnings,
    ]
    return "\n".join(lines) + "\n"
