#!/usr/bin/env bash
# VLM-M of the DIP paper: ViT 5B and Qwen2 32B on 32 GPUs (TP 8, PP 4). See examples/recipe.sh; start with --dry-run.
set -euo pipefail

SETUP=vlm-m TENSOR=8 PIPELINE=4 GPUS_PER_NODE=8
TRAIN_SCRIPT=${TRAIN_SCRIPT:-$(dirname "${BASH_SOURCE[0]}")/../train.py}
MODEL_FLAGS=(--setup vlm-m)

source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"
recipe "$@"
