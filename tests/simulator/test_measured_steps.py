"""Files of measured steps: validated as workloads are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from megatron_dip.cost.device import load_device
from megatron_dip.simulator.measured_steps import load_measured_steps, predict_step
from megatron_dip.spec.errors import InputError

KORTHIKANTI = Path(__file__).parents[2] / "docs" / "results" / "measured" / "korthikanti_2022.json"


def changed(tmp_path: Path, **fields: Any) -> Path:
    raw = msgspec.json.decode(KORTHIKANTI.read_bytes())
    for field, value in fields.items():
        if value is None:
            raw["steps"][1].pop(field)
        else:
            raw["steps"][1][field] = value
    path = tmp_path / "steps.json"
    path.write_bytes(msgspec.json.encode(raw))
    return path


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"parallel": {"pipeline": 1 << 40}}, "parallel.pipeline"), ({"num_microbatches": 10**12}, "num_microbatches"), ({"microbatch": {"lm": [-1]}}, "microbatches"),
     ({"microbatch": {"lm": [4_600_000_000_000_000_000]}}, "microbatches"), ({"microbatch": {"lm": []}}, "microbatches"), ({"measured_s": 0}, "measured_s"),
     ({"measured_s": 1e300}, "measured_s"), ({"speed": 3}, "speed")],
)
def test_a_step_that_nobody_can_have_run_is_named(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=rf"steps.*{named}"):
        load_measured_steps(changed(tmp_path, **fields))


def test_selective_recompute_under_fused_attention_is_simulated(tmp_path: Path) -> None:
    found = load_measured_steps(changed(tmp_path, kernels=None))
    step = found.steps[1]
    assert step.training.recompute == "selective"
    assert predict_step(step, load_device(found.device)).iteration_time_s > 0
