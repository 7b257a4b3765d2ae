#!/usr/bin/env bash
# VLM-S of the DIP paper: ViT 5B and Llama3 8B on 16 GPUs (TP 4, PP 4). See examples/recipe.sh; start with --dry-run.
set -euo pipefail

SETUP=vlm-s TENSOR=4 PIPELINE=4 GPUS_PER_NODE=8
MODEL_FLAGS=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
    --group-query-attention --num-query-groups 8 --rotary-base 500000
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
    --seq-length 8192 --max-position-embeddings 8192
)

source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"
recipe "$@"
