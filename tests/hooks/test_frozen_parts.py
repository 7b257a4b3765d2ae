"""Frozen parts: losses and gradients of the whole model, no stage, message or kept tensor for a gradient that nobody needs.

Needs an installed megatron-core and no checkout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.launcher import launch
from tests.hooks.test_adapters import Case, Outcome, check_case, prepare, run_case

pytestmark = pytest.mark.distributed

CHUNKS = ("--dip-chunks", "vit=2", "lm=2")
LLAVA = Case(model="clip", flags=CHUNKS)
GPT = Case(model="gpt", sequences=2, flags=("--dip-chunks", "lm=2"))
MIMO = Case(model="mimo", flags=("--dip-chunks", "images=2", "lm=2"))
EMBEDDING = r"language_model\.embedding"

CASES = {
    "vision tower": replace(LLAVA, frozen=("vision",)),
    "language model": replace(LLAVA, frozen=("language",)),
    "all but the projector": replace(LLAVA, frozen=("vision", "language")),
    "projector": replace(LLAVA, frozen=("projection",)),
    "tower and projector": replace(LLAVA, frozen=("vision", "projection")),
    "embedding, text alone": replace(LLAVA, frozen_names=EMBEDDING, images=(0, 0)),
    "embedding and tower": replace(LLAVA, frozen=("vision", "projection"), frozen_names=EMBEDDING),
    "all": replace(LLAVA, frozen=("vision", "projection", "language")),
    "adapters in two layers of a frozen language model": replace(LLAVA, frozen=("vision", "projection"), adapters=(1, 2), frozen_names=r"^(?!.*\.(up|down)$)"),
    "adapters in a frozen GPT": replace(GPT, adapters=(3, 5), frozen_names=r"^(?!.*\.(up|down)$)"),
    "embedding of a GPT": replace(GPT, frozen_names=r"^embedding"),
    "tower of a MimoModel": replace(MIMO, frozen=("vision",)),
    "language model of a MimoModel": replace(MIMO, frozen=("language",)),
}


@dataclass(frozen=True, slots=True)
class Traces:
    """What one rank saw. Stages are (module, vp_stage, rank)."""

    outcome: Outcome
    planned: list[tuple[tuple[str, int, int], int, str]]
    """Of the plan: (stage, microbatch, kind)"""
    gradients_to: list[tuple[str, int, int]]
    """Stages that are sent a gradient"""
    kept_bytes: dict[tuple[str, int, int], int]
    """By stage, what autograd saved in its forwards"""
    trained: dict[tuple[str, int, int], bool]
    """Of this rank's chunks: whether anything in it is trained"""


@contextmanager
def counting_saved_tensors(rank: int) -> Iterator[Counter[tuple[str, int, int]]]:
    from megatron_dip.models.staged import DescribedStagedModel

    saved: Counter[tuple[str, int, int]] = Counter()
    original = DescribedStagedModel.forward

    def counted(self: Any, stage: Any, inputs: Any, consumers: Any) -> Any:
        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[stage.module, stage.vp_stage, rank] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return original(self, stage, inputs, consumers)

    DescribedStagedModel.forward = counted  # type: ignore[method-assign]
    try:
        yield saved
    finally:
        DescribedStagedModel.forward = original  # type: ignore[method-assign]


def run_traced(rank: int, ranks: int, cases: list[Case]) -> list[Traces]:
    prepare(1, ranks, 1)
    from megatron_dip.hooks import build
    from megatron_dip.without_cuda.core import CpuDeviceMode

    traces = []
    with CpuDeviceMode():
        for case in cases:
            build._built.clear()
            with counting_saved_tensors(rank) as saved:
                outcome = run_case(rank, ranks, case)
            (built,) = build._built.values()
            forward_backward = built.forward_backward
            assert forward_backward is not None
            plan = forward_backward.plan
            assert plan is not None

            def place(stage: Any) -> tuple[str, int, int]:
                return stage.module, stage.vp_stage, stage.rank

            taker = {tag: consumer for consumer, tags in plan.inputs.items() for tag in tags}
            traces.append(Traces(
                outcome, [(place(stage), stage.microbatch, stage.kind) for stage in plan.stages],
                [place(plan.stages[taker[tag]]) for tag, source in plan.outputs.items() if plan.stages[source].kind == "bw"], dict(saved),
                {
                    (*key, rank): any(weight.requires_grad for weight in chunk.parameters())
                    for key, chunk in zip(built.keys, forward_backward._chunks, strict=True)
                },
            ))
            dist.barrier()
    return traces


def check_traces(case: Case, of_ranks: list[Traces]) -> None:
    check_case(case, [traces.outcome for traces in of_ranks])
    trained = {stage: own for traces in of_ranks for stage, own in traces.trained.items()}
    planned = of_ranks[0].planned
    present = {(stage[0], microbatch) for stage, microbatch, _ in planned}
    backwards = {(stage, microbatch) for stage, microbatch, kind in planned if kind == "bw"}
    for stage, microbatch, kind in planned:
        if kind == "fw":
            name = stage[0]
            feeding = {other for other, _ in present if name == "lm" and other != "lm" and (other, microbatch) in present}
            # By chunks: within a chunk the first trained layer may stand behind others.
            needed = any(
                own and (place[0] in feeding or (place[0] == name and place[1:] <= stage[1:])) for place, own in trained.items()
            )
            assert ((stage, microbatch) in backwards) == needed, (stage, microbatch)
    for traces in of_ranks:
        assert set(traces.gradients_to) <= {stage for stage, _ in backwards}
        for stage, kept in traces.kept_bytes.items():
            if stage not in {place for place, _ in backwards}:
                assert kept == 0, (stage, kept)
    if any(trained.values()) and backwards:
        assert sum(sum(traces.kept_bytes.values()) for traces in of_ranks) > 0


def check_all(cases: list[Case], ranks: int) -> None:
    by_rank = launch(run_traced, ranks, cases, timeout_s=240)
    for index, case in enumerate(cases):
        check_traces(case, [traces[index] for traces in by_rank])


@pytest.mark.parametrize("ranks", [1, 2])
def test_frozen_parts_equal_the_whole_model_and_need_no_more_than_they_must(ranks: int) -> None:
    check_all(list(CASES.values()), ranks)


def test_frozen_parts_with_recomputed_and_offloaded_layers_and_split_backwards() -> None:
    """Megatron's re-entrant checkpoints would lose gradients behind what is frozen."""
    check_all([replace(case, strategy="full") for case in CASES.values()], 1)
    check_all([
        replace(case, flags=(*case.flags, "--dip-split-backward", "--dip-host-memory", "1"), strategy="offload" if index % 2 else None)
        for index, case in enumerate(CASES.values())
    ], 1)


def test_the_projectors_chunk_alone_keeps_something_of_a_frozen_tower() -> None:
    (case,) = launch(run_traced, 1, [CASES["all but the projector"]], timeout_s=120)
    kept = case[0].kept_bytes
    assert ("vit", 0, 0) not in kept
    assert kept["vit", 1, 0] > 0
