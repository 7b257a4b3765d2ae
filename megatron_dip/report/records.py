"""Records behind published numbers: what was run, on which machine, with which versions, every run and its spread."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from megatron_dip.spec.codec import write_atomically

PACKAGES = ("megatron-dip", "torch", "megatron-core", "numpy", "numba")


def machine() -> dict[str, Any]:
    """Processor, cores and memory of this machine."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = next((line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")), model)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"processor": model, "cores": os.cpu_count(), "memory_gib": round(pages / 2**30, 1), "system": f"{platform.system()} {platform.release()}"}


def versions() -> dict[str, str]:
    """Python and the packages that decide about speed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def command_line() -> str:
    """How this process was started, as one would type it."""
    return shlex.join([Path(sys.executable).name, *(os.path.relpath(sys.argv[0]), *sys.argv[1:])])


def write_record(path: Path, title: str, sections: Sequence[str], figures: dict[str, Any]) -> None:
    """Writes ``path``.json with everything and ``path``.md for people."""
    record = {"format": "megatron-dip/bench/1", "title": title, "command": command_line(), "machine": machine(), "versions": versions(), **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    about = ", ".join(f"{key} {value}" for key, value in {**record["machine"], **record["versions"]}.items())
    text = "\n\n".join([f"# {title}", f"`{record['command']}`", *sections, f"Machine and versions: {about}.", f"Every run: [{path.name}.json]({path.name}.json)"])
    write_atomically(path.with_suffix(".md"), (text + "\n").encode())
