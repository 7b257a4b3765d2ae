"""Towers that hide their layers run whole on one rank and give the losses and gradients of one process.

The towers are tiny random models of transformers: behind a wrapper in a LLaVAModel, by Megatron-Core's own ``hf://`` vision models, and as
encoders of a MimoModel as in examples/mimo.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.workload import Parallel, Training
from tests.distributed.launcher import launch
from tests.hooks import test_adapters as adapters
from tests.hooks.test_adapters import Case, Outcome

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-6
SIZES: dict[str, Any] = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def transformers_model(family: str, hidden_size: int) -> torch.nn.Module:
    from megatron_dip.without_cuda.scripts import prepare_imports

    prepare_imports()
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    kind, config = (CLIPVisionModel, CLIPVisionConfig) if family == "clip" else (SiglipVisionModel, SiglipVisionConfig)
    return kind(config(hidden_size=hidden_size, **SIZES))  # type: ignore[no-any-return]


class Tower(torch.nn.Module):
    """As scripts wrap them: images [n, 3, 28, 28] -> [n, 4 (and a class token), hidden]."""

    def __init__(self, family: str, hidden_size: int, flat: bool = False) -> None:
        super().__init__()
        self.model = transformers_model(family, hidden_size)
        self.flat = flat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(x).last_hidden_state
        return hidden.flatten(0, 1) if self.flat else hidden


def provide_wrapped(case: Case, ranks: int, pre_process: bool = True, post_process: bool = True) -> Any:
    """A LLaVAModel whose vision model the script has replaced."""
    family = case.model.removeprefix("wrapped ")
    model = adapters.provide_llava(replace(case, model=family), ranks, pre_process, post_process)
    if model.add_encoder:
        model.vision_model = Tower(family, 32)
        model.vision_model.requires_grad_("vision" not in case.frozen)
    return model


def provide_mimo(case: Case, ranks: int, pre_process: bool = True, post_process: bool = True) -> Any:
    """Modality ``images`` has a tower of transformers and a projection, ``scans`` one that gives its tokens flat and no projection."""
    from megatron.core.models.mimo import MimoModel
    from megatron.core.transformer.spec_utils import ModuleSpec as Spec

    config = adapters.provide_mimo(replace(case, frozen=()), ranks, pre_process, post_process).mimo_config
    specs = config.modality_submodules_spec
    specs["images"].submodules["encoders"]["clip"] = Spec(module=Tower, params={"family": "clip", "hidden_size": 16})
    specs["scans"].submodules["encoders"]["siglip"] = Spec(module=Tower, params={"family": "siglip", "hidden_size": 32, "flat": True})
    model = MimoModel(config)
    if "vision" in case.frozen:
        model.modality_submodules["images"].encoders["clip"].requires_grad_(False)
    return model


def run(rank: int, ranks: int, cases: list[Case]) -> list[Outcome]:
    adapters.MODELS.update({
        "wrapped clip": (provide_wrapped, adapters.forward_step_llava), "wrapped siglip": (provide_wrapped, adapters.forward_step_llava),
        "mimo": (provide_mimo, adapters.forward_step_mimo),
    })
    return adapters.run_cases(rank, ranks, cases)


def check(cases: list[Case], ranks: int) -> None:
    by_rank = launch(run, ranks * cases[0].shards, cases, timeout_s=240)
    for index, case in enumerate(cases):
        adapters.check_case(case, [outcomes[index] for outcomes in by_rank], TOLERANCE)


ONE_BY_ONE = ("--dip-sub-microbatch-size", "vit=1")


def test_a_tower_of_transformers_in_a_llava_model_over_two_ranks(tmp_path: Path) -> None:
    """Trained and frozen; microbatches of 0 to 3 images, one with none; kept, recomputed, offloaded; before and behind the ranks' border."""
    partition = tmp_path / "partition.json"
    partition.write_text(json.dumps({
        "format": "megatron-dip/partition/1", "chunks": {"vit": [[0, 1]], "lm": [[3, 1]]}, "sub_microbatch_size": {"vit": 1, "lm": 1},
    }))
    check([
        Case(model="wrapped clip", flags=ONE_BY_ONE),
        Case(model="wrapped siglip", frozen=("vision",), flags=("--dip-chunks", "lm=2")),
        Case(model="wrapped clip", frozen=("vision", "projection")),
        Case(model="wrapped clip", strategy="full", tied=True),
        Case(model="wrapped clip", strategy="offload", sequences=2, images=(3, 4, 0)),
        Case(model="wrapped clip", flags=("--dip-partition", str(partition)), frozen=("language",)),
        Case(model="wrapped siglip", images=(0, 0)),
    ], 2)


