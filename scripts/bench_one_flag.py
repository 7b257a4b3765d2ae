"""Measures what the flag alone gives in a Megatron-LM script, on two CPU ranks, and writes a record.

    MEGATRON_LM=CHECKOUT python scripts/bench_one_flag.py --output docs/results/one_flag

The script is ``pretrain_vlm.py`` of the checkout on mock samples of zero to four images and texts of 4 to 24 tokens
(``tests/megatron_lm/scripts/pretrain_vlm_varying.py``), through the launcher, P 2, fp32, one thread a rank. Sections:

hand      ``--dip-chunks`` and ``--dip-sub-microbatch-size`` by hand, every one of a grid: the best is what the others are held against
alone     ``--pipeline-schedule dip`` alone: after ``megatron-dip tune``; and without it, resumed after 30 iterations that learned
slowed    a busy process beside both ranks from iteration 16 on: planned beside measured times
waiting   500 iterations of a small model: what was waited for plans

Compared runs take turns, and train the same batches from the same weights; iterations are held against each other one by one, the median of the
rounds each. Measured is the pipeline's time, from the first stage to the last.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from megatron_dip.report.records import write_record
from megatron_dip.report.tables import markdown_table


def words(text: str) -> list[str]:
    return text.split()


ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests/megatron_lm/scripts/pretrain_vlm_varying.py"
COMMON = words("""
--mock-data --tokenizer-type NullTokenizer --vocab-size 2047 --make-vocab-size-divisible-by 64 --transformer-impl local --attention-backend unfused
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion --no-persist-layer-norm
--distributed-backend gloo --use-cpu-initialization --num-workers 0 --attention-dropout 0 --hidden-dropout 0 --log-interval 1 --lr 1e-4
--ckpt-format torch_dist --global-batch-size 8 --micro-batch-size 1 --eval-iters 0 --eval-interval 100000 --split 100,0,0 --patch-dim 14
--pipeline-model-parallel-size 2 --dip-device cpu --dip-log-interval 1 --lr-decay-iters 1000
""")
SIZES = words("--hidden-size 256 --num-attention-heads 4 --encoder-num-layers 8 --decoder-num-layers 8 --img-h 84 --img-w 84")
"""36 patches an image."""
LENGTHS = words("--seq-length 37 --dataloader-seq-length 256 --decoder-seq-length 256 --max-position-embeddings 256")
SMALL = words("--hidden-size 128 --num-attention-heads 4 --encoder-num-layers 4 --decoder-num-layers 4 --img-h 42 --img-w 42")
SMALL_LENGTHS = words("--seq-length 10 --dataloader-seq-length 128 --decoder-seq-length 128 --max-position-embeddings 128")
GRID = [(chunks, size) for chunks in ("vit=1 lm=1", "vit=2 lm=1", "vit=2 lm=2", "vit=4 lm=2", "vit=4 lm=4") for size in (2, 4)]
"""(K of both modules, images in a full sub-microbatch; 4: whole)"""
SKIPPED = 5
"""First iterations of a run: caches and learned costs warm up."""
SLOWED_AFTER, SLOWED_FOR = 15, 25
DIP = ("--pipeline-schedule", "dip")


@dataclass(frozen=True, slots=True)
class Iteration:
    planned_ms: float
    measured_ms: float
    waited_ms: float
    """So far."""
    late: int
    """Plans so far."""


def read(line: str) -> Iteration | None:
    """Of a line of DIP's log."""
    found = re.search(
        r"\[DIP\] iteration +\d+ \| planned \(ms\): (\S+) .*?measured \(ms\): (\S+) .*?waited for plans so far \(ms\): (\S+) \| plans late so far: (\d+)", line
    )
    return None if found is None else Iteration(float(found[1]), float(found[2]), float(found[3]), int(found[4]))


