"""Pictures, traces and tables out of plans and timelines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from matplotlib import image as matplotlib_image
from matplotlib.colors import to_rgb

from megatron_dip.cli.main import main
from megatron_dip.report.colours import IDLE, PALETTE
from megatron_dip.report.gantt import _columns, draw_gantt
from megatron_dip.report.tables import markdown_table, spread, timeline_table
from megatron_dip.report.timeline import read_timeline
from megatron_dip.report.trace import held_over_time, trace_events
from megatron_dip.spec.codec import load_plan, save
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Dep, Plan, PlanStage
from megatron_dip.spec.timeline import Bar, Timeline, plan_timeline

GOLDEN = Path(__file__).parents[1] / "golden" / "plan.json"


def stage(number: int, rank: int, kind: Any, duration: int, *deps: Dep, module: str = "lm") -> PlanStage:
    return PlanStage(
        id=number, rank=rank, kind=kind, duration=duration, mem_delta_start=0, mem_delta_end=0, deps=tuple(deps), module=module, vp_stage=0,
        layers=(0, 1), microbatch=0, sub_microbatch=0, tokens=1, instances=1, strategy=["none"],
    )


def two_rank_plan(order: list[list[int]] | None = None) -> Plan:
    """Forward over two ranks and back: 0 -> 1 -> 2 -> 3, lag 5."""
    return Plan(
        format="megatron-dip/plan/1", ranks=2, memory_capacity=None, memory_initial=[0, 0],
        stages=[stage(0, 0, "fw", 10), stage(1, 1, "fw", 20, Dep(0, 5)), stage(2, 1, "bw", 40, Dep(1, 0)), stage(3, 0, "bw", 30, Dep(2, 5))],
        order=order or [[0, 3], [1, 2]], claimed_makespan=110, lower_bound=110, bubble_fraction=0.5, peak_memory=[0, 0], planning_ns=1,
        evaluations=1, seed=0, chunks={"lm": [[1, 1]]}, sub_microbatch_size={"lm": 1}, actions=[[], []], inputs={1: (0,), 3: (1,)},
        local_inputs={}, outputs={0: 0, 1: 2},
    )


def timeline(**changes: Any) -> Timeline:
    bars = [
        Bar(rank=0, kind="fw", module="vit", vp_stage=0, microbatch=0, sub_microbatch=0, start=100, end=200),
        Bar(rank=1, kind="bw", module="lm", vp_stage=0, microbatch=0, sub_microbatch=0, start=200, end=500),
    ]
    return Timeline(**{"title": "measured", "ranks": 2, "bars": bars, **changes})


def test_plan_times_follow_ranks_and_lags() -> None:
    planned = plan_timeline(two_rank_plan(), "plan")
    assert [(bar.rank, bar.kind, bar.start, bar.end) for bar in planned.bars] == [
        (0, "fw", 0, 10), (1, "fw", 15, 35), (1, "bw", 35, 75), (0, "bw", 80, 110),
    ]
    assert planned.makespan == two_rank_plan().claimed_makespan
    assert planned.bubble_fraction == pytest.approx(1 - 100 / 220)


def test_a_plan_whose_stages_wait_for_each_other_is_an_error() -> None:
    with pytest.raises(InputError, match="wait for each other"):
        plan_timeline(two_rank_plan([[3, 0], [1, 2]]), "plan")


def test_half_a_surrogate_pair_is_shown_as_its_escape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON can escape it, and no font, page or terminal can hold it."""
    raw = msgspec.to_builtins(timeline())
    raw["title"] = "half"
    raw["bars"][0]["module"] = "part"
    text = json.dumps(raw).replace('"half"', '"\\ud800"').replace('"part"', '"\\udc00"')
    (tmp_path / "t.json").write_text(text)
    for suffix in (".png", ".html"):
        assert main(["report", str(tmp_path / "t.json"), "--output", str(tmp_path / f"x{suffix}")]) == 0
        assert "\\ud800" in capsys.readouterr().out


def test_timeline_figures() -> None:
    assert timeline().makespan == 400
    assert timeline().bubble_fraction == pytest.approx(0.5)
    assert timeline(bars=[]).bubble_fraction == 0.0
    assert "| measured | 0.0004 | 50.0 | 25 75 |" in timeline_table([timeline()])


def test_gantt_shows_every_panel_on_one_axis(tmp_path: Path) -> None:
    """Colours are where they must be: the short timeline leaves the right of its panel white."""
    short = timeline(bars=[Bar(rank=0, kind="fw", module="vit", vp_stage=0, microbatch=0, sub_microbatch=0, start=0, end=100)], ranks=1)
    draw_gantt([timeline(), short], tmp_path / "x.png", title="Two")
    pixels = np.round(matplotlib_image.imread(tmp_path / "x.png")[..., :3] * 255).astype(int)

    def columns(colour: str) -> tuple[float, float]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        # Below the legend, which has patches of the same colours.
        found = np.flatnonzero((pixels[100:] == wanted).all(axis=-1).any(axis=0))
        return found.min() / pixels.shape[1], found.max() / pixels.shape[1]

    forward, backward = columns(PALETTE[1][0]), columns(PALETTE[0][1])
    assert forward[0] == pytest.approx(0.065, abs=0.01)
    assert forward[1] == pytest.approx(0.065 + 0.925 / 4, abs=0.01)
    assert backward == pytest.approx((0.065 + 0.925 / 4, 0.985), abs=0.012)


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no stages to draw"):
        draw_gantt([timeline(bars=[])], tmp_path / "x.png", title="")
    with pytest.raises(InputError, match="cannot be written"):
        draw_gantt([timeline()], tmp_path / "absent" / "x.png", title="")


