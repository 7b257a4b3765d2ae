"""The fit finds what made the measurements, moves little on little evidence, and reports what it did not see."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.calibration import calibrate, summarise, with_efficiencies
from megatron_dip.cost.collectives import Group
from megatron_dip.cost.coverage import outside_profile
from megatron_dip.cost.device import DeviceDescription, load_device
from megatron_dip.cost.operators import LatencyRules
from megatron_dip.cost.step import gradient_seconds, optimizer_graph, optimizer_seconds, parameter_seconds
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.named import named_model
from megatron_dip.spec.profile import ModuleProfile, ProfileGrid, ProfilePoint
from megatron_dip.spec.workload import Parallel, Training
from tests.strategies import profile, vlm_case

SHAPES = [("lm", 1024), ("lm", 8192), ("vit", 2704), ("vit", 676), ("lm", 512), ("vit", 5408)]


def predict(device: DeviceDescription) -> list[float]:
    costs = AnalyticCost(named_model("vlm-s"), Parallel(tensor=2, pipeline=2), Training(), device)
    return [costs.part(module, "layer", [length]).forward_ns / 1e9 for module, length in SHAPES]


def test_it_recovers_the_efficiencies_behind_synthetic_measurements() -> None:
    start = load_device("a100")
    truth = with_efficiencies(start, {"training": 0.8, "memory": 0.7})
    found = calibrate(start, predict, predict(truth), [True] * 4 + [False] * 2, widths={"training": 10.0, "memory": 10.0})
    assert found.values["training"][1] == pytest.approx(0.8, rel=0.01)
    assert found.values["memory"][1] == pytest.approx(0.7, rel=0.03)
    assert found.held_out_after.worst < 0.01 < found.held_out_before.worst
    assert (found.fitted_after.count, found.held_out_after.count) == (4, 2)
    assert start.efficiency.training == 0.888, "the given device is not changed"


def test_one_measurement_does_not_move_a_well_known_parameter_far() -> None:
    start = load_device("a100")
    measured = [2.0 * value for value in predict(start)]
    found = calibrate(start, predict, measured, [True] + [False] * 5, ["training"], widths={"training": 0.003})
    assert abs(found.values["training"][1] / start.efficiency.training - 1) < 0.02
    assert found.fitted_after.worst < found.fitted_before.worst


def test_bad_input_is_refused() -> None:
    device = load_device("a100")
    with pytest.raises(InputError, match="is no parameter"):
        calibrate(device, predict, [1.0] * 6, [True] * 6, ["peak_tflops"])
    with pytest.raises(InputError, match="is no time"):
        calibrate(device, predict, [1.0, -1.0] + [1.0] * 4, [True] * 6)
    with pytest.raises(InputError, match="none of them may be fitted"):
        calibrate(device, predict, [1.0] * 6, [False] * 6)


def test_errors_are_relative() -> None:
    found = summarise(np.array([1.1, 0.8]))
    assert (found.count, round(found.mean, 6), round(found.worst, 6)) == (2, 0.15, 0.2)
    assert summarise([]).count == 0


def test_the_optimizers_passes() -> None:
    device, rules = load_device("a100"), LatencyRules()
    shared = optimizer_graph(8e9, Training(), 8)
    assert sum(operator.memory_bytes for operator in shared.operators) == pytest.approx(46 * 1e9 + 4 * 8e9)
    assert next(operator.name for operator in optimizer_graph(1.0, Training(dtype="fp16"), 1).operators) == "optimizer.unscale"
    alone = optimizer_seconds(8e9, Training(distributed_optimizer=False), 8, device, rules)
    assert alone == pytest.approx(50 * 8e9 / device.memory_rate(), rel=1e-3)
    assert optimizer_seconds(8e9, Training(), 8, device, rules) < alone
    assert optimizer_seconds(0.0, Training(), 8, device, rules) == 0.0


def test_gradients_and_parameters_travel() -> None:
    device, group = load_device("a100"), Group(8, 8)
    split, whole = Training(), Training(distributed_optimizer=False)
    assert gradient_seconds(1e9, whole, group, device) == pytest.approx(2 * gradient_seconds(1e9, split, group, device), rel=0.01)
    assert parameter_seconds(1e9, split, group, device) == pytest.approx(gradient_seconds(1e9, split, group, device) / 2, rel=0.01)
    assert parameter_seconds(1e9, whole, group, device) == 0.0


def test_what_a_profile_did_not_measure_is_said() -> None:
    case = vlm_case()
    assert outside_profile(case.profile, [{"vit": [1], "lm": [10]}]) == []
    found = outside_profile(case.profile, [{"vit": [1, 1, 1], "lm": [40]}])
    assert len(found) == 2
    assert "profile.modules.vit.layer: 3 instances in a stage lie 3 times above" in found[0]
    assert "40 tokens in an instance lie 4 times above the measured range 10 to 10" in found[1]
    assert outside_profile(case.profile, [{"vit": [1, 1, 1], "lm": [10]}], {"vit": 1, "lm": 1}) == []


def test_a_stage_below_the_measured_range_is_told_too() -> None:
    point = {"forward_ns": 1.0, "backward_input_ns": 1.0, "backward_weight_ns": 1.0, "activation_bytes": 0.0, "boundary_bytes": 0.0}
    layer = ProfileGrid(points=[ProfilePoint(instances=count, tokens=10 * count, **point) for count in (4, 8)])
    measured = profile({"vit": ModuleProfile(num_layers=2, layer=layer)})
    found = outside_profile(measured, [{"vit": [10] * 6}, {"vit": [10] * 9}], {"vit": 8})
    # Nine images run as five and four: all within.
    assert found == []
    found = outside_profile(measured, [{"vit": [10] * 2}, {"vit": [10] * 9}], {"vit": 8})
    assert [sentence.split(";")[0] for sentence in found] == [
        "profile.modules.vit.layer: 2 instances in a stage lie 2 times below the measured range 4 to 8"
    ]
