"""Tests against a real Megatron-LM source tree, named by the environment variable MEGATRON_LM (never written to: tests copy it)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.megatron_lm.runs import NO_EVALUATION, VARYING, VLM, finished, start

VARIABLE = "MEGATRON_LM"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    root = os.environ.get(VARIABLE)
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.megatron_lm)
            if not root:
                item.add_marker(pytest.mark.skip(reason=f"set {VARIABLE} to the root of a Megatron-LM checkout"))


@pytest.fixture(scope="session")
def checkout() -> Path:
    root = Path(os.environ[VARIABLE])
    assert (root / "megatron/core/package_info.py").is_file(), f"{VARIABLE} = {root} is no Megatron-LM tree"
    return root


def copy_tree(checkout: Path, target: Path) -> Path:
    """The Python sources of the checkout that training needs, without git: what the patch tool and the scripts work on."""
    shutil.copytree(checkout / "megatron", target / "megatron", ignore=shutil.ignore_patterns("__pycache__"))
    for script in checkout.glob("*.py"):
        shutil.copy(script, target)
    shutil.copytree(checkout / "examples" / "multimodal", target / "examples" / "multimodal", ignore=shutil.ignore_patterns("*.png", "__pycache__"))
    shutil.copytree(checkout / "examples" / "mimo", target / "examples" / "mimo", ignore=shutil.ignore_patterns("*.png", "__pycache__"))
    return target


@pytest.fixture
def tree(checkout: Path, tmp_path: Path) -> Path:
    """An unpatched copy of the checkout."""
    return copy_tree(checkout, tmp_path / "megatron_lm")


@pytest.fixture(scope="session")
def patched_tree(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One patched copy for all tests that run scripts."""
    from megatron_dip.checkouts.patching import inspect_tree, write_state

    target = copy_tree(checkout, tmp_path_factory.mktemp("patched"))
    write_state(inspect_tree(target), patched=True)
    return target


@pytest.fixture(scope="session")
def mended_tree(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy without the schedule's patch in which scripts run that do not as released (``--repair``)."""
    from megatron_dip.checkouts.patching import inspect_tree, write_state

    target = copy_tree(checkout, tmp_path_factory.mktemp("mended"))
    write_state(inspect_tree(target, repair=True), patched=True)
    return target


@pytest.fixture(scope="session")
def checkpoint(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that all runs of the vision-language script start from, written by the unpatched script in one process."""
    folder = tmp_path_factory.mktemp("vlm") / "checkpoint"
    arguments = [*VLM, *NO_EVALUATION, "--train-iters", "1", "--save", str(folder), "--save-interval", "1"]
    finished(start(checkout, VARYING, arguments, patched=False), 1)
    return folder
