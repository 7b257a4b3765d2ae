"""What can go wrong in a run of ``megatron-dip train``, and what is said and kept then."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from megatron_dip.spec.errors import EXIT_CODE
from tests.cli.tiny_runs import COMMAND, TIME_LIMIT_S, errors, train, write_example

pytestmark = pytest.mark.distributed

DETERMINISTIC = ("--deterministic", "--evaluations", "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of 4 iterations: ``example``, ``saved`` (iterations 2 and 4), ``record.json``."""
    folder = tmp_path_factory.mktemp("saved")
    result = train(
        write_example(folder / "example"), "--iterations", "4", "--save", str(folder / "saved"), "--save-interval", "2", *DETERMINISTIC,
        "--record", str(folder / "record.json"),
    )
    assert result.returncode == 0, result.stderr
    return folder


def losses(record: Path) -> list[float]:
    return [iteration["loss"] for iteration in json.loads(record.read_text())["iterations"]]


@pytest.mark.parametrize(("given", "at"), [(0, 2), (3, 1)])
def test_a_data_set_that_gives_another_number_ends_the_run_at_once(tmp_path: Path, given: int, at: int) -> None:
    folder = write_example(tmp_path, f"""
class Dataset(tiny.Dataset):
    def microbatches(self, iteration, num_microbatches):
        items = super().microbatches(iteration, num_microbatches)
        return items if iteration < {at} else items[:{given}]
""")
    result = train(folder, "--iterations", "50")
    assert result.returncode == EXIT_CODE, result.stderr
    assert len(errors(result)) == 2
    assert all(f"Dataset.microbatches({at}, 4) = '{given} items'" in line for line in errors(result))
    assert f"iteration    {at}/50" in result.stdout


