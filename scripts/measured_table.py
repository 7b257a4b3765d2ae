"""Writes the table of measurements in docs/measured.md from the records in docs/results, so that no number stands there without its record.

    python scripts/measured_table.py           rewrites the part of docs/measured.md between the two markers
    python scripts/measured_table.py--check    exits with 1 where that part is not what the records say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from megatron_dip.report.tables import markdown_table, spread

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def read(name: str) -> Any:
    path = RESULTS / f"{name}.json"
    return msgspec.json.decode(path.read_bytes()) if path.exists() else None


def schedule_rows(name: str, images: str) -> list[list[str]]:
    record = read(name)
    if record is None:
        return []
    runs = record["runs"]
    ours = runs["dip"]["pipeline_s"]
    labels = {
        "1f1b": "Megatron 1F1B, whole ViT on the first rank", "chain": "Megatron 1F1B, layers split by parameters",
        "interleaved": "Megatron interleaved, layers split by parameters", "measured": "Megatron 1F1B, layers split by measured time",
    }
    rows = []
    for key, label in labels.items():
        if key in runs:
            ratio = spread([theirs / mine for theirs, mine in zip(runs[key]["pipeline_s"], ours, strict=True)])
            rows.append([f"{label} / DIP, {images}", f"{ratio.median:.2f}x ({ratio.low_quartile:.2f} to {ratio.high_quartile:.2f})", link(name)])
    planning = 1e3 * spread(record["planning_s"]).median
    rows.append([f"DIP's planning, {images}, beside an iteration of {spread(ours).median:.2f} s", f"{planning:.0f} ms", link(name)])
    deviation = f"{100 * record['plan_deviation_median']:.1f} % (at most {100 * record['plan_deviation_max']:.1f} %)"
    rows.append([f"makespan against the plan, {images}", deviation, link(name)])
    return rows


def overhead_rows() -> list[list[str]]:
    record = read("train_overhead")
    if record is None:
        return []
    return [["executor against a plain loop on one rank, 20 pairs", f"{100 * record['overhead']:+.1f} %", link("train_overhead")]]


def sleep_rows(name: str) -> list[list[str]]:
    record = read(name)
    if record is None:
        return []
    medians = {schedule: spread(seconds).median for schedule, seconds in record["measured_s"].items()}
    title = record["title"].removeprefix("Executor with sleeping stages, ")
    others = ", ".join(f"{schedule} {seconds / medians['dip']:.2f}x" for schedule, seconds in medians.items() if schedule != "dip")
    return [[f"sleeping stages, {title}: off the plan; others / DIP", f"{100 * record['deviation']['dip']:+.1f} %; {others}", link(name)]]


def digit_rows() -> list[list[str]]:
    rows = []
    for path in sorted(RESULTS.glob("digits_seed*.json")):
        record = msgspec.json.decode(path.read_bytes())
        last = record["evaluations"][-1]
        read_right = f"{100 * last['right'] / last['asked']:.1f} % after {last['training_seconds']:.0f} s"
        rows.append([f"held-out digits read right, seed {record['settings']['seed']}", read_right, f"[record](results/{path.name})"])
    return rows


def link(name: str) -> str:
    return f"[record](results/{name}.md)"


def table() -> str:
    makers: list[Callable[[], list[list[str]]]] = [
        lambda: schedule_rows("train_uniform", "0 to 12 images a microbatch"),
        lambda: schedule_rows("train_heavy", "5 to 12 images a microbatch"),
        overhead_rows,
        lambda: sleep_rows("train_sleep_p4"),
        lambda: sleep_rows("train_sleep_p8"),
        digit_rows,
    ]
    return markdown_table(["what (medians, quartiles in brackets)", "measured", ""], [row for maker in makers for row in maker()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    path = ROOT / "docs" / "measured.md"
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"docs/measured.md has no {BEGIN} ... {END}"
    wanted = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if args.check:
        return int(wanted != text)
    path.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
