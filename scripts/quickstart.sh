#!/usr/bin/env bash
# From nothing to a trained vision-language model: makes .venv, installs, trains the digits example under DIP on two pipeline ranks,
# then lets DIP and Megatron's own schedules take turns on the same weights and batches, and draws one iteration of each.
# Runs on the CPU of any Linux machine with Python 3.11; results go to runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh train,examples

export CUDA_VISIBLE_DEVICES=
out=runs/quickstart
mkdir -p "$out"

echo "== Training the digits example under DIP, two pipeline ranks =="
megatron-dip train examples/vlm/digits --pipeline-schedule dip --pipeline 2 --device cpu --evaluate-interval 60 \
    --seed "${SEED:-1}" --record "$out/training.json" --timelines "$out/timelines"

echo
echo "== DIP beside Megatron's own schedules, in turns on the same weights and batches =="
python scripts/bench_train.py schedules --images changing --turns 6 --warmup 8 --systems dip,1f1b,interleaved \
    --output "$out/comparison" --picture "$out/iteration.png"
