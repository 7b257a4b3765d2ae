"""Models that scripts compose of a tower for packed patches and a GPTModel give the losses and gradients of one process over two ranks.

Megatron-LM's examples/multimodal_dev and Megatron-Bridge want another Python and Transformer Engine; here are classes of their form: the same
attributes, arguments and order of steps, of Megatron-Core's GPTModel and a tiny random tower of transformers (Bridge's is one too).
"""

from __future__ import annotations

import types
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import MegatronModule

from megatron_dip.spec.errors import InputError
from tests.distributed.launcher import launch
from tests.hooks import test_adapters as adapters
from tests.hooks.test_adapters import Case, Outcome, config_of

pytestmark = pytest.mark.distributed

IMAGE, LENGTH, VOCABULARY = 3, 40, 64
GRIDS = ((1, 4, 4), (2, 2, 4), (1, 2, 6), (1, 6, 2))
"""Frames, rows and columns of images and a clip, one after another: 4, 4, 3 and 3 tokens."""


def vision_tower() -> torch.nn.Module:
    from megatron_dip.without_cuda.scripts import prepare_imports

    prepare_imports()
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig

    return Qwen2_5_VisionTransformerPretrainedModel._from_config(Qwen2_5_VLVisionConfig(  # type: ignore[no-any-return]
        depth=2, hidden_size=32, num_heads=2, intermediate_size=40, out_hidden_size=32, patch_size=4, window_size=16, fullatt_block_indexes=[1],
        spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
    ))


def language_model(case: Case, config: Any, pre_process: bool, post_process: bool) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from tests.distributed.context_attention import LAYER

    return GPTModel(
        config=config, transformer_layer_spec=get_gpt_layer_local_spec() if case.shards == 1 else LAYER, vocab_size=VOCABULARY,
        max_sequence_length=LENGTH, pre_process=pre_process, post_process=post_process, share_embeddings_and_output_weights=case.tied,
        position_embedding_type="mrope", scatter_embedding_sequence_parallel=False,
    )


class Wrapped(torch.nn.Module):
    """A tower that gives a tensor, as that of multimodal_dev."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = vision_tower()
        self.spatial_merge_size = 2

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        return self.inner(pixel_values, grid_thw=grid_thw).pooler_output  # type: ignore[no-any-return]


class DevModel(MegatronModule):
    """The form of multimodal_dev's MultimodalModel."""

    def __init__(self, case: Case, config: Any) -> None:
        super().__init__(config=config)
        self.image_token_id = IMAGE
        self.vision_model = Wrapped()
        self.language_model = language_model(case, config, True, True)

    def compute_position_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        sequences, length = input_ids.shape
        before = (input_ids == self.image_token_id).cumsum(1)
        return torch.stack([torch.arange(length).expand(sequences, -1), before, before % 3])

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, attention_mask: Any = None, labels: Any = None, loss_mask: Any = None,
        pixel_values: Any = None, image_grid_thw: Any = None, decoder_input: Any = None, packed_seq_params: Any = None, **kwargs: Any,
    ) -> torch.Tensor:
        if position_ids is None:
            position_ids = self.compute_position_ids(input_ids)
        embeddings = None
        if self.vision_model is not None and pixel_values is not None:
            embeddings = self.vision_model(pixel_values, image_grid_thw)
        if decoder_input is None and self.language_model is not None:
            decoder_input = self.language_model.embedding(input_ids=input_ids, position_ids=None)
            if embeddings is not None:
                together = decoder_input.transpose(0, 1).contiguous()
                mask = (input_ids == self.image_token_id).unsqueeze(-1).expand_as(together)
                decoder_input = together.masked_scatter(mask, embeddings).transpose(0, 1).contiguous()
            if self.config.sequence_parallel:
                from megatron.core import tensor_parallel

                decoder_input = tensor_parallel.scatter_to_sequence_parallel_region(decoder_input)
        return self.language_model(  # type: ignore[no-any-return]
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, decoder_input=decoder_input, labels=labels,
            loss_mask=loss_mask, packed_seq_params=packed_seq_params,
        )


