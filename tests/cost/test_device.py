"""Device files: what loads, what is refused, and the rates that shapes reach."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dip.cost.device import device_names, load_device
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Device

FIGURES = {"peak_tflops": 500.0, "memory_gib": 64.0, "memory_tbs": 2.0, "nvlink_gbs": 100.0, "network_gbs": 10.0}


def test_every_built_in_device_loads() -> None:
    assert set(device_names()) >= {"a100", "h100", "h800", "h200", "h20", "b200", "cpu"}
    for name in device_names():
        device = load_device(name)
        assert device.name == name
        assert device.source
    assert load_device("H100") is load_device("h100")


def test_named_figures_are_the_data_sheets() -> None:
    assert load_device("h800").nvlink_gbs == 200
    assert load_device("h20").peak_tflops == 148
    assert load_device("a100").memory_tbs == 2.039


def test_an_unknown_device_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown device.*a100.*h800") as caught:
        load_device("h900", "--device")
    assert caught.value.field == "--device"


def test_no_device_asks_for_one() -> None:
    with pytest.raises(InputError, match="name a device"):
        load_device(None)


def test_bare_figures_take_the_efficiencies_of_an_h100() -> None:
    device = load_device(Device(**FIGURES))
    assert device.peak_tflops == 500
    assert device.efficiency == load_device("h100").efficiency


@pytest.mark.parametrize("field", sorted(FIGURES))
@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-300, 1e300, float("nan")])
def test_impossible_figures_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError) as caught:
        load_device(Device(**{**FIGURES, field: value}))
    assert caught.value.field == f"device.{field}"


def write_device(path: Path, **changes: object) -> str:
    raw = msgspec.to_builtins(load_device("a100"))
    raw.update(changes)
    path.write_text(json.dumps(raw))
    return str(path)


def test_a_users_file_loads(tmp_path: Path) -> None:
    device = load_device(write_device(tmp_path / "mine.json", name="mine", peak_tflops=777.0))
    assert (device.name, device.peak_tflops) == ("mine", 777.0)


def test_a_users_file_is_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"network_gbs = -5"):
        load_device(write_device(tmp_path / "mine.json", network_gbs=-5.0))
    with pytest.raises(InputError, match="unknown field"):
        load_device(write_device(tmp_path / "mine.json", pigeons=1))
    with pytest.raises(InputError, match="cannot be read"):
        load_device(str(tmp_path / "none.json"))
    efficiency = msgspec.to_builtins(load_device("a100").efficiency)
    efficiency["gemm"]["rows"] = [512, 256, 1024, 2048, 4096, 8192]
    with pytest.raises(InputError, match="growing list"):
        load_device(write_device(tmp_path / "mine.json", efficiency=efficiency))
    efficiency = msgspec.to_builtins(load_device("a100").efficiency)
    efficiency["attention"]["efficiency"] = efficiency["attention"]["efficiency"][:1]
    with pytest.raises(InputError, match="one row for each entry of heads"):
        load_device(write_device(tmp_path / "mine.json", efficiency=efficiency))


def test_rates_are_the_tables_at_their_points() -> None:
    device = load_device("h100")
    peak = 989e12 * device.efficiency.training
    assert device.gemm_rate(2896, 4096) == pytest.approx(0.76 * peak)
    assert device.attention_rate(4096, 32, causal=True, backward=False) == pytest.approx(0.41 * peak)
    assert device.attention_rate(4096, 8, causal=True, backward=False) == pytest.approx(0.26 * peak)
    # Full attention: per block of queries the work of a causal one of twice the length.
    assert device.attention_rate(2048, 32, causal=False, backward=False) == pytest.approx(0.41 * peak)


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(16, 1e5))
def test_more_rows_and_a_wider_inner_size_are_never_less_efficient(a: float, b: float, inner: float) -> None:
    device = load_device("a100")
    low, high = sorted((a, b))
    assert device.gemm_rate(low, inner) <= device.gemm_rate(high, inner) * (1 + 1e-12)
    assert device.gemm_rate(1024, low) <= device.gemm_rate(1024, high) * (1 + 1e-12)


@given(st.floats(1, 1e6), st.floats(0.125, 1e4), st.booleans(), st.booleans())
def test_attention_rates_are_positive_and_below_the_peak(length: float, heads: float, causal: bool, backward: bool) -> None:
    device = load_device("h200")
    rate = device.attention_rate(length, heads, causal=causal, backward=backward)
    assert 0 < rate <= device.peak_tflops * 1e12