def test_trace_has_every_stage_and_message() -> None:
    plan = two_rank_plan()
    events = trace_events([(plan_timeline(plan, "plan"), plan), (timeline(), None)])["traceEvents"]
    stages = [event for event in events if event["ph"] == "X"]
    assert [(event["pid"], event["tid"], event["name"], event["ts"], event["dur"]) for event in stages[:2]] == [
        (1, 1, "lm F0.0", 0.0, 0.01), (1, 2, "lm F0.0", 0.015, 0.02),
    ]
    assert len(stages) == 6
    sent = {event["id"]: event for event in events if event["ph"] == "s"}
    received = {event["id"]: event for event in events if event["ph"] == "f"}
    assert sent.keys() == received.keys() == {"1.0", "1.1"}
    assert (sent["1.0"]["tid"], received["1.0"]["tid"]) == (1, 2)
    assert (sent["1.1"]["tid"], received["1.1"]["tid"]) == (2, 1)
    assert all(received[tag]["ts"] > sent[tag]["ts"] for tag in sent)


def test_two_plans_in_one_trace_have_arrows_of_their_own() -> None:
    plan = two_rank_plan()
    events = trace_events([(plan_timeline(plan, "a"), plan), (plan_timeline(plan, "b"), plan)])["traceEvents"]
    arrows = [(event["id"], event["ph"]) for event in events if event["ph"] in "sf"]
    assert len(set(arrows)) == len(arrows) == 8


def test_memory_counters_end_where_they_began() -> None:
    plan = load_plan(GOLDEN)
    held = held_over_time(plan_timeline(plan, "a"), plan)
    assert [steps[-1].held_bytes for steps in held] == plan.memory_initial
    assert max(step.held_bytes for step in held[0]) == plan.peak_memory[0]


def test_columns_of_many_stages_show_how_much_was_busy() -> None:
    """A rank that works half of each of many short spans is half as far from the idle colour as one that works all the time."""
    bars = [
        Bar(rank=rank, kind="bw", module="lm", vp_stage=0, microbatch=i, sub_microbatch=0, start=100 * i, end=100 * i + length)
        for rank, length in ((0, 100), (1, 50), (2, 0)) for i in range(20_000)
    ]
    image = _columns(timeline(bars=bars, ranks=3), ["lm"]).mean(axis=1)
    idle, busy = np.array(to_rgb(IDLE)), np.array(to_rgb(PALETTE[0][1]))
    assert image[0] == pytest.approx(busy, abs=2e-3)
    assert image[1] == pytest.approx((idle + busy) / 2, abs=5e-3)
    assert image[2] == pytest.approx(idle, abs=2e-3)


@pytest.mark.parametrize("changed", [{"ranks": 0}, {"ranks": 10**9}, {"ranks": -3}, {"ranks": 1}])
def test_timelines_that_cannot_be_are_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    save(tmp_path / "x.json", msgspec.structs.replace(timeline(), **changed))
    with pytest.raises(InputError, match="rank"):
        read_timeline(tmp_path / "x.json")


def test_a_bar_that_ends_before_it_starts_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "x.json", timeline(bars=[Bar(rank=0, kind="fw", module="vit", vp_stage=0, microbatch=0, sub_microbatch=0, start=5, end=4)]))
    with pytest.raises(InputError, match=r"bars\[0\]"):
        read_timeline(tmp_path / "x.json")


def test_a_plan_that_does_not_hold_is_no_timeline(tmp_path: Path) -> None:
    save(tmp_path / "x.json", msgspec.structs.replace(load_plan(GOLDEN), outputs={0: 77}))
    with pytest.raises(InputError, match="does not hold"):
        read_timeline(tmp_path / "x.json")


def test_spread_and_tables() -> None:
    figures = spread([4.0, 1.0, 3.0, 2.0, 5.0])
    assert (figures.median, figures.low_quartile, figures.high_quartile, figures.count) == (3.0, 2.0, 4.0, 5)
    assert spread([7.0]).median == 7.0
    assert markdown_table(["a", "b"], [["x", 1]]) == "| a | b |\n|---|---:|\n| x | 1 |"


def test_commands_write_pictures_and_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "plan.json", load_plan(GOLDEN))
    save(tmp_path / "measured.json", timeline())
    files = [str(tmp_path / "plan.json"), str(tmp_path / "measured.json")]
    assert main(["report", *files, "--output", str(tmp_path / "x.png")]) == 0
    assert "| measured |" in capsys.readouterr().out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert main(["trace", *files, "--output", str(tmp_path / "trace.json")]) == 0
    assert len(msgspec.json.decode((tmp_path / "trace.json").read_bytes())["traceEvents"]) > 6


@pytest.mark.parametrize(
    ("content", "message"), [('{"format": "other"}', "format"), ("[1", "broken JSON"), (None, "cannot be read")]
)
def test_commands_name_a_file_of_another_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    for command in ("report", "trace"):
        assert main([command, str(tmp_path / "x.json"), "--output", str(tmp_path / "out.png")]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Remedy" in error


def test_reading_gives_the_plan_back() -> None:
    assert read_timeline(GOLDEN)[1] == load_plan(GOLDEN)
