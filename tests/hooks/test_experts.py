"""A mixture of experts that is spread over replicas gives what it gives in one process, though every replica has images of its own.

One process computes losses and gradients for the batches of both replicas; then experts lie on two replicas, which exchange tokens in
every layer, forward and backward: different orders of stages would end in a hang or in garbage.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.hooks.arguments import add_dip_args
from megatron_dip.spec.errors import InputError
from tests.distributed.launcher import launch
from tests.hooks.test_adapters import IMAGE, VOCABULARY, Case, batches, config_of, forward_step_llava, plain, whole_names

pytestmark = pytest.mark.distributed

EXPERTS = 4
REPLICAS = (
    Case(model="clip", images=(2, 0, 3, 1), flags=("--dip-chunks", "vit=2", "lm=2", "--dip-sub-microbatch-size", "vit=1")),
    Case(model="clip", images=(0, 1, 0, 4)),
)


def provide(
    ranks: int, expert_ranks: int, pre_process: bool = True, post_process: bool = True, *, frozen: bool = False, dispatcher: str = "alltoall"
) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec

    from megatron_dip.models.layers import projector_spec

    language = config_of(
        4, ranks, num_moe_experts=EXPERTS, moe_token_dispatcher_type=dispatcher, moe_aux_loss_coeff=0.01, moe_router_topk=2,
        moe_router_load_balancing_type="aux_loss", expert_model_parallel_size=expert_ranks, add_bias_linear=False,
    )
    vision = config_of(4, 1)
    vision.vision_model_type = "clip"
    model = LLaVAModel(
        language_transformer_config=language, language_transformer_layer_spec=get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False),
        language_vocab_size=VOCABULARY, language_max_sequence_length=64, vision_transformer_config=vision,
        vision_transformer_layer_spec=get_vit_layer_with_local_spec(), drop_vision_class_token=False, vision_projection_config=config_of(1, 1),
        vision_projection_layer_spec=projector_spec(), img_h=28, img_w=28, patch_dim=14, language_position_embedding_type="rope",
        image_token_index=IMAGE, add_encoder=pre_process and post_process, pre_process=pre_process, post_process=post_process,
    )
    model.freeze(freeze_language_model=frozen, freeze_vision_model=False, freeze_vision_projection=False)
    return model


def prepare(ranks: int, expert_ranks: int) -> None:
    from megatron_dip.without_cuda.scripts import _answer_for_cuda, mend_without_transformer_engine, prepare_imports

    prepare_imports()
    from megatron.core import parallel_state, tensor_parallel

    from megatron_dip.without_cuda.core import CpuDeviceMode, enable_cpu

    enable_cpu()
    _answer_for_cuda()  # the experts' dispatcher asks for streams
    mend_without_transformer_engine()
    parallel_state.initialize_model_parallel(1, ranks, expert_model_parallel_size=expert_ranks)
    CpuDeviceMode().__enter__()
    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)


Tensors = dict[str, Any]


def in_one_process(rank: int, ranks: int) -> tuple[Tensors, list[tuple[list[float], Tensors]]]:
    """Weights; for each replica's batch losses and gradients."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    prepare(1, 1)
    model = provide(1, 1)
    parameters = whole_names(model)
    outcomes = []
    for case in REPLICAS:
        items, losses = batches(case), []
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([1 / len(items)]))
        model.zero_grad()
        for item in items:
            output, loss = forward_step_llava(iter([item]), model)
            value, report = loss(output)
            losses.append(report["loss"])
            (value / len(items)).backward()
        outcomes.append((losses, {name: plain(parameter.grad) for name, parameter in parameters.items()}))
    return {name: plain(parameter.detach()) for name, parameter in parameters.items()}, outcomes


def spread(rank: int, world: int, ranks: int, weights: Tensors) -> tuple[int, list[float], Tensors]:
    """This rank's replica, its losses, and gradients by the names of the whole model."""
    from megatron.core import parallel_state

    from megatron_dip.hooks.build import build_chunks
    from megatron_dip.hooks.megatron_lm import dip_schedule

    prepare(ranks, 2)
    replica = parallel_state.get_data_parallel_rank()
    chunks = build_chunks(arguments_of_two_replicas(ranks), partial(provide, ranks, 2))
    first_expert = parallel_state.get_expert_model_parallel_rank() * EXPERTS // 2
    mine = {whole_name(name, first_expert): parameter for chunk in chunks for name, parameter in whole_names(chunk).items()}
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(torch.from_numpy(weights[name]))
    items = batches(REPLICAS[replica])
    reports = dip_schedule(lambda **arguments: pytest.fail("not DIP"))(
        forward_step_func=forward_step_llava, data_iterator=iter(items), model=chunks, num_microbatches=len(items), seq_length=12,
        micro_batch_size=1, forward_only=False,
    )
    return replica, [report["loss"] for report in reports], {name: plain(parameter.grad) for name, parameter in mine.items()}


def arguments_of_two_replicas(ranks: int) -> argparse.Namespace:
    args = add_dip_args(argparse.ArgumentParser()).parse_args(["--dip-evaluations", "5", "--dip-device", "cpu", "--dip-partition", "even", *REPLICAS[0].flags])
    for name, value in {
        "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": ranks, "data_parallel_size": 2, "context_parallel_size": 1,
        "sequence_parallel": False, "bf16": False, "fp16": False, "use_distributed_optimizer": False,
    }.items():
        setattr(args, name, value)
    return args


def whole_name(name: str, first_expert: int) -> str:
    before, found, after = name.partition(".local_experts.")
    if not found:
        return name
    index, _, rest = after.partition(".")
    return f"{before}{found}{int(index) + first_expert}.{rest}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_on_two_replicas_with_other_images(ranks: int) -> None:
    (weights, expected), = launch(in_one_process, 1)
    for replica, losses, gradients in launch(spread, 2 * ranks, ranks, weights, timeout_s=120):
        if losses:
            np.testing.assert_allclose(losses, expected[replica][0], rtol=1e-6)
        for name, gradient in gradients.items():
            of_replicas = [outcome[1][name] for outcome in expected]
            # An expert's gradient is the sum over the tokens of both replicas.
            wanted = sum(part for part in of_replicas if part is not None) if ".local_experts." in name else of_replicas[replica]
            np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-5 * max(1e-3, np.abs(wanted).max()), err_msg=name)


def refused(rank: int, world: int) -> list[str]:
    """What is said of models whose replicas would not exchange tokens alike."""
    prepare(1, 2)
    from megatron_dip.hooks.build import build_chunks

    messages = []
    for changes in ({"frozen": True}, {"dispatcher": "allgather"}):
        with pytest.raises(InputError) as error:
            build_chunks(arguments_of_two_replicas(1), partial(provide, 1, 2, **changes))  # type: ignore[arg-type]
        messages.append(str(error.value))
    return messages


def test_replicas_that_would_not_exchange_tokens_alike_are_refused() -> None:
    for frozen, allgather in launch(refused, 2):
        assert "--expert-model-parallel-size = 2: with a frozen language model only replicas with images run its backward" in frozen
        assert "Remedy: use --expert-model-parallel-size 1" in frozen
        assert "--moe-token-dispatcher-type = 'allgather': takes equal numbers of tokens on all replicas" in allgather
        assert "Remedy: use --moe-token-dispatcher-type alltoall" in allgather
