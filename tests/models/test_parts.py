"""What is read off a microbatch's tensors: right, and with as few waits for the device as can be."""

from __future__ import annotations

import pytest
import torch
from megatron.core import parallel_state

from megatron_dip.models import parts
from megatron_dip.models.parts import _is_causal, to_host
from tests.fakes.cuda import FakeCuda


def _naive_is_causal(mask: torch.Tensor, ranks: int, rank: int) -> bool:
    """Entry by entry, for the rows that context-parallel rank ``rank`` holds."""
    length = mask.shape[-1]
    half = length // (2 * ranks)
    rows = [*range(rank * half, (rank + 1) * half), *range((2 * ranks - 1 - rank) * half, (2 * ranks - rank) * half)] if ranks > 1 else range(length)
    return all(
        bool(mask[b, 0, place, column]) == (column > row)
        for b in range(mask.shape[0]) for place, row in enumerate(rows) for column in range(length)
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_causal_masks_are_known(ranks: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    monkeypatch.setattr(parts, "_BLOCK", 3)
    for rank in range(ranks):
        monkeypatch.setattr(parallel_state, "get_context_parallel_world_size", lambda: ranks)
        monkeypatch.setattr(parallel_state, "get_context_parallel_rank", lambda rank=rank: rank)
        whole = torch.ones(2, 1, 8, 8, dtype=torch.bool).triu_(1)
        pieces = whole.view(2, 1, 2 * ranks, 8 // (2 * ranks), 8)
        mask = whole if ranks == 1 else torch.cat([pieces[:, :, rank], pieces[:, :, 2 * ranks - 1 - rank]], dim=2)
        assert _is_causal(mask)
        assert _naive_is_causal(mask, ranks, rank)
        place = tuple(int(torch.randint(size, (1,), generator=generator)) for size in mask.shape)
        mask = mask.clone()
        mask[place] = ~mask[place]
        assert not _is_causal(mask)
        assert not _naive_is_causal(mask, ranks, rank)
    assert not _is_causal(torch.zeros(3, 3, dtype=torch.bool))


def test_a_mask_on_a_device_costs_one_wait_and_little_memory() -> None:
    with FakeCuda(1) as cuda, cuda.on(0) as device:
        mask = torch.ones(1, 1, 1024, 1024, dtype=torch.bool).triu_(1).to(device.name)
        device.sweep()
        device.peak[0] = before = device.allocated[0]
        syncs = device.host_syncs
        assert _is_causal(mask)
        assert device.host_syncs == syncs + 1
        assert device.peak[0] - before < mask.nbytes


def test_integers_come_to_the_host_in_one_copy() -> None:
    with FakeCuda(1) as cuda, cuda.on(0) as device:
        there = [torch.tensor([[1, 2], [3, 4]], dtype=torch.int32).to(device.name), torch.tensor([True, False]).to(device.name)]
        syncs = device.host_syncs
        here = to_host(*there)
        assert device.host_syncs == syncs + 1
        assert not any(one.is_cuda for one in here)
        assert [one.tolist() for one in here] == [[1, 2, 3, 4], [1, 0]]
        assert [one.tolist() for one in to_host(there[0], torch.tensor([7]))] == [[1, 2, 3, 4], [7]]
