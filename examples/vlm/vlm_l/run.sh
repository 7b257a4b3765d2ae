#!/usr/bin/env bash
# VLM-L of the DIP paper: ViT 22B and Qwen2 72B on 64 GPUs (TP 8, PP 8). See examples/recipe.sh; start with --dry-run.
set -euo pipefail

SETUP=vlm-l TENSOR=8 PIPELINE=8 GPUS_PER_NODE=8
TRAIN_SCRIPT=${TRAIN_SCRIPT:-$(dirname "${BASH_SOURCE[0]}")/../train.py}
MODEL_FLAGS=(--setup vlm-l)

source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"
recipe "$@"
