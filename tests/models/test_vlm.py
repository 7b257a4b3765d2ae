"""The parts of the vision-language model that need no process group, and its messages for wrong input."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from megatron_dip.models.built_in import ChainCost
from megatron_dip.models.vlm import VlmConfig, VlmDescription, document_bounds, merge_patches
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.training import ImageSpec
from megatron_dip.spec.workload import Parallel
from megatron_dip.trainer.stock_layouts import split_evenly, stock_cuts
from tests.distributed.tiny_vlm import Case, make_any_size_microbatch, make_microbatch, tiny_model


def config(parallel: Parallel | None = None, **changes: Any) -> VlmConfig:
    return VlmConfig(model=tiny_model(Case()), parallel=parallel or Parallel(), **changes)


def test_bounds_of_documents() -> None:
    bounds = document_bounds(torch.tensor([0, 2, 5], dtype=torch.int32), torch.zeros(1, 5))
    assert bounds.cu_seqlens_q.tolist() == bounds.cu_seqlens_kv.tolist() == [0, 2, 5]
    assert bounds.max_seqlen_q == 3
    assert document_bounds(None, torch.zeros(1, 4)).cu_seqlens_q.tolist() == [0, 4]


def test_merge_joins_neighbouring_patches() -> None:
    image = ImageSpec(size=12, channels=1, patch=2, merge=3, token_id=2)
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    hidden = torch.stack([rows, columns], dim=-1).view(36, 1, 2).float()
    merged = merge_patches(hidden, image)
    assert merged.shape == (4, 1, 18)
    for token in range(4):
        places = {tuple(place) for place in merged[token, 0].view(9, 2).int().tolist()}
        top, left = 3 * (token // 2), 3 * (token % 2)
        assert places == {(row, column) for row in range(top, top + 3) for column in range(left, left + 3)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 1, 9, 8)}, r"images = \[2, 1, 9, 8\].*\[N, 1, 8, 8\]"),
        ({"images": torch.zeros(1, 1, 8, 8)}, "tokens = 8.*its images need 4"),
        ({"tokens": torch.zeros(2, 48, dtype=torch.int64)}, "one packed sequence"),
        ({"tokens": torch.full((1, 49), 5)}, "longer than the model's 48"),
        ({"labels": torch.zeros(1, 47, dtype=torch.int64)}, r"labels = \[1, 47\]"),
        ({"cu_lengths": torch.tensor([0, 30, 47])}, r"cu_lengths = \[0, 30, 47\]"),
        ({"cu_lengths": torch.tensor([0, 30, 30, 48])}, "does not rise"),
    ],
)
def test_a_wrong_item_is_named(change: dict[str, torch.Tensor], message: str) -> None:
    description = VlmDescription(config())
    item = make_microbatch(0, 2)
    assert description.item_metadata(item) == {"vit": [16, 16], "lm": [48]}
    with pytest.raises(InputError, match=message):
        description.item_metadata({**item, **change})


@pytest.mark.parametrize(("num_images", "lengths"), [(2, {"vit": [16, 16], "lm": [48]}), (0, {"lm": [48]})])
def test_an_item_and_the_call_made_of_it_have_equal_lengths(num_images: int, lengths: dict[str, list[int]]) -> None:
    description, item = VlmDescription(config()), make_microbatch(0, num_images)
    batch = description.bind((item["images"],), {name: item[name] for name in ("tokens", "position_ids", "cu_lengths", "labels")})
    assert description.item_metadata(item) == description.metadata(batch) == lengths


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        (Parallel(tensor=3), {}, "not divisible by 3 tensor-parallel ranks"),
        (Parallel(context=2), {}, "context = 2"),
        (Parallel(), {"frozen": frozenset({"vit"})}, "frozen = 'vit'"),
    ],
)
def test_a_wrong_model_is_named(parallel: Parallel, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(parallel, **changes)


def test_modules_must_be_a_vision_and_a_language_model() -> None:
    model = tiny_model(Case())
    lonely = msgspec.structs.replace(model, modules=msgspec.structs.replace(model.modules, modules=model.modules.modules[1:]))
    with pytest.raises(InputError, match=r"model\.modules = \['lm'\]"):
        VlmConfig(model=lonely, parallel=Parallel())


def stage(module: str, instances: int, tokens: int) -> PlanStage:
    return PlanStage(
        id=0, rank=0, kind="fw", duration=1, mem_delta_start=0, mem_delta_end=0, deps=(), module=module, vp_stage=0, layers=(0, 1),
        microbatch=0, sub_microbatch=0, tokens=tokens, instances=instances, strategy=["none"],
    )


def test_boundary_shapes() -> None:
    vit, lm = stage("vit", 3, 48), stage("lm", 1, 48)
    description = VlmDescription(config(Parallel(tensor=2)))
    assert description.boundary(vit, vit, {}, 0).shape == (16, 3, 16)
    assert description.boundary(vit, lm, {}, 0).shape == (12, 1, 24)
    assert description.boundary(lm, lm, {}, 0).shape == (24, 1, 24), "sequence parallel: each rank sends its tokens"
    without = VlmDescription(config(Parallel(tensor=2, sequence=False)))
    assert without.boundary(lm, lm, {}, 0).shape == (48, 1, 24)


def test_boundary_shapes_of_images_of_any_size() -> None:
    """Three vision layers go on (0, 3 and 6): they travel behind the hidden states, and less and less of them behind the language model's."""
    case = Case(options=(("tower", "deepstack"),))
    description = VlmDescription(VlmConfig(model=tiny_model(case), parallel=Parallel()))
    batch = {"image_grid_thw": torch.tensor([[1, 2, 4], [2, 2, 2]])}  # 8 + 2 * 4 patches, 4 tokens
    vit, lm = stage("vit", 3, 16), stage("lm", 1, 64)
    assert description.boundary(vit, vit, batch, 0).shape == (16 * 2, 1, 16)
    later = msgspec.structs.replace(vit, layers=(2, 4))
    assert description.boundary(later, vit, batch, 0).shape == (16 * 3, 1, 16)
    assert description.boundary(msgspec.structs.replace(vit, layers=(6, 2)), lm, batch, 0).shape == (4 * 4, 1, 24)
    assert description.boundary(lm, lm, batch, 0).shape == (64 + 2 * 4, 1, 24)
    assert description.boundary(msgspec.structs.replace(lm, layers=(2, 1)), lm, batch, 0).shape == (64, 1, 24)
    assert description.metadata({**batch, "tokens": torch.zeros(1, 64)}) == {"lm": [64], "vit": [8, 4, 4]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_grid_thw": torch.tensor([[1, 3, 2]])}, "no multiples of 2 patches"),
        ({"image_grid_thw": torch.tensor([[1, 2, 10]])}, "limit of 8 patches"),
        ({"images": torch.zeros(3, 4)}, r"images = \[3, 4\]"),
        ({"position_ids": torch.zeros(1, 64, dtype=torch.int64)}, r"position_ids = \[1, 64\]"),
    ],
)
def test_a_wrong_item_of_images_of_any_size_is_named(change: dict[str, torch.Tensor], message: str) -> None:
    model = tiny_model(Case(options=(("tower", "deepstack"),)))
    description = VlmDescription(VlmConfig(model=model, parallel=Parallel()))
    item = make_any_size_microbatch(1, 2, model)
    description.item_metadata(item)
    with pytest.raises(InputError, match=message):
        description.item_metadata({**item, **change})


