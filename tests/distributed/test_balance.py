"""Microbatches that change replicas: the same losses, all of them trained once."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch, launch_all
from tests.distributed.test_training import SCHEDULES, folder, losses, run

pytestmark = pytest.mark.distributed
__all__ = ["folder"]


@pytest.mark.parametrize("parallel", [Parallel(pipeline=1, data=2), Parallel(pipeline=2, data=2)], ids=["P1", "P2"])
def test_dealt_runs_train_as_undealt_ones(folder: Path, tmp_path: Path, parallel: Parallel) -> None:
    runs = {
        balance: run(
            folder, tmp_path / f"{balance}.json", SCHEDULES["dip"], parallel, balance=balance, iterations=8, num_microbatches=8,
            distributed_optimizer=True, overlap_grad_reduce=True,
        )
        for balance in ("off", "exchange")
    }
    assert losses(runs["exchange"]) == pytest.approx(losses(runs["off"]), rel=1e-5)
    assert runs["off"].balance is None
    balance = runs["exchange"].balance
    assert balance is not None
    assert balance.dealt + sum(balance.left.values()) == 7
    assert balance.dealt >= 1
    assert balance.moves >= 2 * balance.dealt
    assert balance.bytes_sent > 0
    assert balance.imbalance <= balance.imbalance_before

MICROBATCHES, STEPS = 6, 9


def _item(replica: int, number: int) -> dict[str, Any]:
    """Heavy ones in a replica that changes from step to step; nested, raw, and never twice the same."""
    rng = np.random.default_rng([replica, number])
    size = int(rng.integers(1, 9)) + (20 if (number // MICROBATCHES) % 2 == replica and number % 2 else 0)
    image = torch.from_numpy(rng.integers(0, 255, (size, 3, 5), dtype=np.uint8))
    return {"id": (replica, number), "images": [image, {"mask": image > 9}], "array": rng.random(3), "empty": torch.empty(0, 2), "work": size}


def _drive(rank: int, num_ranks: int, fault: str) -> dict[str, Any]:
    """Two replicas that hand out batches as training does, with nothing to train; what each place of each replica was given."""
    from megatron_dip.iteration import balance as module
    from megatron_dip.iteration.lookahead import LookaheadIterator
    from megatron_dip.runtime.groups import new_process_groups

    places = num_ranks // 2
    replica = rank // places
    groups = new_process_groups([replica * places + place for place in range(places)], replica, timeout_s=20.0)
    submitted: list[list[Any]] = []
    sent, unpacked = module._sent, module.unpack
    messages = 0

    def slow(*arguments: Any) -> Any:
        nonlocal messages
        messages += 1
        if fault == "late" and messages == 11:
            time.sleep(0.7)
        if fault == "killed" and rank == 1 and messages == 3:
            os._exit(17)
        return sent(*arguments)

    def broken(whole: torch.Tensor) -> Any:
        item = unpacked(whole)
        if fault == "raises" and rank == num_ranks - 1 and item["id"][1] >= 2 * MICROBATCHES:
            raise ValueError("no such class here")
        return item

    module._sent, module.unpack = slow, broken  # type: ignore[assignment]
    is_planner = rank == groups.control_ranks[0]
    balance = module.ReplicaBalance(
        groups, lambda batch: np.array([[1000 * sum(microbatch["vit"])] for microbatch in batch]), submitted.append if is_planner else None, 20.0
    )
    items = [_item(replica, number) for number in range(STEPS * MICROBATCHES)]
    if fault == "unknown":
        items[2 * MICROBATCHES + 1]["images"].append(lambda: None)
    if fault == "ends" and replica == 1:
        del items[(STEPS - 1) * MICROBATCHES + 2 :]
    data = LookaheadIterator(items)

    def describe(item: Any) -> Any:
        if fault == "unreadable" and item["id"] == (1, 2 * MICROBATCHES):
            return KeyError("images")
        return {"vit": [3 * item["work"] if fault == "lies" and replica else item["work"]]}

    got: list[list[Any]] = []
    for step in range(STEPS):
        balance.start(data, True)
        if balance.is_on:
            balance.settle(data, MICROBATCHES, False, 10**9 * (rank + 1))
        batch = list(itertools.islice(data, MICROBATCHES))
        for item in batch:
            expected = _item(*item["id"])
            assert torch.equal(item["images"][0], expected["images"][0])
            assert torch.equal(item["images"][1]["mask"], expected["images"][1]["mask"])
            assert item["images"][0].dtype == torch.uint8
            assert item["array"].tolist() == expected["array"].tolist()
        got.append([item["id"] for item in batch])
        if step == 4 and balance.is_on:  # a replay reads nothing anew and changes nothing
            balance.settle(data, MICROBATCHES, True, 0)
        if step + 1 < STEPS:
            balance.offer(data, [MICROBATCHES] * min(2, STEPS - step - 1), describe)
        for job in balance._jobs:  # as much time as a busy machine takes, but for one that shall be late
            job.done.wait({"late": 0.1 if step > 1 else 10.0, "raises": 1.0, "killed": 1.0}.get(fault, 10.0))
    return {"got": got, "figures": balance.figures(), "is_on": balance.is_on, "submitted": submitted}


def _whole(results: list[dict[str, Any]], places: int) -> list[list[tuple[int, int]]]:
    """What the replicas were given in each step, after seeing that places of a replica agree."""
    for replica in range(2):
        of_places = results[replica * places : (replica + 1) * places]
        assert all(one["got"] == of_places[0]["got"] for one in of_places)
    return [sorted(results[0]["got"][step] + results[places]["got"][step]) for step in range(STEPS)]


def _as_read(step: int) -> list[tuple[int, int]]:
    return sorted((replica, step * MICROBATCHES + place) for replica in range(2) for place in range(MICROBATCHES))


@pytest.mark.parametrize("places", [1, 2])
def test_every_microbatch_is_handed_out_once_in_its_own_step(places: int) -> None:
    results = launch(_drive, 2 * places, "", timeout_s=60)
    assert _whole(results, places) == [_as_read(step) for step in range(STEPS)]
    figures = results[0]["figures"]
    assert figures.dealt >= STEPS - 3
    assert figures.dealt + sum(figures.left.values()) == STEPS - 1
    assert figures.moves > 0
    assert figures.imbalance < 1.1 < figures.imbalance_before
    assert figures.measured_imbalance == pytest.approx({1: 4 / 3, 2: 4 / 3}[places])
    # The planner rank was told what its replica trains, in the order in which it trains it.
    for replica in range(2):
        told = results[replica * places]
        trained = [[{"vit": [_item(*number)["work"]]} for number in batch] for batch in told["got"][1:]]
        assert told["submitted"] == trained


@pytest.mark.parametrize(("fault", "reason"), [("late", "late"), ("unknown", "unknown"), ("unreadable", "unknown"), ("raises", "failed"), ("ends", "short")])
def test_what_cannot_be_dealt_is_trained_as_read_and_counted(fault: str, reason: str) -> None:
    results = launch(_drive, 4, fault, timeout_s=60)
    for step, given in enumerate(_whole(results, 2)):
        expected = _as_read(step)
        if fault == "ends" and step == STEPS - 1:
            expected = [one for one in expected if one <= (1, step * MICROBATCHES + 1)]
        assert given == expected, step
    figures = results[0]["figures"]
    assert figures.left[reason] >= 1
    assert figures.dealt + sum(figures.left.values()) == len(results[0]["got"]) - 1 or fault == "raises"
    assert all(result["is_on"] == (fault != "raises") for result in results)


def test_metadata_that_lie_lose_nothing() -> None:
    results = launch(_drive, 2, "lies", timeout_s=60)
    assert _whole(results, 1) == [_as_read(step) for step in range(STEPS)]


def test_a_replica_killed_in_an_exchange_ends_the_other_within_the_time_limit() -> None:
    began = time.monotonic()
    results = launch_all(_drive, 2, "killed", timeout_s=60)
    assert time.monotonic() - began < 50
    assert results[1].exit_code == 17
    assert results[0].error_message is not None
    assert "lost another rank" in results[0].error_message


def _with_own_look_ahead(rank: int, num_ranks: int) -> None:
    from megatron_dip.iteration.forward_backward import DipForwardBackward, IterationSettings
    from tests.distributed import dip_runs
    from tests.distributed.test_forward_backward import _model
    from tests.distributed.tiny_vlm import Case

    case = Case(parallel=Parallel(pipeline=1, data=2), chunks=(1, 1), num_layers=(4, 4))
    model = _model(case)
    partition = dip_runs.even_cut(case)
    DipForwardBackward(
        staged_model=model.staged, chunks=model.chunks, partition=partition,
        settings=IterationSettings(
            metadata=lambda item: {}, plan_function=dip_runs.PlanMaker(case, partition), device=torch.device("cpu"), look_ahead=1 + rank,
            timeout_s=30.0,
        ),
    )


def test_replicas_with_different_flags_are_told_so_on_all_ranks() -> None:
    for result in launch_all(_with_own_look_ahead, 2, timeout_s=200):
        assert result.error_message is not None
        assert "InputError" in result.error_message, result.error
        assert "--dip-look-ahead" in result.error_message
