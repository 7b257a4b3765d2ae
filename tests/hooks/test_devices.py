"""Where the analytic costs' figures come from: the words of --dip-device, and the name of the GPU that trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dip.cost.device import device_names, load_device
from megatron_dip.hooks.costs import detect_device
from megatron_dip.spec.errors import InputError


def test_an_unknown_device_names_those_there_are() -> None:
    with pytest.raises(InputError) as error:
        load_device("abacus", "--dip-device")
    assert str(error.value) == (
        f"--dip-device = 'abacus': unknown device. Remedy: use one of {', '.join(device_names())}, a device file (*.json), or its figures."
    )


@pytest.mark.parametrize(("name", "device"), [
    ("NVIDIA H200", "h200"), ("NVIDIA H20", "h20"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("cpu", "cpu"),
])
def test_the_gpu_that_trains_is_known_by_its_name(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, name)
    assert detect_device() == device


def test_a_gpu_without_figures_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "Abacus 9000")
    with pytest.raises(InputError) as error:
        detect_device()
    assert str(error.value) == (
        f"--dip-device = None: there are no figures for 'Abacus 9000'. Remedy: give one of {list(device_names())}, a device file, or --dip-profile."
    )


def pretend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    cuda: Any = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_name", lambda *_: name)