class Bench:
    def __init__(self, checkout: Path, folder: Path, iterations: int) -> None:
        self.folder, self.iterations = folder, iterations
        self._checkout = checkout

    def environment(self) -> dict[str, str]:
        return {
            **os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{self._checkout}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1", "TEXT_LENGTHS": "vary",
        }

    def train(self, flags: Sequence[str], iterations: int | None = None, *, busy_after: int | None = None) -> list[Iteration]:
        """Trains on two ranks.

        Args:
            busy_after: a third process computes beside them once so many iterations are through.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            sys.executable, "-W", "ignore", "-m", "megatron_dip.launch", "--device", "cpu", str(SCRIPT), *COMMON, "--train-iters",
            str(iterations or self.iterations), *flags,
        ]
        ranks, logs = [], []
        for rank in range(2):
            variables = {
                **self.environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                "RANK": str(rank), "LOCAL_RANK": str(rank),
            }
            logs.append(self.folder / f"rank{rank}.log")
            output = subprocess.PIPE if rank == 0 else logs[rank].open("w")
            ranks.append(subprocess.Popen(command, cwd=SCRIPT.parent, env=variables, text=True, stdout=output, stderr=subprocess.STDOUT))
        found: list[Iteration] = []
        said = []
        busy: subprocess.Popen[bytes] | None = None
        try:
            assert ranks[0].stdout is not None
            for line in ranks[0].stdout:
                said.append(line)
                iteration = read(line)
                if iteration is not None:
                    found.append(iteration)
                    if len(found) == busy_after:
                        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            if any(rank.wait() for rank in ranks):
                raise SystemExit("".join(said)[-6000:] + logs[1].read_text()[-6000:])
        finally:
            for process in ranks:
                process.kill()
            if busy is not None:
                busy.kill()
        return found

    def tune(self, cache: Path) -> str:
        """The rehearsal's report."""
        output = self.folder / "tuned"
        command = [
            sys.executable, "-W", "ignore", "-m", "megatron_dip.cli.main", "tune", "--device", "cpu", "--output", str(output), str(SCRIPT), *COMMON, *SIZES,
            *LENGTHS, "--train-iters", "1000", "--dip-cache", str(cache),
        ]
        subprocess.run(command, cwd=SCRIPT.parent, env=self.environment(), check=True, stdout=subprocess.DEVNULL)
        return (output / "report.txt").read_text()


def ratios(runs: Sequence[Sequence[Iteration]], against: Sequence[Sequence[Iteration]]) -> list[float]:
    """Of each iteration, medians over rounds."""
    count = min(map(len, [*runs, *against]))
    return [
        statistics.median(run[index].measured_ms for run in runs) / statistics.median(run[index].measured_ms for run in against)
        for index in range(SKIPPED, count)
    ]


def off(runs: Sequence[Sequence[Iteration]]) -> list[float]:
    """How far each measured iteration lies from its prediction."""
    return [abs(one.measured_ms / one.planned_ms - 1) for run in runs for one in run[SKIPPED:]]


