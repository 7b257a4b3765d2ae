"""Pages: one file without network, opened in a real browser where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image as matplotlib_image

from megatron_dip.report.colours import PALETTE
from megatron_dip.report.page import PlaygroundCase, write_page, write_playground
from megatron_dip.report.timeline import read_timeline
from megatron_dip.spec.timeline import Bar, Timeline

GOLDEN = Path(__file__).parents[1] / "golden" / "plan.json"
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


def measured(title: str = "measured") -> Timeline:
    bars = [Bar(rank=rank, kind=kind, module=module, vp_stage=0, microbatch=0, sub_microbatch=0, start=at * 1000, end=at * 1000 + 1000)
            for rank in (0, 1) for at, (kind, module) in enumerate([("fw", "vit"), ("fw", "lm"), ("bw", "lm"), ("bw", "vit")])]  # type: ignore[arg-type]
    return Timeline(title=title, ranks=2, bars=bars)


def screenshot(page: Path) -> np.ndarray:
    """Pixels [height, width, rgb] of the page in a browser without network; fails where the page's scripts do."""
    assert BROWSER is not None
    picture = page.with_suffix(".png")
    run = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={page.parent / 'profile'}",
         "--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=8000", "--window-size=1300,1000",
         f"--screenshot={picture}", page.as_uri()],
        capture_output=True, text=True, timeout=240, check=False,
    )
    said = [line for line in run.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in said if re.search(r"Uncaught|[Ee]rror|not defined", line)], said
    return np.round(matplotlib_image.imread(picture)[..., :3] * 255).astype(int)


def share(pixels: np.ndarray, colour: str) -> float:
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return float((np.abs(pixels - wanted).max(axis=-1) <= 2).mean())


def test_a_page_is_one_file_without_network(tmp_path: Path) -> None:
    timeline, plan = read_timeline(GOLDEN)
    assert plan is not None
    assert plan.memory_capacity is not None
    write_page([timeline, measured("<b>&")], [plan, None], tmp_path / "x.html", title="<script>x</script>")
    text = (tmp_path / "x.html").read_text()
    assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=", text)
    assert "<script>x" not in text
    assert "kB held" in text
    assert f"capacity {min(plan.memory_capacity) / 1e3:.4g} kB" in text


@needs_browser
def test_a_browser_shows_plan_measurement_and_memory(tmp_path: Path) -> None:
    timeline, plan = read_timeline(GOLDEN)
    write_page([timeline, measured()], [plan, None], tmp_path / "x.html", title="Plan and measurement")
    pixels = screenshot(tmp_path / "x.html")
    for colour in (*PALETTE[0][:2], *PALETTE[1][:2]):
        assert share(pixels, colour) > 2e-3, colour


@needs_browser
def test_the_playgrounds_sliders_choose(tmp_path: Path) -> None:
    """It opens on the middle of three, whose module no other position has."""
    cases = [
        PlaygroundCase(position=(ranks,), timelines={"DIP": Timeline(title="", ranks=ranks, bars=[
            Bar(rank=0, kind="fw", module=name, vp_stage=0, microbatch=0, sub_microbatch=0, start=0, end=10**6)])})
        for ranks, name in ((1, "a"), (2, "b"), (4, "c"))
    ]
    write_playground(cases, ["ranks"], tmp_path / "x.html", title="Playground", explanation="One of three")
    pixels = screenshot(tmp_path / "x.html")
    below = pixels[pixels.shape[0] // 5 :]  # without the legend
    assert share(below, PALETTE[1][0]) > 2e-2
    assert share(below, PALETTE[0][0]) < 1e-3
