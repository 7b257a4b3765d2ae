#!/usr/bin/env bash
# T2V-L of the DIP paper: Qwen2 32B and DiT 30B on 64 GPUs (TP 8, PP 8). See examples/recipe.sh; start with --dry-run.
set -euo pipefail

SETUP=t2v-l TENSOR=8 PIPELINE=8 GPUS_PER_NODE=8
TRAIN_SCRIPT=${TRAIN_SCRIPT:-$(dirname "${BASH_SOURCE[0]}")/../train.py}
MODEL_FLAGS=(--setup t2v-l)
SEQUENCE_FLAG=

source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"
recipe "$@"