def quartiles(values: Sequence[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def measure_alone(bench: Bench, rounds: int, facts: dict[str, Any]) -> None:
    model = [*SIZES, *LENGTHS, *DIP]
    weights, learned = bench.folder / "weights", bench.folder / "learned"
    caches = {name: bench.folder / f"cache_{name}" for name in ("none", "tuned", "learned")}
    bench.train([*model, "--dip-cache", str(caches["none"]), "--dip-partition", "even", "--save", str(weights), "--save-interval", "1"], 1)
    start = ["--load", str(weights), "--finetune"]
    hand: dict[str, tuple[float, Sequence[str]]] = {}
    for chunks, size in GRID:
        given = ["--dip-chunks", *chunks.split(), "--dip-sub-microbatch-size", f"vit={size}"]
        run = bench.train([*model, *start, *given, "--dip-cache", str(caches["none"])], SKIPPED + 8)
        hand[f"{chunks} B {size}"] = (statistics.fmean(one.measured_ms for one in run[SKIPPED:]), given)
        print("by hand", chunks, size, hand[f"{chunks} B {size}"][0], flush=True)
    best = min(hand, key=lambda name: hand[name][0])
    facts["hand_ms"] = {name: mean for name, (mean, _) in hand.items()}
    facts["best_by_hand"] = best
    facts["tune_report"] = bench.tune(caches["tuned"])
    print(facts["tune_report"], flush=True)
    # Learns for thirty iterations, is saved, and goes on.
    bench.train([*model, *start, "--dip-cache", str(caches["learned"]), "--save", str(learned), "--save-interval", "30"], 30)
    systems: Mapping[str, Sequence[str]] = {
        "best by hand": [*start, *hand[best][1], "--dip-cache", str(caches["none"])],
        "flag alone after tune": [*start, "--dip-cache", str(caches["tuned"])],
        "flag alone, learned for 30 iterations, resumed": ["--load", str(learned), "--finetune", "--dip-cache", str(caches["learned"])],
    }
    runs: dict[str, list[list[Iteration]]] = {name: [] for name in systems}
    for turn in range(rounds):
        for name, flags in list(systems.items()) if turn % 2 == 0 else list(systems.items())[::-1]:
            runs[name].append(bench.train([*model, *flags]))
            print(turn, name, statistics.median(one.measured_ms for one in runs[name][-1][SKIPPED:]), flush=True)
    facts["runs"] = {name: [[vars_of(one) for one in run] for run in of_one] for name, of_one in runs.items()}
    facts["alone"] = {
        name: {
            "ms": statistics.median(one.measured_ms for run in of_one for one in run[SKIPPED:]),
            "ratio": ratios(of_one, runs["best by hand"]), "off": off(of_one),
        }
        for name, of_one in runs.items()
    }


def measure_slowed(bench: Bench, facts: dict[str, Any]) -> None:
    cache = bench.folder / "cache_tuned"
    if not cache.is_dir():
        bench.tune(cache)
    run = bench.train([*SIZES, *LENGTHS, *DIP, "--dip-cache", str(cache)], SLOWED_AFTER + SLOWED_FOR, busy_after=SLOWED_AFTER)
    facts["slowed"] = [vars_of(one) for one in run]


def measure_waiting(bench: Bench, iterations: int, facts: dict[str, Any]) -> None:
    run = bench.train([*SMALL, *SMALL_LENGTHS, *DIP, "--dip-cache", str(bench.folder / "cache_small")], iterations)
    facts["waiting"] = [vars_of(one) for one in run]


def vars_of(one: Iteration) -> dict[str, float]:
    return {"planned_ms": one.planned_ms, "measured_ms": one.measured_ms, "waited_ms": one.waited_ms, "late": one.late}


def report(facts: Mapping[str, Any]) -> list[str]:
    parts = []
    if "alone" in facts:
        rows = [
            [name, f"{figures['ms']:.0f}", quartiles(figures["ratio"]), f"{100 * statistics.median(figures['off']):.1f} %"] for name, figures in facts["alone"].items()
        ]
        parts.append("## The flag alone, against flags by hand\n\n" + markdown_table(
            ["run", "measured ms, median", "times best by hand, iteration by iteration", "measured off planned, median"], rows
        ))
        grid = sorted(facts["hand_ms"].items(), key=lambda item: item[1])
        parts.append(f"By hand, best: {facts['best_by_hand']}; 8 iterations of each, mean ms:\n\n" + markdown_table(
            ["chunks, images in a part", "measured ms"], [[name, f"{mean:.0f}"] for name, mean in grid]
        ))
        parts.append("The rehearsal's report:\n\n```\n" + facts["tune_report"] + "```")
    if "slowed" in facts:
        run = facts["slowed"]
        rows = [
            [str(index + 1), f"{one['planned_ms']:.0f}", f"{one['measured_ms']:.0f}", f"{100 * (one['measured_ms'] / one['planned_ms'] - 1):+.1f} %"]
            for index, one in enumerate(run) if index >= SLOWED_AFTER - 5
        ]
        before = statistics.median(abs(one["measured_ms"] / one["planned_ms"] - 1) for one in run[SKIPPED:SLOWED_AFTER])
        after = statistics.median(abs(one["measured_ms"] / one["planned_ms"] - 1) for one in run[SLOWED_AFTER + 10 :])
        parts.append(
            f"## A busy process from iteration {SLOWED_AFTER + 1} on\n\nTwo ranks and it share two cores. Measured off planned, median: {100 * before:.1f} % before, "
            f"{100 * after:.1f} % from the tenth iteration behind on.\n\n" + markdown_table(["iteration", "planned ms", "measured ms", "off"], rows)
        )
    if "waiting" in facts:
        run = facts["waiting"]
        waited = [after["waited_ms"] - before["waited_ms"] for before, after in itertools.pairwise(run)]
        parts.append(
            f"## Waiting for plans\n\n{len(run)} iterations of a small model (median {statistics.median(one['measured_ms'] for one in run):.0f} ms). Waited by the end of the "
            f"second: {run[1]['waited_ms']:.0f} ms; by the end: {run[-1]['waited_ms']:.0f} ms; iterations behind the second that waited over 1 ms: "
            f"{sum(ms > 1 for ms in waited[1:])}, over 10 ms: {sum(ms > 10 for ms in waited[1:])}, the longest {max(waited[1:]):.1f} ms. Late plans: {run[-1]['late']}."
        )
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="without suffix: .json and .md are written; sections that are there stay")
    parser.add_argument("--sections", nargs="+", choices=("alone", "slowed", "waiting"), default=("alone", "slowed", "waiting"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=25, help="of each run that is compared (default 25)")
    parser.add_argument("--waiting-iterations", type=int, default=500)
    args = parser.parse_args()
    checkout = os.environ.get("MEGATRON_LM")
    if not checkout or not (Path(checkout) / "pretrain_vlm.py").is_file():
        raise SystemExit("MEGATRON_LM must name a Megatron-LM checkout")
    file = args.output.with_suffix(".json")
    facts: dict[str, Any] = msgspec.json.decode(file.read_bytes()) if file.is_file() else {}
    for name in ("format", "title", "command", "machine", "versions"):
        facts.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(checkout), Path(folder), args.iterations)
        for section in args.sections:
            if section == "alone":
                measure_alone(bench, args.rounds, facts)
            elif section == "slowed":
                measure_slowed(bench, facts)
            else:
                measure_waiting(bench, args.waiting_iterations, facts)
            note = "Measured on CPUs, two ranks of one thread each; pretrain_vlm.py of Megatron-LM on mock samples of zero to four images."
            write_record(args.output, "The flag alone in a Megatron-LM script", [note, *report(facts)], facts)


if __name__ == "__main__":
    main()
