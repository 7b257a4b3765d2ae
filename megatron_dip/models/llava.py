"""Megatron's LLaVAModel as DIP cuts it: the vision model and its projector in chunks, the language model in chunks.

Every chunk is a LLaVAModel that holds some of the parts, so that Megatron's own code merges images and text, builds labels and masks,
and names checkpoint keys (``vision_model.``, ``vision_projection.``, ``language_model.``). Vision models are CLIP, SigLIP, InternViT
and RADIO as LLaVAModel builds them; others, of Hugging Face or a script's own, run whole (:mod:`megatron_dip.models.uncut`). The parts come from the script's own provider (:mod:`megatron_dip.models.provided`).

Letters: n tiles in a sub-microbatch, s tokens of a tile in the vision model, t tokens of a tile in the language model, S tokens of
the longest merged sequence, b sequences in a microbatch, h hidden sizes.

Under context and sequence parallelism LLaVAModel divides the merged sequences itself; every rank runs the vision model on all tiles.

Modules: ``vit`` (an instance is a tile, its length s) and ``lm`` (an instance is a sequence, its length S). The language model's
microbatch is never divided, since its loss belongs to the whole.

Not modelled: tiles of different sizes in one batch (dynamic resolution), sound, inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.description import LANGUAGE, VISION, bind_arguments, unwrap
from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.parts import LanguageModel, copy_attributes, language_conditions, to_host
from megatron_dip.models.provided import Sketch
from megatron_dip.models.uncut import tower_of
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.workload import Microbatch

_UNSUPPORTED_INPUTS = ("inference_context", "inference_params", "vision_packed_seq_params", "sound_clips", "imgs_sizes", "num_frames")
"""Arguments of LLaVAModel.forward (of some releases) that DIP cannot cut."""


class LlavaChunk(LLaVAModel):
    """A LLaVAModel with consecutive layers of one of its modules."""

    vision_model: Any
    vision_projection: Any
    language_model: Any

    def __init__(self, sketch: LLaVAModel, config: TransformerConfig, vp_stage: int | None) -> None:
        """Args:
        sketch: the whole model, its parts sketches.
        config: the language model's, as in the whole model: Megatron's wrappers and its finishing of gradients read a rank's first chunk's.
        """
        super(LLaVAModel, self).__init__(config=config)
        copy_attributes(sketch, self)
        self.vision_model = None
        self.vision_projection = None
        self.language_model = None
        self.add_encoder = self.add_decoder = False
        self.pre_process = self.post_process = False
        self.vp_stage = vp_stage
        # Shapes come from the plan: no sequence need be padded to the longest there could be.
        self._language_is_pipeline_parallel = False

    def run_vision(self, tiles_or_hidden: torch.Tensor) -> torch.Tensor:
        """Tiles [n, 3, height, width] or hidden states [s, n, h] -> hidden states [s, n, h], or embeddings [t, n, h] of the projector."""
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


class LlavaDescription:
    """A script's LLaVAModel as :class:`megatron_dip.models.description.ModelDescription`."""

    def __init__(self, sketch: LLaVAModel) -> None:
        """Args:
        sketch: from :func:`megatron_dip.models.provided.sketch_model`.
        """
        self._sketch = sketch
        self._projection = _sketched(sketch, "vision_projection", MultimodalProjector)
        self._language = LanguageModel(_sketched(sketch, "language_model", GPTModel))
        given = sketch.given
        image = (3, given["img_h"], given["img_w"])
        self._vision = tower_of(sketch.vision_model, self._language.config.params_dtype, image)  # type: ignore[arg-type]
        if getattr(sketch, "_dynamic_resolution", False) or getattr(sketch, "dynamic_resolution", False):
            raise InputError("--dynamic-resolution", True, "tiles of different sizes cannot be divided yet", "leave it out")

    @property
    def model_spec(self) -> ModelSpec:
        trainable = self._vision.trainable or self._projection.trainable
        return ModelSpec(modules=[self._vision.spec(VISION, trainable=trainable), self._language.spec])

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
        """Lengths of a bound batch's instances, the merged sequences' among them; {} where the rank was not given it (examples/multimodal
        reads data on the first and last pipeline rank alone, images on the first). Raises InputError for images that do not fit, and for
        sequences that cannot be divided."""
        microbatch = self._lengths(batch)
        for length in microbatch.get(LANGUAGE, []):
            self._language.check_length(length)
        return microbatch

    def _lengths(self, batch: Mapping[str, Any]) -> Microbatch:
        tokens = batch.get("input_ids")
        if tokens is None:
            return {}
        index = batch.get("image_token_index")
        image_tokens = (tokens == (self._sketch.image_token_index if index is None else index)).sum(dim=1)
        images, tiles = batch.get("images"), batch.get("num_image_tiles")
        image_tokens, given_tiles = to_host(image_tokens, image_tokens[:0] if tiles is None else tiles)
        count = int(given_tiles.sum()) if images is None else images.shape[0]
        tiles_of_image = torch.ones(count, dtype=torch.long) if tiles is None else given_tiles
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
            microbatch[VISION] = [self._vision.length] * count
        return microbatch

    def _num_tiles(self, batch: Mapping[str, Any]) -> int:
        images, tiles = batch.get("images"), batch.get("num_image_tiles")
        return images.shape[0] if images is not None else 0 if tiles is None else int(tiles.sum())

    num_outputs = 2
    """LLaVAModel returns losses or logits, and a loss mask."""

    undivided = (LANGUAGE,)

    def typical_microbatch(self, sequences: int, length: int) -> Microbatch:
        """Half of a sequence's embeddings are those of tiles, one tile at least."""
        tiles = max(1, length // (2 * self._sketch.img_seq_len))
        return {VISION: [self._vision.length] * (tiles * sequences), LANGUAGE: [length] * sequences}

    def item_metadata(self, item: Any) -> Microbatch:
        """What :meth:`metadata` will say of a batch of the data loaders of pretrain_vlm.py and examples/multimodal, which these scripts pad
        as context and sequence parallelism ask for. Raises InputError for items of another form."""
        if isinstance(item, dict) and {"tokens", "image"} <= item.keys():
            return self._padded(self._lengths({"input_ids": item["tokens"], "images": item["image"]}))
        if isinstance(item, dict) and {"tokens", "imgs", "num_tiles"} <= item.keys():
            given = {"images": item["imgs"], "num_image_tiles": item["num_tiles"]} if item["imgs"].dim() == 4 else {}  # [1, 1] says: none
            return self._padded(self._lengths({"input_ids": item["tokens"], **given}))
        raise InputError("data_iterator", type(item).__name__, "items of this form are not known before forward_step reads them",
                         "give dictionaries as pretrain_vlm.py and examples/multimodal do, or --dip-look-ahead 0")

    def _padded(self, microbatch: Microbatch) -> Microbatch:
        divisor = self._language.divisor
        return {**microbatch, LANGUAGE: [-(-length // divisor) * divisor for length in microbatch[LANGUAGE]]}

    def num_instances(self, batch: Mapping[str, Any]) -> dict[str, int]:
        if batch.get("input_ids") is None:
            return {}
        return {VISION: self._num_tiles(batch), LANGUAGE: batch["input_ids"].shape[0]}

    def without_stem_inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return batch if batch.get("images") is None else {**batch, "images": batch["images"].to("meta")}

    def conditions(self, batch: Mapping[str, Any]) -> list[str]:
        return language_conditions(batch, "attention_mask", "packed_seq_params")

    def build_chunk(self, partition: Partition, module: str, vp_stage: int, rank: int) -> LlavaChunk:
        cut = ModuleCut.of_partition(partition, module)
        first, last, stage = (vp_stage, rank) == cut.first, (vp_stage, rank) == cut.last, cut.vp_stage(vp_stage)
        if module == LANGUAGE:
            language = self._language.build_chunk(cut, vp_stage, rank)
            chunk = LlavaChunk(self._sketch, language.config, stage)  # type: ignore[arg-type]
            chunk.add_decoder, chunk.pre_process, chunk.post_process = True, first, last
            chunk.language_model = language
            return chunk
        vision = self._vision.build_chunk(cut, vp_stage, rank)
        chunk = LlavaChunk(self._sketch, self._language.config, stage)
        chunk.add_encoder, chunk._tile_tags = True, None
        chunk.vision_model = vision
        if last:
            chunk.vision_projection = self._projection.build()
        return chunk

    def boundary(self, producer: PlanStage, consumer: PlanStage, batch: Any, first_instance: int) -> PayloadSpec:
        if producer.module == LANGUAGE:
            return self._language.boundary(producer)
        if consumer.module == VISION:
            return self._vision.boundary(producer, self._language.dtype, None)
        return PayloadSpec((self.embeddings_per_tile, producer.instances, self._language.config.hidden_size), self._language.dtype)

    outermost = LANGUAGE

    def output_slice(self, stage: PlanStage, batch: Any, first_instance: int) -> None:
        return None

    def run_chunk(
        self, chunk: torch.nn.Module, stage: PlanStage, batch: Mapping[str, Any], first_instance: int,
        inputs: Mapping[str, Sequence[torch.Tensor]],
    ) -> Any:
        model = unwrap(chunk, LlavaChunk)
        own = inputs.get(stage.module, ())
        if stage.module == VISION:
            given_or_hidden = own[0] if own else batch["images"][first_instance : first_instance + stage.instances].to(self._vision.params_dtype)
            output = model.run_vision(given_or_hidden)
            return output if model.vision_projection is not None else output.to(self._vision.dtype_between(self._language.dtype))
        given = dict(batch)
        if given.get("num_image_tiles") is None and given.get("input_ids") is not None:
            given["num_image_tiles"] = torch.ones(self._num_tiles(batch), dtype=torch.int, device=batch["input_ids"].device)
        given.pop("images", None)
        if own:
            return model.run_language(own[0], **given)
        embeddings = inputs.get(VISION, ())
        merged = torch.cat(list(embeddings), dim=1) if len(embeddings) > 1 else embeddings[0] if embeddings else None
        return model.run_language(merged, **given)


def _sketched(sketch: LLaVAModel, name: str, kind: type[torch.nn.Module]) -> Sketch:
    """A part of the script's model. Raises InputError where the script put another one in its place."""
    part = getattr(sketch, name)
    if not isinstance(part, Sketch) or part.builder is not kind:
        found = getattr(part.builder, "__name__", part.builder) if isinstance(part, Sketch) else type(part).__name__
        raise InputError(f"model_provider: {name}", found, f"DIP can cut a LLaVAModel whose {name} is a {kind.__name__}", "use --pipeline-schedule default")
    return part
