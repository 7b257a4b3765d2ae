"""A toy model of several modules in plain torch, whole and cut into chunks, whose numbers can be compared exactly.

Every chunk is a linear layer with tanh (with two, so that split backward has something to pass through). An encoder chunk takes the
chunk's input; the backbone's first chunk adds the mean of every encoder output to its own input. Rows differ between microbatches and
sub-microbatches, so a message in a wrong shape or order is seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_dip.runtime.interface import ForwardOutput, PayloadSpec
from megatron_dip.spec.plan import Plan, PlanStage

WIDTH = 6
ChunkName = tuple[str, int, int]
"""module, vp_stage, rank"""


def rows(module: str, microbatch: int, sub_microbatch: int) -> int:
    return 1 + (sum(map(ord, module)) + 3 * microbatch + 2 * sub_microbatch) % 5


def data(module: str, microbatch: int, sub_microbatch: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, module)) * 10_007 + microbatch * 101 + sub_microbatch)
    return torch.randn(rows(module, microbatch, sub_microbatch), WIDTH, generator=generator)


def make_chunk(module: str, vp_stage: int, rank: int, num_ranks: int) -> torch.nn.Module:
    """The chunk's weights depend on its number in the module alone."""
    number = vp_stage * num_ranks + rank
    generator = torch.Generator().manual_seed(sum(map(ord, module)) * 997 + number)
    chunk = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return chunk


class ToyStagedModel:
    """One rank's chunks, as the executor takes them."""

    offload = None

    def __init__(self, plan: Plan, rank: int, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.chunk_keys = [(module, k) for module in plan.chunks for k in range(len(plan.chunks[module]))]
        self.chunks = {(module, k): make_chunk(module, k, rank, plan.ranks).to(self.device) for module, k in self.chunk_keys}
        self._last = {module: (len(table) - 1, plan.ranks - 1) for module, table in plan.chunks.items()}
        self._backbone = list(plan.chunks)[-1]

    def payload(self, producer: PlanStage, consumer: PlanStage) -> PayloadSpec:
        return PayloadSpec((rows(producer.module, producer.microbatch, producer.sub_microbatch), WIDTH), torch.float32)

    def forward(self, stage: PlanStage, inputs: Mapping[int, torch.Tensor], consumers: Sequence[PlanStage]) -> ForwardOutput:
        first = stage.vp_stage == 0 and stage.rank == 0
        if first:
            x = data(stage.module, stage.microbatch, stage.sub_microbatch).to(self.device)
            for producer in sorted(inputs):
                x = x + inputs[producer].mean(0)
        else:
            (x,) = inputs.values()
        y = self.chunks[stage.module, stage.vp_stage](x)
        return ForwardOutput({consumer.id: y for consumer in consumers}, result=None if consumers else y)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    return output.square().sum()


def whole_run(plan: Plan, *, frozen: Sequence[str] = ()) -> tuple[dict[int, float], dict[ChunkName, list[torch.Tensor]]]:
    """Losses by microbatch and gradients of all chunks, without a pipeline. ``frozen``: modules without gradients."""
    names = [(module, k, rank) for module, table in plan.chunks.items() for k in range(len(table)) for rank in range(plan.ranks)]
    chunks = {name: make_chunk(*name, plan.ranks) for name in names}
    parts = sorted({(s.microbatch, s.module, s.sub_microbatch) for s in plan.stages})
    backbone = list(plan.chunks)[-1]

    def run(module: str, x: torch.Tensor) -> torch.Tensor:
        for k in range(len(plan.chunks[module])):
            for rank in range(plan.ranks):
                x = chunks[module, k, rank](x)
        return x

    losses = {}
    for microbatch in sorted({part[0] for part in parts}):
        x = data(backbone, microbatch, 0)
        for _, module, sub in [part for part in parts if part[0] == microbatch and part[1] != backbone]:
            y = run(module, data(module, microbatch, sub))
            x = x + (y.detach() if module in frozen else y).mean(0)
        loss = loss_of(run(backbone, x))
        loss.backward()
        losses[microbatch] = float(loss.detach())
    return losses, {name: [torch.zeros_like(p) if p.grad is None else p.grad for p in chunk.parameters()] for name, chunk in chunks.items()}
