"""The same small batch under DIP and under Megatron's own schedules, as timelines to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from megatron_dip.schedule.result import Schedule
from megatron_dip.simulator.estimate import PartitionFunction
from megatron_dip.simulator.step import SimulateOptions, make_costs, simulate_whole
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.named import IMAGE_PATCHES, PACKED_TOKENS, named_setup
from megatron_dip.spec.tasks import KIND_NAMES
from megatron_dip.spec.timeline import Bar, Timeline
from megatron_dip.spec.workload import WORKLOAD_FORMAT, Microbatch, Parallel, ScheduleName, Workload

SYSTEMS: dict[str, ScheduleName] = {"DIP": "dip", "1F1B": "1f1b", "interleaved 1F1B": "interleaved"}
_ROOMY_BYTES = 10**15
"""Schedules are compared, not what fits."""


def playground_timelines(
    ranks: int, num_microbatches: int, images: int, choose: PartitionFunction, *, tensor: int, device: str, evaluations: int, seed: int
) -> dict[str, Timeline]:
    """Name of a system -> its timeline of one batch of vlm-s. Of ``images`` in the mean each microbatch has 0 to twice as many.

    Args:
        choose: how DIP cuts the model.

    A system that cannot run there (Megatron's interleaved schedule with few layers) has an empty timeline.
    """
    model = named_setup("vlm-s").model
    counts = np.random.default_rng((seed, num_microbatches, images)).integers(0, 2 * images + 1, num_microbatches).tolist()
    microbatches: list[Microbatch] = [{"vit": [IMAGE_PATCHES] * count, "lm": [PACKED_TOKENS]} if count else {"lm": [PACKED_TOKENS]} for count in counts]
    workload = Workload(
        format=WORKLOAD_FORMAT, model=model, parallel=Parallel(tensor=tensor, pipeline=ranks), device=device, microbatches=microbatches,
        memory_capacity_bytes=_ROOMY_BYTES,
    )
    options = SimulateOptions(evaluations=evaluations, seed=seed)
    costs = make_costs(workload, options)
    partition = choose(workload, costs)
    found = {}
    for title, name in SYSTEMS.items():
        try:
            simulation = simulate_whole(workload, name, partition=partition if name == "dip" else None, options=options, costs=costs)
        except InputError:
            found[title] = Timeline(title=title, ranks=ranks, bars=[])
            continue
        assert simulation.schedule is not None, "all of them are pipelines"
        bars = _bars(simulation.schedule)
        if name != "dip":
            bars = [msgspec.structs.replace(bar, module=_joined(bar, simulation.result.chunks, microbatches)) for bar in bars]
        found[title] = Timeline(title=title, ranks=ranks, bars=bars)
    return found


def _joined(bar: Bar, chunks: Mapping[str, Sequence[Sequence[int]]], microbatches: Sequence[Microbatch]) -> str:
    """The modules that have layers in a stage of one static chain, and work in its microbatch."""
    inside = [name for name, rows in chunks.items() if bar.vp_stage < len(rows) and rows[bar.vp_stage][bar.rank] and microbatches[bar.microbatch].get(name)]
    return "+".join(inside) or bar.module


def _bars(schedule: Schedule) -> list[Bar]:
    """The stages of a schedule."""
    graph = schedule.graph
    return [
        Bar(
            rank=int(graph.rank[task]), kind=KIND_NAMES[graph.kind[task]], module=graph.module_names[int(graph.module[task])],  # type: ignore[arg-type]
            vp_stage=int(graph.vp_stage[task]), microbatch=int(graph.microbatch[task]), sub_microbatch=int(graph.sub_microbatch[task]),
            start=int(schedule.start_ns[task]), end=int(schedule.end_ns[task]),
        )
        for task in range(graph.num_tasks)
    ]
