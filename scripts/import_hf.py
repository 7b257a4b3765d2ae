#!/usr/bin/env python3
"""Brings the weights of a Hugging Face checkpoint into a checkpoint that examples/vlm/train.py trains from, and back.

    python scripts/import_hf.py Qwen2.5-VL-7B-Instruct checkpoints/qwen
    ... examples/vlm/train.py --model Qwen2.5-VL-7B-Instruct/config.json --load checkpoints/qwen --finetune ...
    python scripts/import_hf.py checkpoints/trained back --export --config Qwen2.5-VL-7B-Instruct

Families: Qwen2-VL, Qwen2.5-VL, Qwen3-VL (dense), LLaVA, LLaVA-OneVision, InternVL. The checkpoint is a folder on disk with config.json and *.safetensors; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_dip.spec.errors import EXIT_CODE, InputError


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder to read: Hugging Face's, or with --export that of --save")
    parser.add_argument("target", type=Path, help="the folder to make")
    parser.add_argument("--export", action="store_true", help="from Megatron's format to Hugging Face's")
    parser.add_argument("--config", type=Path, help="with --export: Hugging Face's folder that training began from")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the weights written (default bf16)")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # Megatron-Core says what is not installed
    try:
        if options.export and options.config is None:
            raise InputError("--config", None, "is needed to export", "name the Hugging Face checkpoint that training began from")
        from megatron_dip.trainer.hugging_face_checkpoint import export_checkpoint, import_checkpoint

        if options.export:
            count = export_checkpoint(options.source, options.config, options.target, dtype=options.dtype)
        else:
            count = import_checkpoint(options.source, options.target, dtype=options.dtype)
    except InputError as error:
        print(f"import_hf.py: error: {error}", file=sys.stderr)
        return EXIT_CODE
    print(f"{count:,} weights: {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
