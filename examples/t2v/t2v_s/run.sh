#!/usr/bin/env bash
# T2V-S of the DIP paper: Llama3 8B and DiT 5B on 16 GPUs (TP 4, PP 4). See examples/recipe.sh; start with --dry-run.
set -euo pipefail

SETUP=t2v-s TENSOR=4 PIPELINE=4 GPUS_PER_NODE=8
TRAIN_SCRIPT=${TRAIN_SCRIPT:-$(dirname "${BASH_SOURCE[0]}")/../train.py}
MODEL_FLAGS=(--setup t2v-s)
SEQUENCE_FLAG=

source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"
recipe "$@"
