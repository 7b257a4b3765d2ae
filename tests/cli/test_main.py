"""What every command does alike: outputs that would overwrite inputs, wrong kinds of file, closed pipes, full disks, interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_dip.cli.main import main
from megatron_dip.version import __version__

GOLDEN = Path(__file__).parents[1] / "golden"
COMMAND = [sys.executable, "-m", "megatron_dip"]


def test_version_without_other_modules() -> None:
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"megatron-dip {__version__}\n"


def test_the_overview_imports_no_command() -> None:
    code = "import sys; from megatron_dip.cli.main import main\ntry: main(['--help'])\nfinally: print('numba' in sys.modules, [m for m in sys.modules if m.endswith('_command')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "what DIP would gain on a model" in done.stdout
    assert done.stdout.endswith("False []\n")


@pytest.mark.parametrize(
    "arguments",
    [("plan", "workload.json", "--output", "workload.json"), ("trace", "plan.json", "--output", "plan.json"),
     ("plan", "workload.json", "--output", "o.json", "--save-partition", "o.json")],
)
def test_outputs_never_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("workload.json", "plan.json"):
        (tmp_path / name).write_bytes((GOLDEN / name).read_bytes())
    assert main(arguments) == 2
    assert "--" in capsys.readouterr().err
    for name in ("workload.json", "plan.json"):
        assert (tmp_path / name).read_bytes() == (GOLDEN / name).read_bytes()
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(("command", "said"), [("plan", "this is a plan, where a workload is asked for"), ("check", "this is a workload, where a plan")])
def test_a_file_of_another_kind_is_called_that(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, said: str) -> None:
    file = GOLDEN / ("plan.json" if command == "plan" else "workload.json")
    output = ["--output", str(tmp_path / "x.json")] if command == "plan" else []
    assert main([command, str(file), *output]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[" * 100_000, '{"\\ud800": 1, "format": "megatron-dip/plan/1"}', '{"format": "\\ud800"}'])
@pytest.mark.parametrize("command", ["report", "trace", "check"])
def test_depth_and_surrogates_end_in_one_line(tmp_path: Path, command: str, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    output = [] if command == "check" else ["--output", str(tmp_path / "o.png")]
    done = subprocess.run([*COMMAND, command, str(tmp_path / "x.json"), *output], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_closed_pipe_and_a_full_disk_end_without_a_traceback() -> None:
    command = [*COMMAND, "simulate", str(GOLDEN / "workload.json"), "--schedule", "1f1b", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read().decode()
        assert process.wait(timeout=120) == 141
    assert "Traceback" not in error
    assert "BrokenPipe" not in error
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("is_compiling", [False, True], ids=["while it plans", "while kernels are compiled"])
def test_an_interrupt_ends_in_one_line_and_leaves_no_file(is_compiling: bool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    workload = tmp_path / "w.json"  # whose cut alone takes far longer to choose than the interrupt takes to come
    assert main(["workload", "vlm-l", "--microbatches", "64", "--output", str(workload)]) == 0
    command = [*COMMAND, "plan", str(workload), "--output", str(tmp_path / "p.json"), "--time-budget", "60", "--no-baselines"]
    kernels = {"NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("kernels"))} if is_compiling else {}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # shells let what they start in the background ignore it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **kernels}, preexec_fn=heard
    ) as process:
        time.sleep(6.0)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.decode().strip().splitlines()[-1] == "megatron-dip: interrupted"
    assert "Traceback" not in error.decode()
    assert list(tmp_path.iterdir()) == [workload]


def test_report_names_the_kinds_of_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(GOLDEN / "plan.json"), "--output", str(tmp_path / "picture")]) == 2
    assert ".png" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_title_is_text_and_no_formula(tmp_path: Path) -> None:
    assert main(["report", str(GOLDEN / "plan.json"), "--output", str(tmp_path / "p.png"), "--title", r"costs $\frac{"]) == 0


@pytest.mark.parametrize(
    ("flags", "said"), [((), "no CUDA device"), (("--device", "cpu", "--partition", "cut.json"), "layers")], ids=["no device", "a cut that does not fit"]
)
def test_what_the_parent_can_know_is_said_once_and_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    if not flags and any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "cut.json").write_text(
        '{"format": "megatron-dip/partition/1", "chunks": {"vit": [[1, 1]], "lm": [[1, 1]]}, "sub_microbatch_size": {"vit": 1, "lm": 1}}'
    )
    example = Path(__file__).parents[2] / "examples" / "vlm" / "digits"
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys; from megatron_dip.cli.main import main; status = main(sys.argv[1:]); print('torch' in sys.modules); "
         "sys.exit(status)", "train", str(example), *flags],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )
    assert loaded.returncode == 2, loaded.stderr
    assert loaded.stdout == "False\n"
    assert said in loaded.stderr
    assert len(loaded.stderr.splitlines()) == 1


def test_a_folder_without_example_py_is_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Path(__file__).parents[2] / "examples" / "vlm" / "digits" / "config.json"
    (tmp_path / "config.json").write_bytes(source.read_bytes())
    assert main(["train", str(tmp_path), "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("has no example.py") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("check", "plan.json", "--jsn"), "usage: megatron-dip check"), (("pln", "w.json"), "did you mean 'plan'?"), (("zzzzz",), "commands are estimate")],
)
def test_a_word_that_is_not_known_is_answered_by_who_knows_better(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", [("estimate", "a" * 3000, "--gpus", "2"), ("lengths", "a" * 3000), ("checkpoint", "inspect", "a" * 3000), ("patch", "a" * 3000)])
def test_names_that_no_file_can_have_end_in_one_line(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    assert main(command) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
