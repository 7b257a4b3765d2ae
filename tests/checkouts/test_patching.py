"""The patch tool on small trees that are made from the patches' own context lines: no checkout of Megatron-LM is needed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_dip.checkouts import patching
from megatron_dip.checkouts.patching import apply_hunks, inspect_tree, parse_patch, patches_directory, read_manifest, write_state
from megatron_dip.cli.main import main
from megatron_dip.spec.errors import EXIT_CODE, InputError

RANGES = read_manifest(patches_directory())


def make_tree(root: Path, patch: str, version: str) -> Path:
    """A tree whose files hold the lines that the patch's hunks ask for, between lines of filler."""
    for file in parse_patch((patches_directory() / patch).read_text()):
        lines = []
        for hunk in sorted(file.hunks, key=lambda hunk: hunk.start):
            lines += [f"# filler before line {hunk.start}\n", *hunk.old]
        (root / file.path).parent.mkdir(parents=True, exist_ok=True)
        (root / file.path).write_text("".join([*lines, "# end\n"]))
    major, minor, micro = version.split(".")
    info = root / "megatron/core/package_info.py"
    info.parent.mkdir(parents=True, exist_ok=True)
    info.write_text(f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {micro}\nPRE_RELEASE = 'rc0'\n")
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file() and ".git/" not in str(path)}


@pytest.fixture
def own_patches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the patches whose manifest names the made tree of 0.16 as a release, used by the command too."""
    directory = tmp_path / "patches"
    shutil.copytree(patches_directory(), directory)
    tree = make_tree(tmp_path / "made", "megatron-0.16-0.18.patch", "0.16.1")
    document = json.loads((directory / "manifest.json").read_text())
    document["ranges"][0]["releases"] = {
        "made_v0.16.1": {name: hashlib.sha256(data).hexdigest() for name, data in contents(tree).items() if "package_info" not in name}
    }
    (directory / "manifest.json").write_text(json.dumps(document))
    monkeypatch.setattr(patching, "patches_directory", lambda: directory)
    return directory


@pytest.mark.parametrize("entry", RANGES, ids=lambda entry: entry.patch)
def test_every_patch_applies_and_reverses_on_its_own_context(entry: patching.VersionRange, tmp_path: Path) -> None:
    tree = make_tree(tmp_path, entry.patch, f"{entry.minors[0]}.0")
    for file in parse_patch((patches_directory() / entry.patch).read_text()):
        before = (tree / file.path).read_text()
        after = apply_hunks(before, file.hunks)
        assert after != before
        assert apply_hunks(after, file.hunks, reverse=True) == before
        with pytest.raises(patching.HunkError):
            apply_hunks(after, file.hunks)


@pytest.mark.parametrize("entry", RANGES, ids=lambda entry: entry.patch)
def test_patches_stay_small_and_name_the_flag(entry: patching.VersionRange) -> None:
    text = (patches_directory() / entry.patch).read_text()
    added = [line for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")]
    removed = [line for line in text.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert len(added) <= 30
    assert len(removed) <= 2
    assert any("'--pipeline-schedule'" in line for line in added)


def test_every_served_version_has_repairs_and_known_files() -> None:
    for entry in RANGES:
        assert set(entry.repairs) == set(entry.minors)
        for hashes in entry.releases.values():
            assert {file.path for file in parse_patch((patches_directory() / entry.patch).read_text())} <= set(hashes)
        for name in entry.repairs.values():
            for file in parse_patch((patches_directory() / name).read_text()):
                before = "".join(line for hunk in file.hunks for line in hunk.old)
                after = apply_hunks(before, file.hunks)
                assert apply_hunks(after, file.hunks, reverse=True) == before


def test_apply_is_idempotent_and_revert_restores_every_byte(own_patches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "made"
    before = contents(root)
    assert main(["patch", str(root), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "not patched"
    assert contents(root) == before
    assert main(["patch", str(root)]) == 0
    patched = contents(root)
    assert patched != before
    assert inspect_tree(root, own_patches).patched
    assert main(["patch", str(root)]) == 0
    assert contents(root) == patched
    assert main(["patch", str(root), "--check"]) == 0
    assert main(["patch", str(root), "--revert"]) == 0
    assert contents(root) == before
    assert main(["patch", str(root), "--revert"]) == 0
    assert contents(root) == before


def test_a_half_patched_tree_is_completed(own_patches: Path, tmp_path: Path) -> None:
    root = tmp_path / "made"
    before = contents(root)
    tree = inspect_tree(root, own_patches)
    (root / tree.files[0].path).write_text(tree.files[0].patched_text)
    half = inspect_tree(root, own_patches)
    assert not half.patched
    assert not half.untouched
    assert len(write_state(half, patched=True)) == len(tree.files) - 1
    assert inspect_tree(root, own_patches).patched
    write_state(inspect_tree(root, own_patches), patched=False)
    assert contents(root) == before


@pytest.mark.parametrize("when", ["before the patch", "after the patch"])
def test_other_changes_are_refused_and_nothing_is_written(
    when: str, own_patches: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "made"
    if when == "after the patch":
        assert main(["patch", str(root)]) == 0
    training = root / "megatron/training/training.py"
    training.write_text(training.read_text() + "# mine\n")
    before = contents(root)
    for action in ([], ["--check"], ["--revert"]):
        assert main(["patch", str(root), *action]) == EXIT_CODE
        message = capsys.readouterr().err
        assert "megatron/training/training.py" in message
        assert "arguments.py" not in message
        assert "Remedy" in message
    assert contents(root) == before


def test_a_missing_context_names_the_file(own_patches: Path, tmp_path: Path) -> None:
    root = tmp_path / "made"
    schedules = root / "megatron/core/pipeline_parallel/schedules.py"
    schedules.write_text(schedules.read_text().replace("forward_backward_no_pipelining", "something_else"))
    with pytest.raises(InputError, match=r"schedules\.py.*matches nowhere"):
        inspect_tree(root, own_patches)


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=root, check=True, capture_output=True)


def test_committed_changes_of_a_git_tree_are_kept(tmp_path: Path) -> None:
    root = make_tree(tmp_path, "megatron-main.patch", "0.20.0")
    with pytest.raises(InputError, match="changes other than"):
        inspect_tree(root)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "fork")
    before = contents(root)
    write_state(inspect_tree(root), patched=True)
    tree = inspect_tree(root)
    assert tree.patched
    assert tree.release is None
    (root / tree.files[0].path).write_text(tree.files[0].patched_text + "# mine\n")
    with pytest.raises(InputError, match=r"arguments\.py"):
        inspect_tree(root)
    (root / tree.files[0].path).write_text(tree.files[0].patched_text)
    write_state(inspect_tree(root), patched=False)
    assert contents(root) == before


@pytest.mark.parametrize(("version", "remedy"), [("0.15.3", "check out one of the releases"), ("0.21.0", "use a newer megatron-dip")])
def test_versions_without_a_patch_are_refused(version: str, remedy: str, tmp_path: Path) -> None:
    root = make_tree(tmp_path, "megatron-main.patch", version)
    with pytest.raises(InputError, match=remedy):
        inspect_tree(root)


def test_what_is_no_tree_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", str(tmp_path)]) == EXIT_CODE
    assert "no Megatron-LM source tree" in capsys.readouterr().err
