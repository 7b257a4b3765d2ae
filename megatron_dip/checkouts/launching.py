"""Runs a script of a Megatron-LM checkout with the patch applied in memory: the files stay as they are.

The patch is the one of ``patches/`` that ``megatron-dip patch`` would apply. A finder in front of Python's own hands the touched
modules out with the hunks applied to their source; a tree that is patched already is left alone. In contrast to patching the files,
changes elsewhere in them are fine as long as every hunk matches exactly.

Limits: only modules that are imported after :func:`patch_in_memory` are patched.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import linecache
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dip.checkouts.patching import PACKAGE_INFO, Tree, inspect_tree
from megatron_dip.spec.errors import InputError


def find_checkout(script: Path) -> Path:
    """The root of the tree that a script belongs to: the nearest folder above it, or on ``sys.path``, with Megatron-LM's sources."""
    folders = [*script.resolve().parents, *(Path(entry) for entry in sys.path)]
    for folder in folders:
        if (folder / PACKAGE_INFO).is_file() and (folder / "megatron/training").is_dir():
            return folder
    raise InputError(
        "SCRIPT", str(script), "does not belong to a Megatron-LM checkout, and none is on PYTHONPATH",
        "give a script of a checkout, or put the checkout on PYTHONPATH",
    )


def patch_in_memory(root: Path) -> Tree:
    """Hands the touched modules of the tree out patched, from here on. Raises InputError where a hunk does not match."""
    tree = inspect_tree(root, require_known=False)
    sources = {
        file.path.removesuffix(".py").replace("/", "."): (str(root / file.path), file.patched_text) for file in tree.files if not file.patched
    }
    early = sorted(name for name in sources if name in sys.modules)
    assert not early, f"{early} were imported before they could be patched"
    if sources:
        sys.meta_path.insert(0, _PatchedFinder(sources))
    return tree


class _PatchedFinder(importlib.abc.MetaPathFinder):
    def __init__(self, sources: Mapping[str, tuple[str, str]]) -> None:
        self._sources = sources
        """Module name -> path of its file, patched text."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._sources:
            return None
        file, text = self._sources[fullname]
        return importlib.machinery.ModuleSpec(fullname, _PatchedLoader(fullname, file, text), origin=file)


class _PatchedLoader(importlib.abc.InspectLoader):
    def __init__(self, fullname: str, file: str, text: str) -> None:
        self._fullname, self._file, self._text = fullname, file, text

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def get_source(self, fullname: str) -> str:
        return self._text

    def exec_module(self, module: types.ModuleType) -> None:
        module.__file__ = self._file
        # Tracebacks and inspect.getsource show what runs, not what stands in the file.
        linecache.cache[self._file] = (len(self._text), None, self._text.splitlines(keepends=True), self._file)
        exec(compile(self._text, self._file, "exec", dont_inherit=True), module.__dict__)


def run_script(script: Path, arguments: Sequence[str]) -> None:
    """Runs ``script`` as ``python script arguments`` would. Its processes spawned by multiprocessing start from the launcher again."""
    main = sys.modules["__main__"]
    sys.argv = [str(script), *arguments]
    main.__file__ = str(script)
    exec(compile(script.read_bytes(), str(script), "exec", dont_inherit=True), main.__dict__)