def test_megatrons_own_hugging_face_vision_model(tmp_path: Path) -> None:
    """LLaVAModel's vision model type ``hf://``, from a folder."""
    transformers_model("siglip", 32).save_pretrained(tmp_path)  # type: ignore[operator]
    model = f"hf://{tmp_path}"
    check([Case(model=model, flags=ONE_BY_ONE), Case(model=model, frozen=("vision",))], 2)


@pytest.mark.long
def test_encoders_of_a_mimo_model_over_two_ranks() -> None:
    check([Case(model="mimo", flags=("--dip-chunks", "lm=2", "--dip-sub-microbatch-size", "images=1")), Case(model="mimo", frozen=("vision",), tied=True)], 2)


@pytest.mark.long
def test_a_tower_under_tensor_parallelism() -> None:
    """TP 2 x P 2, with sequence parallelism of the language model: both tensor-parallel ranks hold the whole tower."""
    check([Case(model="wrapped clip", tensor=2, images=(2, 0, 4), flags=ONE_BY_ONE)], 2)


@pytest.mark.long
def test_a_tower_under_context_parallelism() -> None:
    """CP 2 x P 2: every context-parallel rank runs the tower on all images."""
    check([Case(model="wrapped clip", context=2, images=(1, 0, 2, 1)), Case(model="wrapped clip", context=2, images=(1, 0, 2), frozen=("vision",))], 2)


@pytest.mark.long
def test_a_tower_on_one_of_four_ranks(tmp_path: Path) -> None:
    partition = tmp_path / "partition.json"
    partition.write_text(json.dumps({
        "format": "megatron-dip/partition/1", "chunks": {"vit": [[0, 1, 0, 0]], "lm": [[1, 1, 1, 1]]}, "sub_microbatch_size": {"vit": 2, "lm": 1},
    }))
    check([Case(model="wrapped clip", flags=ONE_BY_ONE, tied=True), Case(model="wrapped siglip", flags=("--dip-partition", str(partition)))], 4)


@cache
def spec(uncut: bool) -> ModelSpec:
    sizes: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4}
    vit = ModuleSpec(name="vit", kind="vit", role="encoder", **sizes, **({"num_layers": 1, "uncut_blocks": 6} if uncut else {"num_layers": 6}))
    return ModelSpec(modules=[vit, ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=4, vocab_size=64, **sizes)])


def test_an_uncut_tower_costs_what_its_blocks_and_its_stem_cost() -> None:
    cut, uncut = (AnalyticCost(spec(kind), Parallel(), Training(dtype="bf16"), "H800") for kind in (False, True))
    layer, stem, whole = cut.part("vit", "layer", [16] * 3), cut.part("vit", "first", [16] * 3), uncut.part("vit", "layer", [16] * 3)
    assert whole.activation_bytes == pytest.approx(6 * layer.activation_bytes + stem.activation_bytes, rel=0.1)
    assert whole.forward_ns == pytest.approx(6 * layer.forward_ns + stem.forward_ns, rel=0.1)
    assert uncut.part("vit", "first", [16] * 3).forward_ns == 0
    assert uncut.static_bytes("vit", 1, first=True, last=False) == cut.static_bytes("vit", 6, first=True, last=False)
    assert set(uncut.strategies("vit", [16])) == {"none", "full", "offload"}
    full = uncut.strategies("vit", [16])["full"]
    assert full.activation < cut.strategies("vit", [16])["full"].activation / 5
    # Under tensor parallelism every rank runs all of it.
    divided = AnalyticCost(spec(True), Parallel(tensor=2), Training(dtype="bf16"), "H800")
    assert divided.part("vit", "layer", [16] * 3) == whole


