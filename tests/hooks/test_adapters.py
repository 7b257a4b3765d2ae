"""Chunks of the models that Megatron-LM's scripts build give the losses and gradients of the whole model.

Needs an installed megatron-core and no checkout: the providers here do what pretrain_vlm.py and pretrain_gpt.py do.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_dip.hooks.arguments import add_dip_args
from megatron_dip.spec.codec import load_plan, load_timeline
from megatron_dip.spec.errors import InputError
from tests.distributed.launcher import launch, launch_all

pytestmark = pytest.mark.distributed

IMAGE, TEXT_LENGTH, VOCABULARY = -200, 12, 64
SPECIAL = {"images": 60, "scans": 61}
"""Token of each modality of a MimoModel."""
MIMO_LENGTH = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    model: str
    """Vision model type of a LLaVAModel, or "gpt", or "mimo"."""
    flags: tuple[str, ...] = ()
    images: tuple[int, ...] = (2, 0, 3, 1)
    """Of each microbatch, spread over its sequences."""
    sequences: int = 1
    vision_layers: int = 4
    """Of a LLaVAModel's vision model."""
    drop_class_token: bool = False
    pixel_shuffle: bool = False
    tags: bool = False
    frozen: tuple[str, ...] = ()
    adapters: tuple[int, ...] = ()
    """Layers of the language model that get an adapter once they are built."""
    frozen_names: str = ""
    """Regular expression: weights that are frozen once the chunks are built."""
    strategy: str | None = None
    """Memory strategy of every layer that has it."""
    experts: int | None = None
    expert_layers: tuple[int, ...] = ()
    """Of a language model that lists its layers in its spec: 1 for a layer of experts, 0 for a dense one; () = all of experts."""
    tied: bool = False
    documents: bool = False
    """Whether sequences hold two documents that do not see each other."""
    blind_rank: int | None = None
    """A pipeline rank whose data loader gives no attention mask."""
    tensor: int = 1
    """Tensor-parallel ranks, above 1 with sequence parallelism of the language model."""
    context: int = 1
    """Context-parallel ranks."""
    lists_all: bool | None = None
    """Whether the provider lists all layers or those it is asked for; None: as LLaVAModels and GPTModels need it."""

    @property
    def whole(self) -> dict[str, Any]:
        """How the configs of vision model and projector say the parallel sizes."""
        return {"tensor_model_parallel_size": self.tensor}

    @property
    def divided(self) -> dict[str, Any]:
        """How the language model's config says them."""
        return {**self.whole, "sequence_parallel": self.tensor > 1, "context_parallel_size": self.context}

    @property
    def mixture(self) -> dict[str, Any]:
        """How the language model's config says its experts."""
        if self.experts is None:
            return {}
        return {
            "num_moe_experts": self.experts, "moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "aux_loss", "add_bias_linear": False,
            "moe_layer_freq": list(self.expert_layers) or 1,
        }

    @property
    def shards(self) -> int:
        """Ranks that hold one chunk together."""
        return self.tensor * self.context


def config_of(layers: int, ranks: int, **others: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=layers, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0, attention_dropout=0.0,
        pipeline_model_parallel_size=ranks, pipeline_dtype=torch.float32, **others,
    )


def provide_llava(case: Case, ranks: int, pre_process: bool = True, post_process: bool = True, language_model_type: str = "") -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.multimodal.llava_spec import decoder_model_with_local_default_spec
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec

    from megatron_dip.models.layers import projector_spec
    from tests.distributed.context_attention import LAYER

    language, vision = config_of(4, ranks, **case.divided, **case.mixture), config_of(case.vision_layers, 1, **case.whole)
    language.language_model_type, vision.vision_model_type = language_model_type, case.model
    projection = deepcopy(language)
    projection.pipeline_model_parallel_size = projection.context_parallel_size = 1
    projection.sequence_parallel = False
    spec: Any = decoder_model_with_local_default_spec(None, False) if case.shards == 1 else LAYER
    if case.expert_layers:
        spec = get_gpt_decoder_block_spec(language if case.lists_all is False else config_of(4, 1, **case.mixture), use_transformer_engine=False)
    model = LLaVAModel(
        language_transformer_config=language, language_transformer_layer_spec=spec, language_vocab_size=VOCABULARY,
        language_max_sequence_length=64, vision_transformer_config=vision, vision_transformer_layer_spec=get_vit_layer_with_local_spec(),
        drop_vision_class_token=case.drop_class_token, vision_projection_config=projection,
        vision_projection_layer_spec=projector_spec(), img_h=28, img_w=28, patch_dim=14,
        language_position_embedding_type="rope", pixel_shuffle=case.pixel_shuffle, image_token_index=IMAGE,
        tile_tags=[[1, 2, 3, 4, tag] for tag in range(5, 9)] if case.tags else None, tokenizer_type="qwen2p5" if case.tags else "",
        max_num_tiles=3 if case.tags else 0, share_embeddings_and_output_weights=case.tied,
        # A stock script builds the vision model on the first pipeline rank alone.
        add_encoder=pre_process and post_process, pre_process=pre_process, post_process=post_process,
    )
    model.freeze(
        freeze_language_model="language" in case.frozen, freeze_vision_model="vision" in case.frozen,
        freeze_vision_projection="projection" in case.frozen,
    )
    return model


