# What the recipes share; sourced by their run.sh, which sets SETUP, TENSOR, PIPELINE, GPUS_PER_NODE and, for models that train,
# MODEL_FLAGS (the model's sizes in the script's words).
#
#   run.sh --dry-run   draws a batch of the setup's data, chooses the cut, plans, simulates, and says whether it fits and what would
#                      run; needs no GPU, no data and no Megatron-LM
#   run.sh [flags]     trains; further flags go to the training script
#
# Environment of a training run: MEGATRON_LM (checkout), TRAIN_SCRIPT (a script of yours whose model provider builds a LLaVAModel of
# this recipe's sizes on your data, for instance packed energon/WebDataset shards; scripts/write_webdataset.py writes small ones),
# NODES, NODE_RANK, MASTER_ADDR; of both: WORK (where files go, default ./runs/SETUP), TIME_BUDGET (seconds of search, default 1).
set -euo pipefail

WORK=${WORK:-runs/$SETUP}
TIME_BUDGET=${TIME_BUDGET:-1}
SEQUENCE_FLAG=${SEQUENCE_FLAG---sequence-parallel}  # empty: the model has no sequence parallelism

plan() {
    mkdir -p "$WORK"
    megatron-dip workload "$SETUP" --tensor "$TENSOR" --pipeline "$PIPELINE" --output "$WORK/workload.json"
    megatron-dip plan "$WORK/workload.json" --output "$WORK/plan.json" --save-partition "$WORK/partition.json" \
        --time-budget "$TIME_BUDGET" --hardware-queues 1 --no-baselines
}

command_line() {
    COMMAND=(torchrun --nproc-per-node "$GPUS_PER_NODE" --nnodes "${NODES:-$((TENSOR * PIPELINE / GPUS_PER_NODE))}"
        --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}"
        -m megatron_dip.launch "${TRAIN_SCRIPT:-TRAIN_SCRIPT}"
        --pipeline-schedule dip --dip-partition "$WORK/partition.json" --dip-time-budget "$TIME_BUDGET" --dip-trace-dir "$WORK/traces"
        --tensor-model-parallel-size "$TENSOR" --pipeline-model-parallel-size "$PIPELINE" $SEQUENCE_FLAG
        --micro-batch-size 1 --global-batch-size 32 --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --transformer-impl transformer_engine --ckpt-format torch_dist "${MODEL_FLAGS[@]}" "$@")
}

recipe() {
    if [ "${1:-}" = "--dry-run" ]; then
        shift
        plan
        echo
        megatron-dip simulate "$WORK/workload.json" --schedule dip --partition "$WORK/partition.json"
        echo
        # Without a plan that fits, the planner has ended this script.
        echo "The plan fits: no rank goes beyond its capacity, the device's memory less a margin."
        echo "The simulator's peak may reach into the margin."
        echo
        if [ -z "${MODEL_FLAGS+set}" ]; then
            echo "This model plans and simulates; a training model of it is not part of this release."
        else
            command_line "$@"
            echo "A training run would start on every node:"
            printf '%q ' "${COMMAND[@]}"
            echo
        fi
        return
    fi
    if [ -z "${MODEL_FLAGS+set}" ]; then
        echo "run.sh: error: $SETUP can be planned and simulated, not trained yet. Remedy: run.sh --dry-run" >&2
        exit 2
    fi
    for name in MEGATRON_LM TRAIN_SCRIPT; do
        if [ -z "${!name:-}" ]; then
            echo "run.sh: error: $name is not set. Remedy: see examples/recipe.sh for what it names, or use --dry-run" >&2
            exit 2
        fi
    done
    [ -f "$WORK/partition.json" ] || plan
    command_line "$@"
    export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"
    # Megatron asks for one hardware queue under tensor parallelism; plans hang on no number of them. Kernels are loaded before the first
    # launch: one that is loaded while a receive waits may wait for it.
    export CUDA_DEVICE_MAX_CONNECTIONS=1 CUDA_MODULE_LOADING=EAGER
    exec "${COMMAND[@]}"
}
