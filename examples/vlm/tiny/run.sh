#!/usr/bin/env bash
# Trains a tiny vision-language model with two processes on this machine's CPU, in about a minute.
#
#   MEGATRON_LM=checkout run.sh [flags]   examples/vlm/train.py on Megatron-LM's pretrain(), on real images of any size with captions that
#                                         scripts/write_images.py cuts out of scikit-image's photographs; further flags go to the script
#   run.sh [flags]                        without a checkout: the built-in trainer on scikit-learn's digits; flags of megatron-dip train
#
# Environment: WORK (where files go, default ./runs/vlm-tiny).
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
WORK=${WORK:-runs/vlm-tiny}

if [ -z "${MEGATRON_LM:-}" ]; then
    exec megatron-dip train "$HERE" --device cpu --pipeline 2 "$@"
fi
[ -d "$WORK/images" ] || python "$HERE/../../../scripts/write_images.py" "$WORK/images" --samples 400 --max-side 48
export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"
source "$HERE/../../cpu.sh"
cpu_environment
exec python -m torch.distributed.run --standalone --nproc-per-node 2 -m megatron_dip.launch --device cpu "$HERE/../train.py" \
    --model "$HERE/any_size.json" --data-path "$WORK/images" \
    --pipeline-schedule dip --dip-time-budget 0.05 --dip-chunks vit=2 lm=1 --dip-sub-microbatch-size vit=8 \
    --pipeline-model-parallel-size 2 --global-batch-size 8 --train-iters 20 --lr 3e-3 --log-interval 1 \
    --eval-iters 2 --eval-interval 10 --save "$WORK/checkpoints" --save-interval 10 --dataloader-save "$WORK/loader" \
    "${CPU_FLAGS[@]}" "$@"
