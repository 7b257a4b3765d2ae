"""Train an example, for instance examples/vlm/digits, under DIP or under one of Megatron's own schedules.

Started by torchrun it is one rank of the run; started by hand it starts as many ranks on this machine as the parallel sizes need.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.orders import OrderName

if TYPE_CHECKING:
    from megatron_dip.spec.training import ExampleConfig, RunSettings

NEEDED = ("torch", "megatron.core", "psutil")
"""What training cannot do without; psutil for Megatron-Core's checkpoints."""

SUMMARY = "train an example under DIP or Megatron's own schedules"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("example", metavar="EXAMPLE", type=Path, help="folder with config.json and example.py")
    pipeline = parser.add_argument_group("pipeline")
    pipeline.add_argument("--pipeline-schedule", choices=("dip", "1f1b", "interleaved"), default="dip")
    pipeline.add_argument("--dip-schedule", choices=get_args(OrderName), default="dip", help="dip: run its cut in another schedule's order, for comparisons (default: searched)")
    pipeline.add_argument("--pipeline", type=int, default=2, metavar="P", help="pipeline ranks (default 2)")
    pipeline.add_argument("--tensor", type=int, default=1, metavar="T", help="tensor-parallel ranks (default 1)")
    pipeline.add_argument("--data", type=int, default=1, metavar="D", help="replicas (default 1)")
    pipeline.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default cuda; cpu is refused where CUDA is present")
    pipeline.add_argument(
        "--partition", metavar="auto|FILE", help="dip: how the modules are cut: a file (JSON); auto: as an earlier run has found best, or as is best by "
        "--profile or estimated costs and the example's data; default: config.json's K, even layers",
    )
    pipeline.add_argument("--plan-time", type=float, default=0.01, metavar="S", help="dip: seconds of search for each plan (default 0.01)")
    pipeline.add_argument("--evaluations", type=int, metavar="N", help="dip: orders tried for each plan, instead of --plan-time seconds")
    pipeline.add_argument(
        "--deterministic", action="store_true",
        help="dip: plans by --evaluations (default 20) and fixed costs (--profile, or the device's estimated ones), so that a run can be repeated bit for bit",
    )
    pipeline.add_argument(
        "--profile", metavar="FILE", help="dip: plan with these costs, from megatron-dip profile; default: measured while training"
    )
    pipeline.add_argument("--split-backward", action="store_true", help="dip: plan weight gradients apart, to fill bubbles with them")
    pipeline.add_argument(
        "--stock-layout", choices=("scripts", "parameters"),
        help="1f1b: whole encoder on the first rank as Megatron's scripts have it (default), or one chain cut by parameters; "
        "interleaved: the chain",
    )
    pipeline.add_argument("--virtual-pipeline", type=int, default=2, metavar="V", help="interleaved: chunks a rank (default 2)")
    run = parser.add_argument_group("run")
    run.add_argument("--iterations", type=int, metavar="N", help="default: config.json's")
    run.add_argument("--num-microbatches", type=int, metavar="N", help="of all replicas together; default: config.json's")
    run.add_argument("--seed", type=int, default=1, help="of weights and data (default 1)")
    run.add_argument("--data-file", metavar="FILE", help="own data instead of the example's; the example says in which form")
    run.add_argument("--distributed-optimizer", action="store_true", help="spread the optimizer's state over the replicas")
    run.add_argument("--balance", choices=("auto", "off", "indices", "exchange"), default="auto",
                     help="dip: whether replicas deal the microbatches of a global batch among them by work; auto (default): indices, each takes "
                     "its own from the data set; exchange: they travel between replicas, as where each reads a part of the data")
    run.add_argument("--overlap-grad-reduce", action="store_true", help="reduce gradients over the replicas beside the pipeline")
    run.add_argument("--threads", type=int, default=1, help="of each rank's tensor operations on the CPU (default 1)")
    run.add_argument("--timeout", type=float, default=600.0, metavar="S", help="a rank that waits longer for another gives up (default 600 s)")
    output = parser.add_argument_group("output")
    output.add_argument("--log-interval", type=int, default=10, metavar="N")
    output.add_argument("--evaluate-interval", type=int, default=0, metavar="N", help="iterations between scorings; default: at the end")
    output.add_argument("--save", metavar="DIR", help="write checkpoints into this folder")
    output.add_argument("--save-interval", type=int, default=0, metavar="N", help="iterations between checkpoints; default: at the end")
    output.add_argument("--load", metavar="DIR", help="go on from the last checkpoint in this folder, of any cut")
    output.add_argument("--load-iteration", type=int, metavar="N", help="instead of the last checkpoint the one of this iteration")
    output.add_argument("--record", metavar="FILE", help="write the run's figures (JSON)")
    output.add_argument("--timelines", metavar="DIR", help="write the last iteration's plan and timelines (JSON) for report and trace")


