"""The launcher on small trees: the patch in memory, the files untouched, the script as if started by python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkouts.test_patching import contents, make_tree

SCRIPT = """
import sys
from megatron.core.pipeline_parallel import schedules
print(sys.argv, __name__, __file__, hasattr(schedules, "marker"))
assert sys.path[0].endswith("tree"), sys.path
"""

SCHEDULES = '''marker = True
from typing import List, Union
import torch

# Types
Shape = Union[List[int], torch.Size]


def get_forward_backward_func(pp_size=1):
    if pp_size > 1:
        forward_backward_func = "pipelining"
    else:
        forward_backward_func = forward_backward_no_pipelining
    return forward_backward_func


forward_backward_no_pipelining = "none"
'''

RUNNING = SCRIPT + """
assert schedules.get_forward_backward_func() == "none"
schedules._forward_backward_func_override = lambda stock: "dip instead of " + stock
print(schedules.get_forward_backward_func())
"""


def start(tree: Path, *words: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", "megatron_dip.launch", *words], cwd=tree, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": root},
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = make_tree(tmp_path / "tree", "megatron-0.16-0.18.patch", "0.16.9")
    # The real file has more between the hunks; what matters is that both hunks meet and that the module runs.
    (root / "megatron/core/pipeline_parallel/schedules.py").write_text(SCHEDULES)
    (root / "megatron/training").mkdir(exist_ok=True)
    (root / "run.py").write_text(RUNNING)
    return root


def test_the_module_runs_patched_and_the_file_stays(tree: Path) -> None:
    before = contents(tree)
    result = start(tree, "run.py", "--lr", "1", "--device", "mine")
    assert result.returncode == 0, result.stderr
    assert "['run.py', '--lr', '1', '--device', 'mine'] __main__" in result.stdout
    assert "dip instead of none" in result.stdout
    assert {name: data for name, data in contents(tree).items() if "__pycache__" not in name} == before


def test_a_hunk_that_does_not_match_is_refused(tree: Path) -> None:
    (tree / "megatron/training/training.py").write_text("# nothing of Megatron's\n")
    result = start(tree, "run.py")
    assert result.returncode == 2
    assert "training.py" in result.stderr
    assert "Remedy" in result.stderr


def test_scripts_outside_of_a_checkout_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text("")
    result = start(tmp_path, "run.py")
    assert result.returncode == 2
    assert "does not belong to a Megatron-LM checkout" in result.stderr
    assert start(tmp_path, "absent.py").returncode == 2


def test_a_release_that_is_too_new_is_refused_with_the_remedy(tree: Path) -> None:
    info = tree / "megatron/core/package_info.py"
    info.write_text(info.read_text().replace("MINOR = 16", "MINOR = 99"))
    result = start(tree, "run.py")
    assert result.returncode == 2
    assert "no patch for this version" in result.stderr
    assert "use a newer megatron-dip" in result.stderr
