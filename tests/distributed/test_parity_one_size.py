"""Vision modules of LLaVA's, LLaVA-OneVision's and InternVL's kind: DIP gives the losses and gradients of one process.

``clip`` has a class token and a norm before the layers, ``siglip`` a learned embedding behind each image, ``intern`` a class token, scales of
what its layers add, and a norm before the projector.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dip.spec.workload import Parallel
from tests.distributed.test_checkpoint import SAVED_AT, go_on_elsewhere
from tests.distributed.test_parity_dip import check
from tests.distributed.tiny_vlm import Case

pytestmark = pytest.mark.distributed

KINDS = ("clip", "siglip", "intern")


def case(kind: str, ranks: int, chunks: tuple[int, int], **changes: object) -> Case:
    base = Case(parallel=Parallel(pipeline=ranks), chunks=chunks, gated=True, dtype="float64", options=(("vit", kind),))
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_every_cut(ranks: int) -> None:
    cuts = [(1, 1), (2, 2)] if ranks == 2 else [(1, 2)]
    check([case(kind, ranks, cut, tied=cut == (1, 1)) for kind in KINDS for cut in cuts], 1e-6)


@pytest.mark.long
def test_single_precision() -> None:
    check([case(kind, 2, (2, 2), dtype="float32") for kind in KINDS], 5e-6)


def test_unusual_batches_and_frozen_parts() -> None:
    cases = []
    for kind in KINDS:
        cases += [
            case(kind, 2, (2, 1), image_counts=((0, 0, 0),)),
            case(kind, 2, (1, 2), image_counts=((5,),), sub_microbatch_size=1),
            case(kind, 2, (2, 2), trainable=(False, True)),
            case(kind, 2, (2, 2), frozen=frozenset({"vision_model"})),
            case(kind, 2, (1, 2), trainable=(True, False)),
        ]
    check(cases, 1e-6)


def test_fewer_layers_than_ranks() -> None:
    """What stands at the ends of the vision module lies on ranks without a layer."""
    check([case(kind, 4, (1, 1), num_layers=(2, 5)) for kind in KINDS], 1e-6)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["siglip", "intern"])
def test_checkpoints_load_under_other_cuts(kind: str, tmp_path: Path) -> None:
    saver = case(kind, 2, (2, 2), dtype="float32", steps=2 * SAVED_AT)
    loaders = [
        replace(saver, parallel=Parallel(), chunks=(1, 1)), replace(saver, parallel=Parallel(tensor=2), chunks=(1, 2)),
        replace(saver, chunks=(1, 1), options=(*saver.options, ("layout", "scripts"))),
    ]
    go_on_elsewhere(saver, loaders, tmp_path)


@pytest.mark.long
def test_tensor_and_data_parallel() -> None:
    check([case(kind, 2, (1, 2), parallel=Parallel(pipeline=2, tensor=2, sequence=sequence)) for kind in KINDS for sequence in (False, True)], 5e-6)
    check(
        [
            case(kind, 2, (1, 2), parallel=Parallel(pipeline=2, data=2), image_counts=((3, 0, 5, 1), (0, 2, 0, 4)), steps=3, overlap_grad_reduce=True,
                 distributed_optimizer=True, dtype="float32")
            for kind in KINDS
        ],
        5e-6,
        moved=2e-2,  # Adam makes whole steps of gradients that are near their rounding
    )
