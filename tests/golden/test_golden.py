"""Files of the first versions of the formats stay readable, and mean what they meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from megatron_dip.cli.main import main
from megatron_dip.schedule.checker import check_plan
from megatron_dip.spec.codec import encode, load_partition, load_plan, load_workload

HERE = Path(__file__).parent


@pytest.mark.parametrize(("name", "load"), [("workload", load_workload), ("partition", load_partition), ("plan", load_plan)])
def test_a_golden_file_reads_and_writes_back_byte_for_byte(name: str, load: Callable[[Path], msgspec.Struct]) -> None:
    path = HERE / f"{name}.json"
    assert encode(load(path)) == path.read_bytes()


def test_the_golden_plan_holds_for_its_workload_and_partition() -> None:
    workload, partition, plan = load_workload(HERE / "workload.json"), load_partition(HERE / "partition.json"), load_plan(HERE / "plan.json")
    partition.validate({module.name: module.num_layers for module in workload.model_spec.modules}, workload.parallel.pipeline)
    assert plan.chunks == partition.chunks
    assert check_plan(plan, workload.microbatches).makespan == plan.claimed_makespan


def test_the_golden_workload_can_be_planned_with_the_golden_partition(tmp_path: Path) -> None:
    arguments = [str(HERE / "workload.json"), "--partition", str(HERE / "partition.json"), "--output", str(tmp_path / "plan.json")]
    assert main(["plan", *arguments, "--evaluations", "10", "--no-baselines"]) == 0
    assert load_plan(tmp_path / "plan.json").chunks == load_partition(HERE / "partition.json").chunks
