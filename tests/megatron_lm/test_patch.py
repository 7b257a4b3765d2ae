"""Patch, byte-compile, check and revert a copy of the checkout."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megatron_dip.checkouts.patching import inspect_tree
from megatron_dip.cli.main import main
from megatron_dip.spec.errors import EXIT_CODE


def digests(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*.py"))}


@pytest.mark.parametrize("words", [[], ["--repair"]], ids=["schedule", "repairs"])
def test_patch_compile_check_revert(words: list[str], tree: Path) -> None:
    before = digests(tree)
    assert inspect_tree(tree, repair=bool(words)).release is not None
    assert main(["patch", str(tree), *words]) == 0
    after = digests(tree)
    touched = sorted(path for path in before if before[path] != after[path])
    assert touched == sorted(file.path for file in inspect_tree(tree, repair=bool(words)).files)
    for path in touched:
        compile((tree / path).read_text(), path, "exec")
    assert main(["patch", str(tree), "--check", *words]) == 0
    assert main(["patch", str(tree), *words]) == 0
    assert digests(tree) == after
    assert main(["patch", str(tree), "--revert", *words]) == 0
    assert digests(tree) == before


def test_a_changed_file_is_refused(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = tree / "megatron/training/training.py"
    training.write_text(training.read_text() + "\n# mine\n")
    before = digests(tree)
    assert main(["patch", str(tree)]) == EXIT_CODE
    message = capsys.readouterr().err
    assert "megatron/training/training.py" in message
    assert "arguments.py" not in message
    assert digests(tree) == before
