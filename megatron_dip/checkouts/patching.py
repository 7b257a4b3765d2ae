"""Applies the small patches of ``patches/`` to a Megatron-LM checkout, and takes them back.

What comes in: the path of a source tree, with or without git. What goes out: the same tree with the hunks applied (or reversed), or
an :class:`InputError` and an untouched tree. A tree only ever moves between two known states:

* *known original*: each file that the patch touches is byte for byte that of a release named in ``patches/manifest.json``, or, for
  releases and commits that the manifest does not name, what the tree's own git has committed;
* *patched*: exactly the original plus the patch.

Hunks must match exactly (all context lines, one place only); line numbers may have moved. Limits: renamed files and hunks without
context are not supported, since no patch here has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dip.spec.errors import InputError

PACKAGE_INFO = Path("megatron/core/package_info.py")
"""Where every Megatron-LM tree says its version."""

_HUNK_HEADER = re.compile(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")
_VERSION_FIELD = re.compile(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE)\s*=\s*['\"]?([^'\"\n#]*)['\"]?", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Hunk:
    start: int
    """0-based line at which the hunk stood in the release the patch was made from."""
    old: tuple[str, ...]
    """Context and removed lines, with their line ends."""
    new: tuple[str, ...]
    """Context and added lines."""


@dataclass(frozen=True, slots=True)
class FilePatch:
    path: str
    """Relative to the tree's root."""
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True, slots=True)
class VersionRange:
    """One entry of the manifest: which patch serves which minor versions."""

    patch: str
    minors: tuple[str, ...]
    """"0.16", "0.17", ..."""
    repairs: Mapping[str, str]
    """Minor version -> patch that mends its scripts."""
    releases: Mapping[str, Mapping[str, str]]
    """Release -> touched file -> SHA-256 of its bytes as released."""


class HunkError(ValueError):
    """A hunk whose lines do not stand in the file, or stand there twice."""


def patches_directory() -> Path:
    """The folder with the patches: package data in an installed wheel, ``patches/`` of the repository in a source tree."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "patches", package.parent / "patches"):
        if (candidate / "manifest.json").is_file():
            return candidate
    raise AssertionError(f"no patches beside {package}: the installation is incomplete")


def read_manifest(directory: Path) -> list[VersionRange]:
    document = json.loads((directory / "manifest.json").read_text())
    return [VersionRange(entry["patch"], tuple(entry["minors"]), entry["repairs"], entry["releases"]) for entry in document["ranges"]]


def parse_patch(text: str) -> list[FilePatch]:
    """Files and hunks of a unified diff; text before the first ``---`` line is a comment."""
    files: list[FilePatch] = []
    hunks: list[Hunk] = []
    old: list[str] = []
    new: list[str] = []
    start = -1

    def close_hunk() -> None:
        if start >= 0:
            hunks.append(Hunk(start, tuple(old), tuple(new)))
            old.clear()
            new.clear()

    lines = text.splitlines(keepends=True)
    path: str | None = None
    for index, line in enumerate(lines):
        header = _HUNK_HEADER.match(line)
        if line.startswith("--- ") and index + 1 < len(lines) and lines[index + 1].startswith("+++ "):
            close_hunk()
            start = -1
            if path is not None:
                files.append(FilePatch(path, tuple(hunks)))
                hunks.clear()
            path = lines[index + 1][4:].split("\t")[0].strip().removeprefix("b/")
        elif header is not None:
            close_hunk()
            start = int(header.group(1)) - 1
        elif start >= 0:
            if line.startswith((" ", "-")):
                old.append(line[1:])
            if line.startswith((" ", "+")) and not line.startswith("+++ "):
                new.append(line[1:])
    close_hunk()
    if path is None:
        raise AssertionError("a patch without files")
    files.append(FilePatch(path, tuple(hunks)))
    return files


def apply_hunks(text: str, hunks: Sequence[Hunk], *, reverse: bool = False) -> str:
    """``text`` with every hunk applied, or taken back. Raises HunkError when one does not match in exactly one place."""
    lines = text.splitlines(keepends=True)
    for number, hunk in enumerate(hunks, start=1):
        before, after = (hunk.new, hunk.old) if reverse else (hunk.old, hunk.new)
        size = len(before)
        places = [at for at in range(len(lines) - size + 1) if lines[at] == before[0] and tuple(lines[at : at + size]) == before]
        if len(places) != 1:
            found = "nowhere" if not places else f"at lines {[at + 1 for at in places]}"
            raise HunkError(f"hunk {number} (line {hunk.start + 1}) matches {found}")
        lines[places[0] : places[0] + size] = after
    return "".join(lines)


@dataclass(frozen=True, slots=True)
class TouchedFile:
    """One file of the tree that the patch touches, in both states."""

    path: str
    patched: bool
    original_text: str
    patched_text: str


@dataclass(frozen=True, slots=True)
class Tree:
    """A Megatron-LM tree that can be patched, or is."""

    root: Path
    version: str
    """From package_info.py, "0.16.1"."""
    release: str | None
    """The manifest's name of the release, None when the originals are only known to the tree's git."""
    patch: str
    files: tuple[TouchedFile, ...]

    @property
    def patched(self) -> bool:
        return all(file.patched for file in self.files)

    @property
    def untouched(self) -> bool:
        return not any(file.patched for file in self.files)


def read_version(root: Path) -> str:
    """The version that the tree gives itself, without the pre-release part. Raises InputError when this is no Megatron-LM tree."""
    try:
        text = (root / PACKAGE_INFO).read_text()
    except OSError:
        raise InputError(
            "CHECKOUT", str(root), f"no Megatron-LM source tree: {PACKAGE_INFO} is not there",
            "give the root of a checkout of github.com/NVIDIA/Megatron-LM",
        ) from None
    fields = {name: value.strip() for name, value in _VERSION_FIELD.findall(text)}
    try:
        return f"{int(fields['MAJOR'])}.{int(fields['MINOR'])}.{int(fields['PATCH'])}"
    except (KeyError, ValueError):
        raise InputError(
            str(root / PACKAGE_INFO), fields, "does not name a version", "restore the file as released"
        ) from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _committed(root: Path, path: str) -> str | None:
    """The file as the tree's git has it committed; None without git."""
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "show", f"HEAD:./{path}"], capture_output=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.decode() if result.returncode == 0 else None


