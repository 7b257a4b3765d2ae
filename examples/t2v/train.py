"""Trains text-to-video, a language model and a diffusion transformer in one pipeline, on Megatron-LM's own pretrain().

    torchrun --nproc-per-node 2 -m megatron_dip.launch examples/t2v/train.py --setup t2v-s --mock-data --scale-down 64 \\
        --pipeline-schedule dip --pipeline-model-parallel-size 2 ...

The model is that of a named setup of the DIP paper. ``--mock-data`` draws microbatches with the setup's statistics: clips and captions of
drawn lengths packed up to 16 s, latents of noise, and noise and noise levels of their own, all from the sample's number, so that every
rank has the same. ``--scale-down`` divides widths, layers and clips' sizes for a machine that the setup does not fit.

Megatron's --num-layers, --hidden-size, --num-attention-heads, --seq-length and --max-position-embeddings are set from the setup; a sample
is a microbatch (--micro-batch-size 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
from megatron.core.enums import ModelType
from megatron.training import get_args, pretrain

from megatron_dip.models.dit import DiTSizes
from megatron_dip.models.flow_matching import FlowMatching, add_noise, timestep, velocity
from megatron_dip.models.t2v import TextToVideoConfig
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.named import named_setup
from megatron_dip.spec.training import TextToVideoModel, VideoSpec
from megatron_dip.spec.workload import Parallel
from megatron_dip.trainer.pretraining import whole_model
from megatron_dip.workloads.generators import TOKENS_PER_LATENT_FRAME, pack_clips

MAX_TEXT = 8192
"""Text tokens of a microbatch at most."""
LATENT = VideoSpec(channels=16, patch_spatial=2, patch_temporal=1)
"""Of Wan's VAE: 16 channels, patches of 1 x 2 x 2."""
ROWS = 16
"""Patches along the height of a frame; the rest of a frame's patches lie along its width."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("text-to-video")
    group.add_argument("--setup", default="t2v-s", help="t2v-s or t2v-l (default t2v-s)")
    group.add_argument("--scale-down", type=int, default=1, metavar="N", help="divides widths, layers and clips (default 1)")
    group.add_argument("--freeze-text-encoder", action="store_true", help="the language model only runs forward")
    group.add_argument("--flow-shift", type=float, default=FlowMatching().shift, help="of flow matching's noise levels")
    return parser


def scaled(module: ModuleSpec, factor: int, trainable: bool) -> ModuleSpec:
    """The module with widths and layers divided; heads keep an even size of at least 8."""
    heads = max(4, module.num_attention_heads // factor)
    size = max(8, module.hidden_size // factor // heads // 2 * 2)
    groups = None if module.query_groups == module.num_attention_heads else max(2, min(heads, module.query_groups // factor))
    return msgspec.structs.replace(
        module, num_layers=max(4, module.num_layers // factor), hidden_size=heads * size,
        ffn_hidden_size=max(16, module.ffn_hidden_size // factor // 8 * 8), num_attention_heads=heads, num_query_groups=groups,
        vocab_size=None if module.vocab_size is None else max(128, module.vocab_size // factor // 128 * 128), trainable=trainable,
    )


def model_of(setup: str, factor: int, freeze_text_encoder: bool) -> TextToVideoModel:
    """Raises InputError for setups that make no video."""
    named = named_setup(setup, "--setup")
    if named.family != "t2v":
        raise InputError("--setup", setup, "makes no video", "use t2v-s or t2v-l")
    if factor < 1:
        raise InputError("--scale-down", factor, "must be at least 1", "give a whole number such as 64")
    modules = [
        module if factor == 1 and not freeze_text_encoder else scaled(module, factor, module.name != "lm" or not freeze_text_encoder)
        for module in named.model.modules
    ]
    return TextToVideoModel(modules=ModelSpec(modules=modules), video=LATENT, sequence_length=MAX_TEXT)


class MockClips:
    """An endless stream of packed microbatches; number i follows from (seed, i) alone."""

    def __init__(self, model: TextToVideoModel, factor: int, flow: FlowMatching, seed: int, first: int, stride: int) -> None:
        self.model, self.factor, self.flow, self.seed = model, factor, flow, seed
        self.number, self.stride = first, stride
        video = model.video
        self.sizes = DiTSizes(in_channels=video.channels, patch_spatial=video.patch_spatial, patch_temporal=video.patch_temporal)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        item = self.item(self.number)
        self.number += self.stride
        return item

    def item(self, number: int) -> dict[str, torch.Tensor]:
        random = np.random.default_rng((self.seed, number))
        (microbatch,) = pack_clips(random, 1, self.model.modules.module("dit"))
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        side = max(1, ROWS // self.factor)
        width = max(1, TOKENS_PER_LATENT_FRAME // ROWS // self.factor)
        grids = torch.tensor([[max(1, tokens // TOKENS_PER_LATENT_FRAME), side, width] for tokens in microbatch["dit"]])
        lengths = torch.tensor([max(1, tokens // min(self.factor, 8)) for tokens in microbatch["lm"]])
        patches = grids.prod(dim=1)
        # Double: Megatron's Float16Module would round single ones.
        sigma = torch.tensor([self.flow.draw_sigma(generator) for _ in grids], dtype=torch.float64)
        clip, noise = (torch.randn(int(patches.sum()), 1, self.sizes.patch_size, generator=generator) for _ in range(2))
        level = sigma.float().repeat_interleave(patches)[:, None, None]
        vocabulary = self.model.modules.module("lm").vocab_size
        assert vocabulary is not None
        return {
            "x": add_noise(clip, noise, level), "timesteps": timestep(sigma), "grid_sizes": grids, "text_lengths": lengths,
            "tokens": torch.randint(0, vocabulary, (1, int(lengths.sum())), generator=generator),
            "target": velocity(clip, noise), "weight": self.flow.loss_weight(level)[:, :, 0],
        }


def config_of(args: Any) -> TextToVideoConfig:
    if args.sequence_parallel:
        raise InputError("--sequence-parallel", True, "is not supported in a text-to-video model", "leave it out")
    parallel = Parallel(
        tensor=args.tensor_model_parallel_size, pipeline=args.pipeline_model_parallel_size, data=args.data_parallel_size, sequence=False
    )
    return TextToVideoConfig(
        model=model_of(args.setup, args.scale_down, args.freeze_text_encoder), parallel=parallel, seed=args.seed, dtype=args.params_dtype,
        calculate_per_token_loss=args.calculate_per_token_loss, transformer_engine=args.transformer_impl == "transformer_engine",
        use_cpu_initialization=bool(args.use_cpu_initialization),
    )


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **unused: Any) -> torch.nn.Module:
    args = get_args()
    return whole_model(config_of(args), args, unused.get("pg_collection"))


def datasets_provider(num_samples: Any) -> tuple[Any, Any, Any]:
    """Streams for training, validation and test; every tensor rank draws its own copy."""
    from megatron.core import parallel_state

    args = get_args()
    if not args.mock_data:
        raise InputError("--mock-data", False, "other data are not read yet", "give --mock-data")
    model, flow = model_of(args.setup, args.scale_down, False), FlowMatching(shift=args.flow_shift)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    first = args.consumed_train_samples + replica
    return tuple(  # type: ignore[return-value]
        MockClips(model, args.scale_down, flow, args.seed + 1000 * number, start, replicas)
        for number, start in enumerate((first, replica, replica))
    )


datasets_provider.is_distributed = True  # type: ignore[attr-defined]

ARGUMENTS = ("x", "timesteps", "tokens", "grid_sizes", "text_lengths")


def loss_func(target: torch.Tensor, weight: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted squared error of the velocity: sum over patches, their number, and what is logged."""
    loss = ((output.float() - target.float()).square().mean(dim=-1) * weight).sum()
    count = torch.tensor(len(target), dtype=torch.int, device=output.device)
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    item = next(data_iterator)
    if torch.cuda.is_available():
        item = {name: value.cuda(non_blocking=True) for name, value in item.items()}
    output = model(**{name: item[name] for name in ARGUMENTS})
    return output, partial(loss_func, item["target"], item["weight"])


def defaults() -> dict[str, Any]:
    """What Megatron's arguments say of a model, from the setup on the command line."""
    parser = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False))
    given, _ = parser.parse_known_args()
    dit = model_of(given.setup, given.scale_down, given.freeze_text_encoder).modules.module("dit")
    return {
        "num_layers": dit.num_layers, "hidden_size": dit.hidden_size, "num_attention_heads": dit.num_attention_heads,
        "seq_length": MAX_TEXT, "max_position_embeddings": MAX_TEXT, "micro_batch_size": 1, "dataloader_type": "external",
        "tokenizer_type": "NullTokenizer", "vocab_size": 127, "ckpt_format": "torch_dist",
    }


if __name__ == "__main__":
    pretrain(
        datasets_provider, model_provider, ModelType.encoder_or_decoder, forward_step, extra_args_provider=add_arguments,
        args_defaults=defaults(),
    )
