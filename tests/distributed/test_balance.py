"""Microbatches that change replicas: the same losses, all of them trained once."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from megatron_dip.partition.deal import deal
from megatron_dip.partition.second_pass import deal_by_plans
from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch, launch_all
from tests.distributed.test_training import SCHEDULES, folder, losses, run

pytestmark = pytest.mark.distributed
__all__ = ["folder"]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Kernels that are compiled while the first iterations train make their batches late."""
    work = np.arange(24).reshape(12, 2)
    deal_by_plans(work, deal(work, 4), max)


@pytest.mark.parametrize(
    ("parallel", "is_tied"), [(Parallel(pipeline=1, data=2), False), (Parallel(pipeline=2, data=2), True)], ids=["P1", "P2, embedding and head tied"]
)
@pytest.mark.long
def test_dealt_runs_train_as_undealt_ones(folder: Path, tmp_path: Path, parallel: Parallel, is_tied: bool) -> None:
    """Under a distributed optimizer, with gradients reduced beside the pipeline and clipped."""
    folder = Path(shutil.copytree(folder, tmp_path / "example"))
    config = msgspec.json.decode((folder / "config.json").read_bytes())
    next(module for module in config["model"]["modules"]["modules"] if module["name"] == "lm")["tied_embeddings"] = is_tied
    config["optimizer"]["clip_grad"] = 0.5
    (folder / "config.json").write_bytes(msgspec.json.encode(config))
    runs = {
        balance: run(
            folder, tmp_path / f"{balance}.json", SCHEDULES["dip"], parallel, balance=balance, iterations=8, num_microbatches=8,
            distributed_optimizer=True, overlap_grad_reduce=True,
        )
        for balance in ("off", "exchange", "indices")
    }
    for balance in ("exchange", "indices"):
        assert losses(runs[balance]) == pytest.approx(losses(runs["off"]), rel=1e-5), balance
    assert runs["off"].balance is None
    balance = runs["exchange"].balance
    assert balance is not None
    assert balance.dealt + sum(balance.left.values()) == 7
    assert balance.dealt >= 1
    assert balance.moves >= 2 * balance.dealt
    assert balance.bytes_sent > 0
    assert balance.imbalance <= balance.imbalance_before
    by_indices = runs["indices"].balance
    assert by_indices is not None
    # No batch has to be read before it is dealt; one more is read ahead.
    assert by_indices.dealt + sum(by_indices.left.values()) in (8, 9)
    assert by_indices.dealt >= 1
    assert by_indices.bytes_sent == 0
    assert by_indices.measured_imbalance > 1.0


MICROBATCHES, STEPS = 6, 9


def _item(replica: int, number: int) -> dict[str, Any]:
    """Heavy ones in a replica that changes from step to step; nested, raw, and never twice the same."""
    rng = np.random.default_rng([replica, number])
    size = int(rng.integers(1, 9)) + (20 if (number // MICROBATCHES) % 2 == replica and number % 2 else 0)
    image = torch.from_numpy(rng.integers(0, 255, (size, 3, 5), dtype=np.uint8))
    return {"id": (replica, number), "images": [image, {"mask": image > 9}], "array": rng.random(3), "empty": torch.empty(0, 2), "work": size}


def _hidden(item: dict[str, Any]) -> int:
    """What a plan takes for the item beyond its estimated work."""
    return item["id"][1] * 37 % 13


def _planned_ns(batch: list[Any]) -> int:
    if any(microbatch["where"] == [1] for microbatch in batch):
        raise ValueError("no plan for this one")
    return 1000 * sum(microbatch["vit"][0] + microbatch["hidden"][0] for microbatch in batch)


def _drive(rank: int, num_ranks: int, fault: str) -> dict[str, Any]:
    """Two replicas that hand out batches as training does, with nothing to train; what each place of each replica was given."""
    from megatron_dip.iteration import exchange
    from megatron_dip.iteration.balance import ReplicaBalance, ReplicaPlans
    from megatron_dip.iteration.lookahead import LookaheadIterator
    from megatron_dip.runtime.groups import new_process_groups

    places = num_ranks // 2
    replica = rank // places
    groups = new_process_groups([replica * places + place for place in range(places)], replica, timeout_s=20.0)
    submitted: list[list[Any]] = []
    sent, unpacked = exchange._sent, exchange.unpack
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

    exchange._sent, exchange.unpack = slow, broken  # type: ignore[assignment]
    is_planner = rank == groups.control_ranks[0]
    plans = ReplicaPlans(submit=submitted.append, planned_ns=_planned_ns if fault in ("planned", "unplannable") else None)
    balance = ReplicaBalance(
        groups, lambda batch: np.array([[1000 * sum(microbatch["vit"])] for microbatch in batch]), plans if is_planner else None, 20.0,
    )
    items = [_item(replica, number) for number in range(STEPS * MICROBATCHES)]
    if fault == "unknown":
        items[2 * MICROBATCHES + 1]["images"].append(lambda: None)
    if fault == "ends" and replica == 1:
        del items[(STEPS - 1) * MICROBATCHES + 2 :]
    data = LookaheadIterator(items)

    def describe(item: Any) -> Any:
        if fault in ("planned", "unplannable"):
            return {"vit": [item["work"]], "hidden": [_hidden(item)], "where": [replica if fault == "unplannable" else 0]}
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


@pytest.mark.long  # on a machine that is busy otherwise an exchange may come late, and then no figure is what it should be
def test_deals_go_on_by_planned_times_where_plans_are_at_hand() -> None:
    results = {fault: launch(_drive, 2, fault, timeout_s=60) for fault in ("", "planned", "unplannable")}
    for given in results.values():
        assert _whole(given, 1) == [_as_read(step) for step in range(STEPS)]
    by_plans, by_work = results["planned"][0]["figures"], results[""][0]["figures"]
    assert by_work.planned_imbalance is None
    # The first batch ahead is dealt before an iteration was measured.
    assert by_plans.planned_imbalance == pytest.approx(_planned_imbalance(results["planned"], STEPS - 1))
    slowest = {fault: [_slowest_plan(given, step) for step in range(2, STEPS)] for fault, given in results.items()}
    assert all(planned <= work for planned, work in zip(slowest["planned"], slowest[""], strict=True))
    assert sum(slowest["planned"]) < sum(slowest[""])
    # What cannot be planned is dealt by work.
    assert results["unplannable"][0]["got"] == results[""][0]["got"]
    assert results["unplannable"][0]["figures"].planned_imbalance is None


def _plans_of(results: list[dict[str, Any]], step: int) -> list[int]:
    items = [[_item(*number) for number in result["got"][step]] for result in results]
    return [sum(item["work"] + _hidden(item) for item in of_replica) for of_replica in items]


def _slowest_plan(results: list[dict[str, Any]], step: int) -> int:
    return max(_plans_of(results, step))


def _planned_imbalance(results: list[dict[str, Any]], step: int) -> float:
    plans = _plans_of(results, step)
    return max(plans) * len(plans) / sum(plans)


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