def _both_states(path: str, text: str, hunks: Sequence[Hunk]) -> TouchedFile:
    """Raises HunkError (about applying) when the text is in neither state."""
    try:
        return TouchedFile(path, True, apply_hunks(text, hunks, reverse=True), text)
    except HunkError:
        return TouchedFile(path, False, text, apply_hunks(text, hunks))


def _minor(version: str) -> str:
    return version.rsplit(".", 1)[0]


def find_range(version: str, ranges: Sequence[VersionRange]) -> VersionRange:
    """The entry that serves a version. Raises InputError for versions that no patch serves."""
    minor = _minor(version)
    for entry in ranges:
        if minor in entry.minors:
            return entry
    served = sorted((m for entry in ranges for m in entry.minors), key=lambda m: tuple(map(int, m.split("."))))
    too_new = tuple(map(int, minor.split("."))) > tuple(map(int, served[-1].split(".")))
    remedy = (
        "use a newer megatron-dip, or check out the latest release it serves" if too_new else "check out one of the releases it serves"
    )
    raise InputError("CHECKOUT", f"Megatron-LM {version}", f"no patch for this version, there are patches for {', '.join(served)}", remedy)


def inspect_tree(root: Path, directory: Path | None = None, *, require_known: bool = True, repair: bool = False) -> Tree:
    """Finds a tree's version and patch and the state of every touched file; changes nothing.

    Args:
        repair: look at the patch that mends the version's scripts, instead of the one for the schedule.
        require_known: refuse files with changes other than the patch's own; False asks only that every hunk matches.

    Raises:
        InputError: not a Megatron-LM tree, a version without a patch, or files changed otherwise.
    """
    directory = patches_directory() if directory is None else directory
    version = read_version(root)
    entry = find_range(version, read_manifest(directory))
    launcher = "or start training with `python -m megatron_dip.launch`, which leaves the files as they are"
    patch = entry.repairs[_minor(version)] if repair else entry.patch
    files = []
    for file_patch in parse_patch((directory / patch).read_text()):
        where = root / file_patch.path
        try:
            text = where.read_bytes().decode()
        except OSError:
            raise InputError("CHECKOUT", str(where), "missing from the tree", "restore it from the release") from None
        try:
            files.append(_both_states(file_patch.path, text, file_patch.hunks))
        except HunkError as error:
            raise InputError(
                "CHECKOUT", str(where), f"is not as released for Megatron-LM {version}: {error}",
                f"undo the changes of this file (`git checkout {file_patch.path}`, or unpack the release again), patch, then make them again",
            ) from None
    tree = Tree(root, version, _release_of(files, entry), patch, tuple(files))
    if tree.release is None and require_known:
        changed = [file.path for file in files if not _is_committed(root, file)]
        # Files of one release that differ are the ones to name; of an unknown release all are.
        known = {digest for hashes in entry.releases.values() for digest in hashes.values()}
        changed = [path for path in changed if _sha256(next(f.original_text for f in files if f.path == path)) not in known] or changed
        if changed:
            raise InputError(
                "CHECKOUT", str(root), f"changes other than the patch's own in {', '.join(changed)} (Megatron-LM {version})",
                f"undo or commit them (releases known byte for byte: {', '.join(sorted(entry.releases))}), {launcher}",
            )
    return tree


def _release_of(files: Sequence[TouchedFile], entry: VersionRange) -> str | None:
    for release, hashes in entry.releases.items():
        if all(hashes.get(file.path) == _sha256(file.original_text) for file in files):
            return release
    return None


def _is_committed(root: Path, file: TouchedFile) -> bool:
    """Whether git has the file as it is, or without the patch."""
    committed = _committed(root, file.path)
    return committed is not None and committed in (file.original_text, file.patched_text)


def write_state(tree: Tree, *, patched: bool) -> list[str]:
    """Brings every touched file into the wanted state; the paths written. All of them or none."""
    todo = [file for file in tree.files if file.patched is not patched]
    written: list[TouchedFile] = []
    try:
        for file in todo:
            _replace(tree.root / file.path, file.patched_text if patched else file.original_text)
            written.append(file)
    except OSError as error:
        for file in written:
            _replace(tree.root / file.path, file.patched_text if file.patched else file.original_text)
        raise InputError("CHECKOUT", str(tree.root), f"cannot be written: {error}", "make the tree writable, or use the launcher") from error
    return [file.path for file in todo]


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all, with the mode it had."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(text.encode())
        os.chmod(name, path.stat().st_mode)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
