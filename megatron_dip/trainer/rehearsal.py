"""Measures an example's stages as training runs them, and writes a profile that plan, simulate and training use.

All ranks rehearse training: its chunks, its executor, its messages, on batches of the example's data but of another seed than
training's, without optimizer steps. Each round's batch is put together of those microbatches whose stages were measured least, so that
rare batch shapes are measured as often as common ones. Every rank is busy, as in training: two ranks on one machine slow one another.
Rounds take turns: training's cut; the same with microbatches whole, for larger stages than training's; and a finer cut, which tells
stem, layers and head apart, for plans with other cuts.

What is counted as a stage's time: from where the stage before it ended, where the rank did not wait for a message; executor and posts
in between are the rank's time too. What is counted as a message's time, in the mean: from the end of the stage that made it to the
start of the stage that stood waiting for it, less that. Times are means (:func:`megatron_dip.cost.measured.expected_time`), since a
makespan adds them up.

Not measured: the optimizer; the batch's way to the ranks and their agreement on the plan, before the first stage.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.measured import PartBytes, StageSample, expected_time, fit_profile
from megatron_dip.cost.modules import Kernels
from megatron_dip.iteration.feedback import measure_p2p, stage_samples
from megatron_dip.models.staged import first_instances, part_sizes
from megatron_dip.partition.offline import even_partition
from megatron_dip.partition.online import split
from megatron_dip.runtime.executor import PlanLinks
from megatron_dip.runtime.timing import StageRecord
from megatron_dip.spec.codec import load_example
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.profile import PointToPoint, Profile
from megatron_dip.spec.training import RunSettings
from megatron_dip.spec.workload import Microbatch, Training, Workload
from megatron_dip.trainer.dip_system import DipSystem
from megatron_dip.trainer.loop import load_example_module, start_rank

WARM_UP = 3
"""Rounds of each kind at the start that are not measured: compiled kernels, allocators and caches warm up."""
LEAST_ROUNDS = 5
"""Of each kind, measured."""
_POOL = 400
"""Microbatches of the example's data to choose from."""

Shape = tuple[str, int, int]
"""(module, instances, tokens) of a stage."""


@dataclass(slots=True)
class _Found:
    samples: list[StageSample] = field(default_factory=list)
    gaps_ns: list[int] = field(default_factory=list)
    """From the end of a stage to the start of the next where nothing was waited for."""
    latencies_ns: list[float] = field(default_factory=list)
    """Of messages that were waited for: from the end of the stage that made them to the start of the one that waited, less the time that
    their bytes take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleProfile:
    profile: Profile
    rounds: int
    stages: int
    """Measured ones."""
    gap_ns: float
    """Between two stages of a rank, in the mean; part of the profile's times."""
    workload: Workload
    """The first iteration's batch of training, on this profile."""