def get_image_features(self: Any, pixel_values: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
    """A function of transformers that is bound to the model."""
    output = self.visual(pixel_values.type(self.visual.dtype), grid_thw=grid)
    sizes = (grid.prod(-1) // self.visual.spatial_merge_size**2).tolist()
    return list(torch.split(getattr(output, "pooler_output", output), sizes))


class BridgeModel(MegatronModule):
    """The form of Megatron-Bridge's Qwen25VLModel."""

    def __init__(self, case: Case, config: Any, pre_process: bool = True, post_process: bool = True) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process = pre_process, post_process
        if pre_process:
            self.visual = vision_tower()
        self.language_model = language_model(case, config, pre_process, post_process)
        self.share_embeddings_and_output_weights = case.tied
        self.shared_embedding_or_output_weight = self.language_model.shared_embedding_or_output_weight
        self.get_image_features = types.MethodType(get_image_features, self)

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.language_model.set_input_tensor(input_tensor)

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, inputs_embeds: Any = None, pixel_values: Any = None,
        pixel_values_videos: Any = None, image_grid_thw: Any = None, labels: Any = None, packed_seq_params: Any = None, *, loss_mask: Any = None,
    ) -> torch.Tensor:
        if self.pre_process:
            inputs_embeds = self.language_model.embedding(input_ids=input_ids, position_ids=None).transpose(1, 0).contiguous()
            if pixel_values is not None:
                features = torch.cat(self.get_image_features(pixel_values, image_grid_thw), dim=0)
                mask = (input_ids == IMAGE).unsqueeze(-1).expand_as(inputs_embeds)
                inputs_embeds = inputs_embeds.masked_scatter(mask, features)
            inputs_embeds = inputs_embeds.transpose(1, 0)
        position_ids = torch.arange(input_ids.shape[1]).expand(3, *input_ids.shape)
        return self.language_model.forward(  # type: ignore[no-any-return]
            input_ids=None, position_ids=position_ids, attention_mask=attention_mask, decoder_input=inputs_embeds, labels=labels, loss_mask=loss_mask,
        )


def provide(kind: type[Any], case: Case, ranks: int, pre_process: bool = True, post_process: bool = True) -> Any:
    model = kind(case, config_of(4, ranks, mrope_section=[1, 1, 2], **case.divided))
    tower = model.vision_model if kind is DevModel else model.visual
    if "vision" in case.frozen:
        tower.requires_grad_(False)
    if "blocks" in case.frozen:  # as Bridge freezes a vision model without its merger
        tower.blocks.requires_grad_(False)
        tower.patch_embed.requires_grad_(False)
    if "language" in case.frozen:
        model.language_model.requires_grad_(False)
    return model


def batches(case: Case) -> list[dict[str, Any]]:
    """Images of mixed sizes, one after another over the sequences."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for number, count in enumerate(case.images):
        tokens = torch.randint(9, VOCABULARY, (case.sequences, LENGTH), generator=generator)
        grids = [GRIDS[(number + image) % len(GRIDS)] for image in range(count)]
        of_sequence = -(-count // case.sequences) if count else 0
        for image, grid in enumerate(grids):
            sequence, place = divmod(image, of_sequence)
            tokens[sequence, 2 + 6 * place :][: grid[0] * grid[1] * grid[2] // 4] = IMAGE
        patches = sum(frames * rows * columns for frames, rows, columns in grids)
        result.append({
            "input_ids": tokens, "position_ids": None, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(tokens.shape),
            "pixel_values": torch.randn(patches, 3 * 2 * 16, generator=generator) if count else None,
            "image_grid_thw": torch.tensor(grids) if count else None,
        })
    return result


def forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    batch = next(data_iterator)
    output = model(attention_mask=None, **batch)
    return output, partial(adapters.loss_function, batch["loss_mask"])


def run(rank: int, ranks: int, cases: list[Case]) -> list[Outcome]:
    adapters.MODELS.update({"dev": (partial(provide, DevModel), forward_step), "bridge": (partial(provide, BridgeModel), forward_step)})
    adapters.batches = batches
    return adapters.run_cases(rank, ranks, cases)


def check(cases: list[Case], ranks: int) -> None:
    by_rank = launch(run, ranks * cases[0].shards, cases, timeout_s=240)
    for index, case in enumerate(cases):
        adapters.check_case(case, [outcomes[index] for outcomes in by_rank], 1e-6 if case.shards == 1 else 5e-6)


ONE_BY_ONE = ("--dip-sub-microbatch-size", "vit=1")


@pytest.mark.parametrize("model", [pytest.param("dev", marks=pytest.mark.long), "bridge"])
def test_over_two_ranks(model: str) -> None:
    """Images of mixed sizes, some microbatches without any; parts of the tower frozen; tied; K 2; recomputed."""
    check([
        Case(model=model, flags=(*ONE_BY_ONE, "--dip-chunks", "lm=2")),
        Case(model=model, frozen=("vision",), tied=True, sequences=2),
        Case(model=model, frozen=("language",), strategy="full"),
        Case(model=model, images=(0, 0)),
        *([Case(model=model, frozen=("blocks",))] if model == "bridge" else []),
    ], 2)


@pytest.mark.long
def test_under_tensor_and_sequence_parallelism() -> None:
    """TP 2 x P 2."""
    check([Case(model="dev", tensor=2, flags=ONE_BY_ONE)], 2)


def describe(rank: int, ranks: int) -> dict[str, str]:
    """What is said of such models and inputs that cannot be cut."""
    adapters.prepare(1, 1, 1)
    from megatron_dip.models.packed_vision import PackedVisionDescription
    from megatron_dip.models.provided import sketch_model

    case = Case(model="dev", sequences=1)

    def description(change: Any = None, kind: type[Any] = DevModel, context: int = 1) -> PackedVisionDescription:
        sketch = sketch_model(partial(provide, kind, replace(case, context=context), 1))
        if change is not None:
            change(sketch)
        return PackedVisionDescription(sketch)

    def another_language_model(pre_process: bool, post_process: bool) -> Any:
        model = provide(DevModel, case, 1)
        model.language_model = torch.nn.Linear(1, 1)
        return model

    item = batches(case)[0]
    ahead = description().item_metadata({**item, "image_grid_thw": item["image_grid_thw"][None]})
    bound = description().bind((), item)
    assert ahead == description().metadata(bound) == {"lm": [LENGTH], "vit": [16, 16]}, ahead
    attempts = {
        "language": lambda: sketch_model(another_language_model),
        "merge": lambda: description(lambda sketch: delattr(sketch.vision_model, "spatial_merge_size")),
        "deepstack": lambda: description(lambda sketch: setattr(sketch.vision_model, "deepstack_visual_indexes", [1])),
        "predictions": lambda: description(lambda sketch: sketch.language_model.sketch.arguments.update(mtp_block_spec=object())),
        "context": lambda: description(context=2),
        "embeddings": lambda: description().bind((), {**item, "decoder_input": torch.zeros(1)}),
        "patches": lambda: description().bind((), {**item, "pixel_values": item["pixel_values"][1:]}),
        "items": lambda: description().item_metadata({"tokens": 1}),
    }
    messages = {}
    for name, attempt in attempts.items():
        with pytest.raises(InputError) as error:
            attempt()
        messages[name] = str(error.value)
    return messages


def test_what_cannot_be_cut_is_refused() -> None:
    (messages,) = launch(describe, 1)
    for name, part in {
        "language": "a tower called vision_model or visual, here a Linear",
        "merge": "does not say how many patches become a token. Remedy: give it spatial_merge_size",
        "deepstack": "gives outputs of several layers (deepstack)",
        "predictions": "--mtp-num-layers = None: multi-token prediction layers cannot be cut yet",
        "context": "--context-parallel-size = 2: DevModel divides sequences in every forward",
        "embeddings": "forward_step: model(decoder_input=...) = 'Tensor': DIP cannot cut this input",
        "patches": "forward_step: pixel_values = [31, 96]: are not the 32 patches that image_grid_thw asks for",
        "items": "data_iterator = 'dict': items of this form are not known before forward_step reads them",
    }.items():
        assert part in messages[name], messages
