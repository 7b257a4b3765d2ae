"""Feeds mutated files and arguments to the commands, and looks for what nobody should meet: tracebacks, hangs, and files left by a command that failed.

Each case runs the real command in a process of its own group (a fork of one that has imported the commands, so that a case takes milliseconds), in an
empty folder. Found faults are printed with the command and the input kept. ``--cases 20000`` is the long run; a short one stands in the tests.
Exit code 1 where something was found.

    python scripts/fuzz_commands.py --cases 20000 --seed 1 --keep found/
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import gzip
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "plan.json"
DIGITS = ROOT / "examples" / "vlm" / "digits"
MEASURED = ROOT / "docs" / "results" / "measured"
SMALL = {
    "format": "megatron-dip/workload/1",
    "model": {"modules": [
        {"name": "vit", "kind": "vit", "role": "encoder", "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4},
        {"name": "lm", "kind": "lm", "role": "backbone", "num_layers": 4, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 4,
         "vocab_size": 1000}]},
    "parallel": {"pipeline": 2}, "device": "h100", "memory_capacity_bytes": 10**10,
    "microbatches": [{"vit": [64, 64], "lm": [256]}, {"lm": [256]}, {"vit": [64], "lm": [256]}],
}
TIMELINE = {
    "format": "megatron-dip/timeline/1", "title": "measured", "ranks": 2,
    "bars": [{"rank": rank, "kind": kind, "module": "lm", "vp_stage": 0, "microbatch": 0, "sub_microbatch": 0, "start": at, "end": at + 100}
             for rank in (0, 1) for at, kind in ((0, "fw"), (100, "bw"))],
}
PARTITION = {"format": "megatron-dip/partition/1", "chunks": {"vit": [[2, 2]], "lm": [[2, 2]]}, "sub_microbatch_size": {"vit": 2, "lm": 1}}
HUB_CONFIG = {
    "model_type": "qwen2_5_vl", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False,
    "vision_config": {"depth": 2, "hidden_size": 256, "intermediate_size": 512, "num_heads": 4, "out_hidden_size": 256},
}
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**32, 2**63, 2**64, 10**12, 10**30, -(10**30), 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 1e-300, 0.5,
    "", "x", "[/b]", "[red]", "$\\frac{$", "\u0000", "\n", "\ud800", "漢", "a" * 5000, "../x", "/dev/null", [], {}, [[]], {"": None}, [None], [0] * 3,
)
WORDS = ("-1", "0", "1", "nan", "inf", "1e308", "10" * 20, "", "x", "[/b]", "--", "-", "/dev/full", "/dev/null", "/proc/x", ".", "absent/x", "漢", "a" * 3000,
         "\x1b[31m", "vit=2", "vit=0", "=", ",", "lm=99999999999")
_CASE_LIMIT_S = 60.0
_CPU_LIMIT_S = 55


@dataclass(frozen=True, slots=True)
class Target:
    """A command with one file that is mutated; ``{input}`` and ``{output}`` stand for paths."""

    name: str
    arguments: tuple[str, ...]
    source: Any
    flags: tuple[str, ...] = ()
    """Flags whose values are mutated too."""
    file: str = "input.json"
    """Name of the mutated file."""


@dataclass(slots=True)
class Findings:
    counts: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)


def targets() -> list[Target]:
    plan = json.loads(GOLDEN.read_text())
    steps = json.loads((MEASURED / "korthikanti_2022.json").read_text())
    steps["steps"] = steps["steps"][:2]
    profile = json.loads((MEASURED / "cpu_small_profile.json").read_text())
    device = json.loads((ROOT / "megatron_dip" / "cost" / "devices" / "h100.json").read_text())
    workload = {**SMALL}
    samples = "\n".join(json.dumps({"text": "word " * at} if at % 2 else {"tokens": 100 * at, "text": "x"}) for at in range(1, 12))
    budget = ("--evaluations", "2")
    return [
        Target("plan", ("plan", "{input}", "--output", "{output}.json", *budget, "--no-baselines"), workload,
               ("--chunks", "--sub-microbatch", "--seed", "--threads", "--replica", "--time-budget", "--hardware-queues", "--partition", "--grid", "--save-partition")),
        Target("plan partition", ("plan", "{workload}", "--partition", "{input}", "--output", "{output}.json", *budget, "--no-baselines"), PARTITION),
        Target("simulate", ("simulate", "{input}", "--schedule", "1f1b"), workload,
               ("--seed", "--device", "--evaluations", "--memory-timeline", "--balance", "--attention", "--schedule", "--top")),
        Target("simulate json", ("simulate", "{input}", "--schedule", "interleaved", "--json"), workload),
        Target("simulate device", ("simulate", "{workload}", "--schedule", "1f1b", "--device", "{input}"), device),
        Target("check", ("check", "{input}"), plan, ("--workload", "--replica")),
        Target("trace", ("trace", "{input}", "--output", "{output}.json"), plan),
        Target("trace timeline", ("trace", "{input}", "--output", "{output}.json"), TIMELINE),
        Target("report page", ("report", "{input}", "--output", "{output}.html"), TIMELINE, ("--title",)),
        Target("report picture", ("report", "{input}", "--output", "{output}.png"), TIMELINE, ("--title",)),
        Target("report plan", ("report", "{input}", "--output", "{output}.svg"), plan),
        Target("calibrate", ("calibrate", "{input}", "--device", "a100", "--output", "{output}.json"), steps, ("--parameters", "--freedom", "--device")),
        Target("calibrate profile", ("calibrate", "{input}", "--device", "cpu", "--workload", str(MEASURED / "cpu_small_workload.json"), "--output",
                                     "{output}.json"), profile),
        Target("workload", ("workload", "vlm-s", "--microbatches", "2", "--output", "{output}.json"), None,
               ("--seed", "--data", "--images", "--iteration", "--iterations", "--tensor", "--pipeline", "--data-parallel", "--device", "--microbatches")),
        Target("estimate", ("estimate", "{input}", "--gpus", "2", "--microbatches", "2", "--evaluations", "1", "--sequence-length", "1024"), HUB_CONFIG,
               ("--gpus", "--device", "--data", "--sequence-length", "--seed", "--save-partition", "--save-workload")),
        Target("lengths", ("lengths", "{input}", "--output", "{output}.jsonl"), samples, file="input.jsonl"),
        Target("estimate samples", ("estimate", "{config}", "--gpus", "2", "--microbatches", "2", "--evaluations", "1", "--sequence-length", "1024", "--data",
                                    "{input}"), "\n".join(json.dumps({"text": 300, "images": [[64, 48]] * (at % 3)}) for at in range(6)), file="input.jsonl"),
        Target("estimate workload", ("estimate", "{input}", "--gpus", "2", "--evaluations", "1", "--json"), workload),
        Target("check workload", ("check", str(GOLDEN), "--workload", "{input}"), workload, ("--replica",)),
        # Ends at the partition at the latest, so no rank starts.
        Target("train config", ("train", "{folder}", "--device", "cpu", "--partition", "/dev/null"), json.loads((DIGITS / "config.json").read_text()),
               ("--pipeline", "--tensor", "--data", "--plan-time", "--evaluations", "--iterations", "--threads", "--profile", "--save", "--record", "--timeout"),
               file="config.json"),
        Target("checkpoint", ("checkpoint", "inspect", "{folder}"), {"sharded_backend": "torch_dist", "sharded_backend_version": 1}, file="metadata.json"),
        Target("playground", ("playground", "--output", "{output}.html", "--ranks", "1", "--microbatches", "1", "--images", "0", "--evaluations", "1"), None,
               ("--ranks", "--microbatches", "--images", "--evaluations", "--seed", "--device")),
        Target("schema", ("schema", "plan"), None, ("--x",)),
    ]


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []

        def walk(node: Any, found: list[tuple[Any, Any]] = places) -> None:
            for key, child in list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []:
                found.append((node, key))
                walk(child)

        walk(value)
        if not places:
            return rng.choice(ODD)
        node, key = rng.choice(places)
        change = rng.randrange(7)
        if change == 0:
            del node[key]
        elif change == 1 and isinstance(node, dict):
            node[rng.choice(("extra", "[/b]", "\ud800", "", "x" * 3000))] = copy.deepcopy(rng.choice(ODD))
        elif change == 2 and isinstance(node, list):
            node.insert(key, copy.deepcopy(node[key]))
        elif change == 3:
            source, other = rng.choice(places)
            node[key] = copy.deepcopy(source[other]) if (isinstance(source, list) and other < len(source)) or (isinstance(source, dict) and other in source) else None
        elif change == 4 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
            node[key] = node[key] * rng.choice((-1, 2, 0.5, 1000, 10**9))
        else:
            node[key] = copy.deepcopy(rng.choice(ODD))
    return value


def raw(data: bytes, rng: random.Random) -> bytes:
    """Broken in other ways than JSON can say."""
    at = rng.randrange(len(data) + 1)
    return rng.choice((
        lambda: b"", lambda: data[:at], lambda: data[:at] + bytes(rng.randrange(256) for _ in range(8)) + data[at:], lambda: b"\xef\xbb\xbf" + data,
        lambda: data.decode(errors="replace").encode("utf-16"), lambda: data.replace(b"\n", b"\r\n"), lambda: b"[" * 100_000, lambda: gzip.compress(data),
        lambda: b"9" * 10_000, lambda: b'{"a":' * 50_000, lambda: data + data, lambda: b"\x00" * 100, lambda: b"[" + b"0," * 200_000 + b"0]",
    ))()


def make_case(target: Target, folder: Path, rng: random.Random) -> list[str]:
    """Writes the input into ``folder`` and returns the arguments."""
    (folder / "workload.json").write_text(json.dumps(SMALL))
    (folder / "hub.json").write_text(json.dumps(HUB_CONFIG))
    given = folder / target.file
    arguments = list(target.arguments)
    change_flag = bool(target.flags) and (target.source is None or rng.random() < 0.25)
    if target.source is not None:
        text = target.source if isinstance(target.source, str) else json.dumps(target.source)
        if not change_flag:
            if rng.random() < 0.1 or isinstance(target.source, str):
                given.write_bytes(raw(text.encode(), rng))
            else:
                given.write_text(json.dumps(mutated(target.source, rng)))
        else:
            given.write_text(text)
    for flag in rng.sample(target.flags, min(len(target.flags), rng.choice((1, 1, 2)))) if change_flag else ():
        arguments += [flag, rng.choice(WORDS)]
    return _placed(arguments, target, folder)


def _placed(arguments: Sequence[str], target: Target, folder: Path) -> list[str]:
    paths = {
        "{input}": folder / target.file, "{output}": folder / "out", "{workload}": folder / "workload.json", "{config}": folder / "hub.json", "{folder}": folder,
    }
    placed = list(arguments)
    for place, path in paths.items():
        placed = [word.replace(place, str(path)) for word in placed]
    return placed


def run_case(arguments: list[str], folder: Path, channel: Any) -> None:
    """In a process of its own: the command's exit code and what it wrote."""
    import resource

    os.setsid()
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_LIMIT_S, _CPU_LIMIT_S + 5))
    from megatron_dip.cli.main import main

    said = io.StringIO()
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="surrogateescape")
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
        try:
            status = main(arguments)
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 2
        except BaseException:
            status = 1
            said.write(traceback.format_exc())
    channel.send((status, said.getvalue()))
    channel.close()
    os._exit(0)