def test_the_language_model_makes_up_for_the_tower() -> None:
    """The joint choice leaves the tower whole and gives its rank fewer of the other layers."""
    model = spec(True)
    costs = AnalyticCost(model, Parallel(pipeline=2), Training(dtype="bf16"), "H800")
    choice = joint_partition(model, 2, [[{"vit": [256] * 4, "lm": [1024]}] * 8], costs, chunks={}, sizes={"lm": 1 << 20})
    (tower,), rows = choice.partition.chunks["vit"], choice.partition.chunks["lm"]
    assert sorted(tower) == [0, 1]
    of_rank = [sum(row[rank] for row in rows) for rank in range(2)]
    assert of_rank[tower.index(1)] < of_rank[tower.index(0)]


def test_sizes_and_outputs_are_found_on_the_tower() -> None:
    from megatron_dip.models.uncut import UncutTower

    tower = UncutTower(Tower("clip", 32), torch.float32, None)
    found = tower.spec("vit", trainable=True)
    assert (found.num_layers, found.uncut_blocks, found.hidden_size, found.ffn_hidden_size, found.num_attention_heads) == (1, 2, 32, 48, 4)
    assert tower.length == tower.length_of(torch.empty(7, 3, 28, 28, device="meta")) == 5
    conv = torch.nn.Sequential(torch.nn.Conv2d(3, 24, 14, 14), torch.nn.Flatten(2))
    plain = UncutTower(conv, torch.float32, (3, 28, 56))
    assert plain.length == 24  # [n, 24, 8]: such a tower gives channels for tokens
    assert plain.spec("vit", trainable=True).uncut_blocks == max(1, round(sum(w.numel() for w in conv.parameters()) / (12 * 8**2)))
    assert np.prod(plain.boundary(_stage(1), torch.float32, None).shape) == 3 * 24 * 8
    assert plain.boundary(_stage(0), torch.float32, None).shape == (3, 3, 28, 56)


def _stage(layers: int) -> Any:
    from megatron_dip.spec.plan import PlanStage

    return PlanStage(
        id=0, rank=0, kind="fw", duration=1, mem_delta_start=0, mem_delta_end=0, deps=(), module="vit", vp_stage=0, layers=(0, layers), microbatch=0,
        sub_microbatch=0, tokens=3, instances=3, strategy=[],
    )


def test_a_tower_of_another_form_is_refused() -> None:
    from megatron_dip.models.uncut import UncutTower

    with pytest.raises(InputError, match=r"is what Conv2d makes of one image \[3, 28, 28\].*let its forward give \[images, tokens, width\]"):
        _ = UncutTower(torch.nn.Conv2d(3, 4, 14, 14), torch.float32, (3, 28, 28)).length_of(None)


def test_a_tower_that_gives_no_tensor_is_refused() -> None:
    from megatron_dip.models.uncut import UncutTower

    with pytest.raises(InputError, match=r"instead of a tensor\. Remedy: wrap it in a module"):
        _ = UncutTower(transformers_model("clip", 32), torch.float32, None).length


def test_uncut_blocks_go_with_one_layer_of_an_encoder() -> None:
    with pytest.raises(InputError, match=r"uncut_blocks = 3: does not go with num_layers 2"):
        ModuleSpec(name="v", kind="vit", role="encoder", num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, uncut_blocks=3).validate("m")
