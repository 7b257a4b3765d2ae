"""What the choice of a cut is worth and how it ages, simulated: one setup a call, rows are added to the output.

    python scripts/record_cut_choices.py vlm-s --output docs/results/cut_choices

Cuts: *even* (one chunk a rank, whole microbatches: what the flag alone gave without a choice), *expected* (the joint choice on microbatches that the model's
description expects, half of a sequence images: what the flag alone starts on), *sample* (the joint choice on 256 microbatches of the data: what `megatron-dip
tune` finds). Each is planned on other batches of the same data, and on data that have drifted; there it is held against the best of all cuts of this
table and the joint choice on that very distribution. All times are *simulated* on analytic costs, by numbers of evaluations: they repeat exactly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.partition.offline import even_partition
from megatron_dip.planner.iteration import PlanOptions, plan_iteration
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.report.tables import markdown_table
from megatron_dip.spec.codec import write_atomically
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.named import NAMED_SETUPS, Setup, named_setup
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import Microbatch
from megatron_dip.workloads.generators import default_parallel, make_workload, typical_clips

Batch = list[Microbatch]
MICROBATCHES, SAMPLED, JUDGED = 32, 8, 2
EVALUATIONS = 150
_WHOLE = 1 << 20
_SAMPLE_SEED, _JUDGED_SEED = 100, 500


def data_of(setup: str) -> dict[str, Callable[[int], Batch]]:
    """Distribution -> batch by seed. Text-to-video: heavy is one clip as long as the longest, half four middling ones, light eight short
    ones, none the same with captions of four times the length."""
    def uniform(low: int, high: int) -> Callable[[int], Batch]:
        return lambda seed: make_workload(setup, seed=seed, num_microbatches=MICROBATCHES, data="uniform", images=(low, high)).microbatches

    def nominal(seed: int) -> Batch:
        return make_workload(setup, seed=seed, num_microbatches=MICROBATCHES).microbatches

    def bimodal(seed: int) -> Batch:
        none, many = uniform(0, 0)(seed), uniform(32, 32)(seed)
        return [(many if index % 2 else none)[index] for index in range(MICROBATCHES)]

    if setup.startswith("vlm"):
        return {"nominal": nominal, "heavy": uniform(32, 48), "half": uniform(4, 12), "light": uniform(0, 3), "none": uniform(0, 0), "bimodal": bimodal}

    longest = max(length for seed in range(8) for one in nominal(seed) for length in one["dit"])
    frame = min(length for seed in range(8) for one in nominal(seed) for length in one["dit"])

    def clips(count: int, low: int, high: int, caption: int = 1) -> Callable[[int], Batch]:
        """So many clips in each microbatch, of ``low`` to ``high`` times the shortest one's patches, with captions as they come."""
        def batch(seed: int) -> Batch:
            rng = np.random.default_rng(seed)
            captions = [length for one in nominal(seed) for length in one["lm"]]
            return [
                {"lm": (caption * rng.choice(captions, count)).tolist(), "dit": (frame * rng.integers(low, high, count, endpoint=True)).tolist()}
                for _ in range(MICROBATCHES)
            ]

        return batch

    heavy, light = clips(1, longest // frame, longest // frame), clips(8, 1, 3)

    def humped(seed: int) -> Batch:
        pairs = zip(heavy(seed), light(seed), strict=True)
        return [pair[index % 2] for index, pair in enumerate(pairs)]

    return {"nominal": nominal, "heavy": heavy, "half": clips(4, 6, 10), "light": light, "none": clips(8, 1, 3, caption=4), "bimodal": humped}


def expected_batch(setup: Setup, sample: list[Batch]) -> Batch:
    """What a model's description expects: of the data it knows the sequence length and an image's length alone."""
    def typical(module: str) -> int:
        return round(statistics.median(length for batch in sample for one in batch for length in one.get(module, ())))

    names = [module.name for module in setup.model.modules]
    if "vit" in names:
        # 16 images of 256 embeddings are half of 8192.
        return [{"vit": [typical("vit")] * 16, "lm": [typical("lm")]}] * MICROBATCHES
    longest = max(sum(one["dit"]) for batch in sample for one in batch)
    lengths = typical_clips(longest)
    return [{"lm": [caption for _, caption in lengths], "dit": [clip for clip, _ in lengths]}] * MICROBATCHES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setup", choices=NAMED_SETUPS)
    parser.add_argument("--output", type=Path, required=True, help="without suffix: .json and .md are added")
    args = parser.parse_args()
    setup = named_setup(args.setup)
    data = data_of(args.setup)
    sample = [data["nominal"](_SAMPLE_SEED + index) for index in range(SAMPLED)]
    training = make_workload(args.setup, num_microbatches=1).training
    costs = AnalyticCost(
        setup.model, default_parallel(setup), training, setup.device, microbatches=[one for name in data for one in data[name](_SAMPLE_SEED)]
    )

    def choose(batches: list[Batch]) -> tuple[Partition, float]:
        began = time.process_time()
        return joint_partition(setup.model, setup.pipeline, batches, costs).partition, time.process_time() - began

    whole = {module.name: _WHOLE for module in setup.model.modules}
    tuned, cpu_s = choose(sample)
    cuts = {"even": even_partition(setup.model, setup.pipeline, {}, whole), "expected": choose([expected_batch(setup, sample)])[0], "sample": tuned}
    rows: dict[str, Any] = {}
    for name, batch_of in data.items():
        judged = [batch_of(_JUDGED_SEED + index) for index in range(JUDGED)]
        own = {} if name == "nominal" else {"own": choose([batch_of(_SAMPLE_SEED + index) for index in range(2)])[0]}
        rows[name] = {which: _seconds(setup, cut, judged, costs) for which, cut in {**cuts, **own}.items()}
        print(args.setup, name, rows[name], flush=True)
    file = args.output.with_suffix(".json")
    facts = json.loads(file.read_text()) if file.is_file() else {"setups": {}}
    facts["setups"][args.setup] = {
        "rows": rows, "choice_cpu_s": cpu_s, "date": time.strftime("%Y-%m-%d"),
        "cuts": {which: {"chunks": cut.chunks, "sub_microbatch_size": cut.sub_microbatch_size} for which, cut in cuts.items()},
    }
    write_atomically(file, (json.dumps(facts, indent=0) + "\n").encode())
    write_atomically(args.output.with_suffix(".md"), report(facts).encode())
    return 0


def _seconds(setup: Setup, cut: Partition, judged: list[Batch], costs: AnalyticCost) -> float | None:
    """Mean planned iteration; None where one does not fit."""
    try:
        plans = [plan_iteration(setup.model, cut, batch, costs, PlanOptions(evaluations=EVALUATIONS)) for batch in judged]
    except InputError:
        return None
    return statistics.fmean(plan.claimed_makespan for plan in plans) / 1e9


def report(facts: dict[str, Any]) -> str:
    def cell(row: dict[str, float | None], which: str) -> str:
        best = min(value for value in row.values() if value is not None)
        value = row.get(which)
        return "does not fit" if value is None else f"{value / best - 1:.1%}"

    lines = [
        [setup, name, f"{min(value for value in row.values() if value is not None):.3f}", *(cell(row, which) for which in ("even", "expected", "sample"))]
        for setup, of_setup in facts["setups"].items() for name, row in of_setup["rows"].items()
    ]
    worst = [
        [setup, *(f"{max(row[which] / min(v for v in row.values() if v) for row in rows.values()) - 1:.1%}" for which in ("expected", "sample"))]
        for setup, rows in ((setup, of_setup["rows"]) for setup, of_setup in facts["setups"].items())
    ]
    times = [[setup, f"{of_setup['choice_cpu_s']:.1f}", of_setup["date"]] for setup, of_setup in facts["setups"].items()]
    return "\n".join([
        "# Choices of a cut, and how they age\n",
        "    for setup in vlm-s vlm-m vlm-l t2v-s t2v-l; do python scripts/record_cut_choices.py $setup --output docs/results/cut_choices; done\n",
        f"*Simulated* on analytic costs of each setup's device under its memory; {MICROBATCHES} microbatches, {EVALUATIONS} evaluations a plan, mean of {JUDGED} "
        "batches. *even*: one chunk a rank, whole microbatches. *expected*: chosen without any data (the flag alone, first start). *sample*: chosen on "
        f"{SAMPLED * MICROBATCHES} microbatches of nominal data (`megatron-dip tune`). Figures: time above the best cut that is known for the row, among them "
        "one that was chosen on that very distribution.\n",
        markdown_table(["setup", "data", "best s", "even", "expected", "sample"], lines) + "\n",
        "Largest of each setup; at most 4 % were asked for of *sample*:\n",
        markdown_table(["setup", "expected", "sample"], worst) + "\n",
        "CPU time of the choice on the sample (2 cores, shared):\n",
        markdown_table(["setup", "CPU s", "date"], times) + "\n",
    ])


if __name__ == "__main__":
    raise SystemExit(main())
