"""Trains text-to-video, a language model and a diffusion transformer in one pipeline, on Megatron-LM's own pretrain().

    torchrun --nproc-per-node 2 -m megatron_dip.launch examples/t2v/train.py --setup t2v-s --mock-data --scale-down \\
        --pipeline-schedule dip --pipeline-model-parallel-size 2 ...

The model is that of a named setup of the DIP paper (``--setup``), or one of a file (``--model``): an example's config.json, or the same
fields in YAML. ``--mock-data`` draws microbatches with the setup's statistics (clips.py): clips and captions of drawn lengths packed up to
16 s. ``--data-path FOLDER`` reads latents (or frames) and captions from an energon WebDataset (energon_clips.py; scripts/write_clips.py
writes a small one). ``--scale-down`` divides widths, layers, frames' sizes and captions for a machine that the setup does not fit.

Megatron's --num-layers, --hidden-size, --num-attention-heads, --seq-length and --max-position-embeddings are set from the model; a sample
is a microbatch of packed clips (--micro-batch-size 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from clips import PackLimits, draw_microbatch
from megatron.training import get_args

from megatron_dip.models.flow_matching import FlowMatching
from megatron_dip.models.t2v import TextToVideoConfig
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.named import named_setup
from megatron_dip.spec.training import TextToVideoModel, VideoSpec
from megatron_dip.trainer.pretraining import (
    NumberedStream,
    add_scale_down,
    check_scale_down,
    model_of_example,
    parallel_of,
    read_model_file,
    read_webdataset,
    scaled,
    start_pretrain,
    whole_model,
)
from megatron_dip.trainer.samples import tokenizer_of
from megatron_dip.workloads.generators import LATENT_FRAMES_PER_SECOND, MAX_SECONDS

MAX_TEXT = 8192
"""Text tokens of a setup's microbatch at most."""
LATENT = VideoSpec(channels=16, patch_spatial=2, patch_temporal=1)
"""Of Wan's VAE: 16 channels, patches of 1 x 2 x 2."""
ROWS, COLUMNS = 16, 28
"""Patches of a setup's latent frame."""
MOST_SHORTENED = 8
"""Captions of a scaled-down setup are at most this many times shorter, so that there are some words left."""
FILE_FRAME = (4, 4)
"""Patches of a mock frame where the model is a file's."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("text-to-video")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--setup", default="t2v-s", help="t2v-s or t2v-l (default t2v-s)")
    which.add_argument("--model", type=Path, default=None, metavar="FILE", help="config.json of an example, or YAML")
    add_scale_down(group)
    group.add_argument(
        "--packed-patches", type=int, default=None, metavar="N", help="of a microbatch of --data-path at most (default: of 16 s of the setup's frames)"
    )
    group.add_argument("--freeze-text-encoder", action="store_true", help="the language model only runs forward")
    group.add_argument("--flow-shift", type=float, default=FlowMatching().shift, help="of flow matching's noise levels")
    group.add_argument("--dataloader-save", default=None, metavar="FOLDER", help="where the data loader's place is saved beside checkpoints")
    return parser


def model_of(args: argparse.Namespace) -> TextToVideoModel:
    """The model that the flags name. Raises InputError for setups that make no video and for files that hold no model."""
    check_scale_down(args)
    if args.model is not None:
        model = model_of_example(args.model, read_model_file(args.model), TextToVideoModel)
        if model.video.text_width is not None:
            raise InputError("--model", str(args.model), "takes text embeddings, which no data here have", "give it a language model")
    else:
        named = named_setup(args.setup, "--setup")
        if named.family != "t2v":
            raise InputError("--setup", args.setup, "makes no video", "use t2v-s or t2v-l")
        modules = [scaled(module, args.scale_down) for module in named.model.modules]
        model = TextToVideoModel(modules=ModelSpec(modules=modules), video=LATENT, sequence_length=MAX_TEXT // min(args.scale_down, MOST_SHORTENED))
    if not args.freeze_text_encoder:
        return model
    modules = [msgspec.structs.replace(module, trainable=module.trainable and module.name != "lm") for module in model.modules.modules]
    return msgspec.structs.replace(model, modules=ModelSpec(modules=modules))


def frame_of(args: argparse.Namespace) -> tuple[int, int]:
    """Patches along height and width of a mock frame."""
    if args.model is not None:
        return FILE_FRAME
    side = args.scale_down**0.5
    return max(1, round(ROWS / side)), max(1, round(COLUMNS / side))


def config_of(args: Any) -> TextToVideoConfig:
    return TextToVideoConfig(
        model=model_of(args), parallel=parallel_of(args), seed=args.seed, dtype=args.params_dtype,
        calculate_per_token_loss=args.calculate_per_token_loss, transformer_engine=args.transformer_impl == "transformer_engine",
        use_cpu_initialization=bool(args.use_cpu_initialization),
    )


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **unused: Any) -> torch.nn.Module:
    args = get_args()
    return whole_model(config_of(args), args, unused.get("pg_collection"))


def datasets_provider(num_samples: Any) -> tuple[Any, Any, Any]:
    """Streams for training, validation and test; every rank of a replica draws or reads its own copy."""
    from megatron.core import parallel_state

    args = get_args()
    model, flow, frame = model_of(args), FlowMatching(shift=args.flow_shift), frame_of(args)
    if not args.mock_data:
        from energon_clips import ClipEncoder

        tokenize = tokenizer_of(args, model.modules.module("lm").vocab_size or 0)
        most = round(MAX_SECONDS * LATENT_FRAMES_PER_SECOND) * frame[0] * frame[1]
        limits = PackLimits(patches=most if args.packed_patches is None else args.packed_patches, tokens=model.sequence_length)
        # Clips wait for the next ones to fill a microbatch with.
        return read_webdataset(args, lambda left_out: ClipEncoder(model, tokenize, limits, flow, left_out), packing_buffer_size=32)
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    starts = (args.consumed_train_samples + replica, args.consumed_valid_samples + replica, replica)
    return tuple(  # type: ignore[return-value]
        NumberedStream(partial(draw_microbatch, model, frame, -(-MAX_TEXT // model.sequence_length), flow, args.seed + 1000 * number), start, replicas)
        for number, start in enumerate(starts)
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
    """What Megatron's arguments say of a model, from the flags."""
    given, _ = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False)).parse_known_args()
    model = model_of(given)
    dit, language = model.modules.module("dit"), model.modules.module("lm")
    return {
        "num_layers": dit.num_layers, "hidden_size": dit.hidden_size, "num_attention_heads": dit.num_attention_heads,
        "seq_length": model.sequence_length, "max_position_embeddings": model.sequence_length, "micro_batch_size": 1,
        "dataloader_type": "external", "tokenizer_type": "NullTokenizer", "vocab_size": (language.vocab_size or 128) - 1, "ckpt_format": "torch_dist",
    }


if __name__ == "__main__":
    start_pretrain(datasets_provider, model_provider, forward_step, add_arguments, defaults())
