"""Generated workloads have the statistics that are claimed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.named import MAX_IMAGES, NAMED_SETUPS
from megatron_dip.workloads.generators import (
    MAX_SECONDS,
    T2V_SPREAD,
    dit_spread,
    draw_packed,
    dynamic_bounds,
    make_workload,
    pack_documents,
    repack_documents,
)

LATENT_TOKENS_OF_16_S = 16 * 1792


@pytest.mark.parametrize("name", NAMED_SETUPS)
def test_a_name_and_a_seed_say_everything(name: str) -> None:
    assert make_workload(name, seed=3, num_microbatches=4) == make_workload(name, seed=3, num_microbatches=4)
    assert make_workload(name, seed=3, num_microbatches=4) != make_workload(name, seed=4, num_microbatches=4)
    assert make_workload(name, seed=3, num_microbatches=4) != make_workload(name, seed=3, num_microbatches=4, iteration=2)


@pytest.mark.parametrize("name", ["t2v-s", "t2v-l"])
@pytest.mark.parametrize("num_microbatches", [2, 32])
def test_t2v_packing_spreads_as_in_the_paper(name: str, num_microbatches: int) -> None:
    dit = NAMED_SETUPS[name].model.module("dit")
    for seed in range(5):
        microbatches = make_workload(name, seed=seed, num_microbatches=num_microbatches).microbatches
        assert dit_spread(microbatches, dit) == pytest.approx(T2V_SPREAD, rel=0.02)
        for microbatch in microbatches:
            assert 1 <= len(microbatch["dit"]) == len(microbatch["lm"]) <= 8
            assert sum(microbatch["dit"]) <= LATENT_TOKENS_OF_16_S
    assert MAX_SECONDS * 1792 == LATENT_TOKENS_OF_16_S


def test_packed_vlm_microbatches_differ_widely_within_the_limits() -> None:
    counts = [len(m.get("vit", [])) for seed in range(20) for m in make_workload("vlm-s", seed=seed).microbatches]
    assert max(counts) <= 48
    assert min(counts) <= 3
    assert 14 <= np.mean(counts) <= 18
    microbatch = make_workload("vlm-s", seed=0).microbatches[0]
    assert microbatch["lm"] == [8192]
    assert set(microbatch["vit"]) == {2704}


def test_the_dynamic_run_moves_its_bounds_as_in_the_paper() -> None:
    bounds = [dynamic_bounds(iteration) for iteration in range(1, 41)]
    assert bounds[:5] == [(0, 32), (4, 32), (8, 32), (12, 32), (16, 32)]
    assert bounds[19] == (0, 0)
    assert bounds[:20] == bounds[20:]
    assert all(low >= after_low and high >= after_high for (low, high), (after_low, after_high) in pairwise(bounds[4:20]))
    for iteration in (1, 5, 12, 20):
        low, high = dynamic_bounds(iteration)
        counts = [len(m.get("vit", [])) for m in make_workload("vlm-s", data="dynamic", iteration=iteration, num_microbatches=64).microbatches]
        assert low <= min(counts)
        assert max(counts) <= high


def test_uniform_data_keep_their_bounds() -> None:
    counts = [len(m.get("vit", [])) for m in make_workload("vlm-m", data="uniform", images=(3, 5), num_microbatches=64).microbatches]
    assert set(counts) == {3, 4, 5}


@pytest.mark.parametrize(("options", "field"), [
    ({"name": "vlm-xs"}, "setup"), ({"data": "random"}, "--data"), ({"num_microbatches": 0}, "--microbatches"), ({"iteration": 0}, "--iteration"),
    ({"seed": -1}, "--seed"), ({"data": "uniform", "images": (5, 2)}, "--images"), ({"name": "t2v-s", "data": "dynamic"}, "--data"),
])
def test_impossible_wishes_are_refused(options: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        make_workload(**{"name": "vlm-s", **options})  # type: ignore[arg-type]
    assert caught.value.field == field


@given(seed=st.integers(0, 10**6), count=st.integers(1, 12))
def test_documents_packed_anew_are_those_that_were_drawn(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    documents = [draw_packed(rng) for _ in range(count)]
    images = [len(microbatch.get("vit", [])) for microbatch in repack_documents(documents)]
    before = [sum(document.num_images for document in of_microbatch) for of_microbatch in documents]
    drawn = np.random.default_rng(seed)
    assert [len(pack_documents(drawn).get("vit", [])) for _ in range(count)] == before
    assert len(images) == count
    assert sum(images) <= sum(before)
    assert max(images, default=0) <= MAX_IMAGES


def test_documents_packed_anew_leave_nearly_no_image_out_and_spread_evenly() -> None:
    rng = np.random.default_rng(3)
    documents = [draw_packed(rng) for _ in range(128)]
    before = [sum(document.num_images for document in of_microbatch) for of_microbatch in documents]
    images = [len(microbatch.get("vit", [])) for microbatch in repack_documents(documents)]
    assert sum(images) > 0.98 * sum(before)
    assert np.std(images) < np.std(before) / 4
