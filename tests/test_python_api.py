"""The documented Python runs as it stands, the documented workload is one, and links between documents lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_dip.spec.codec import load_workload

ROOT = Path(__file__).parents[1]


def test_the_page_for_people_who_study_schedules_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python_api.md").read_text(), re.S)
    assert len(blocks) == 2
    exec("\n".join(blocks), {})
    printed = capsys.readouterr().out.splitlines()
    planned, replayed = float(printed[0].split()[0]), float(printed[-1].split()[0])
    assert replayed == pytest.approx(planned)


def test_the_workload_by_hand_is_one() -> None:
    assert len(load_workload(ROOT / "examples" / "workloads" / "vlm_by_hand.json").microbatches) == 8


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]))
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http:", "https:")):
            assert (ROOT / page).parent.joinpath(target).exists(), target
