#!/usr/bin/env bash
# VLM-M of the DIP paper: ViT 5B and Qwen2 32B on 32 GPUs (TP 8, PP 4). See examples/recipe.sh; start with --dry-run.
set -euo pipefail

SETUP=vlm-m TENSOR=8 PIPELINE=4 GPUS_PER_NODE=8
MODEL_FLAGS=(
    --num-layers 64 --hidden-size 5120 --ffn-hidden-size 27648 --num-attention-heads 40
    --group-query-attention --num-query-groups 8 --rotary-base 1000000 --add-qkv-bias
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --position-embedding-type rope
    --seq-length 8192 --max-position-embeddings 8192
)

source "$(dirname "${BASH_SOURCE[0]}")/../../recipe.sh"
recipe "$@"
