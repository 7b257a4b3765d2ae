"""A small model with given costs, and a cut of it that is far from level."""

from __future__ import annotations

from typing import Any

from megatron_dip.cost.profile import ProfileCost
from megatron_dip.planner.cut_choice import CutTask
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import ModuleProfile, PointToPoint, Profile, ProfileGrid, ProfilePoint
from megatron_dip.spec.tuned import RunKey

SIZES: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 4}
MODEL = ModelSpec(modules=[
    ModuleSpec(name="vit", kind="vit", role="encoder", num_layers=8, **SIZES),
    ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=8, vocab_size=128, **SIZES),
])
RANKS = 2


def _module(ns: float) -> ModuleProfile:
    point = ProfilePoint(
        instances=1, tokens=16, forward_ns=ns, backward_input_ns=ns, backward_weight_ns=ns, activation_bytes=1.0, boundary_bytes=1.0
    )
    return ModuleProfile(num_layers=8, layer=ProfileGrid(points=[point]))


PROFILE = Profile(
    format="megatron-dip/profile/1", modules={"vit": _module(1e6), "lm": _module(3e6)}, p2p=PointToPoint(latency_ns=1000.0, bytes_per_second=1e10)
)
BATCH = [{"vit": [16] * (index % 4), "lm": [16]} if index % 4 else {"lm": [16]} for index in range(8)]
LOPSIDED = Partition(chunks={"vit": [[7, 1]], "lm": [[7, 1]]}, sub_microbatch_size={"vit": 1, "lm": 1})
KEY = RunKey(
    model=MODEL, pipeline=RANKS, tensor=1, context=1, sequence=False, numbers="fp32", device="cpu", memory_limit_bytes=None,
    data=["train.py", "--micro-batch-size 1"],
)


def task(current: Partition = LOPSIDED) -> CutTask:
    return CutTask(model=MODEL, num_ranks=RANKS, batches=[BATCH] * 2, costs=ProfileCost(PROFILE, None), current=current, chunks={}, sizes={})