@pytest.mark.parametrize("what", ["gradient", "loss"])
@pytest.mark.long
def test_what_is_not_finite_is_neither_stepped_nor_saved(tmp_path: Path, what: str) -> None:
    """In the last iteration too. The run before it can be gone on with."""
    folder = write_example(tmp_path / "example", f"""
from functools import partial
import torch

class Dataset(tiny.Dataset):
    def microbatches(self, iteration, num_microbatches):
        return [dict(item, bad=torch.tensor(iteration == 2)) for item in super().microbatches(iteration, num_microbatches)]

class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()
    @staticmethod
    def backward(ctx, g):
        return g * float("nan")

def loss_func(mask, bad, output):
    if bad:
        output = BadGradient.apply(output) if {what!r} == "gradient" else output * float("inf")
    return tiny.digits.loss_func(mask, output)

def forward_step(data_iterator, model):
    item = tiny.digits.next_item(data_iterator)
    output = model(**{{name: item[name] for name in ("images", "tokens", "position_ids", "cu_lengths", "labels")}})
    return output, partial(loss_func, item["loss_mask"], bool(item["bad"]))
""")
    result = train(folder, "--iterations", "3", "--save", str(tmp_path / "saved"), "--save-interval", "1")
    assert result.returncode == EXIT_CODE, result.stderr
    assert len(errors(result)) == 2
    assert all(f"the {what} = 'not finite': in iteration 3" in line and "data" in line for line in errors(result))
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["iter_0000001", "iter_0000002", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "saved" / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_deterministic_run_is_repeated_bit_for_bit_and_resumed_from_a_named_iteration(saved: Path, tmp_path: Path) -> None:
    again = train(saved / "example", "--iterations", "4", *DETERMINISTIC, "--record", str(tmp_path / "again.json"))
    assert again.returncode == 0, again.stderr
    assert losses(tmp_path / "again.json") == losses(saved / "record.json")
    assert "of waiting for them" in again.stdout
    resumed = train(
        saved / "example", "--iterations", "4", *DETERMINISTIC, "--load", str(saved / "saved"), "--load-iteration", "2",
        "--record", str(tmp_path / "resumed.json"),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "resumed.json") == losses(saved / "record.json")[2:]


def test_the_folder_of_another_run_is_not_saved_over(saved: Path) -> None:
    result = train(saved / "example", "--iterations", "4", "--seed", "2", "--save", str(saved / "saved"))
    assert result.returncode == EXIT_CODE
    assert all("--save = " in line and "holds another run's checkpoints, up to iteration 4" in line for line in errors(result))


def test_a_run_that_has_nothing_left_to_train_says_so_and_keeps_its_record(saved: Path, tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    record.write_text("before")
    result = train(saved / "example", "--iterations", "3", "--load", str(saved / "saved"), "--record", str(record))
    assert result.returncode == EXIT_CODE
    assert all("--iterations = 3: nothing is left to train" in line for line in errors(result))
    assert record.read_text() == "before"


@pytest.mark.long
def test_a_damaged_tracker_or_checkpoint_is_named_with_what_can_be_loaded(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "saved", tmp_path / "saved")
    (tmp_path / "saved" / "latest_checkpointed_iteration.txt").write_text("")
    result = train(saved / "example", "--iterations", "5", "--load", str(tmp_path / "saved"))
    assert result.returncode == EXIT_CODE
    assert all("iterations [2, 4] lie there: name one with --load-iteration" in line for line in errors(result))
    (tmp_path / "saved" / "iter_0000004" / "common.pt").unlink()
    result = train(saved / "example", "--iterations", "5", "--load", str(tmp_path / "saved"), "--load-iteration", "4")
    assert result.returncode == EXIT_CODE
    assert all("cannot be loaded" in line and "give --load-iteration one of [2]" in line for line in errors(result))


@pytest.mark.long
def test_an_error_in_scoring_costs_no_checkpoint_and_no_record_and_is_not_called_a_missing_package(tmp_path: Path) -> None:
    folder = write_example(tmp_path / "example", """
def evaluation_step(data_iterator, model):
    import pandas_not_there
""")
    result = train(folder, "--iterations", "1", "--save", str(tmp_path / "saved"), "--record", str(tmp_path / "record.json"))
    assert result.returncode == 1
    assert "ModuleNotFoundError: No module named 'pandas_not_there'" in result.stderr
    assert "example.py" in result.stderr
    assert "pip install" not in result.stderr
    assert (tmp_path / "saved" / "iter_0000001" / "metadata.json").is_file()
    assert len(losses(tmp_path / "record.json")) == 1


def test_outputs_are_tried_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--save", "--timelines"):
        result = train(write_example(tmp_path / "example"), option, str(tmp_path / "file"))
        assert result.returncode == EXIT_CODE
        assert len(errors(result)) == 1
        assert f"{option} = " in errors(result)[0]


def test_settings_that_differ_between_ranks_are_named_on_all_of_them(tmp_path: Path) -> None:
    folder = write_example(tmp_path / "example")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [*COMMAND, str(folder), "--device", "cpu", "--seed", str(rank + 1)], env={**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, stderr = rank.communicate(timeout=TIME_LIMIT_S)
            assert rank.returncode == EXIT_CODE
            assert "rank 1 = ['seed']: were given otherwise than to rank 0" in stderr
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.long
def test_an_exit_in_user_code_ends_all_ranks_with_its_code(tmp_path: Path) -> None:
    folder = write_example(tmp_path, """
import os, sys
def forward_step(data_iterator, model):
    if os.environ["RANK"] == "1":
        sys.exit(7)
    return tiny.forward_step(data_iterator, model)
""")
    began = time.monotonic()
    result = train(folder, "--iterations", "50", "--timeout", "300")
    assert result.returncode in (1, 7)
    assert time.monotonic() - began < 300


FAILING = """
import os
from functools import partial
import torch

HERE = os.environ["RANK"] == "1"

class Dataset(tiny.Dataset):
    def microbatches(self, iteration, num_microbatches):
        if HERE and iteration == 1 and {where!r} == "data":
            raise OSError("the reader of rank 1 broke")
        return super().microbatches(iteration, num_microbatches)

calls = 0

def loss_func(mask, output):
    if HERE and calls > 4 and {where!r} == "loss":
        raise ArithmeticError("the loss of rank 1 broke")
    return tiny.digits.loss_func(mask, output)

def forward_step(data_iterator, model):
    global calls
    calls += 1
    if HERE and calls > 4 and {where!r} == "memory":
        raise torch.OutOfMemoryError("rank 1 tried to allocate 2 GiB")
    output, loss = tiny.forward_step(data_iterator, model)
    return output, partial(loss_func, loss.args[0])
"""


@pytest.mark.parametrize(
    ("where", "said"),
    [("data", "the reader of rank 1 broke"), ("loss", "the loss of rank 1 broke"), ("memory", "OutOfMemoryError: rank 1 tried to allocate 2 GiB")],
)
@pytest.mark.long
def test_an_error_on_a_tensor_rank_that_is_not_the_first_ends_all_ranks_with_it(tmp_path: Path, where: str, said: str) -> None:
    """Long before the time limit, which is longer than the test may run."""
    folder = write_example(tmp_path, FAILING.format(where=where))
    result = train(folder, "--pipeline", "1", "--tensor", "2", "--iterations", "50", "--timeout", "3600")
    assert result.returncode == 1, result.stderr
    assert said in result.stderr
    assert "iteration    1/50" in result.stdout
    assert "iteration    3/50" not in result.stdout
