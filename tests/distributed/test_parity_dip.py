"""DIP gives the losses and gradients of one process without a pipeline: every cut, every order, every kind of parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.spec.plan import Plan
from megatron_dip.spec.workload import Parallel
from tests.distributed.dip_runs import build, dip_of, forward_backward
from tests.distributed.launcher import launch
from tests.distributed.tiny_vlm import Case, Result, largest_move, losses_of, merge_ranks, references, run_case, worst_difference
from tests.distributed.vlm_plans import make_plan, plans_of

pytestmark = pytest.mark.distributed


def dip_forward_backward(plans: list[list[Plan]]) -> Callable[..., list[dict[str, Any]]]:
    """Runs the case's steps, each by the plan made for it, through the callable that Megatron's training loop would call."""

    def run(case: Case, model: Any, items: Sequence[dict[str, torch.Tensor]], replica: int) -> list[dict[str, Any]]:
        steps = plans[replica]
        dip_of(case, model, plan_function=lambda microbatches, forward_only: steps.pop(0), plan_deadline_s=30.0)
        return forward_backward(case, model, items, replica)

    return run


def run_dip(rank: int, num_ranks: int, cases: Sequence[Case], plans: Sequence[list[list[Plan]]]) -> list[Result]:
    return [run_case(case, build, dip_forward_backward(plan)) for case, plan in zip(cases, plans, strict=True)]


def check(cases: Sequence[Case], tolerance: float, moved: float = 1e-3) -> None:
    """Runs all cases in one spawn, on as many ranks as the first one needs, and compares each with one process: losses and gradients,
    or after optimizer steps losses, gradient norms and weights, these to ``moved`` (see :func:`largest_move`)."""
    expected = references(cases)
    by_rank = launch(run_dip, cases[0].parallel.num_gpus, cases, [plans_of(case) for case in cases])
    for index, case in enumerate(cases):
        results, alone = [results[index] for results in by_rank], [expected[index]]
        np.testing.assert_allclose(losses_of(results), losses_of(alone), rtol=tolerance, err_msg=str(case))
        if case.steps:
            assert largest_move(merge_ranks(results, "weights"), merge_ranks(alone, "weights")) <= moved, case
            for result in results:
                np.testing.assert_allclose(result.grad_norms, alone[0].grad_norms, rtol=tolerance, err_msg=str(case))
        else:
            assert worst_difference(merge_ranks(results, "gradients"), merge_ranks(alone, "gradients")) <= tolerance, case


CUTS = [(1, 1), (1, 2), (2, 2), (2, 4)]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_cut(ranks: int) -> None:
    layers = (16, 16) if ranks == 4 else (8, 8)
    check([Case(parallel=Parallel(pipeline=ranks), chunks=cut, tied=tied, num_layers=layers) for cut in CUTS for tied in (False, True)], 1e-6)


def test_uneven_chunks_and_unusual_batches() -> None:
    two = Parallel(pipeline=2)
    check(
        [
            Case(parallel=two, chunks=(2, 2), num_layers=(7, 5)),
            Case(parallel=two, chunks=(1, 2), image_counts=((0, 0, 0),)),
            Case(parallel=two, chunks=(2, 1), image_counts=((5,),), sub_microbatch_size=1),
            Case(parallel=two, chunks=(1, 2), per_token=True, gated=True),
            Case(parallel=two, chunks=(2, 2), trainable=(False, True)),
            Case(parallel=two, chunks=(2, 2), trainable=(True, False)),
            Case(parallel=two, chunks=(2, 2), frozen=frozenset({"vision_model"})),
        ],
        1e-6,
    )


def run_rules(rank: int, num_ranks: int, cases: Sequence[Case]) -> list[Result]:
    return [run_case(case, build, forward_backward) for case in cases]


def test_orders_of_other_schedules() -> None:
    """The executor runs every rule's order, plans travelling as orders, with the same numbers."""
    rules = ("interleaved", "optimus", "three-phase", "entrain")
    cases = [
        Case(parallel=Parallel(pipeline=2), chunks=(1, 2), image_counts=((2, 0, 3, 1),), options=(("schedule", rule), ("split_backward", split)))
        for rule in rules for split in (False, True)
    ]
    expected = references(cases[:1])[0]
    by_rank = launch(run_rules, 2, cases)
    for index, case in enumerate(cases):
        results = [results[index] for results in by_rank]
        np.testing.assert_allclose(losses_of(results), losses_of([expected]), rtol=1e-6, err_msg=str(case))
        assert worst_difference(merge_ranks(results, "gradients"), merge_ranks([expected], "gradients")) <= 1e-6, case


