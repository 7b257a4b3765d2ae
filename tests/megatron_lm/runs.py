"""Starts Megatron-LM's scripts on the CPU, one process a rank, and reads the losses in their logs."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
VARYING = SCRIPTS / "pretrain_vlm_varying.py"
TIME_LIMIT_S = 420


def words(text: str) -> list[str]:
    return text.split()


COMMON = words("""
--hidden-size 64 --num-attention-heads 4 --mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64
--transformer-impl local --attention-backend unfused --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion
--no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm --distributed-backend gloo --use-cpu-initialization --num-workers 0
--attention-dropout 0 --hidden-dropout 0 --log-interval 1 --lr 1e-3 --lr-decay-iters 10 --ckpt-format torch_dist --global-batch-size 8
""")

VLM = [*COMMON, *words("""
--encoder-num-layers 4 --decoder-num-layers 4 --seq-length 5 --dataloader-seq-length 64 --decoder-seq-length 64
--max-position-embeddings 128 --img-h 28 --img-w 28 --patch-dim 14 --micro-batch-size 1
""")]

GPT = [*COMMON, *words("--num-layers 6 --seq-length 32 --max-position-embeddings 32 --micro-batch-size 2")]

NO_EVALUATION = words("--eval-iters 0 --eval-interval 1000 --split 100,0,0")

DIP = words("--pipeline-schedule dip --dip-evaluations 20 --dip-device cpu --dip-partition even")


P2 = words("--pipeline-model-parallel-size 2")


def fresh(checkpoint: Path, iterations: int | None = None) -> list[str]:
    """Start at iteration 0 from the checkpoint's weights."""
    return ["--load", str(checkpoint), "--finetune", *([] if iterations is None else ["--train-iters", str(iterations)])]


@dataclass(frozen=True, slots=True)
class Run:
    losses: list[float]
    """Of the iterations, in order."""
    validation: list[float]
    loss_lines: list[str]
    """What the log says of each iteration's loss and gradient norm, letter by letter."""
    log: list[dict[str, str]]
    """Each iteration's log line but for its times: "lm loss", "loss scale", "consumed samples", ... -> what it says."""
    exit_code: int
    output: str
    """Of all ranks."""


def log_lines(text: str) -> list[dict[str, str]]:
    """Megatron's lines ``iteration 1/ 3 | consumed samples: 8 | ...``, by name, without what differs from run to run."""
    lines = []
    for line in text.splitlines():
        if re.search(r"iteration +\d+/ +\d+ \|", line):
            pairs = (part.partition(":") for part in line.split("|")[1:] if ":" in part)
            lines.append({name.strip(): value.strip() for name, _, value in pairs if "elapsed time" not in name})
    return lines


def start(
    tree: Path, script: Path, arguments: Sequence[str], *, ranks: int = 1, patched: bool = True, environment: Mapping[str, str] | None = None
) -> Run:
    """Runs a script of ``tree`` (through the launcher, or without any patch) on ``ranks`` processes and waits for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        **os.environ, **(environment or {}), "PYTHONPATH": f"{ROOT}{os.pathsep}{tree}", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GLOO_SOCKET_IFNAME": "lo", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    launcher = ["-m", "megatron_dip.launch", "--device", "cpu"] if patched else ["-m", "unpatched", str(tree)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *launcher, str(script), *arguments], cwd=SCRIPTS, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    text = "\n".join(outputs)
    # The last rank logs, with the loss of the pipeline's last stage.
    lines = re.findall(r"lm loss: (\S+) \|.*?grad norm: (\S+)", outputs[-1])
    return Run(
        losses=[float(loss) for loss, _ in lines],
        validation=[float(loss) for loss in re.findall(r"validation loss at .*?lm loss value: (\S+)", outputs[-1])],
        loss_lines=[f"{loss} {norm}" for loss, norm in lines],
        log=log_lines(outputs[-1]),
        exit_code=max(process.returncode for process in processes),
        output=text,
    )


def finished(run: Run, iterations: int) -> Run:
    """The run, if it came to its end."""
    assert run.exit_code == 0, run.output[-6000:]
    assert len(run.losses) == iterations, run.output[-6000:]
    return run


def own_losses(run: Run) -> list[float]:
    """Of each iteration alone: as the second loss since its start the release logs the mean of the first two."""
    return [2 * loss - run.losses[0] if index == 1 else loss for index, loss in enumerate(run.losses)]
