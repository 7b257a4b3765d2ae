"""Choose the cut of a run of a Megatron-LM script by a short rehearsal with the run's own flags.

The script is started on the ranks of one replica, on this machine, for some thirty iterations: its data are read ahead (256 microbatches or more), its
layers are timed as training runs them, and from both the chunks of every module, their layers, and the sub-microbatch sizes are chosen. Written are
partition.json, profile.json and report.txt (the expected iteration against the flags' own cut and the stock schedule), and the cut is kept for
--dip-partition auto, the default, which finds it for a run with equal model, sizes, device, script and data flags.

    megatron-dip tune pretrain_vlm.py --pipeline-model-parallel-size 4 <the run's flags>

Nothing is loaded or saved. --one-rank needs one pipeline rank's device alone (times its tensor and context ranks), if all layers fit on it; messages
between ranks then take what the device's description says. Where the replica spans several machines, start the run itself with --dip-rehearse DIR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "choose the cut of a Megatron-LM run by a short rehearsal"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("tuned"), metavar="DIR", help="folder to write (default: tuned)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: without GPUs, over gloo; the layers must be local ones")
    parser.add_argument("--data-parallel", type=int, default=1, metavar="N", help="replicas of the run, among which its global batch is shared (default: 1)")
    parser.add_argument("--one-rank", action="store_true", help="measure all layers on one pipeline rank, and choose for as many as the flags say")
    parser.add_argument("script", type=Path, metavar="SCRIPT", help="the training script of your Megatron-LM checkout")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments, as in training")


def run(args: argparse.Namespace) -> int:
    from megatron_dip.checkouts.tuning import rehearse
    from megatron_dip.spec.codec import check_folder_writable

    check_folder_writable(args.output, "--output")
    rehearse(args.script, args.arguments, args.output, args.device, args.data_parallel, one_rank=args.one_rank)
    return 0
