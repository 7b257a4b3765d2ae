"""GPTModel under context parallelism: DIP on P 2 x CP 2 gives the losses and gradients of the stock schedule there, and of one process.

Both multi-rank runs go through Megatron's DistributedDataParallel and finalize_model_grads, so that scaling and reduction over
context-parallel ranks are part of what is compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.hooks.arguments import add_dip_args
from tests.distributed.launcher import launch
from tests.hooks.test_adapters import TEXT_LENGTH, Case, batches, plain, provide_gpt, whole_names

pytestmark = pytest.mark.distributed

STAGES, CONTEXT = 2, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    counted: bool = False
    """Whether the loss function also returns its number of tokens, as pretrain_gpt.py's does."""
    per_token: bool = False
    """--calculate-per-token-loss; ranks then have other numbers of tokens that count."""
    documents: bool = False
    """Whether sequences hold two documents that do not see each other."""
    experts: int | None = None

    def case(self, context: int) -> Case:
        return Case(
            model="gpt", sequences=2, documents=self.documents, experts=self.experts, context=context, flags=("--dip-chunks", "lm=2"),
        )

    def items(self) -> list[dict[str, Any]]:
        items = batches(self.case(1))
        generator = torch.Generator().manual_seed(2)
        for item in items if self.per_token else []:
            item["loss_mask"] = (torch.rand(item["tokens"].shape, generator=generator) < 0.6).float()
        return items


KINDS = (Kind(), Kind(counted=True, documents=True), Kind(counted=True, per_token=True), Kind(counted=True, experts=4))


def loss_function(kind: Kind, mask: torch.Tensor, losses: torch.Tensor) -> tuple[Any, ...]:
    from megatron.core import parallel_state

    total, tokens = (losses * mask).sum(), mask.sum()
    report = {"loss": torch.stack([total, tokens]).detach().numpy()}
    if kind.counted:
        return total, tokens.int(), report
    of_sequences = tokens.clone()  # such functions average over whole sequences: Megatron scales by CP what it averages over ranks later
    torch.distributed.all_reduce(of_sequences, group=parallel_state.get_context_parallel_group())
    return total / of_sequences, report


def forward_step(kind: Kind, data_iterator: Iterator[Any], model: Callable[..., Any]) -> tuple[Any, Any]:
    """As pretrain_gpt.py: every rank reads whole sequences and gives the model its part."""
    from tests.distributed.context_attention import on_this_rank

    item = next(data_iterator)
    names = {"tokens": "tokens", "labels": "labels", "loss_mask": "loss_mask", "position_ids": "position_ids", "attention_mask": "mask"}
    batch = on_this_rank({name: item[source] for name, source in names.items()})
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, partial(loss_function, kind, batch["loss_mask"])


Tensors = dict[str, Any]
Outcome = tuple[list[Any], Tensors]


def prepare(stages: int, context: int) -> None:
    from megatron_dip.without_cuda.scripts import _answer_for_cuda, mend_without_transformer_engine, prepare_imports

    prepare_imports()
    from megatron.core import parallel_state, tensor_parallel

    from megatron_dip.without_cuda.core import CpuDeviceMode, enable_cpu

    enable_cpu()
    _answer_for_cuda()  # the experts' dispatcher asks for streams
    mend_without_transformer_engine()
    parallel_state.initialize_model_parallel(1, stages, context_parallel_size=context)
    CpuDeviceMode().__enter__()
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def run(kind: Kind, chunks: list[Any], schedule: Callable[..., Any], weights: Tensors | None) -> Outcome:
    """Reports, and reduced gradients by the names of the whole model."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.utils import get_model_config

    items = kind.items()
    parameters = {name: parameter for chunk in chunks for name, parameter in whole_names(chunk).items()}
    if weights is not None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.from_numpy(weights[name]))
    for chunk in chunks:
        chunk.config.calculate_per_token_loss = kind.per_token
        chunk.config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    assert get_model_config(wrapped[0]) is chunks[0].config
    reports = schedule(
        forward_step_func=partial(forward_step, kind), data_iterator=iter(items), model=wrapped, num_microbatches=len(items),
        seq_length=TEXT_LENGTH, micro_batch_size=2, forward_only=False,
    )
    return [report["loss"] for report in reports], {name: plain(parameter.main_grad) for name, parameter in parameters.items()}


def in_one_process(rank: int, ranks: int) -> list[tuple[Tensors, Outcome]]:
    prepare(1, 1)
    from megatron.core.pipeline_parallel import schedules

    outcomes = []
    for kind in KINDS:
        model = provide_gpt(kind.case(1), 1)
        weights = {name: plain(parameter.detach()) for name, parameter in whole_names(model).items()}
        outcomes.append((weights, run(kind, [model], schedules.forward_backward_no_pipelining, None)))
    return outcomes


def divided(rank: int, ranks: int, weights: list[Tensors]) -> list[tuple[Outcome, Outcome]]:
    """Under the stock schedule, and under DIP."""
    prepare(STAGES, CONTEXT)
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import schedules

    from megatron_dip.hooks.build import build_chunks
    from megatron_dip.hooks.megatron_lm import dip_schedule

    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    outcomes = []
    for kind, of_kind in zip(KINDS, weights, strict=True):
        case = kind.case(CONTEXT)
        stock = run(
            kind, [provide_gpt(case, STAGES, pre_process=first, post_process=last)], schedules.forward_backward_pipelining_without_interleaving, of_kind
        )
        args = add_dip_args(argparse.ArgumentParser()).parse_args(["--dip-evaluations", "5", "--dip-device", "cpu", "--dip-partition", "even", *case.flags])
        for name, value in {
            "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": STAGES, "data_parallel_size": 1, "context_parallel_size": CONTEXT,
            "sequence_parallel": False, "bf16": False, "fp16": False, "use_distributed_optimizer": False,
        }.items():
            setattr(args, name, value)
        chunks = build_chunks(args, partial(provide_gpt, case, STAGES))
        outcomes.append((stock, run(kind, chunks, dip_schedule(lambda **arguments: pytest.fail("not DIP")), of_kind)))
    return outcomes


def test_context_parallel_gpt_equals_stock_and_one_process() -> None:
    (alone,) = launch(in_one_process, 1)
    by_rank = launch(divided, STAGES * CONTEXT, [weights for weights, _ in alone], timeout_s=120)
    for index, (kind, (_, (expected, gradients))) in enumerate(zip(KINDS, alone, strict=True)):
        of_kind = [outcomes[index] for outcomes in by_rank]
        reports = []
        for (stock_reports, stock_gradients), (dip_reports, dip_gradients) in of_kind:
            np.testing.assert_allclose(dip_reports, stock_reports, rtol=1e-6, err_msg=str(kind))
            assert dip_reports or not reports
            reports += [dip_reports] if dip_reports else []
            assert_equal(kind, dip_gradients, gradients)
            assert_equal(kind, stock_gradients, gradients)
        # Sums and numbers of tokens of the context-parallel ranks add up to those of whole sequences.
        assert len(reports) == CONTEXT
        np.testing.assert_allclose(np.sum(reports, axis=0), expected, rtol=1e-6, err_msg=str(kind))


def assert_equal(kind: Kind, mine: Tensors, wanted: Tensors) -> None:
    for name, gradient in mine.items():
        tolerance = 1e-5 * max(1e-3, np.abs(wanted[name]).max())
        np.testing.assert_allclose(gradient, wanted[name], rtol=0, atol=tolerance, err_msg=f"{kind} {name}")
