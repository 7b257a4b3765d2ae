"""Megatron's LLaVAModel as DIP cuts it: the vision model and its projector in chunks, the language model in chunks.

Every chunk is a LLaVAModel that holds some of the parts, so that Megatron's own code merges images and text, builds labels and masks,
and names checkpoint keys (``vision_model.``, ``vision_projection.``, ``language_model.``). Vision models are CLIP, SigLIP, InternViT
and RADIO as LLaVAModel builds them; the parts come from the script's own provider (:mod:`megatron_dip.models.provided`).

Letters: n tiles in a sub-microbatch, s tokens of a tile in the vision model, t tokens of a tile in the language model, S tokens of
the longest merged sequence, b sequences in a microbatch, h hidden sizes.

Modules: ``vit`` (an instance is a tile, its length s) and ``lm`` (an instance is a sequence, its length S). The language model's
microbatch is never divided, since its loss belongs to the whole.

Not modelled: tiles of different sizes in one batch (dynamic resolution), sound, context parallelism, inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.description import unwrap
from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.provided import Sketch, bind_arguments, cut_config
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.workload import Microbatch

VISION = "vit"
LANGUAGE = "lm"

_UNSUPPORTED_INPUTS = ("inference_context", "inference_params", "vision_packed_seq_params", "sound_clips", "imgs_sizes", "num_frames")
"""Arguments of LLaVAModel.forward (of some releases) that DIP cannot cut."""

_STEM = ("conv1", "position_embeddings", "class_token", "embedder", "mask_token", "ln_pre")
"""What stands before the layers, in the vision models."""


class LlavaChunk(LLaVAModel):
    """A LLaVAModel with consecutive layers of one of its modules."""

    vision_model: Any
    vision_projection: Any
    language_model: Any

    def __init__(self, sketch: LLaVAModel, config: TransformerConfig, vp_stage: int | None) -> None:
        """Args:
        sketch: the whole model, its parts sketches.
        config: of the chunk's module, narrowed to its layers.
        """
        super(LLaVAModel, self).__init__(config=config)
        own = vars(self)
        for name, value in vars(sketch).items():
            if name not in own:
                setattr(self, name, value)
        self.vision_model = None
        self.vision_projection = None
        self.language_model = None
        self.add_encoder = self.add_decoder = False
        self.pre_process = self.post_process = False
        self.vp_stage = vp_stage
        # Shapes come from the plan: no sequence need be padded to the longest there could be.
        self._language_is_pipeline_parallel = False

    def run_vision(self, tiles_or_hidden: torch.Tensor) -> torch.Tensor:
        """Tiles [n, 3, height, width] or hidden states [n, s, h] -> hidden states [n, s, h], or embeddings [t, n, h] of the projector."""
        if self.vision_projection is None:
            return self.vision_model(tiles_or_hidden)
        embeddings, _ = self(tiles_or_hidden, None, None, None)
        return embeddings

    def run_language(self, hidden: torch.Tensor | None, **inputs: Any) -> Any:
        """Image embeddings [t, n, h] (None: no tile) for the first chunk, hidden states [S, b, h] for the others -> hidden states, or
        for the last chunk what LLaVAModel returns: (losses [b, S] or logits, loss mask [b, S])."""
        if self.pre_process and hidden is None:
            hidden = torch.zeros(0, 0, 0, dtype=self.config.params_dtype, device=inputs["input_ids"].device)
        elif self.pre_process and self._tile_tags is not None:
            hidden = self._apply_tile_tagging(hidden, inputs["num_image_tiles"])
        self.set_input_tensor(hidden)
        output = self(images=None, **inputs)
        self.set_input_tensor(None)
        return output if self.post_process else output[0]


def vision_chunk_class(builder: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The vision model's class, with a forward that starts from hidden states where the stem is elsewhere."""

    class VisionChunk(builder):  # type: ignore[valid-type, misc]
        has_stem = True

        def keep(self, *, stem: bool, end: bool) -> None:
            """Drops what stands before the layers, or behind them."""
            self.has_stem = stem
            if not stem:
                for name in _STEM:
                    if hasattr(self, name):
                        delattr(self, name)
            if not end:
                self.ln_post = None

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.has_stem:
                return super().forward(x, *args, **kwargs)
            hidden = self.decoder(x.permute(1, 0, 2).contiguous(), attention_mask=None)
            hidden = hidden.permute(1, 0, 2).contiguous()
            return hidden if self.ln_post is None else self.ln_post(hidden)

    VisionChunk.__name__ = VisionChunk.__qualname__ = f"{builder.__name__}Chunk"
    return VisionChunk


