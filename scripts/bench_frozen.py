"""Time and memory of LLaVA's first training stage: frozen vision model, frozen language model, both.

    python scripts/bench_frozen.py [--ranks 2] [--runs 5]

Runs a small LLaVAModel under DIP on the CPU, with the plan's own executor, and prints for each pipeline rank the CPU time of an iteration
(median and range over the runs) and the most bytes that autograd kept at once (each storage counted once, weights left out).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

FREEZING = {"nothing": (), "--freeze-ViT": ("vision",), "--freeze-LM": ("language",), "--freeze-ViT --freeze-LM": ("vision", "language")}
IMAGES = (4, 2, 6, 4)
TEXT = 128


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: list[float]
    kept_bytes: int
    loss: float


class KeptBytes:
    """Bytes of distinct storages that autograd holds, now and at most."""

    def __init__(self, weights: set[int]) -> None:
        self._weights = weights
        self._counts: dict[int, int] = {}
        self.now = self.peak = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self._weights:
            return _Kept(tensor)
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        kept = _Kept(tensor)
        weakref.finalize(kept, self._drop, key, size)
        return kept

    def _drop(self, key: int, size: int) -> None:
        self._counts[key] -= 1
        if not self._counts[key]:
            self.now -= size


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def provide(frozen: tuple[str, ...], ranks: int, pre_process: bool = True, post_process: bool = True) -> Any:
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dip.models.layers import projector_spec

    def config(pipeline: int) -> Any:
        return TransformerConfig(
            num_layers=8, hidden_size=256, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
            pipeline_model_parallel_size=pipeline, pipeline_dtype=torch.float32, deallocate_pipeline_outputs=True,
        )

    language, vision, projection = config(ranks), config(1), config(1)
    language.language_model_type, vision.vision_model_type = "", "clip"
    model = LLaVAModel(
        language_transformer_config=language, language_transformer_layer_spec=decoder_model_with_local_default_spec(None, False),
        language_vocab_size=512, language_max_sequence_length=1024, vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(), drop_vision_class_token=True, vision_projection_config=projection,
        vision_projection_layer_spec=projector_spec(), img_h=112, img_w=112, patch_dim=14, language_position_embedding_type="rope",
        image_token_index=-200, add_encoder=pre_process and post_process, pre_process=pre_process, post_process=post_process,
    )
    model.freeze(freeze_language_model="language" in frozen, freeze_vision_model="vision" in frozen, freeze_vision_projection=False)
    return model


def batch() -> list[dict[str, torch.Tensor]]:
    generator, items = torch.Generator().manual_seed(0), []
    for count in IMAGES:
        tokens = torch.randint(0, 512, (1, TEXT), generator=generator)
        tokens[0, torch.randperm(TEXT, generator=generator)[:count]] = -200
        items.append({"tokens": tokens, "labels": tokens.roll(-1, 1).clamp(min=0), "images": torch.rand(count, 3, 112, 112, generator=generator)})
    return items


def loss_function(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    loss = (losses * mask).sum() / mask.sum()
    return loss, {"loss": loss.item()}


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    item = next(data_iterator)
    tokens = item["tokens"]
    output, mask = model(
        item["images"], tokens, torch.arange(TEXT)[None], None, item["labels"], torch.ones(tokens.shape),
        num_image_tiles=torch.ones(len(item["images"]), dtype=torch.int),
    )
    return output, partial(loss_function, mask)


def run(rank: int, ranks: int, frozen: tuple[str, ...], runs: int) -> Measured:
    from tests.hooks.test_adapters import prepare

    prepare(1, ranks, 1)
    from megatron.core import tensor_parallel

    from megatron_dip.hooks.arguments import add_dip_args
    from megatron_dip.hooks.build import build_chunks
    from megatron_dip.hooks.megatron_lm import dip_schedule
    from megatron_dip.without_cuda.core import CpuDeviceMode

    torch.set_num_threads(1)
    args = add_dip_args(argparse.ArgumentParser()).parse_args(
        ["--dip-evaluations", "100", "--dip-device", "cpu", "--dip-chunks", "vit=2", "lm=2", "--dip-sub-microbatch-size", "vit=2"]
    )
    for name, value in {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": ranks, "data_parallel_size": 1, "context_parallel_size": 1,
        "sequence_parallel": False, "bf16": False, "fp16": False, "use_distributed_optimizer": False,
    }.items():
        setattr(args, name, value)
    seconds, loss = [], 0.0
    with CpuDeviceMode():
        torch.manual_seed(1)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        chunks = build_chunks(args, partial(provide, frozen, ranks))
        kept = KeptBytes({weight.untyped_storage().data_ptr() for chunk in chunks for weight in chunk.parameters()})
        for number in range(runs + 2):
            counting = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda packed: packed.tensor)
            if number == 1:  # the first warms up, the second counts
                counting.__enter__()
            began = time.process_time()
            reports = dip_schedule(lambda **_: [])(
                forward_step_func=forward_step, data_iterator=iter(batch()), model=chunks, num_microbatches=len(IMAGES), seq_length=TEXT,
                micro_batch_size=1, forward_only=False,
            )
            if number == 1:
                counting.__exit__(None, None, None)
            elif number > 1:
                seconds.append(time.process_time() - began)
            loss = sum(report["loss"] for report in reports)
    return Measured(seconds, kept.peak, loss)


def main() -> None:
    from tests.distributed.launcher import launch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    print("| frozen | rank | CPU s of an iteration, median (range) | kept at most, MiB | loss |")
    print("|---|---|---|---|---|")
    for name, frozen in FREEZING.items():
        for rank, found in enumerate(launch(run, given.ranks, frozen, given.runs, timeout_s=240)):
            spread = f"{min(found.seconds):.3f} to {max(found.seconds):.3f}"
            print(f"| {name} | {rank} | {statistics.median(found.seconds):.3f} ({spread}) | {found.kept_bytes / 2**20:.2f} | {found.loss:.6f} |")


if __name__ == "__main__":
    main()
