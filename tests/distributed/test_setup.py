"""Wrong set-ups end in one message on every rank; what the CPU module does to a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_dip.spec.workload import Parallel
from tests.distributed.dip_runs import build, even_cut
from tests.distributed.launcher import launch, launch_all
from tests.distributed.tiny_vlm import Case, tiny_model

pytestmark = pytest.mark.distributed


def set_up(rank: int, num_ranks: int, case: Case, device: str) -> None:
    from megatron_dip.models.vlm import VlmConfig
    from megatron_dip.trainer.build import initialize_parallel

    initialize_parallel(case.parallel, device=device, seed=1, timeout_s=60)
    build(case, VlmConfig(model=tiny_model(case), parallel=case.parallel))


@pytest.mark.parametrize(
    ("case", "device", "message"),
    [
        (Case(parallel=Parallel(pipeline=4)), "cpu", "[1, 4, 1]: needs 4 ranks, 2 were started"),
        (Case(parallel=Parallel(pipeline=2), num_layers=(3, 8), chunks=(2, 1)), "cpu", "chunks.vit = 2: 3 layers cannot fill 4 chunks"),
        (Case(parallel=Parallel(pipeline=2)), "cuda", "this machine has no CUDA device"),
        (Case(parallel=Parallel(pipeline=2)), "tpu", "--device = 'tpu': no such device"),
        (Case(parallel=Parallel(pipeline=1, context=2)), "cpu", "parallel.context = 2"),
    ],
)
def test_every_rank_says_what_is_wrong(case: Case, device: str, message: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    for result in launch_all(set_up, 2, case, device):
        assert result.error_message is not None
        assert result.error_message.startswith("InputError")
        assert message in result.error_message


def try_cpu_beside_cuda(rank: int, num_ranks: int) -> str:
    from megatron_dip.spec.errors import InputError
    from megatron_dip.without_cuda import core as cpu

    cuda: Any = torch.cuda
    cuda.is_available, cuda.device_count = lambda: True, lambda: 8
    try:
        cpu.enable_cpu()
    except InputError as error:
        return str(error)
    return "enabled"


def test_the_cpu_module_is_refused_where_cuda_is_present() -> None:
    assert "this machine has 8 CUDA device(s)" in launch(try_cpu_beside_cuda, 1)[0]


def enable(rank: int, num_ranks: int) -> dict[str, Any]:
    from megatron.core.pipeline_parallel import schedules

    from megatron_dip.without_cuda.core import CpuDeviceMode, enable_cpu

    enable_cpu()
    enable_cpu()
    torch.manual_seed(5)
    first = torch.rand(1)
    state = torch.cuda.get_rng_state()
    second = torch.rand(1)
    torch.cuda.set_rng_state(state)
    with CpuDeviceMode():
        inside = torch.zeros(2, device="cuda")
        kind = inside.type()
    return {
        "device": str(torch.cuda.current_device()), "again": torch.equal(second, torch.rand(1)), "moved": not torch.equal(first, second),
        "inside": str(inside.device), "kind": kind, "outside": inside.type(), "schedules": str(schedules.torch.zeros([], device="cuda").device),
    }


def test_the_cpu_module_answers_for_cuda() -> None:
    assert launch(enable, 1)[0] == {
        "device": "cpu", "again": True, "moved": True, "inside": "cpu", "kind": "torch.cuda.FloatTensor", "outside": "torch.FloatTensor",
        "schedules": "cpu",
    }


def test_partition_for_other_ranks_is_refused() -> None:
    case = Case(parallel=Parallel(pipeline=2))
    for result in launch_all(set_up_with_partition, 2, case, even_cut(Case(parallel=Parallel(pipeline=4)))):
        assert result.error_message is not None
        assert "has 4 entries for 2 pipeline ranks" in result.error_message


def set_up_with_partition(rank: int, num_ranks: int, case: Case, partition: Any) -> None:
    from megatron_dip.models.vlm import VlmConfig
    from megatron_dip.trainer.build import build_dip_model, initialize_parallel

    initialize_parallel(case.parallel, device="cpu", seed=1, timeout_s=60)
    build_dip_model(VlmConfig(model=tiny_model(case), parallel=case.parallel), partition)


def wait_for_another(rank: int, num_ranks: int, folder: str) -> bool:
    """Rank 1 does not come to Megatron's collective until rank 0 has given it up."""
    import datetime

    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_dip.trainer.build import initialize_parallel

    initialize_parallel(Parallel(pipeline=2), device="cpu", seed=1, timeout_s=3.0)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    if rank == 1:
        store.wait(["given up"], datetime.timedelta(seconds=45))  # Megatron's shortest limit in whole minutes is 60 s
        return True
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1), group=parallel_state.get_pipeline_model_parallel_group())
    store.set("given up", "1")
    return True


def test_time_limits_below_a_minute_hold_in_megatrons_groups(tmp_path: Path) -> None:
    assert launch(wait_for_another, 2, str(tmp_path)) == [True, True]
