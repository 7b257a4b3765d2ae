"""The wheel builds without a network, and what the code reads at run time travels in it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_the_patches_and_the_devices(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="builds with the installed setuptools")
    # A copy, since setuptools leaves its build folders in the tree.
    source = tmp_path / "source"
    for name in ("megatron_dip", "patches"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(tmp_path), str(source)],
        capture_output=True, text=True, timeout=240,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("megatron_dip-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    wanted = {f"megatron_dip/patches/{path.name}": path for path in (ROOT / "patches").iterdir()}
    wanted |= {str(path.relative_to(ROOT)): path for pattern in ("*.py", "*.json", "py.typed") for path in (ROOT / "megatron_dip").rglob(pattern)}
    assert any(name.endswith("/manifest.json") for name in wanted)
    assert any(name.endswith("/devices/h100.json") for name in wanted)
    for name, path in wanted.items():
        assert held.get(name) == path.read_bytes(), name
    assert {name.split("/")[0].split("-")[0] for name in held} == {"megatron_dip"}
