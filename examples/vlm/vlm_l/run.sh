#!/usr/bin/env bash
# VLM-L of the DIP paper: ViT 22B and Qwen2 72B on 64 GPUs (TP 8, PP 8). See examples/recipe.sh; start with --dry-run.
set -euo pipefail

SETUP=vlm-l TENSOR=8 PIPELINE=8 GPUS_PER_NODE=8
MODEL_FLAGS=(
    --num-layers 80 --hidden-size 8192 --ffn-hidden-size 29568 --num-attention-heads 64
    --group-query-attention --num-query-groups 8 --rotary-base 1000000 --add-qkv-bias
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
    --seq-length 8192 --max-position-embeddings 8192
)

source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"
recipe "$@"