def provide_gpt(
    case: Case, ranks: int, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None, config: Any = None,
) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec

    from tests.distributed.context_attention import LAYER, gathering

    config = config or config_of(8, ranks, **case.divided, **case.mixture)
    spec = get_gpt_layer_local_spec() if case.shards == 1 else LAYER
    if case.experts is not None:
        listed, stage = (config_of(8, 1, **case.mixture), None) if case.lists_all else (config, vp_stage)
        spec = get_gpt_decoder_block_spec(listed, use_transformer_engine=False, vp_stage=stage)
        if case.shards > 1:
            spec.layer_specs = [gathering(layer) for layer in spec.layer_specs]
    return GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=VOCABULARY, max_sequence_length=TEXT_LENGTH, pre_process=pre_process,
        post_process=post_process, share_embeddings_and_output_weights=False, position_embedding_type="rope", vp_stage=vp_stage,
    )


def provide_mimo(case: Case, ranks: int, pre_process: bool = True, post_process: bool = True) -> Any:
    """As the providers of examples/mimo: parts by specs. Modality ``scans`` has an encoder and no projection."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.mimo import MimoModel, MimoModelConfig
    from megatron.core.models.mimo.submodules.vision import VisionModalitySubmodules
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.multimodal_projector import MultimodalProjector
    from megatron.core.models.vision.vit_layer_specs import get_vit_layer_with_local_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_dip.models.layers import projector_spec
    from tests.distributed.context_attention import LAYER

    def encoder(layers: int, hidden_size: int, **arguments: Any) -> ModuleSpec:
        config = replace(config_of(layers, 1, **case.whole), hidden_size=hidden_size, ffn_hidden_size=2 * hidden_size)
        return ModuleSpec(module=CLIPViTModel, params={
            "transformer_config": config, "transformer_layer_spec": get_vit_layer_with_local_spec(), "patch_dim": 14, "img_h": 28, "img_w": 28,
            **arguments,
        })

    language = config_of(4, ranks, **case.divided)
    projection = ModuleSpec(module=MultimodalProjector, params={
        "config": config_of(1, 1, **case.whole), "submodules": projector_spec(), "projector_type": "mlp", "input_size": 16,
    })
    specs = {
        "images": ModuleSpec(module=VisionModalitySubmodules, params={}, submodules={
            "encoders": {"clip": encoder(4, 16)}, "input_projections": [projection],
        }),
        "scans": ModuleSpec(module=VisionModalitySubmodules, submodules={
            "encoders": {"siglip": encoder(2, 32, model_subtype="siglip", class_token_len=0, add_class_token=False)},
        }),
    }
    model = MimoModel(MimoModelConfig(
        language_model_spec=ModuleSpec(module=GPTModel, params={
            "config": language, "transformer_layer_spec": get_gpt_layer_local_spec() if case.shards == 1 else LAYER, "vocab_size": VOCABULARY,
            "max_sequence_length": MIMO_LENGTH, "pre_process": pre_process, "post_process": post_process, "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": case.tied, "scatter_embedding_sequence_parallel": False,
        }),
        modality_submodules_spec=specs, special_token_ids=SPECIAL,
    ))
    frozen = {"vision": model.modality_submodules["images"].encoders["clip"], "language": model.language_model}
    for name in case.frozen:
        frozen[name].requires_grad_(False)
    return model


def mimo_batches(case: Case) -> list[dict[str, Any]]:
    """``images`` as the case says, and one ``scan`` in every second microbatch; 5 and 4 tokens each."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for index, count in enumerate(case.images):
        tokens = torch.randint(9, 60, (case.sequences, MIMO_LENGTH), generator=generator)
        for image in range(count):
            tokens[image % case.sequences, 2 + 6 * (image // case.sequences) :][:5] = SPECIAL["images"]
        inputs: dict[str, Any] = {"images": {"clip": {"x": torch.rand(count, 3, 28, 28, generator=generator)}} if count else None}
        if index % 2:
            tokens[0, 32:36] = SPECIAL["scans"]
            inputs["scans"] = {"siglip": {"x": torch.rand(1, 3, 28, 28, generator=generator)}}
        result.append({
            "input_ids": tokens, "position_ids": torch.arange(MIMO_LENGTH).expand(case.sequences, -1), "labels": tokens.roll(-1, 1),
            "loss_mask": torch.ones(tokens.shape), "modality_inputs": inputs, "attention_mask": None,
        })
    return result


def forward_step_mimo(data_iterator: Iterator[Any], model: Callable[..., Any]) -> tuple[Any, Any]:
    output, mask = model(**next(data_iterator))
    return output, partial(loss_function, mask)


def batches(case: Case) -> list[dict[str, Any]]:
    if case.model == "mimo":
        return mimo_batches(case)
    generator = torch.Generator().manual_seed(1)
    result = []
    for count in case.images:
        tokens = torch.randint(9, VOCABULARY, (case.sequences, TEXT_LENGTH), generator=generator)
        tiles = torch.ones(count, dtype=torch.int)
        if case.model != "gpt":
            if case.tags:
                tokens[0, 3] = IMAGE  # one image of ``count`` tiles
                tiles = torch.tensor([count], dtype=torch.int)
            else:
                for image in range(count):
                    tokens[image % case.sequences, 2 + 3 * (image // case.sequences)] = IMAGE
        result.append({
            "tokens": tokens, "labels": tokens.roll(-1, 1).clamp(min=0), "loss_mask": torch.ones(tokens.shape), "tiles": tiles,
            "position_ids": torch.arange(TEXT_LENGTH).expand(case.sequences, -1), "mask": mask_of(case),
            "images": torch.rand(count, 3, 28, 28, generator=generator),
        })
    return result


def loss_function(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    loss = (losses * mask).sum() / mask.sum()
    return loss, {"loss": loss.item()}


def forward_step_llava(data_iterator: Iterator[Any], model: Callable[..., Any]) -> tuple[Any, Any]:
    batch = next(data_iterator)
    output, mask = model(
        batch["images"], batch["tokens"], batch["position_ids"], None, batch["labels"], batch["loss_mask"], num_image_tiles=batch["tiles"]
    )
    return output, partial(loss_function, mask)


def forward_step_gpt(data_iterator: Iterator[Any], model: Callable[..., Any]) -> tuple[Any, Any]:
    batch = next(data_iterator)
    return model(batch["tokens"], batch["position_ids"], batch["mask"], labels=batch["labels"]), partial(loss_function, batch["loss_mask"])


MODELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "gpt": (provide_gpt, forward_step_gpt), "mimo": (provide_mimo, forward_step_mimo),
}


def mask_of(case: Case) -> torch.Tensor:
    """[1, 1, S, S], True where nobody looks; block-diagonal for documents."""
    mask = torch.ones(TEXT_LENGTH, TEXT_LENGTH, dtype=torch.bool).triu_(1)
    if case.documents:
        mask[TEXT_LENGTH // 2 :, : TEXT_LENGTH // 2] = True
    return mask[None, None]


def whole_names(chunk: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters by their names in the whole model."""
    names = {}
    for name, parameter in chunk.named_parameters():
        part, found, rest = f".{name}".partition(".decoder.layers.")
        if found:
            index, _, tail = rest.partition(".")
            layer = chunk.get_submodule(f"{part}.decoder".lstrip(".")).layers[int(index)]
            name = f"{part}.decoder.layers.{layer.layer_number - 1}.{tail}".lstrip(".")
        names[name] = parameter
    return names


def shards_of(models: list[Any]) -> set[Any]:
    """What models put into a torch_dist checkpoint: key, shape of the whole tensor, place of the part."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    tensors = [value for model in models for value in nested_values(model.sharded_state_dict()) if isinstance(value, ShardedTensor)]
    return {(tensor.key, tuple(tensor.global_shape), tuple(tensor.global_offset)) for tensor in tensors}


Outcome = tuple[list[float], list[float], dict[str, Any], dict[str, Any], Any, Any, Any]


def run_cases(rank: int, ranks: int, cases: list[Case]) -> list[Outcome]:
    tensor, context = cases[0].tensor, cases[0].context
    assert all((case.tensor, case.context) == (tensor, context) for case in cases), "the cases of a launch share their ranks"
    stages = ranks // (tensor * context)
    prepare(tensor, stages, context)
    from megatron_dip.without_cuda.core import CpuDeviceMode

    with CpuDeviceMode():  # without a mask, as the scripts run them, local layers make one on "cuda"
        return [run_case(rank, stages, case) for case in cases]


def prepare(tensor: int, stages: int, context: int) -> None:
    """This process as one of tensor x context x stages ranks on the CPU."""
    from megatron_dip.without_cuda.scripts import mend_without_transformer_engine, prepare_imports

    prepare_imports()
    from megatron.core import parallel_state

    from megatron_dip.without_cuda.core import enable_cpu
    from tests.distributed.context_attention import let_llava_take_it

    enable_cpu()
    mend_without_transformer_engine()
    parallel_state.initialize_model_parallel(tensor, stages, context_parallel_size=context)
    let_llava_take_it()


def run_case(rank: int, ranks: int, case: Case) -> Outcome:
    """Losses and gradients of the whole model and of this rank's chunks."""
    from megatron.core import tensor_parallel
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import _allreduce_word_embedding_grads
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.utils import get_model_config

    from megatron_dip.hooks.build import build_chunks
    from megatron_dip.hooks.megatron_lm import dip_schedule

    torch.manual_seed(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    provide, forward_step = MODELS.get(case.model, (provide_llava, forward_step_llava))
    items = batches(case)

    whole = provide(case, 1)
    change_built([whole], case)
    whole.train(case.model != "radio")  # in training RADIO draws a random crop of its position embeddings for every call
    expected = []
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor([case.context / len(items)]))
    for item in items:
        output, loss = forward_step(iter([item]), whole)
        value, report = loss(output)
        expected.append(report["loss"])
        if value.requires_grad:  # not for text alone before a frozen language model
            (value * case.context / len(items)).backward()

    parser = argparse.ArgumentParser()
    args = add_dip_args(parser).parse_args(["--dip-evaluations", "5", "--dip-device", "cpu", "--dip-partition", "even", *case.flags])
    for name, value in {
        "tensor_model_parallel_size": case.tensor, "pipeline_model_parallel_size": ranks, "data_parallel_size": 1,
        "context_parallel_size": case.context, "sequence_parallel": case.tensor > 1, "bf16": False, "fp16": False, "use_distributed_optimizer": False,
    }.items():
        setattr(args, name, value)
    chunks = build_chunks(args, partial(provide, case, ranks))
    change_built(chunks, case)
    for chunk in chunks:
        chunk.train(whole.training)
        # What Megatron reads of a rank's first chunk, whichever module it is of: here the sum of norms' gradients over tensor ranks.
        assert chunk.config.sequence_parallel == whole.config.sequence_parallel
        assert chunk.config.num_moe_experts == whole.config.num_moe_experts
    wanted = whole_names(whole)
    mine = {
        # A tied head on another rank than the embedding holds a copy of its weight.
        name if name in wanted else name.replace("output_layer", "embedding.word_embeddings"): parameter
        for chunk in chunks for name, parameter in whole_names(chunk).items()
    }
    with torch.no_grad():
        for name, parameter in mine.items():
            assert parameter.requires_grad == wanted[name].requires_grad, name
            parameter.copy_(wanted[name])

    def stock(**arguments: Any) -> None:
        raise AssertionError("the stock schedule was chosen for a model that DIP has cut")

    if rank == case.blind_rank:
        items = [{**item, "mask": None} for item in items]
    with everything_under(case.strategy) if case.strategy else contextlib.nullcontext():
        reports = dip_schedule(stock)(
            forward_step_func=forward_step, data_iterator=iter(items), model=chunks, num_microbatches=len(items), seq_length=TEXT_LENGTH,
            micro_batch_size=case.sequences, forward_only=False,
        )
    if case.tied:
        for chunk in chunks:
            chunk.ddp_config = DistributedDataParallelConfig()
        _allreduce_word_embedding_grads(chunks, get_model_config(chunks[0]))
    gradients = {name: plain(parameter.grad) for name, parameter in mine.items() if parameter.requires_grad}
    wholes = {name: plain(wanted[name].grad) for name in gradients}
    everything = sorted(wanted) if rank == 0 else None
    saves = case.model != "mimo" or "sharded_state_dict" in vars(type(whole))  # of MimoModel since 0.18
    shards: tuple[set[Any], set[Any]] = (shards_of(chunks), shards_of([whole])) if saves and not case.adapters else (set(), set())
    for chunk in [] if saves else chunks:
        with pytest.raises(InputError, match=r"--ckpt-format = 'torch_dist': this release .*Remedy: use Megatron-LM 0"):
            chunk.sharded_state_dict()
    return expected, [report["loss"] for report in reports], gradients, wholes, everything, *shards


class Adapter(torch.nn.Module):
    """A linear layer of Megatron's with a low-rank product beside it."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base
        rows, columns = base.weight.shape  # type: ignore[misc]
        self.down = torch.nn.Parameter(torch.randn(2, columns) * 0.1)
        self.up = torch.nn.Parameter(torch.randn(rows, 2) * 0.1)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        output, bias = self.base(hidden)
        return output + hidden @ self.down.t() @ self.up.t(), bias


def change_built(models: list[Any], case: Case) -> None:
    """What scripts do to models that were built: adapters, weights frozen by name."""
    for model in models:
        language = model if case.model == "gpt" else model.language_model
        for layer in [] if language is None else language.decoder.layers:
            if layer.layer_number - 1 in case.adapters:
                layer.mlp.linear_fc2 = Adapter(layer.mlp.linear_fc2)
        for name, parameter in whole_names(model).items():
            if case.frozen_names and re.search(case.frozen_names, name):
                parameter.requires_grad_(False)


@contextlib.contextmanager
def everything_under(strategy: str) -> Iterator[None]:
    """Plans under which every layer that has a backward uses one memory strategy."""
    from megatron_dip.hooks import megatron_lm

    original = megatron_lm.plan_columns
    megatron_lm.plan_columns = lambda *args, **kwargs: original(*args[:-1], replace(args[-1], strategy=strategy), **kwargs)
    try:
        yield
    finally:
        megatron_lm.plan_columns = original


def plain(gradient: torch.Tensor | None) -> np.ndarray | None:
    """As an array: newer releases pickle tensors so that the reader must import Megatron-Core."""
    return None if gradient is None else gradient.numpy().copy()


def check(cases: list[Case], ranks: int) -> None:
    by_rank = launch(run_cases, ranks * cases[0].shards, cases, timeout_s=240)
    for index, case in enumerate(cases):
        check_case(case, [outcomes[index] for outcomes in by_rank])


def check_case(case: Case, results: list[Outcome], tolerance: float = 1e-5) -> None:
    """Args:
    tolerance: of gradients, as a share of the largest one of a weight.
    """
    for expected, losses, *_ in results[-case.shards :]:
        np.testing.assert_allclose(losses, expected, rtol=1e-6, err_msg=str(case))
    names: list[str] = []
    for rank, (_, _, gradients, wholes, *_) in enumerate(results):
        for name, gradient in gradients.items():
            if rank % case.shards == 0:
                names.append(name)
            whole = wholes[name]
            if gradient is None or whole is None:  # no gradient is as good as none of any size
                assert gradient is None or not gradient.any(), (case, name)
                assert whole is None or not whole.any(), (case, name)
            else:
                np.testing.assert_allclose(gradient, whole, rtol=0, atol=tolerance * max(1e-3, np.abs(whole).max()), err_msg=f"{case} {name}")
    saved: set[Any] = set().union(*(result[5] for result in results))
    assert saved == set().union(*(result[6] for result in results)), (case, "the chunks' checkpoint is not the whole model's")
    assert case.tied or len(set(names)) == len(names), (case, "a weight lies in two chunks")
    if not (case.frozen or case.frozen_names):
        assert sorted(set(names)) == results[0][4], (case, "weights of the whole model are missing from the chunks")


def test_a_vision_model_of_fewer_layers_than_ranks() -> None:
    check([Case(model="clip", vision_layers=2), Case(model="siglip", vision_layers=1, frozen=("vision",))], 4)


LLAVA = [
    Case(model="clip", flags=("--dip-chunks", "vit=2", "lm=2", "--dip-sub-microbatch-size", "vit=1")),
    Case(model="clip", drop_class_token=True, sequences=2, images=(3, 4, 0), flags=("--dip-sub-microbatch-size", "vit=2")),
    Case(model="siglip", flags=("--dip-chunks", "vit=2")),
    Case(model="internvit", drop_class_token=True, pixel_shuffle=True, flags=("--dip-chunks", "lm=2")),
    Case(model="radio", drop_class_token=True, flags=("--dip-chunks", "vit=2", "--dip-sub-microbatch-size", "vit=2")),
    Case(model="internvit300M", drop_class_token=True, tags=True, images=(1, 3, 2)),
    Case(model="clip", frozen=("vision",)),
    Case(model="clip", frozen=("language",), flags=("--dip-chunks", "vit=2", "lm=2")),
    Case(model="clip", frozen=("vision", "projection")),
    Case(model="clip", images=(0, 0, 0)),
]


def test_llava_chunks_equal_the_whole_model() -> None:
    check(LLAVA, 1)


def test_llava_chunks_over_two_ranks() -> None:
    check([LLAVA[0], LLAVA[4], LLAVA[6], replace(LLAVA[0], tied=True)], 2)


GPT = Case(model="gpt", sequences=2, flags=("--dip-chunks", "lm=2"))


def test_gpt_chunks_equal_the_whole_model(tmp_path: Path) -> None:
    check([replace(GPT, flags=(*GPT.flags, "--dip-trace-dir", str(tmp_path / "traces"), "--dip-log-interval", "1"))], 1)
    plan = load_plan(tmp_path / "traces/iteration_000001_plan.json")
    measured = load_timeline(tmp_path / "traces/iteration_000001_measured.json")
    assert len(measured.bars) == len(plan.stages)
    assert measured.bars[0].start == 0


def test_gpt_and_mixture_of_experts_over_two_ranks() -> None:
    check([GPT, replace(GPT, experts=4)], 2)


MIXED_GPT = Case(model="gpt", sequences=2, experts=4, expert_layers=(0, 1, 0, 0, 1, 1, 0, 1), flags=("--dip-chunks", "lm=2"))
MIXED_LLAVA = Case(model="clip", experts=4, expert_layers=(1, 0, 0, 1), flags=("--dip-chunks", "lm=2", "vit=2"))


def test_layers_that_differ_are_cut_with_their_own_specs() -> None:
    """Dense layers and layers of experts in turns: a spec that lists every layer is cut with the layers."""
    check([MIXED_GPT, MIXED_LLAVA, replace(MIXED_LLAVA, expert_layers=(0, 1, 1, 0), flags=())], 1)


def test_layers_that_differ_over_two_ranks() -> None:
    check([MIXED_GPT, replace(MIXED_GPT, flags=("--dip-chunks", "lm=3"), lists_all=True), MIXED_LLAVA], 2)


def test_a_spec_of_one_ranks_layers_is_refused() -> None:
    for result in launch_all(run_cases, 2, [replace(MIXED_LLAVA, lists_all=False, flags=())], timeout_s=120):
        assert "transformer_layer_spec = 2: lists other than the model's 4 layers" in str(result.error_message)
        assert "Remedy: give the spec of the whole model" in str(result.error_message)


def test_documents_that_do_not_see_each_other() -> None:
    """Block-diagonal masks reach all layers; a plain causal one is what layers without a mask do."""
    check([replace(GPT, documents=True), replace(GPT, blind_rank=1)], 2)


def test_a_mask_that_only_some_ranks_have_is_refused() -> None:
    results = launch_all(run_cases, 2, [replace(GPT, documents=True, blind_rank=1)], timeout_s=120)
    assert len(results) == 2
    for result in results:
        assert "forward_step" in str(result.error_message)
        assert "masks or bounds of packed sequences on some pipeline ranks only" in str(result.error_message)


def test_llava_under_sequence_parallelism() -> None:
    """TP 2 x P 2; merged sequences of other lengths in each microbatch, all of them even."""
    check([
        Case(model="clip", tensor=2, images=(2, 0, 4, 2), flags=("--dip-chunks", "vit=2", "--dip-sub-microbatch-size", "vit=1")),
        Case(model="clip", tensor=2, drop_class_token=True, sequences=2, images=(4, 8, 0)),
    ], 2)


def test_llava_under_context_parallelism() -> None:
    """CP 2 x P 2: as the scripts pad them, sequences of 12, 16 and 20 tokens."""
    check([
        Case(model="clip", context=2, images=(1, 0, 2, 1), flags=("--dip-chunks", "vit=2", "lm=2")),
        Case(model="clip", context=2, images=(1, 0, 2), frozen=("vision",)),
    ], 2)


def describe_ahead(rank: int, ranks: int) -> tuple[Any, Any, str]:
    """What is known of a batch of pretrain_vlm.py before forward_step pads it, and then; and what is said of one that was not padded."""
    prepare(1, 1, ranks)
    from megatron_dip.models.llava import LlavaDescription
    from megatron_dip.models.provided import sketch_model

    description = LlavaDescription(sketch_model(partial(provide_llava, Case(model="clip", context=ranks), 1)))  # type: ignore[arg-type]
    tokens = torch.full((1, TEXT_LENGTH), 9)
    tokens[0, 4] = IMAGE
    images = torch.zeros(1, 3, 28, 28)
    with pytest.raises(InputError) as error:
        description.metadata({"input_ids": tokens[:, :11], "images": images})
    ahead = description.item_metadata({"tokens": tokens[:, :11], "image": images})
    return ahead, description.metadata({"input_ids": tokens, "images": images}), str(error.value)


def test_sequences_that_do_not_divide_are_refused_and_foreseen_padded() -> None:
    for ahead, padded, message in launch(describe_ahead, 2):
        assert ahead == padded == {"lm": [16], "vit": [5]}
        assert "forward_step: input_ids = 15" in message
        assert "pad to a multiple of 4" in message


def describe_gpt(rank: int, ranks: int) -> tuple[Any, ...]:
    """What is known of a batch of pretrain_gpt.py before every rank takes its part of it, and then; whether this rank's rows of a causal
    mask say more than no mask does, and those of a mask with documents."""
    prepare(1, 1, ranks)
    from megatron_dip.models.gpt import GptDescription
    from megatron_dip.models.provided import sketch_model
    from tests.distributed.context_attention import on_this_rank

    provider = partial(provide_gpt, Case(model="gpt", context=2), 1)
    description = GptDescription(sketch_model(provider), provider, {})  # type: ignore[arg-type]
    lengths = description.item_metadata({"tokens": torch.zeros(3, 12)}), description.metadata({"input_ids": torch.zeros(3, 6)})
    masks = [mask_of(replace(GPT, documents=documents)) for documents in (False, True)]
    return *lengths, *(description.conditions(on_this_rank({"attention_mask": mask})) for mask in masks)


def test_gpt_sequences_and_masks_are_known_by_the_whole() -> None:
    assert launch(describe_gpt, 2) == [({"lm": [12] * 3}, {"lm": [12] * 3}, [], ["attention_mask"])] * 2


MIMO = Case(model="mimo", flags=("--dip-chunks", "images=2", "lm=2", "--dip-sub-microbatch-size", "images=1"))


def test_mimo_chunks_equal_the_whole_model() -> None:
    check([MIMO, Case(model="mimo", frozen=("vision",), sequences=2), replace(MIMO, frozen=("language",)), replace(MIMO, images=(0, 0))], 1)


def test_mimo_chunks_over_two_ranks() -> None:
    flags = ("--dip-chunks", "images=2", "lm=2", "scans=1")
    check([replace(MIMO, flags=flags), replace(MIMO, flags=flags, tied=True)], 2)


@pytest.mark.parametrize(("parallel", "message"), [
    ({"context": 2}, "--context-parallel-size = 2: this release's MimoModel gives every rank whole sequences"),
    ({"tensor": 2}, "--sequence-parallel = True: this release's MimoModel does not divide its sequences over tensor-parallel ranks"),
])
def test_mimo_under_context_and_sequence_parallelism(parallel: dict[str, int], message: str) -> None:
    """P 2, and CP 2 or TP 2, where the release can: context parallelism from 0.17, sequence parallelism from 0.19. Others are refused."""
    case = replace(MIMO, **parallel)
    for minor, refusal in launch(describe_mimo, 2, case):
        if minor >= (17 if case.context > 1 else 19):
            assert refusal is None
        else:
            assert message in refusal
            assert "Remedy: use Megatron-LM 0.1" in refusal
    if refusal is None:
        check([case, replace(case, tied=True, flags=())], 2)


def describe_mimo(rank: int, ranks: int, case: Case) -> tuple[int, str | None]:
    """The release of Megatron-Core, and why it is refused."""
    prepare(case.tensor, 1, case.context)
    from megatron.core.package_info import MINOR

    from megatron_dip.models.mimo import MimoDescription
    from megatron_dip.models.provided import sketch_model

    try:
        MimoDescription(sketch_model(partial(provide_mimo, case, 1)))  # type: ignore[arg-type]
    except InputError as error:
        return MINOR, str(error)
    return MINOR, None


@pytest.mark.parametrize(("change", "message"), [
    ("two", r"modality_submodules_spec\['scans'\] = .*one encoder and nothing behind the language model"),
    ("language", r"language_model_spec = 'Linear': DIP can cut language models that are a GPTModel"),
    ("grid", r"MimoModelConfig\.module_to_grid_map = \['images'\]: DIP lays all modules out over the same ranks"),
    ("load", r"model_provider = 'a checkpoint of one part': is loaded while the model is described.*--load"),
])
def test_what_mimo_models_cannot_have_is_refused_with_a_remedy(change: str, message: str) -> None:
    from megatron.core.models.mimo import MimoModel
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_dip.models.mimo import MimoDescription
    from megatron_dip.models.provided import sketch_model

    def provider(pre_process: bool, post_process: bool) -> Any:
        model = provide_mimo(MIMO, 1)
        if change == "load":
            model.language_model.load_state_dict({})
        config = model.mimo_config
        if change == "grid":
            config.module_to_grid_map = {"images": None}
            return model
        scans = config.modality_submodules_spec["scans"].submodules["encoders"]
        other = ModuleSpec(module=torch.nn.Linear, params={"in_features": 1, "out_features": 1, "config": config.language_model_spec.params["config"]})
        if change == "language":
            config.language_model_spec = other
        else:
            scans["second"] = other
        return MimoModel(config)

    with pytest.raises(InputError, match=message) as error:
        MimoDescription(sketch_model(provider))  # type: ignore[arg-type]
    assert error.value.remedy


def refused(rank: int, ranks: int) -> dict[str, str]:
    """What is said of models and inputs that cannot be cut, of which scripts and not flags decide."""
    prepare(1, 1, 1)
    from megatron.core.models.vision.clip_vit_model import CLIPViTModel
    from megatron.core.models.vision.radio import RADIOViTModel

    from megatron_dip.models.gpt import GptDescription
    from megatron_dip.models.llava import LlavaDescription
    from megatron_dip.models.parts import VisionTower
    from megatron_dip.models.provided import Sketch, call_provider, sketch_model

    case = Case(model="clip")
    llava = LlavaDescription(sketch_model(partial(provide_llava, case, 1)))  # type: ignore[arg-type]

    def hybrid(pre_process: bool, post_process: bool) -> Any:
        return call_provider(lambda pre_process, post_process: provide_llava(case, 1, language_model_type="nemotron5-hybrid"))

    def multi_token() -> None:
        sketch = sketch_model(partial(provide_gpt, replace(GPT, sequences=1), 1))
        sketch.sketch.arguments["mtp_block_spec"] = object()  # type: ignore[union-attr, operator, index]
        GptDescription(sketch, lambda: sketch, {})  # type: ignore[arg-type]

    tokens, images = torch.full((1, TEXT_LENGTH), 9), torch.zeros(2, 3, 28, 28)
    attempts: dict[str, Callable[[], Any]] = {
        "state-space": lambda: sketch_model(hybrid),
        "multi-token": multi_token,
        "images that differ": lambda: VisionTower(Sketch(RADIOViTModel, {"transformer_config": config_of(4, 1), "dynamic_resolution": True})),
        "divided vision": lambda: VisionTower(Sketch(CLIPViTModel, {
            "transformer_config": config_of(4, 1, tensor_model_parallel_size=2, sequence_parallel=True),
        })),
        "inference": lambda: llava.bind((images, tokens, None, None), {"inference_context": 1}),
        "images without tokens": lambda: llava.metadata({"input_ids": tokens, "images": images}),
        "unknown items": lambda: llava.item_metadata({"text": tokens}),
    }
    messages = {}
    for name, attempt in attempts.items():
        with pytest.raises(InputError) as error:
            attempt()
        messages[name] = str(error.value)
    return messages


def test_models_and_inputs_that_cannot_be_cut_are_refused() -> None:
    (messages,) = launch(refused, 1)
    for name, part in {
        "state-space": "DIP cannot cut state-space and hybrid language models. Remedy: use --pipeline-schedule default",
        "multi-token": "--mtp-num-layers = None: multi-token prediction layers cannot be cut yet",
        "images that differ": "--dynamic-resolution = True: images of different sizes cannot be divided yet",
        "divided vision": "CLIPViTModel takes whole images on every rank. Remedy: set sequence_parallel=False",
        "inference": "forward_step: model(inference_context=...) = 'int': DIP cannot cut this input",
        "images without tokens": "forward_step: images = [2, 0]: tiles and image tokens of a microbatch do not match",
        "unknown items": "data_iterator = 'dict': items of this form are not known before forward_step reads them",
    }.items():
        assert part in messages[name], messages


def test_other_models_are_refused() -> None:
    from megatron.core.models.T5 import T5Model

    from megatron_dip.models.provided import sketch_model

    with pytest.raises(InputError, match=r"T5Model.*DIP can cut LLaVAModel, MimoModel, GPTModel, .*--pipeline-schedule default"):
        sketch_model(lambda pre_process, post_process: T5Model.__new__(T5Model))