def make_settings(args: argparse.Namespace, config: ExampleConfig) -> RunSettings:
    """The command line and the example's config joined and checked."""
    from megatron_dip.spec.codec import check_folder_writable, check_writable, load_partition, load_profile
    from megatron_dip.spec.training import RunSettings, SchedulePlan
    from megatron_dip.spec.workload import Parallel, check_measured

    interleaved = args.pipeline_schedule == "interleaved"
    if interleaved and args.stock_layout == "scripts":
        raise InputError("--stock-layout", "scripts", "Megatron's scripts cannot interleave a vision-language model", "use parameters")
    if args.threads < 1:
        raise InputError("--threads", args.threads, "must be at least 1", "give a positive whole number")
    if args.profile is not None:
        if args.pipeline_schedule != "dip":
            raise InputError("--profile", args.profile, f"given for schedule {args.pipeline_schedule!r}, which is not planned", "leave one of them out")
        check_measured(config.model.modules, load_profile(args.profile), "--profile")
    schedule = SchedulePlan(
        name=args.pipeline_schedule, order=args.dip_schedule, layout=args.stock_layout or ("parameters" if interleaved else "scripts"),
        virtual=args.virtual_pipeline if interleaved else 1, partition=None if args.partition in (None, "auto") else load_partition(args.partition),
        auto_partition=args.partition == "auto",
        plan_s=args.plan_time, evaluations=20 if args.deterministic and args.evaluations is None else args.evaluations,
        deterministic=args.deterministic, profile=args.profile, split_backward=args.split_backward,
    )
    if args.record is not None:
        check_writable(args.record, "--record")
    for folder, field in ((args.save, "--save"), (args.timelines, "--timelines")):
        if folder is not None:
            check_folder_writable(folder, field)
    settings = RunSettings(
        schedule=schedule, parallel=Parallel(tensor=args.tensor, pipeline=args.pipeline, data=args.data), device=args.device,
        seed=args.seed, iterations=config.iterations if args.iterations is None else args.iterations,
        num_microbatches=config.num_microbatches if args.num_microbatches is None else args.num_microbatches,
        data=config.data if args.data_file is None else {**config.data, "file": args.data_file}, timeout_s=args.timeout,
        distributed_optimizer=args.distributed_optimizer, overlap_grad_reduce=args.overlap_grad_reduce, balance=args.balance, log_interval=args.log_interval,
        evaluate_interval=args.evaluate_interval, save=args.save, save_interval=args.save_interval, load=args.load,
        load_iteration=args.load_iteration, record=args.record,
        timelines=args.timelines,
    )
    settings.validate()
    return settings


def run(args: argparse.Namespace) -> int:
    from megatron_dip.cli.output import messages
    from megatron_dip.spec.codec import load_example
    from megatron_dip.trainer.launch import check_launch
    from megatron_dip.trainer.ranks import is_rank, run_rank, run_ranks

    config = load_example(args.example / "config.json")
    settings = make_settings(args, config)
    num_ranks = settings.parallel.num_gpus
    if not is_rank():
        check_launch(args.example, config, settings, NEEDED)
        messages().print(f"megatron-dip: starting {num_ranks} rank{'s' if num_ranks > 1 else ''}, loading torch", soft_wrap=True)
        return run_ranks([sys.executable, "-m", "megatron_dip.cli.main", *sys.argv[1:]], num_ranks, threads=args.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(args.threads))
    run_rank(lambda: _train(args.example, settings), needed=NEEDED)


def _train(example: Path, settings: RunSettings) -> None:
    from megatron_dip.trainer.loop import train

    train(example, settings, lambda line: print(line, flush=True))