class LlavaDescription:
    """A script's LLaVAModel as :class:`megatron_dip.models.description.ModelDescription`."""

    def __init__(self, sketch: LLaVAModel) -> None:
        """Args:
        sketch: from :func:`megatron_dip.models.provided.sketch_model`.
        """
        assert isinstance(sketch.vision_model, Sketch)
        assert isinstance(sketch.vision_projection, Sketch)
        assert isinstance(sketch.language_model, Sketch)
        self._sketch = sketch
        self._vision: Sketch = sketch.vision_model
        self._projection: Sketch = sketch.vision_projection
        self._language: Sketch = sketch.language_model
        self._vision_class = vision_chunk_class(self._vision.builder)
        self.vision_config: TransformerConfig = self._vision.arguments["transformer_config"]
        self.language_config: TransformerConfig = self._language.arguments["config"]
        if getattr(sketch, "_dynamic_resolution", False) or getattr(sketch, "dynamic_resolution", False):
            raise InputError("--dynamic-resolution", True, "tiles of different sizes cannot be divided yet", "leave it out")

    @property
    def model_spec(self) -> ModelSpec:
        vision, language = self.vision_config, self.language_config
        return ModelSpec(modules=[
            module_spec(VISION, "vit", "encoder", vision, trainable=self._vision.trainable or self._projection.trainable, causal=False),
            module_spec(
                LANGUAGE, "lm", "backbone", language, trainable=self._language.trainable, causal=True,
                vocab_size=self._language.arguments["vocab_size"],
                tied_embeddings=bool(self._language.arguments.get("share_embeddings_and_output_weights", False)),
            ),
        ])

    @property
    def tile_length(self) -> int:
        """s: tokens of a tile in the vision model."""
        arguments = self._vision.arguments
        patches = (arguments["img_h"] // arguments["patch_dim"]) * (arguments["img_w"] // arguments["patch_dim"])
        return patches + (arguments["class_token_len"] if arguments.get("add_class_token", True) else 0)

    @property
    def embeddings_per_tile(self) -> int:
        """t as the projector gives it, tile tags not counted."""
        tags = self._sketch._tile_tags
        return self._sketch.img_seq_len - (0 if tags is None else len(tags[0]))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        batch = bind_arguments(LLaVAModel.forward, args, kwargs)
        for name in _UNSUPPORTED_INPUTS:
            if batch.get(name) is not None:
                raise InputError(f"forward_step: model({name}=...)", type(batch[name]).__name__, "DIP cannot cut this input", "leave it out")
        return batch

    def metadata(self, batch: Mapping[str, Any]) -> Microbatch:
        """Lengths of a bound batch's instances, the merged sequences' among them. Raises InputError for images that do not fit."""
        tokens, images = batch["input_ids"], batch.get("images")
        count = 0 if images is None else images.shape[0]
        index = batch.get("image_token_index")
        image_tokens = (tokens == (self._sketch.image_token_index if index is None else index)).sum(dim=1)
        tiles = batch.get("num_image_tiles")
        tiles_of_image = torch.ones(count, dtype=torch.long) if tiles is None else tiles.detach().cpu().long()
        if int(image_tokens.sum()) != len(tiles_of_image) or int(tiles_of_image.sum()) != count:
            raise InputError(
                "forward_step: images", [count, int(image_tokens.sum())],
                "tiles and image tokens of a microbatch do not match", "give one image token for each image",
            )
        parts = tiles_of_image.split(image_tokens.tolist())
        merged = max(int(part.sum()) * self._sketch.img_seq_len - len(part) for part in parts) + tokens.shape[1]
        length = min(merged, self._sketch._language_max_sequence_length)
        microbatch: Microbatch = {LANGUAGE: [length] * tokens.shape[0]}
        if count:
            microbatch[VISION] = [self.tile_length] * count
        return microbatch

    num_outputs = 2
    """LLaVAModel returns losses or logits, and a loss mask."""

    def item_metadata(self, item: Any) -> Microbatch:
        """What :meth:`metadata` will say of a batch of pretrain_vlm.py's data loader. Raises InputError for items of another form."""
        if not isinstance(item, dict) or not {"tokens", "image"} <= item.keys():
            raise InputError("data_iterator", type(item).__name__, "items of this form are not known before forward_step reads them",
                             "give dictionaries as pretrain_gpt.py and pretrain_vlm.py do, or --dip-look-ahead 0")
        return self.metadata({"input_ids": item["tokens"], "images": item["image"]})

    def num_instances(self, batch: Mapping[str, Any]) -> dict[str, int]:
        images = batch.get("images")
        return {VISION: 0 if images is None else images.shape[0], LANGUAGE: batch["input_ids"].shape[0]}

    def build_chunk(self, partition: Partition, module: str, vp_stage: int, rank: int) -> LlavaChunk:
        cut = ModuleCut.of_partition(partition, module)
        first, last, stage = (vp_stage, rank) == cut.first, (vp_stage, rank) == cut.last, cut.vp_stage(vp_stage)
        if module == LANGUAGE:
            config = cut_config(self.language_config, cut)
            chunk = LlavaChunk(self._sketch, config, stage)
            chunk.add_decoder, chunk.pre_process, chunk.post_process = True, first, last
            chunk.language_model = self._language.build(config=config, pre_process=first, post_process=last, vp_stage=stage)
            return chunk
        config = cut_config(self.vision_config, cut)
        chunk = LlavaChunk(self._sketch, config, stage)
        chunk.add_encoder, chunk._tile_tags = True, None
        vision = self._vision_class(**{**self._vision.arguments, "transformer_config": config, "vp_stage": stage})
        vision.requires_grad_(self._vision.trainable)
        vision.keep(stem=first, end=last)  # type: ignore[operator]
        chunk.vision_model = vision
        if last:
            chunk.vision_projection = self._projection.build()
        return chunk

    def boundary(self, producer: PlanStage, consumer: PlanStage) -> PayloadSpec:
        vision, language = self.vision_config, self.language_config
        dtype = torch.float32 if language.fp32_residual_connection else language.params_dtype
        if producer.module == VISION and consumer.module == VISION:
            return PayloadSpec((producer.instances, self.tile_length, vision.hidden_size), dtype)
        if producer.module == VISION:
            return PayloadSpec((self.embeddings_per_tile, producer.instances, language.hidden_size), dtype)
        return PayloadSpec(language_boundary(producer, language), dtype)

    def run_chunk(
        self, chunk: torch.nn.Module, stage: PlanStage, batch: Mapping[str, Any], first_instance: int,
        inputs: Mapping[str, Sequence[torch.Tensor]],
    ) -> Any:
        model = unwrap(chunk, LlavaChunk)
        own = inputs.get(stage.module, ())
        if stage.module == VISION:
            if own:
                return model.run_vision(own[0])
            tiles = batch["images"][first_instance : first_instance + stage.instances]
            return model.run_vision(tiles.to(self.vision_config.params_dtype))
        given = dict(batch)
        if given.get("num_image_tiles") is None:
            given["num_image_tiles"] = torch.ones(self.num_instances(batch)[VISION], dtype=torch.int, device=batch["input_ids"].device)
        given.pop("images", None)
        if own:
            return model.run_language(own[0], **given)
        embeddings = inputs.get(VISION, ())
        merged = torch.cat(list(embeddings), dim=1) if len(embeddings) > 1 else embeddings[0] if embeddings else None
        return model.run_language(merged, **given)


def language_boundary(producer: PlanStage, config: TransformerConfig) -> tuple[int, int, int]:
    """Hidden states between two chunks of a language model: [S (/ TP under sequence parallelism), b, h]."""
    length = producer.tokens // producer.instances
    if config.sequence_parallel:
        length //= config.tensor_model_parallel_size
    return (length, producer.instances, config.hidden_size)


def module_spec(name: str, kind: Any, role: Any, config: TransformerConfig, *, causal: bool, trainable: bool, **others: Any) -> ModuleSpec:
    """A module's spec from Megatron's config."""
    return ModuleSpec(
        name=name, kind=kind, role=role, num_layers=config.num_layers, hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size, num_attention_heads=config.num_attention_heads, num_query_groups=config.num_query_groups,
        causal=causal, gated_mlp=bool(config.gated_linear_unit), trainable=trainable, **others,
    )
