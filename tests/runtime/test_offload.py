"""Offloaded layers give the numbers of kept ones, and hold no more than they say: on the host, and on devices that run behind their hosts."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch

from megatron_dip.runtime.memory_meter import MemoryMeter
from megatron_dip.runtime.offload import ActivationOffload, HostPool, OffloadFigures, host_link_bytes_per_second
from tests.fakes.cuda import FakeCuda, Violation, current_device

CPU = torch.device("cpu")
WIDTH, ROWS = 8, 6
PLENTY = 1 << 30


class Layer(torch.nn.Module):
    """Saves views of one storage, a mask of its argument, its weights, a dropout mask and its input twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.outer = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        query, key, value = self.inner(self.norm(hidden)).split(WIDTH, dim=-1)
        scores = (query @ key.t() + mask).softmax(-1)
        return hidden + torch.nn.functional.dropout(self.outer(torch.tanh(scores @ value)), 0.3) + hidden.square()


def _model(num_layers: int) -> list[Layer]:
    torch.manual_seed(3)
    return [Layer() for _ in range(num_layers)]


def _forward(offload: ActivationOffload, stage: int, layers: Sequence[Layer], offloaded: Sequence[int], hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    offload.settle()
    with nullcontext() if offload.meter is None else offload.meter.watching(), offload.stage(stage, [hidden]):
        for index, layer in enumerate(layers):
            if index in offloaded:
                with offload.layer(layer, [mask]):
                    hidden = layer(hidden, mask)
            else:
                hidden = layer(hidden, mask)
    return hidden


def _backward(offload: ActivationOffload, stage: int, output: torch.Tensor) -> None:
    offload.settle(stage)
    output.sum().backward()
    offload.finish(stage)


def _run(offload: ActivationOffload, device: torch.device, order: Sequence[tuple[str, int]], offloaded: dict[int, Sequence[int]]) -> list[torch.Tensor]:
    """Forwards and backwards of stages through the same three layers; the gradients of inputs and weights."""
    layers = [layer.to(device) for layer in _model(3)]
    inputs, outputs = {}, {}
    mask = torch.zeros(ROWS, ROWS, device=device)
    for place, (kind, stage) in enumerate(order):
        if kind == "F":
            torch.manual_seed(stage)
            inputs[stage] = torch.randn(ROWS, WIDTH).to(device).requires_grad_()
            torch.manual_seed(100 + stage)  # of dropout
            outputs[stage] = _forward(offload, stage, layers, offloaded.get(stage, ()), inputs[stage], mask)
        else:
            _backward(offload, stage, outputs.pop(stage))
        if place + 2 < len(order) and order[place + 2][0] == "B" and order[place + 1] != ("F", order[place + 2][1]):
            # As the executor does, right before the action in between.
            offload.fetch_ahead(order[place + 2][1], order[place + 1][1] if order[place + 1][0] == "B" else None)
    offload.assert_empty()
    return [*(one.grad.cpu() for one in inputs.values()), *(p.grad.cpu() for layer in layers for p in layer.parameters() if p.grad is not None)]


ORDERS: list[list[tuple[str, int]]] = [
    [("F", 0), ("B", 0)],
    [("F", 0), ("F", 1), ("F", 2), ("B", 0), ("F", 3), ("B", 1), ("B", 2), ("B", 3)],
    [("F", 0), ("F", 1), ("B", 1), ("B", 0)],
]
CHOICES: list[dict[int, Sequence[int]]] = [
    dict.fromkeys(range(4), (0, 1, 2)),
    {0: (0, 1), 1: (2,), 2: (), 3: (1,)},
    {0: (2,), 1: (0, 1, 2), 3: (0, 2)},
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_are_those_of_kept_activations(order: list[tuple[str, int]], choice: dict[int, Sequence[int]]) -> None:
    expected = _run(ActivationOffload(CPU, PLENTY), CPU, order, {})
    offload = ActivationOffload(CPU, PLENTY)
    for ours, theirs in zip(_run(offload, CPU, order, choice), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert offload.figures.moved_bytes > 0


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_on_devices_that_run_behind_their_hosts(monkeypatch: pytest.MonkeyPatch, order: list[tuple[str, int]], choice: dict[int, Sequence[int]]) -> None:
    monkeypatch.setattr("megatron_dip.runtime.offload._LEAST_BYTES", 1)
    expected = _run(ActivationOffload(CPU, PLENTY), CPU, order, {})
    with FakeCuda(1) as cuda:

        def host(rank: int) -> tuple[list[torch.Tensor], int]:
            device = torch.device("cuda", rank)
            offload = ActivationOffload(device, PLENTY)
            found = _run(offload, device, order, choice)
            assert set(current_device().peak) == {0}  # all memory from the computing stream's pool
            return found, offload.figures.moved_bytes

        ((found, moved),) = cuda.run(host)
    assert moved > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_copies_that_nobody_waits_for_are_found_by_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_dip.runtime.offload._LEAST_BYTES", 1)
    monkeypatch.setattr("megatron_dip.runtime.offload._CopyStreams.wait", lambda self, event: None)
    with FakeCuda(1) as cuda, pytest.raises(Violation):
        cuda.run(lambda rank: _run(ActivationOffload(torch.device("cuda", rank), PLENTY), torch.device("cuda", rank), ORDERS[1], CHOICES[0]))


def test_a_graph_that_is_let_go_unused_gives_its_memory_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_dip.runtime.offload._LEAST_BYTES", 1)

    def host(rank: int) -> int:
        device = torch.device("cuda", rank)
        offload = ActivationOffload(device, PLENTY)
        layers, mask = [layer.to(device) for layer in _model(3)], torch.zeros(ROWS, ROWS, device=device)
        for ahead in (False, True):
            output = _forward(offload, 0, layers, (0, 1, 2), torch.randn(ROWS, WIDTH).to(device), mask)
            if ahead:
                offload.settle()
                offload.fetch_ahead(0, None)
            del output
            offload.forget()
            gc.collect()
        return offload._pool._in_use

    with FakeCuda(1) as cuda:
        assert cuda.run(host) == [0]


def test_the_link_is_measured_with_copies_both_ways_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_dip.runtime.offload._LINK_BYTES", 1 << 12)
    assert host_link_bytes_per_second(CPU) > 0

    def host(rank: int) -> set[int]:
        assert host_link_bytes_per_second(torch.device("cuda", rank)) > 0
        return {entry.stream for entry in current_device().entries if "copy_" in entry.name}

    with FakeCuda(1) as cuda:
        (streams,) = cuda.run(host)
    assert len(streams) == 2


def test_memory_falls_to_what_is_not_moved_and_comes_back_layer_by_layer() -> None:
    meter = MemoryMeter()
    offload = ActivationOffload(CPU, PLENTY, meter)
    layers, mask = _model(3), torch.zeros(ROWS, ROWS)
    meter.leave_out([mask, *(p for layer in layers for p in layer.parameters())])
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    kept = _forward(offload, 0, layers, (), hidden, mask)
    all_kept = meter.live_bytes
    _backward(offload, 0, kept)
    del kept
    assert meter.live_bytes <= hidden.untyped_storage().nbytes()
    meter.begin()
    moved = _forward(offload, 1, layers, (0, 1, 2), hidden, mask)
    assert meter.peak_bytes < 0.75 * all_kept  # two layers at most, and the input
    offload.settle()
    assert meter.live_bytes < 0.05 * all_kept + hidden.untyped_storage().nbytes()
    meter.begin()
    _backward(offload, 1, moved)
    assert meter.peak_bytes < 0.85 * all_kept
    assert offload.figures.late_fetches == 1
    del moved
    assert meter.live_bytes <= hidden.untyped_storage().nbytes()


def test_what_is_on_its_way_out_goes_before_anything_is_fetched() -> None:
    meter = MemoryMeter()
    offload = ActivationOffload(CPU, PLENTY, meter)
    layers, mask = _model(1), torch.zeros(ROWS, ROWS)
    meter.leave_out([mask, *layers[0].parameters()])
    inputs = [torch.randn(ROWS, WIDTH, requires_grad=True) for _ in range(2)]
    first, second = (_forward(offload, stage, layers, (0,), inputs[stage], mask) for stage in range(2))
    with_one_layer = meter.live_bytes
    meter.begin()
    offload.fetch_ahead(0, None)
    assert meter.peak_bytes == meter.live_bytes == with_one_layer
    _backward(offload, 0, first)
    # What is needed next of all stays where it is.
    moved = _forward(offload, 2, layers, (0,), inputs[0], mask)
    meter.begin()
    offload.fetch_ahead(2, None)
    assert meter.peak_bytes == meter.live_bytes
    _backward(offload, 2, moved)
    _backward(offload, 1, second)
    offload.assert_empty()


def test_each_storage_is_copied_once_and_weights_never() -> None:
    offload = ActivationOffload(CPU, PLENTY)
    layer, mask = _model(1)[0], torch.zeros(ROWS, ROWS)
    hidden = torch.randn(ROWS, WIDTH)
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(hidden, mask)
    own = {tensor.untyped_storage().data_ptr() for tensor in (hidden, mask, *layer.parameters())}
    _forward(offload, 0, [layer], (0,), hidden, mask)
    assert offload.figures.moved_bytes == sum(size for address, size in sizes.items() if address not in own)
    del output


def test_what_finds_no_room_on_the_host_stays(caplog: pytest.LogCaptureFixture) -> None:
    expected = _run(ActivationOffload(CPU, PLENTY), CPU, ORDERS[1], {})
    offload = ActivationOffload(CPU, 2048)
    for ours, theirs in zip(_run(offload, CPU, ORDERS[1], CHOICES[0]), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert offload.figures.kept_bytes > 0
    assert offload.figures.host_bytes <= 2048
    assert len([record for record in caplog.records if "--dip-host-memory" in record.message]) == 1


def test_buffers_are_used_again() -> None:
    figures = OffloadFigures()
    pool = HostPool(CPU, 4096, figures)
    first, second = pool.take(2000), pool.take(1000)
    assert first is not None
    assert second is not None
    pool.give_back(first)
    again = pool.take(600)  # a new buffer of its size still has room
    larger = pool.take(1200)
    assert again is not None
    assert larger is first
    assert pool.take(700) is None
    pool.give_back(larger)
    assert pool.take(700) is first  # a larger one, before none
    assert figures.host_bytes == 4096
    assert figures.most_in_use == 4096
