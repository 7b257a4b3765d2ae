"""Trains a vision-language model on Megatron-LM's own pretrain().

    torchrun --nproc-per-node 2 -m megatron_dip.launch examples/vlm/train.py --setup vlm-s --mock-data --scale-down 64 \\
        --pipeline-schedule dip --pipeline-model-parallel-size 2 ...

The model is that of a named setup of the DIP paper (``--setup``), or one of a file (``--model``): an example's config.json, the same fields
in YAML, or the config.json of a Hugging Face checkpoint (Qwen2-VL, Qwen2.5-VL, Qwen3-VL), whose images have any size. ``--mock-data`` draws
microbatches with the setup's statistics (images.py); ``--data-path FOLDER`` reads images and text from an energon WebDataset
(energon_images.py; scripts/write_images.py writes a small one). ``--scale-down`` divides widths, layers, images and sequences for a machine
that the model does not fit.

Megatron's --num-layers, --hidden-size, --num-attention-heads, --seq-length and --max-position-embeddings are set from the model; a sample
is a microbatch of packed documents (--micro-batch-size 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from images import draw_microbatch
from megatron.training import get_args

from megatron_dip.models.hugging_face import model_of_config
from megatron_dip.models.vlm import FREEZABLE, VlmConfig
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.named import PACKED_TOKENS, named_setup
from megatron_dip.spec.training import ImageSpec, LayerOptions, VisionLanguageModel
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

PATCH, MERGE, BLOCKS = 14, 4, 13
"""Of the paper's setups: images of 728 pixels, 52 x 52 patches, 13 x 13 tokens."""
LLAMA3 = LayerOptions(normalization="RMSNorm", add_bias_linear=False, rotary_base=500_000)
QWEN2 = LayerOptions(normalization="RMSNorm", add_bias_linear=False, add_qkv_bias=True, rotary_base=1_000_000)
LANGUAGE_LAYERS = {"vlm-s": LLAMA3, "vlm-m": QWEN2, "vlm-l": QWEN2}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("vision-language")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--setup", default="vlm-s", help=f"one of {', '.join(LANGUAGE_LAYERS)} (default vlm-s)")
    which.add_argument("--model", type=Path, default=None, metavar="FILE", help="config.json of an example or of Hugging Face, or YAML")
    add_scale_down(group)
    group.add_argument("--max-image-size", type=int, default=1288, metavar="PIXELS", help="of Hugging Face's models (default 1288)")
    group.add_argument("--packed-length", type=int, default=None, metavar="TOKENS", help=f"of a microbatch (default: the model's, {PACKED_TOKENS})")
    group.add_argument("--freeze", nargs="*", default=[], choices=FREEZABLE, help="parts that are not trained")
    group.add_argument("--image-token-text", default="<image>", help="what stands for an image in a sample's text")
    group.add_argument("--dataloader-save", default=None, metavar="FOLDER", help="where the data loader's place is saved beside checkpoints")
    return parser


def model_of(args: argparse.Namespace) -> VisionLanguageModel:
    """The model that the flags name. Raises InputError for setups without images and for files that hold no model."""
    check_scale_down(args)
    model = _model_of_setup(args.setup, args.scale_down) if args.model is None else _model_of_file(args)
    return model if args.packed_length is None else msgspec.structs.replace(model, sequence_length=args.packed_length)


def _model_of_setup(setup: str, factor: int) -> VisionLanguageModel:
    if setup not in LANGUAGE_LAYERS:
        named_setup(setup, "--setup")
        raise InputError("--setup", setup, "is no vision-language model that trains here", f"use one of {', '.join(LANGUAGE_LAYERS)}")
    modules = [scaled(module, factor) for module in named_setup(setup).model.modules]
    blocks = max(1, round(BLOCKS / factor**0.5))
    length = PACKED_TOKENS if factor == 1 else -(-PACKED_TOKENS * blocks**2 // BLOCKS**2 // 64) * 64
    vocabulary = modules[1].vocab_size
    assert vocabulary is not None
    image = ImageSpec(size=PATCH * MERGE * blocks, channels=3, patch=PATCH, merge=MERGE, token_id=vocabulary - 1)
    return VisionLanguageModel(
        modules=ModelSpec(modules=modules), image=image, sequence_length=length, language_layers=LANGUAGE_LAYERS[setup]
    )


def _model_of_file(args: argparse.Namespace) -> VisionLanguageModel:
    raw = read_model_file(args.model)
    if "model_type" in raw:
        return model_of_config(raw, sequence_length=PACKED_TOKENS, image_size=args.max_image_size)
    return model_of_example(args.model, raw, VisionLanguageModel)


def config_of(args: Any) -> VlmConfig:
    return VlmConfig(
        model=model_of(args), parallel=parallel_of(args), frozen=frozenset(args.freeze), seed=args.seed, dtype=args.params_dtype,
        init_method_std=args.init_method_std, calculate_per_token_loss=args.calculate_per_token_loss,
        transformer_engine=args.transformer_impl == "transformer_engine", use_cpu_initialization=bool(args.use_cpu_initialization),
    )


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, **unused: Any) -> torch.nn.Module:
    args = get_args()
    return whole_model(config_of(args), args, unused.get("pg_collection"))


def datasets_provider(num_samples: Any) -> tuple[Any, Any, Any]:
    """Streams for training, validation and test; every rank of a replica draws or reads its own copy."""
    from megatron.core import parallel_state

    args = get_args()
    model = model_of(args)
    if not args.mock_data:
        from energon_images import DocumentEncoder

        tokenize = tokenizer_of(args, model.modules.module("lm").vocab_size or 0)
        # Documents wait for the next ones to fill a sequence with.
        return read_webdataset(
            args, lambda left_out: DocumentEncoder(model, tokenize, args.image_token_text, left_out), packing_buffer_size=64
        )
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    starts = (args.consumed_train_samples + replica, args.consumed_valid_samples + replica, replica)
    return tuple(  # type: ignore[return-value]
        NumberedStream(partial(draw_microbatch, model, args.seed + 1000 * number), start, replicas) for number, start in enumerate(starts)
    )


datasets_provider.is_distributed = True  # type: ignore[attr-defined]

ARGUMENTS = ("images", "image_grid_thw", "tokens", "position_ids", "cu_lengths", "labels")


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the losses of tokens [1, S], their number, and what is logged."""
    loss = (output.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int32)
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Any]:
    item = next(data_iterator)
    if torch.cuda.is_available():
        item = {name: value.cuda(non_blocking=True) for name, value in item.items()}
    output = model(**{name: item[name] for name in ARGUMENTS if name in item})
    return output, partial(loss_func, item["loss_mask"])


def defaults() -> dict[str, Any]:
    """What Megatron's arguments say of a model, from the flags."""
    given, _ = add_arguments(argparse.ArgumentParser(add_help=False, allow_abbrev=False)).parse_known_args()
    model = model_of(given)
    language = model.modules.module("lm")
    return {
        "num_layers": language.num_layers, "hidden_size": language.hidden_size, "num_attention_heads": language.num_attention_heads,
        "seq_length": model.sequence_length, "max_position_embeddings": model.sequence_length, "micro_batch_size": 1,
        "dataloader_type": "external", "tokenizer_type": "NullTokenizer", "vocab_size": (language.vocab_size or 128) - 1, "ckpt_format": "torch_dist",
    }


if __name__ == "__main__":
    start_pretrain(datasets_provider, model_provider, forward_step, add_arguments, defaults())
