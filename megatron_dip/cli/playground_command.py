"""Write a page with sliders for pipeline ranks, microbatches and images: DIP beside Megatron's 1F1B and interleaved schedules.

One file that needs no network. Every combination of the sliders is planned now, for the ViT and language model of the paper's vlm-s on one device, and
the page only chooses among them. Takes a minute or two. Needs Bokeh (the extra "html"), neither a GPU nor torch.
"""

from __future__ import annotations

import argparse
import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_dip.spec.partition import Partition
    from megatron_dip.spec.workload import Workload

SUMMARY = "write a page with sliders: DIP beside 1F1B and interleaved"
_RANKS, _MICROBATCHES, _IMAGES = (2, 4, 8), (4, 8, 16), (0, 2, 4, 8)
_TENSOR = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="PAGE.html", help="where to write the page")
    parser.add_argument("--device", default="h100", metavar="NAME|FILE.json", help="GPU whose times are shown (default h100)")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(_RANKS), metavar="N", help="pipeline ranks to choose from (default 2 4 8)")
    parser.add_argument("--microbatches", type=int, nargs="+", default=list(_MICROBATCHES), metavar="N", help="microbatches to choose from (default 4 8 16)")
    parser.add_argument("--images", type=int, nargs="+", default=list(_IMAGES), metavar="N",
                        help="mean images of a microbatch to choose from; each has 0 to twice as many (default 0 2 4 8)")
    parser.add_argument("--evaluations", type=int, default=100, metavar="N", help="schedules that DIP tries for each (default 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the batches and the search (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    from megatron_dip.cost.device import load_device
    from megatron_dip.spec.codec import check_outputs
    from megatron_dip.spec.errors import InputError

    for flag, values, high in (("--ranks", args.ranks, 64), ("--microbatches", args.microbatches, 256), ("--images", args.images, 48)):
        for value in values:
            if not (0 if flag == "--images" else 1) <= value <= high:
                raise InputError(flag, value, f"outside {0 if flag == '--images' else 1} to {high}", "give a smaller page")
    if not 1 <= args.evaluations <= 1 << 20:
        raise InputError("--evaluations", args.evaluations, "outside 1 to 2^20", "give a positive whole number")
    if not 0 <= args.seed < 1 << 32:
        raise InputError("--seed", args.seed, "outside 0 to 2^32", "give a whole number from 0")
    check_outputs({"--output": args.output})
    load_device(args.device, "--device")
    if find_spec("bokeh") is None:
        raise InputError("--output", str(args.output), "needs bokeh, which is not installed", 'pip install "megatron-dip[html]"')
    from megatron_dip.cli.output import print_json
    from megatron_dip.cost.interface import CostModel
    from megatron_dip.partition.joint import ChoiceLimits
    from megatron_dip.planner.partitioning import joint_partition
    from megatron_dip.report.page import PlaygroundCase, write_playground
    from megatron_dip.simulator.playground import playground_timelines

    def choose(workload: Workload, costs: CostModel) -> Partition:
        return joint_partition(
            workload.model_spec, workload.parallel.pipeline, [workload.microbatches], costs,
            limits=ChoiceLimits(short=8, thorough=1), drift=False,
        ).partition

    cases = [
        PlaygroundCase(
            position=(ranks, count, images),
            timelines=playground_timelines(ranks, count, images, choose, tensor=_TENSOR, device=args.device, evaluations=args.evaluations, seed=args.seed),
        )
        for ranks, count, images in itertools.product(sorted(set(args.ranks)), sorted(set(args.microbatches)), sorted(set(args.images)))
    ]
    write_playground(
        cases, ("pipeline ranks", "microbatches", "images in the mean"), args.output, title="One iteration of a vision-language model",
        explanation=f"Simulated on {Path(args.device).name}: ViT 5B and Llama 3 8B, tensor parallel {_TENSOR}, microbatches of 8192 tokens with 0 to "
        "twice the chosen mean of images. All three train the same batch. Wheel: zoom. Drag: move.",
    )
    if args.json:
        print_json({"output": str(args.output), "cases": [
            {"pipeline": case.position[0], "microbatches": case.position[1], "images": case.position[2],
             "seconds": {name: timeline.makespan / 1e9 for name, timeline in case.timelines.items()}} for case in cases]})
    else:
        print(f"wrote {args.output}")
    return 0