def judge(target: Target, arguments: list[str], folder: Path, before: set[str], context: Any, limit_s: float) -> str | None:
    """What is wrong with a case, None where nothing is."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_case, args=(arguments, folder, sender))
    process.start()
    sender.close()
    answer = None
    if receiver.poll(limit_s):
        with contextlib.suppress(EOFError):
            answer = receiver.recv()
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return f"hangs for {limit_s:.0f} s"
    process.join()
    if answer is None:
        return f"died with {process.exitcode}"
    status, said = answer
    if "Traceback" in said:
        return "traceback: " + said.strip().splitlines()[-1][:200]
    if status == 2 and not said.strip():
        return "exit code 2 without a message"
    if status not in (0, 1, 2):
        return f"exit code {status}"
    if status == 2 and (left := {entry.name for entry in folder.iterdir()} - before):
        return f"left {sorted(left)} after an error"
    return None


def fuzz(cases: int, seed: int, *, keep: Path | None = None, limit_s: float = _CASE_LIMIT_S, only: str = "", say: Any = print) -> Findings:
    """Runs ``cases`` cases in turn over all targets (those whose name holds ``only``)."""
    chosen = [target for target in targets() if only in target.name]
    context = multiprocessing.get_context("fork")
    findings, began = Findings(), time.monotonic()
    for number in range(cases):
        rng = random.Random(f"{seed} {number}")
        target = chosen[number % len(chosen)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            arguments = make_case(target, folder, rng)
            before = {entry.name for entry in folder.iterdir()}
            problem = judge(target, arguments, folder, before, context, limit_s)
            findings.counts[target.name] += 1
            if problem is not None:
                shown = [word.replace(name, "FOLDER")[:120] for word in arguments]
                findings.faults.append(f"case {number} ({target.name}): {problem}: {' '.join(shown)}")
                say(findings.faults[-1])
                if keep is not None:
                    shutil.copytree(folder, keep / f"{seed}-{number}", dirs_exist_ok=True)
        if number % 1000 == 999:
            say(f"{number + 1} cases, {len(findings.faults)} faults, {time.monotonic() - began:.0f} s")
    return findings


def warm_up() -> None:
    """Imports what the commands import and loads their kernels, so that no case pays for it."""
    from megatron_dip.cli.main import main

    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        folder = Path(name)
        for target in targets():
            rng = random.Random(0)
            make_case(target, folder, rng)
            text = target.source if isinstance(target.source, str) else json.dumps(target.source)
            given = folder / target.file
            given.write_text(text)
            words = _placed(target.arguments, target, folder)
            assert main(words) in ((0, 1) if target.name not in ("train config", "checkpoint", "check workload") else (0, 1, 2)), words
            given.unlink()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name holds this")
    parser.add_argument("--keep", type=Path, help="copy the folders of found faults here")
    args = parser.parse_args()
    warm_up()
    findings = fuzz(args.cases, args.seed, keep=args.keep, only=args.only, say=lambda text: print(text, flush=True))
    print(f"{sum(findings.counts.values())} cases: {dict(findings.counts)}; {len(findings.faults)} faults")
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())
