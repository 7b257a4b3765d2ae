"""Images of any size and number through a vision tower: DIP gives the losses and gradients of one process.

Every microbatch mixes sizes and aspects, a clip of two frames, and there are some of text alone. ``windows`` is a tower as Qwen2.5-VL has
it, ``deepstack`` one as Qwen3-VL has it, three of whose layers go into the first layers of the language model.

Frames of other sub-microbatches are summed in another order, and single precision rounds that by up to 5e-6 of the largest gradient here: in
double precision the same runs agree to 1e-6 (losses and gradients are kept in single precision).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dip.spec.workload import Parallel
from tests.distributed.test_parity_dip import check
from tests.distributed.tiny_vlm import Case

pytestmark = pytest.mark.distributed

KINDS = ("windows", "deepstack")


def case(kind: str, ranks: int, chunks: tuple[int, int], **changes: object) -> Case:
    options = changes.pop("options", ())
    base = Case(
        parallel=Parallel(pipeline=ranks), chunks=chunks, gated=True, dtype="float64", options=(("tower", kind), *options),  # type: ignore[misc]
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_cut(ranks: int) -> None:
    cuts = [(1, 1), (2, 2)] if ranks == 2 else [(1, 1), (2, 1), (1, 2)]
    check([case(kind, ranks, cut, tied=cut == (1, 1)) for kind in KINDS for cut in cuts], 1e-6)


def test_single_precision() -> None:
    check([case(kind, 2, (2, 2), dtype="float32") for kind in KINDS], 5e-6)


def test_unusual_batches_and_memory() -> None:
    cases = []
    for kind in KINDS:
        cases += [
            case(kind, 2, (2, 1), image_counts=((0, 0, 0),)),
            case(kind, 2, (1, 2), image_counts=((5,),), sub_microbatch_size=1),
            case(kind, 2, (2, 2), trainable=(False, True)),
            case(kind, 2, (2, 2), frozen=frozenset({"vision_model"})),
            case(kind, 2, (1, 2), options=(("memory", 900_000),)),
            case(kind, 2, (2, 2), options=(("random", 5),)),
        ]
    check(cases, 1e-6)


@pytest.mark.long
def test_tensor_and_data_parallel() -> None:
    check(
        [
            case(kind, 2, (1, 2), parallel=Parallel(pipeline=2, tensor=2, sequence=sequence))
            for kind, sequence in (("windows", False), ("windows", True), ("deepstack", False))
        ],
        5e-6,
    )
    counts = ((3, 0, 5, 1), (0, 2, 0, 4))
    check(
        [
            case(kind, 2, (1, 2), parallel=Parallel(pipeline=2, data=2), image_counts=counts, steps=3, overlap_grad_reduce=True,
                 distributed_optimizer=True, dtype="float32")
            for kind in KINDS
        ],
        5e-6,
        moved=2e-2,  # Adam makes whole steps of gradients that are near their rounding
    )