def profile_example(folder: Path, settings: RunSettings, seconds: float, say: Callable[[str], None]) -> ExampleProfile | None:
    """Runs one rank's part of the rehearsal for ``seconds``; the profile on pipeline rank 0, None elsewhere.

    Args:
        settings: as training's; one replica.
        say: is told on rank 0 how far it is.
    """
    config = load_example(folder / "config.json")
    example = load_example_module(folder, config, msgspec.structs.replace(settings, seed=settings.seed + 1))
    start_rank(settings)
    system = DipSystem(settings.schedule, example, settings)
    assert system.model.staged is not None
    description = system.model.staged.description
    pool = [item for i in range(math.ceil(_POOL / settings.num_microbatches)) for item in example.dataset.microbatches(i, settings.num_microbatches)]
    metadata = [description.item_metadata(item) for item in pool]
    rehearsals = [_Rehearsal(system, system.partition, metadata)]
    largest = {module: max((len(m.get(module, ())) for m in metadata), default=1) or 1 for module in system.partition.chunks}
    if any(size > system.partition.sub_microbatch_size[module] for module, size in largest.items()):
        rehearsals.append(_Rehearsal(system, Partition(chunks=system.partition.chunks, sub_microbatch_size=largest), metadata))
    finer = _finer_cut(system)
    if finer is not None:
        rehearsals.append(_Rehearsal(DipSystem(msgspec.structs.replace(settings.schedule, partition=finer), example, settings), finer, metadata))
    p2p = measure_p2p(system.forward_backward.groups)
    is_first = parallel_state.get_pipeline_model_parallel_rank() == 0 and parallel_state.get_tensor_model_parallel_rank() == 0
    found = _Found()
    bytes_per_token: dict[str, PartBytes] = {}
    began = time.monotonic()
    rounds = 0
    while _go_on(rounds, len(rehearsals), time.monotonic() - began, seconds):
        rehearsal = rehearsals[rounds % len(rehearsals)]
        rounds += 1
        planned_latency_ns = rehearsal.system.current_costs().p2p_latency_ns
        items = [pool[index] for index in rehearsal.chooser.choose(settings.num_microbatches)]
        plan, records = rehearsal.run(items)
        if is_first and records is not None and rounds > WARM_UP * len(rehearsals):
            bytes_per_token = bytes_per_token or _bytes_per_token(system, plan, items, metadata)
            _collect(found, plan, records, rehearsal.partition, planned_latency_ns)
            if rounds % (LEAST_ROUNDS * len(rehearsals)) == 0:
                # Orders as training's plans have them, not those of a rough guess; messages stay as they were measured first.
                profile = _fit(system, found.samples, bytes_per_token, p2p)
                for other in rehearsals:
                    other.system.feedback.use_profile(profile)
                say(f"{rounds} rounds, {len(found.samples)} stages measured in {time.monotonic() - began:.0f} s")
    if not is_first:
        return None
    gap_ns = expected_time(found.gaps_ns) if found.gaps_ns else 0.0
    latency_ns = p2p.latency_ns
    if found.latencies_ns:
        # The gap stands in the time of the stage that waits.
        latency_ns = max(0.0, sum(found.latencies_ns) / len(found.latencies_ns) - gap_ns)
    samples = [_longer(sample, round(gap_ns)) for sample in found.samples]
    profile = _fit(system, samples, bytes_per_token, PointToPoint(latency_ns=latency_ns, bytes_per_second=p2p.bytes_per_second))
    training = load_example_module(folder, config, settings).dataset.microbatches(0, settings.num_microbatches)
    workload = Workload(
        format="megatron-dip/workload/1", model=config.model.modules, parallel=settings.parallel,
        training=Training(dtype="fp32", split_backward=settings.schedule.split_backward), profile=profile,
        microbatches=[description.item_metadata(item) for item in training],
    )
    return ExampleProfile(profile=profile, rounds=rounds, stages=len(samples), gap_ns=gap_ns, workload=workload)


class Chooser:
    """Deals out microbatches so that every shape of a stage comes about equally often."""

    def __init__(self, shapes: Sequence[Counter[Shape]]) -> None:
        self._shapes = shapes
        self._seen: Counter[Shape] = Counter()
        self._dealt = [0] * len(shapes)

    def choose(self, count: int) -> list[int]:
        """Indices of the next ``count`` microbatches."""
        chosen = []
        for _ in range(count):
            index = min(range(len(self._shapes)), key=lambda i: (min(self._seen[shape] for shape in self._shapes[i]), self._dealt[i], i))
            self._seen.update(self._shapes[index])
            self._dealt[index] += 1
            chosen.append(index)
        return chosen


class _Rehearsal:
    """One cut and sub-microbatch size, to be run round by round."""

    def __init__(self, system: DipSystem, partition: Partition, metadata: Sequence[Microbatch]) -> None:
        self.system, self.partition = system, partition
        model, costs = system.example.config.model.modules, system.current_costs()
        self.chooser = Chooser([
            Counter((part.module, len(part.lengths), sum(part.lengths)) for part in split([microbatch], model, partition, costs))
            for microbatch in metadata
        ])

    def run(self, items: Sequence[Any]) -> tuple[Plan, list[list[StageRecord]] | None]:
        """The plan that ran and, on pipeline rank 0, when its stages did."""
        system = self.system
        system.partition = self.partition
        system.model.zero_grad()
        dist.barrier()
        system.run(system.example.module.forward_step, forward_only=False, items=items)
        plan = system.last_plan()
        assert plan is not None
        return plan, system.forward_backward.gather_records()