def test_recomputed_layers() -> None:
    """A tight memory makes the planner choose every strategy somewhere; the numbers stay."""
    case = Case(parallel=Parallel(pipeline=2), chunks=(1, 2), options=(("memory", 450_000),))
    assert {strategy for stage in make_plan(case).stages for strategy in stage.strategy} == {"none", "selective", "full"}
    check([case], 1e-6)


def test_bf16_stays_near_fp32() -> None:
    case = Case(parallel=Parallel(pipeline=2), chunks=(1, 2), dtype="bfloat16", steps=2, distributed_optimizer=True)
    expected = losses_of([references([replace(case, dtype="float32")])[0]])
    found = losses_of([results[0] for results in launch(run_dip, 2, [case], [plans_of(case)])])
    np.testing.assert_allclose(found, expected, rtol=1e-2)


def test_random_plans() -> None:
    cases = [
        Case(parallel=Parallel(pipeline=2), chunks=cut, seed=seed, tied=bool(seed % 2), options=(("random", seed),))
        for seed in range(6) for cut in CUTS[1:3]
    ]
    check(cases, 1e-6)


@pytest.mark.long
def test_random_plans_on_four_ranks() -> None:
    check([Case(parallel=Parallel(pipeline=4), chunks=(1, 2), options=(("random", seed),)) for seed in range(4)], 1e-6)


def test_ranks_without_layers_are_passed_over() -> None:
    four = Parallel(pipeline=4)
    check([Case(parallel=four, chunks=(1, 1), num_layers=layers, tied=layers[1] == 3) for layers in ((2, 5), (1, 3), (3, 1))], 1e-6)


def test_tensor_parallel() -> None:
    check(
        [
            Case(parallel=Parallel(pipeline=2, tensor=2, sequence=sequence), chunks=chunks, tied=tied, gated=not tied, options=options)
            for sequence in (False, True)
            for chunks, tied, options in (((1, 1), False, ()), ((1, 2), True, (("random", 3),)))
        ],
        5e-6,
    )


@pytest.mark.long
def test_data_parallel() -> None:
    counts = ((3, 0, 5, 1), (0, 2, 0, 4))
    base = Case(parallel=Parallel(pipeline=2, data=2), chunks=(1, 2), image_counts=counts, steps=3)
    overlapped = replace(base, overlap_grad_reduce=True, distributed_optimizer=True)
    check(
        [
            base,
            replace(base, overlap_grad_reduce=True, tied=True, options=(("random", 1),)),
            replace(overlapped, options=(("random", 2),)),
            replace(overlapped, tied=True, image_counts=((0, 0, 0, 0), (1, 2, 0, 4))),
            replace(overlapped, options=(("random", 3), ("overlap_param_gather", True))),
            replace(overlapped, trainable=(False, True)),
            replace(overlapped, trainable=(True, False)),
        ],
        5e-6,
    )


def test_tied_embeddings_in_two_chunks_of_one_rank() -> None:
    base = Case(parallel=Parallel(data=2), chunks=(1, 2), tied=True, image_counts=((3, 0, 5, 1), (0, 2, 0, 4)), steps=3)
    check([base, replace(base, overlap_grad_reduce=True, distributed_optimizer=True)], 5e-6)