def test_split_evenly_is_the_best_of_all_splits() -> None:
    def heaviest(costs: list[float], sizes: list[int]) -> float:
        bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        return max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))

    def every(count: int, parts: int) -> list[list[int]]:
        if parts == 1:
            return [[count]]
        return [[first, *rest] for first in range(1, count - parts + 2) for rest in every(count - first, parts - 1)]

    generator = torch.Generator().manual_seed(0)
    for parts in range(1, 6):
        costs = torch.randint(1, 20, (7,), generator=generator).float().tolist()
        sizes = split_evenly(costs, parts)
        assert sum(sizes) == 7
        assert min(sizes) >= 1
        assert heaviest(costs, sizes) == min(heaviest(costs, other) for other in every(7, parts))


def test_parameter_costs_count_the_weights() -> None:
    """Weight matrices of a layer as Megatron builds it: qkv with grouped queries, projection, MLP."""
    costs = config().parameter_costs()
    assert costs["lm"].layer == 24 * (24 + 2 * 12) + 24 * 24 + 2 * 24 * 48
    assert costs["lm"].first == costs["lm"].last == 32 * 24
    assert costs["vit"].last == (16 * 4) * 24 + 24 * 24


def test_stock_cuts() -> None:
    scripts = stock_cuts(config(), "scripts", ranks=2)
    assert scripts["vit"].rows == ((8, 0),)
    assert scripts["lm"].rows == ((4, 4),)
    times = {"vit": ChainCost(layer=1.0), "lm": ChainCost(layer=3.0)}
    chain = stock_cuts(config(), "measured", ranks=2, virtual=2, layer_times=times)
    assert chain["vit"].rows == ((8, 0), (0, 0))
    assert chain["lm"].rows == ((0, 3), (3, 2))
    assert (chain["lm"].first, chain["lm"].last) == ((0, 1), (1, 1))


def test_stock_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(InputError, match="no virtual stages"):
        stock_cuts(config(), "scripts", ranks=2, virtual=2)
    with pytest.raises(InputError, match="cannot fill 18 stages"):
        stock_cuts(config(), "parameters", ranks=2, virtual=9)
    with pytest.raises(InputError, match="needs the layers' times"):
        stock_cuts(config(), "measured", ranks=2)
    odd = replace(config(), model=tiny_model(Case(num_layers=(8, 7))))
    with pytest.raises(InputError, match="not divisible by 2 pipeline ranks"):
        stock_cuts(odd, "scripts", ranks=2)