def _finer_cut(system: DipSystem) -> Partition | None:
    """Twice as many chunks where the layers suffice; None where they do for no module."""
    ranks = system.partition.num_ranks
    modules = system.example.config.model.modules
    chunks = {
        module.name: system.partition.num_chunks(module.name) * (1 if module.num_layers < 2 * ranks * system.partition.num_chunks(module.name) else 2)
        for module in modules.modules
    }
    if all(count == system.partition.num_chunks(module) for module, count in chunks.items()):
        return None
    return even_partition(modules, ranks, chunks, system.partition.sub_microbatch_size)


def _go_on(rounds: int, rehearsals: int, elapsed_s: float, seconds: float) -> bool:
    """Rank 0's decision, on every rank."""
    more = torch.tensor([int(rounds < (WARM_UP + LEAST_ROUNDS) * rehearsals or elapsed_s < seconds)])
    dist.broadcast(more, 0)
    return bool(more)


def _collect(
    found: _Found, plan: Plan, records: Sequence[Sequence[StageRecord]], partition: Partition, planned_latency_ns: float
) -> None:
    found.samples += stage_samples(plan, records, partition)
    spans = {record.stage: (record.start_ns, record.end_ns) for of_rank in records for record in of_rank}
    for rank, order in enumerate(plan.order):
        free = None
        for stage_id in order:
            start, end = spans[stage_id]
            arrivals = [(spans[dep.stage][1], dep.lag) for dep in plan.stages[stage_id].deps if plan.stages[dep.stage].rank != rank]
            made, lag = max(arrivals, key=sum, default=(0, 0))
            if free is not None and made + 2 * lag < free:
                found.gaps_ns.append(start - free)
            elif arrivals and (free is None or made > free):
                found.latencies_ns.append(start - made - lag + planned_latency_ns)
            free = end


def _longer(sample: StageSample, gap_ns: int) -> StageSample:
    return replace(sample, duration_ns=sample.duration_ns + gap_ns)


def _fit(system: DipSystem, samples: Sequence[StageSample], bytes_per_token: Mapping[str, PartBytes], p2p: PointToPoint) -> Profile:
    modules = system.example.config.model.modules.modules
    return fit_profile(samples, {module.name: module.num_layers for module in modules}, bytes_per_token, p2p)


def _bytes_per_token(system: DipSystem, plan: Plan, items: Sequence[Any], metadata: Sequence[Microbatch]) -> dict[str, PartBytes]:
    """Activations as the operator graphs have them (local layers keep attention's scores), messages as the model sends them."""
    config = system.example.config
    costs = AnalyticCost(config.model.modules, system.settings.parallel, Training(dtype="fp32"), "cpu", kernels=Kernels(attention="unfused"))
    links = PlanLinks(plan)
    assert system.model.staged is not None
    description, first = system.model.staged.description, first_instances(part_sizes(plan))
    sent: dict[str, dict[str, float]] = {}
    for forward, stage in ((stage.id, stage) for stage in plan.stages if stage.kind == "fw"):
        for consumer in links.of(plan.stages[forward]).consumers:
            spec = description.boundary(stage, consumer, items[stage.microbatch], first[stage.module, stage.microbatch, stage.sub_microbatch])
            size = math.prod(spec.shape) * spec.dtype.itemsize / stage.tokens
            sent.setdefault(stage.module, {})["boundary" if consumer.module == stage.module else "output"] = size
    found = {}
    for module in config.model.modules.modules:
        length = max((max(microbatch[module.name]) for microbatch in metadata if microbatch.get(module.name)), default=1)
        activation = costs.part(module.name, "layer", [length]).activation_bytes / length
        sizes = sent.get(module.name, {})
        found[module.name] = PartBytes(activation=activation, boundary=sizes.get("boundary", 0.0), output=sizes.get("output", 0.0))
    return found
