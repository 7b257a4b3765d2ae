"""What DIP would gain on a model: its best layout of a number of GPUs beside Megatron's own, encoder data parallelism and FSDP2.

MODEL is a Hugging Face config.json (or the folder that holds one), a named setup such as vlm-s, or a workload file. Batches are packed from --data: a JSONL
file of samples (megatron-dip lengths writes one), or the statistics of public data sets. All times are simulated on the same global batch; what
they rest on is printed below them. Needs no GPU and no torch. Exit code 2 on bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from megatron_dip.cli.output import print_json, progress, tables
from megatron_dip.cost.device import load_device
from megatron_dip.cost.interface import CostModel
from megatron_dip.partition.joint import ChoiceLimits
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.simulator.estimate import Candidate, estimate
from megatron_dip.simulator.step import SimulateOptions
from megatron_dip.simulator.workers import cores
from megatron_dip.spec.codec import (
    STANDARD_INPUT,
    check_outputs,
    decode,
    format_of,
    load_workload,
    read_file,
    read_whole,
    resolve_workload,
    save,
)
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.named import NAMED_SETUPS
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.workload import WORKLOAD_FORMAT, Microbatch, Parallel, Workload
from megatron_dip.workloads.generators import make_workload, pack_clips
from megatron_dip.workloads.huggingface import HubModel, read_hub_config
from megatron_dip.workloads.samples import STATISTICS, draw_samples, pack_samples, read_samples

SUMMARY = "what DIP would gain on a model, beside other ways to train it"

_DEFAULT_DATA = "mixed"
_PROCESSES = 4
"""Layouts that are tried side by side at most, each by a process of some 200 MB."""
_NAMES = {"dip": "DIP", "megatron": "Megatron, best of 1F1B and interleaved", "encoder-dp": "encoders data-parallel (three-phase)", "fsdp2": "FSDP2"}
_MEASURED_ERROR = "3 to 5 % mean, 11 % at most on published runs of text models (docs/results/simulator_validation.md); no multimodal run was published in a form to compare"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Subject:
    """What is estimated, and what the estimate rests on."""

    workload: Workload
    title: str
    notes: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hugging Face config.json or folder, a named setup, or a workload file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs to train on")
    parser.add_argument("--device", metavar="NAME|FILE.json", help="GPU (default: the workload's own, else h100)")
    parser.add_argument("--data", metavar="FILE.jsonl|FOLDER|STATISTICS", default=_DEFAULT_DATA,
                        help="samples to pack (megatron-dip lengths), a folder of recorded batches (workload files, as --dip-observe writes them), or statistics "
                        f"of a public data set: {', '.join(STATISTICS)} (default mixed)")
    parser.add_argument("--sequence-length", type=int, default=8192, metavar="N", help="tokens of a packed microbatch (default 8192)")
    parser.add_argument("--microbatches", type=int, metavar="N", help="of the global batch (default: 4 for each GPU, at least 32)")
    parser.add_argument("--evaluations", type=int, default=200, metavar="N", help="schedules that DIP tries for each batch (default 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the data and the search (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--save-workload", type=Path, metavar="FILE", help="write what was simulated under DIP, for plan and simulate")
    parser.add_argument("--save-partition", type=Path, metavar="FILE", help="write DIP's cut, for --dip-partition")


def run(args: argparse.Namespace) -> int:
    for name, value in (("--gpus", args.gpus), ("--sequence-length", args.sequence_length), ("--microbatches", args.microbatches),
                        ("--evaluations", args.evaluations)):
        if value is not None and not 1 <= value <= 1 << 20:
            raise InputError(name, value, "outside 1 to 2^20", "give a positive whole number")
    if not 0 <= args.seed < 1 << 32:
        raise InputError("--seed", args.seed, "outside 0 to 2^32", "give a whole number from 0")
    check_outputs({"--save-workload": args.save_workload, "--save-partition": args.save_partition}, [Path(args.model), Path(args.data)])
    if args.device is not None:
        load_device(args.device, "--device")
    subject = _subject(args)
    with progress("estimating") as show:
        candidates = estimate(
            subject.workload, args.gpus, _choose, options=SimulateOptions(evaluations=args.evaluations, seed=args.seed, replicas=1),
            processes=cores(_PROCESSES), progress=show,
        )
    dip = candidates[0]
    if dip.parallel is not None and args.save_workload is not None:
        save(args.save_workload, msgspec.structs.replace(subject.workload, parallel=dip.parallel))
    if dip.partition is not None and args.save_partition is not None:
        save(args.save_partition, dip.partition)
    if dip.untried:
        subject.notes.append(f"{dip.untried} layouts were not tried with DIP for want of time (this machine is slow or busy): one may be better")
    if args.json:
        print_json({
            "model": subject.title, "gpus": args.gpus, "systems": [_row(candidate) for candidate in candidates], "advice": _advice(subject, candidates),
            "notes": subject.notes, "flags": None if dip.parallel is None else _flags(dip.parallel, args.save_partition),
        })
        return 0
    _print(subject, candidates, args)
    return 0


def _choose(workload: Workload, costs: CostModel) -> Partition:
    """DIP's cut for one layout, judged on the first replica's batch."""
    return joint_partition(
        workload.model_spec, workload.parallel.pipeline, [workload.replica_microbatches(0)], costs,
        split_backward=workload.training.split_backward, limits=ChoiceLimits(short=24, thorough=4), drift=False,
    ).partition


def _subject(args: argparse.Namespace) -> _Subject:
    count = args.microbatches or max(32, 4 * args.gpus)
    path = Path(args.model)
    if args.model in NAMED_SETUPS:
        workload = make_workload(args.model, seed=args.seed, num_microbatches=count)
        return _Subject(workload=_on_device(workload, args.device), title=args.model, notes=["batches as the paper describes them (workload --data packed)"])
    file = path / "config.json" if path.is_dir() else path
    data, config = _read_json(file, args.model)
    if str(config.get("format", "")).startswith("megatron-dip/"):
        return _Subject(workload=_on_device(resolve_workload(decode(data, Workload, args.model), file), args.device), title=file.name, notes=["the file's own batch"])
    return _hub_subject(read_hub_config(config, str(file)), args, count)


def _read_json(file: Path, given: str) -> tuple[bytes, dict[str, object]]:
    try:
        data = sys.stdin.buffer.read() if given == STANDARD_INPUT else read_whole(file)
        found = msgspec.json.decode(data)
    except OSError as error:
        raise InputError(
            "MODEL", given, f"is neither a named setup nor a file that can be read ({error.strerror})",
            f"give a config.json, a workload file, or one of {', '.join(NAMED_SETUPS)}",
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError("MODEL", given, f"is no JSON ({error})", "give a model's config.json or a workload file") from error
    if not isinstance(found, dict):
        raise InputError("MODEL", given, "holds no JSON object", "give a model's config.json or a workload file")
    return data, found


def _on_device(workload: Workload, device: str | None) -> Workload:
    return workload if device is None else msgspec.structs.replace(workload, device=device, profile=None)


def _hub_subject(hub: HubModel, args: argparse.Namespace, count: int) -> _Subject:
    source = f"drawn with the statistics '{args.data}' (image sizes assumed)"
    if args.data not in STATISTICS and Path(args.data).is_dir():
        microbatches = _recorded(Path(args.data), [module.name for module in hub.model.modules])[:count]
        source = f"as recorded in {args.data}"
    elif not any(module.kind == "lm" for module in hub.model.modules):
        if args.data != _DEFAULT_DATA:
            raise InputError("--data", args.data, f"says nothing of the clips that {hub.name} is trained on", "leave it out, or give a folder of recorded batches")
        clips = pack_clips(np.random.default_rng(args.seed), count, hub.model.modules[0])
        microbatches = [{"dit": microbatch["dit"]} for microbatch in clips]
        source = "of at most 8 clips and 16 s"
    elif args.data not in STATISTICS:
        microbatches = pack_samples(read_samples(Path(args.data), "--data"), hub.image, args.sequence_length, count)
        source = f"packed from {args.data}, of at most {args.sequence_length} tokens"
    else:
        microbatches = pack_samples(draw_samples(args.data, args.seed), hub.image, args.sequence_length, count)
        source = f"of at most {args.sequence_length} tokens, {source}"
    if len(microbatches) < count:
        # A file that is shorter than a global batch stands for more of its kind.
        microbatches = [microbatches[index % len(microbatches)] for index in range(count)]
    if not any(microbatch.get("vit") for microbatch in microbatches) and hub.image is not None:
        hub.notes.append("no image in the data: the vision model has no work")
    notes = [
        f"{hub.parameters / 1e9:.3f} billion parameters, counted from the config",
        f"{count} microbatches {source}",
        *hub.notes,
    ]
    workload = Workload(format=WORKLOAD_FORMAT, model=hub.model, device=args.device or "h100", microbatches=microbatches)
    workload.validate()
    return _Subject(workload=workload, title=hub.name, notes=notes)


def _recorded(folder: Path, modules: list[str]) -> list[Microbatch]:
    """The microbatches of all workload files of a folder, by name; other files are passed over."""
    found: list[Microbatch] = []
    for path in sorted(folder.glob("*.json")):
        if format_of(read_file(path)) != WORKLOAD_FORMAT:
            continue
        for microbatch in load_workload(path).microbatches:
            if others := sorted(set(microbatch) - set(modules)):
                raise InputError("--data", str(path), f"has batches of module {others[0]!r}, which the model lacks", f"give batches of {', '.join(modules)}")
            found.append(microbatch)
    if not found:
        raise InputError("--data", str(folder), "holds no workload files", "record batches with --dip-observe, or give a JSONL file of samples")
    return found


def _row(candidate: Candidate) -> dict[str, object]:
    parallel, result = candidate.parallel, candidate.result
    if parallel is None or result is None:
        return {"system": candidate.system, "fits": False, "problem": candidate.problem}
    return {
        "system": candidate.system, "fits": True, "dealing": candidate.dealing, "parallel": {"data": parallel.data, "tensor": parallel.tensor, "pipeline": parallel.pipeline},
        "result": result,
    }


_WORTH_IT, _DEALING_COUNTS = 1.03, 1.02
"""Gains below which DIP is not worth its trouble, and below which dealing is not spoken of."""


def _advice(subject: _Subject, candidates: list[Candidate]) -> str:
    """Whether DIP is worth it here, in a sentence."""
    dip, others = candidates[0], [candidate for candidate in candidates[1:] if candidate.result is not None]
    modules = [module for module in subject.workload.model_spec.modules if any(m.get(module.name) for m in subject.workload.microbatches)]
    if dip.result is None:
        return f"DIP cannot train this here: {dip.problem}."
    if not others:
        return "Only DIP fits into memory on these GPUs."
    best = min(others, key=lambda candidate: candidate.result.iteration_time_s if candidate.result else 0.0)
    assert best.result is not None
    gain = best.result.iteration_time_s / dip.result.iteration_time_s
    lead = f"{gain:.2f}x as fast as the best other way ({_NAMES[best.system]})"
    if len(modules) < 2:
        verdict = f"DIP is not meant for this, though it is {lead} here" if gain >= _WORTH_IT else f"not worth it, DIP is {lead}"
        return f"The data keep one module busy, so there is nothing to interleave: {verdict}."
    if gain < _WORTH_IT:
        return f"Not worth it: DIP is {lead}; {_NAMES[best.system]} is simpler."
    sentence = f"DIP is expected to be {gain:.2f}x as fast as {_NAMES[best.system]}."
    if dip.dealing < _DEALING_COUNTS:
        return sentence
    share = "all" if gain / dip.dealing < _WORTH_IT else f"some {dip.dealing:.2f}x"
    return f"{sentence} Of that {share} comes from dealing the microbatches to the replicas by their work, which is not interleaving."


def _flags(parallel: Parallel, partition: Path | None) -> str:
    """What a Megatron-LM script is given for a layout, as it was simulated."""
    flags = [f"--tensor-model-parallel-size {parallel.tensor}", f"--pipeline-model-parallel-size {parallel.pipeline}"]
    if parallel.sequence_parallel:
        flags.append("--sequence-parallel")
    if parallel.data > 1:
        flags.append("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")
    return " ".join([*flags, "--pipeline-schedule dip", f"--dip-partition {'PARTITION.json' if partition is None else shlex.quote(str(partition))}"])


def _print(subject: _Subject, candidates: list[Candidate], args: argparse.Namespace) -> None:
    console = tables()
    dip = candidates[0].result
    table = Table("system", "DP", "TP", "PP", "s an iteration", "over DIP", "MFU", "bubbles", "peak GB", "fits", title=f"{subject.title} on {args.gpus} GPUs (simulated)")
    for candidate in candidates:
        parallel, result = candidate.parallel, candidate.result
        if parallel is None or result is None:
            table.add_row(_NAMES[candidate.system], *["-"] * 8, "no")
            continue
        ratio = "-" if dip is None else f"{result.iteration_time_s / dip.iteration_time_s:.2f}"
        table.add_row(
            _NAMES[candidate.system], str(parallel.data), str(parallel.tensor), str(parallel.pipeline), f"{result.iteration_time_s:.3f}", ratio,
            "-" if result.mfu is None else f"{result.mfu:.3f}", f"{result.bubble_fraction:.1%}", f"{max(result.peak_memory_bytes) / 1e9:.1f}", "yes",
        )
    console.print(table)

    def say(text: str) -> None:
        console.print(text, soft_wrap=True)

    for candidate in candidates:
        if candidate.result is None:
            say(f"{_NAMES[candidate.system]}: {candidate.problem or 'no layout of these GPUs and modules'}.")
    say(_advice(subject, candidates))
    first = candidates[0]
    if first.parallel is not None and first.partition is not None:
        say(f"DIP's cut: layers {first.partition.chunks}, instances a sub-microbatch {first.partition.sub_microbatch_size}")
        say(f"To run it: {_flags(first.parallel, args.save_partition)}" + ("" if args.save_partition else "   (write the file with --save-partition)"))
    say("It rests on: " + "; ".join(subject.notes) + f". Error of the simulator: {_MEASURED_ERROR}.")
