"""What a run on CUDA and NCCL is held to before it starts; no device is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_dip.runtime.groups import new_process_groups
from megatron_dip.runtime.startup import check_start, hardware_queues
from megatron_dip.spec.errors import InputError

LAZY_NCCL, EAGER_NCCL = SimpleNamespace(bound_device_id=None), SimpleNamespace(bound_device_id="cuda:3")


def test_eager_initialisation_of_nccl_is_refused() -> None:
    with pytest.raises(InputError, match=r"cuda:3.*one communicator.*leave device_id out"):
        check_start(EAGER_NCCL, cuda_runs=True, environment={})


def test_groups_over_nccl_are_not_made_under_eager_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is asked of the other ranks: there are none here."""
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: EAGER_NCCL)
    with pytest.raises(InputError, match="device_id"):
        new_process_groups([0, 1], 0, backend="nccl")


def test_torch_keeps_the_device_of_an_eager_initialisation_where_it_is_looked_for() -> None:
    """On the group itself, so that what is refused is what torch does."""
    assert "bound_device_id" in dir(dist.ProcessGroup)


def test_kernels_are_loaded_eagerly_where_cuda_has_not_read_its_variables_yet() -> None:
    environment: dict[str, str] = {}
    settings = check_start(LAZY_NCCL, cuda_runs=False, environment=environment)
    assert environment == {"CUDA_MODULE_LOADING": "EAGER"}
    assert settings.loads_eagerly
    assert "export" not in settings.describe()


@pytest.mark.parametrize("environment", [{}, {"CUDA_MODULE_LOADING": "LAZY"}])
def test_eager_loading_is_asked_for_where_it_is_too_late_to_set(environment: dict[str, str]) -> None:
    given = dict(environment)
    settings = check_start(LAZY_NCCL, cuda_runs=True, environment=environment)
    assert environment == given
    assert "export CUDA_MODULE_LOADING=EAGER" in settings.describe()


def test_what_the_user_says_of_loading_stays() -> None:
    environment = {"CUDA_MODULE_LOADING": "LAZY"}
    assert not check_start(LAZY_NCCL, cuda_runs=False, environment=environment).loads_eagerly
    assert environment["CUDA_MODULE_LOADING"] == "LAZY"


def test_the_log_line_tells_all_three() -> None:
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUDA_MODULE_LOADING": "EAGER", "NCCL_MAX_P2P_NCHANNELS": "2"}
    line = check_start(LAZY_NCCL, cuda_runs=True, environment=environment).describe()
    assert line == " [DIP] device: CUDA_DEVICE_MAX_CONNECTIONS=1, CUDA_MODULE_LOADING=EAGER, NCCL_MAX_P2P_NCHANNELS=2"


@pytest.mark.parametrize(("text", "queues"), [("1", 1), ("32", 32), (" 8 ", 8), ("", None)])
def test_numbers_of_hardware_queues(text: str, queues: int | None) -> None:
    assert hardware_queues({"CUDA_DEVICE_MAX_CONNECTIONS": text}) == queues
    assert hardware_queues({}) is None


@pytest.mark.parametrize("text", ["0", "33", "-1", "one", "1.0"])
def test_other_numbers_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="CUDA_DEVICE_MAX_CONNECTIONS"):
        hardware_queues({"CUDA_DEVICE_MAX_CONNECTIONS": text})


def test_no_torch_at_import() -> None:
    code = "import megatron_dip.runtime.startup, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ}, timeout=60).returncode == 0
    assert not torch.cuda.is_initialized()
