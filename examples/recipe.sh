# What the recipes share; sourced by their run.sh, which sets SETUP, TENSOR, PIPELINE, GPUS_PER_NODE, TRAIN_SCRIPT and MODEL_FLAGS.
#
#   run.sh --dry-run                 draws a batch of the setup's data, chooses the cut, plans, simulates, and says whether it fits and
#                                    what would run; needs no GPU, no data and no Megatron-LM
#   run.sh --mock-data [flags]       trains on microbatches with the setup's statistics, made on the fly
#   run.sh --data-path DIR [flags]   trains on an energon WebDataset: images and text, or latents (frames) and captions;
#                                    scripts/write_images.py and scripts/write_clips.py write small ones
#   ... --scale-down [N]             the same on this machine's CPU: widths, layers, vocabulary, images or clips and sequences divided
#                                    by N (default 64), no tensor parallelism, two processes of one pipeline over gloo, Megatron's
#                                    local layers, five iterations
#
# Further flags go to the training script (examples/vlm/train.py, examples/t2v/train.py) and on to Megatron-LM; the last one counts.
#
# Environment of a training run: MEGATRON_LM (checkout), TRAIN_SCRIPT (a script of your own in place of the recipe's), NODES, NODE_RANK,
# MASTER_ADDR; RANKS (processes of a scaled-down run, default 2); of all: WORK (where files go, default ./runs/SETUP), TIME_BUDGET (seconds
# of search, default 1).
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/cpu.sh"
WORK=${WORK:-runs/$SETUP}
TIME_BUDGET=${TIME_BUDGET:-1}
RANKS=${RANKS:-2}
SEQUENCE_FLAG=${SEQUENCE_FLAG---sequence-parallel}  # empty: the model has no sequence parallelism

plan() {
    mkdir -p "$WORK"
    megatron-dip workload "$SETUP" --tensor "$TENSOR" --pipeline "$PIPELINE" --output "$WORK/workload.json"
    megatron-dip plan "$WORK/workload.json" --output "$WORK/plan.json" --save-partition "$WORK/partition.json" \
        --time-budget "$TIME_BUDGET" --hardware-queues 1 --no-baselines
}

has_flag() {  # has_flag NAME "$@": whether it is among the words, alone or as NAME=VALUE
    local name=$1 word
    shift
    for word in "$@"; do
        if [[ $word == "$name" || $word == "$name="* ]]; then return 0; fi
    done
    return 1
}

command_line() {
    # Megatron takes either of the two, not both.
    LENGTH_FLAGS=(--train-iters 1000)
    if has_flag --train-samples "$@"; then LENGTH_FLAGS=(); fi
    COMMAND=(torchrun --nproc-per-node "$GPUS_PER_NODE" --nnodes "${NODES:-$((TENSOR * PIPELINE / GPUS_PER_NODE))}"
        --node-rank "${NODE_RANK:-0}" --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-29500}"
        -m megatron_dip.launch "$TRAIN_SCRIPT"
        --pipeline-schedule dip --dip-partition "$WORK/partition.json" --dip-time-budget "$TIME_BUDGET" --dip-trace-dir "$WORK/traces"
        --tensor-model-parallel-size "$TENSOR" --pipeline-model-parallel-size "$PIPELINE" $SEQUENCE_FLAG
        --micro-batch-size 1 --global-batch-size 32 --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
        --transformer-impl transformer_engine --ckpt-format torch_dist "${LENGTH_FLAGS[@]}" --lr 1e-4 --log-interval 1
        "${MODEL_FLAGS[@]}" "$@")
}

scaled_command_line() {
    LENGTH_FLAGS=(--train-iters 5)
    if has_flag --train-samples "$@"; then LENGTH_FLAGS=(); fi
    COMMAND=(python -m torch.distributed.run --standalone --nproc-per-node "$RANKS" -m megatron_dip.launch --device cpu "$TRAIN_SCRIPT"
        --pipeline-schedule dip --dip-time-budget 0.05 --tensor-model-parallel-size 1 --pipeline-model-parallel-size "$RANKS"
        --micro-batch-size 1 --global-batch-size 4 --ckpt-format torch_dist "${LENGTH_FLAGS[@]}" --lr 1e-3 --log-interval 1
        --eval-iters 1 --eval-interval 1000 "${CPU_FLAGS[@]}" "${MODEL_FLAGS[@]}" "$@")
}

say_command() {
    echo "A training run would start $1:"
    printf '%q ' "${COMMAND[@]}"
    echo
}

recipe() {
    local is_dry=
    if [ "${1:-}" = "--dry-run" ]; then
        is_dry=1
        shift
    fi
    if has_flag --scale-down "$@"; then
        scaled_command_line "$@"
        if [ -n "$is_dry" ]; then
            say_command "on this machine"
            return
        fi
    elif [ -n "$is_dry" ]; then
        plan
        echo
        megatron-dip simulate "$WORK/workload.json" --schedule dip --partition "$WORK/partition.json"
        echo
        # Without a plan that fits, the planner has ended this script.
        echo "The plan fits: no rank goes beyond its capacity, the device's memory less a margin."
        echo "The simulator's peak may reach into the margin."
        echo
        command_line "$@"
        say_command "on every node"
        return
    fi
    if [ -z "${MEGATRON_LM:-}" ]; then
        echo "run.sh: error: MEGATRON_LM is not set. Remedy: name a Megatron-LM checkout by it, or use --dry-run" >&2
        exit 2
    fi
    if ! has_flag --mock-data "$@" && ! has_flag --data-path "$@"; then
        echo "run.sh: error: no data are named. Remedy: --mock-data, or --data-path FOLDER with an energon WebDataset" >&2
        exit 2
    fi
    export PYTHONPATH="$MEGATRON_LM${PYTHONPATH:+:$PYTHONPATH}"
    if has_flag --scale-down "$@"; then
        cpu_environment
        exec "${COMMAND[@]}"
    fi
    [ -f "$WORK/partition.json" ] || plan
    command_line "$@"
    # Megatron asks for one hardware queue under tensor parallelism; plans hang on no number of them. Kernels are loaded before the first
    # launch: one that is loaded while a receive waits may wait for it.
    export CUDA_DEVICE_MAX_CONNECTIONS=1 CUDA_MODULE_LOADING=EAGER
    exec "${COMMAND[@]}"
}
