"""The search over layouts: the same answer whatever is shared, left out by a bound, or run side by side."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import msgspec
import pytest

from megatron_dip.cost.analytic import AnalyticCost, KnownParts
from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.offline import even_partition, least_work
from megatron_dip.simulator.estimate import Candidate, estimate
from megatron_dip.simulator.grid import grid_parallels
from megatron_dip.simulator.step import SimulateOptions, make_costs, simulate_whole
from megatron_dip.simulator.workers import Workers
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import WORKLOAD_FORMAT, Parallel, Training, Workload

_MODEL = ModelSpec(modules=[
    ModuleSpec(name="vit", kind="vit", role="encoder", num_layers=8, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=4096),
    ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=12, hidden_size=2048, num_attention_heads=16, ffn_hidden_size=8192, vocab_size=32000),
])
_WORKLOAD = Workload(
    format=WORKLOAD_FORMAT, model=_MODEL, device="h100",
    microbatches=[{"vit": [1024] * (index % 4), "lm": [4096]} if index % 4 else {"lm": [4096]} for index in range(16)],
)
_OPTIONS = SimulateOptions(evaluations=20, replicas=1)


def _choose(workload: Workload, costs: CostModel) -> Partition:
    return even_partition(workload.model_spec, workload.parallel.pipeline, {"vit": 1, "lm": 2 if workload.parallel.pipeline <= 4 else 1}, {"vit": 4, "lm": 1})


def _sized(parallel: Parallel) -> Workload:
    return msgspec.structs.replace(_WORKLOAD, parallel=parallel)


def _told(candidates: list[Candidate]) -> list[object]:
    return [(candidate.system, candidate.parallel, candidate.result, candidate.problem) for candidate in candidates]


def test_the_best_of_all_layouts_is_found_whatever_is_left_out() -> None:
    candidates = estimate(_WORKLOAD, 8, _choose, options=_OPTIONS, time_limit_s=1e9)
    times = []
    for parallel in grid_parallels(_WORKLOAD, 8):
        if parallel.pipeline > 1:
            workload = _sized(parallel)
            costs = make_costs(workload, _OPTIONS)
            times.append(simulate_whole(workload, "dip", partition=_choose(workload, costs), options=_OPTIONS, costs=costs).result.iteration_time_s)
            least = least_work(_MODEL, workload.microbatches, costs)
            assert max(least.total / parallel.pipeline, least.whole) / parallel.data / 1e9 <= times[-1]
    assert candidates[0].result is not None
    assert candidates[0].result.iteration_time_s == min(times)
    assert candidates[0].untried == 0
    for candidate in candidates[1:]:
        assert candidate.parallel is not None
        assert candidate.result is not None
        alone = simulate_whole(_sized(candidate.parallel), candidate.result.schedule, options=_OPTIONS)
        assert candidate.result == alone.result


def test_processes_change_nothing_of_the_answer() -> None:
    one = estimate(_WORKLOAD, 8, _choose, options=_OPTIONS, time_limit_s=1e9)
    assert _told(estimate(_WORKLOAD, 8, _choose, options=_OPTIONS, time_limit_s=1e9, processes=2)) == _told(one)


def test_layouts_left_for_want_of_time_are_counted() -> None:
    found = estimate(_WORKLOAD, 16, _choose, options=_OPTIONS, time_limit_s=0.0)
    assert found[0].result is not None
    assert found[0].untried > 0


def test_only_parts_that_are_alike_are_shared() -> None:
    known = KnownParts()
    training = Training()
    first = AnalyticCost(_MODEL, Parallel(tensor=2, pipeline=2, data=2), training, "h100", known=known)
    cost = first.part("lm", "layer", [4096])
    alike = AnalyticCost(_MODEL, Parallel(tensor=2, pipeline=4, data=1), training, "h100", known=known)
    assert alike.part("lm", "layer", [4096]) is cost
    for other in (
        AnalyticCost(_MODEL, Parallel(tensor=4, pipeline=2), training, "h100", known=known),
        AnalyticCost(_MODEL, Parallel(tensor=2, pipeline=2, context=2), training, "h100", known=known),
        AnalyticCost(_MODEL, Parallel(tensor=2, pipeline=2), Training(dtype="fp32"), "h100", known=known),
        AnalyticCost(_MODEL, Parallel(tensor=2, pipeline=2), training, "a100", known=known),
        AnalyticCost(_MODEL, Parallel(tensor=2, pipeline=2), training, "h100", known=known, undivided=["lm"]),
    ):
        assert other.part("lm", "layer", [4096]) != cost


def _slow_or_dead(value: int) -> int:
    if value < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(value)
    return value


def test_a_process_that_is_killed_ends_the_search_with_one_error() -> None:
    with pytest.raises(InputError, match="ended from outside"), Workers(_slow_or_dead, 2) as workers:
        list(workers.results(iter([0, -1])))


def test_an_interruption_does_not_wait_for_trials() -> None:
    began = time.monotonic()

    def values() -> Iterator[int]:
        yield 0
        yield 600
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Workers(_slow_or_dead, 2) as workers:
        list(workers.results(values()))
    assert time.monotonic() - began < 300
