# What a training script of Megatron-LM needs where there is no CUDA device; sourced by recipe.sh and vlm/tiny/run.sh.
CPU_FLAGS=(--transformer-impl local --attention-backend unfused --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm --distributed-backend gloo
    --use-cpu-initialization --attention-dropout 0 --hidden-dropout 0 --num-workers 0 --dip-device cpu)

cpu_environment() {
    # Processes talk over this machine alone; the launcher refuses the CPU where a process sees a CUDA device.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo} CUDA_DEVICE_MAX_CONNECTIONS=1 CUDA_VISIBLE_DEVICES=
}
