#!/usr/bin/env bash
# VLM-S of the DIP paper: ViT 5B and Llama3 8B on 16 GPUs (TP 4, PP 4). See examples/recipe.sh; start with --dry-run.
set -euo pipefail

SETUP=vlm-s TENSOR=4 PIPELINE=4 GPUS_PER_NODE=8
TRAIN_SCRIPT=${TRAIN_SCRIPT:-$(dirname "${BASH_SOURCE[0]}")/../train.py}
MODEL_FLAGS=(--setup vlm-s)

source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"
recipe "$@"
