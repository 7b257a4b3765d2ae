"""Models of a tower for packed patches and a GPTModel, as scripts compose them: a tower that runs whole, the language model in chunks.

They are known by their form, not by their class: ``language_model`` is a GPTModel, ``vision_model`` or ``visual`` a module called with packed
patches and ``image_grid_thw``, and forward takes ``input_ids``, ``pixel_values`` and ``image_grid_thw``. That is the form of ``MultimodalModel`` of
Megatron-LM's examples/multimodal_dev while its language model was a GPTModel (commit 66f7ea56), and of Megatron-Bridge's ``Qwen25VLModel``.
Every chunk is a module of the script's own class with one of the parts, so that the script's own code places embeddings, finds positions and names
checkpoint keys; in the tower's place the first chunk of the language model finds the embeddings that were received.

Letters: N images, V patches of all of them, T their tokens, S tokens of a sequence, b sequences, h hidden size of the language model.

Modules: ``vit`` (an instance is an image, or a clip, its length its patches; one layer that is not cut, see :mod:`megatron_dip.models.uncut`) and
``lm`` (an instance is a sequence). The language model's microbatch is never divided, since its loss belongs to the whole.

Not modelled: videos as an input of their own, outputs of several layers (deepstack), language models of other classes, multi-token prediction, context
parallelism, which such models divide sequences for in every forward.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.description import LANGUAGE, VISION, bind_arguments, unwrap
from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.parts import LanguageModel, copy_attributes, language_conditions, to_host
from megatron_dip.models.provided import packed_tower
from megatron_dip.models.trained import mark_uncut
from megatron_dip.models.uncut import Passing, sizes_of
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.workload import Microbatch

_UNSUPPORTED_INPUTS = (
    "decoder_input", "inputs_embeds", "pixel_values_videos", "inference_context", "inference_params", "second_per_grid_ts", "padding_mask",
)
"""Arguments of such models' forward that DIP cannot cut, or that only some releases' GPTModel takes."""
_TYPICAL_SIDE = 32
"""Patches along a side of an image, before any was seen."""


class _Given:
    """Stands for the tower where its embeddings are there already."""

    def __init__(self, tower: torch.nn.Module, merge: int, dtype: torch.dtype) -> None:
        self.spatial_merge_size, self.dtype = merge, dtype
        self.config = getattr(tower, "config", None)
        self.embeddings: torch.Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert self.embeddings is not None
        return self.embeddings


class PackedChunk(MegatronModule):
    """What chunks of every such model have; mixed into the script's class."""

    language_model: Any
    tower_name: str
    given: _Given | None

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return None if self.language_model is None else self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Any) -> None:
        if self.language_model is not None:
            self.language_model.set_input_tensor(input_tensor)

    def run_vision(self, patches_or_embeddings: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
        """Patches [V, values] or embeddings [T, h] -> the same where the tower stands elsewhere, else embeddings [T, h]."""
        tower = getattr(self, self.tower_name)
        if isinstance(tower, Passing):
            return patches_or_embeddings
        output = tower(patches_or_embeddings, grids)
        output = getattr(output, "pooler_output", output)  # of transformers from 5 on
        return torch.cat(list(output)) if isinstance(output, list | tuple) else output

    def run_language(self, embeddings: torch.Tensor | None, hidden: torch.Tensor | None, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Embeddings [T, h] of all images for the first chunk, hidden states [S (/ TP), b, h] for the others -> hidden states, or what the
        model returns."""
        given = dict(inputs)
        if embeddings is None:
            given["pixel_values"] = None
        else:
            assert self.given is not None
            self.given.embeddings = embeddings
        self.set_input_tensor(hidden)
        if hidden is not None and "decoder_input" in inspect.signature(type(self).forward).parameters:
            given["decoder_input"] = hidden  # it would embed tokens otherwise; layers take hidden states from set_input_tensor
        output: torch.Tensor = self(**given)
        self.set_input_tensor(None)
        if self.given is not None:
            self.given.embeddings = None
        return output


@cache
def _chunk_class(kind: type[MegatronModule]) -> type[PackedChunk]:
    return type(f"{kind.__name__}Chunk", (PackedChunk, kind), {})


class PackedVisionDescription:
    """A script's model of that form as :class:`megatron_dip.models.description.ModelDescription`."""

    def __init__(self, sketch: MegatronModule) -> None:
        """Args:
        sketch: from :func:`megatron_dip.models.provided.sketch_model`, its language model a sketch, its tower as the script built it.

        Raises:
            InputError: for parts that DIP cannot cut.
        """
        self._sketch = sketch
        found = packed_tower(sketch)
        assert found is not None, type(sketch)
        self._name, self._tower = found
        own = sketch.language_model.sketch  # type: ignore[union-attr]
        self._language = LanguageModel(own)  # type: ignore[arg-type]
        config = self._language.config
        if own.arguments.get("mtp_block_spec") is not None:  # type: ignore[union-attr, operator]
            raise InputError("--mtp-num-layers", getattr(config, "mtp_num_layers", None), "multi-token prediction layers cannot be cut yet", "leave it out")
        if config.context_parallel_size > 1:
            raise InputError(
                "--context-parallel-size", config.context_parallel_size, f"{type(sketch).__name__} divides sequences in every forward",
                "use 1, or the same model through examples/vlm/train.py",
            )
        for holder in (self._tower, getattr(self._tower, "config", None)):
            if getattr(holder, "deepstack_visual_indexes", None):
                raise InputError(
                    f"model_provider: {self._name}", type(self._tower).__name__, "gives outputs of several layers (deepstack), which a script's model cannot have",
                    "use the same model through examples/vlm/train.py",
                )
        self._merge = self._merge_size()

    def _merge_size(self) -> int:
        for holder in (self._tower, getattr(self._tower, "config", None), self._sketch):
            found = getattr(holder, "spatial_merge_size", None)
            if isinstance(found, int):
                return found
        raise InputError(
            f"model_provider: {self._name}", type(self._tower).__name__, "does not say how many patches become a token", "give it spatial_merge_size"
        )

    @property
    def model_spec(self) -> ModelSpec:
        trainable = any(weight.requires_grad for weight in self._tower.parameters())
        vision = ModuleSpec(
            name=VISION, kind="vit", role="encoder", num_layers=1, causal=False, trainable=trainable,
            **sizes_of(self._tower, self._language.config.hidden_size),
        )
        return ModelSpec(modules=[vision, self._language.spec])

    num_outputs = None

    undivided = (LANGUAGE,)

    outermost = LANGUAGE

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """``arguments`` of the model by name, and ``patches`` of each image, on the host."""
        arguments = bind_arguments(type(self._sketch).forward, args, kwargs)
        arguments |= arguments.pop("kwargs", {})
        for name in _UNSUPPORTED_INPUTS:
            if arguments.get(name) is not None:
                raise InputError(f"forward_step: model({name}=...)", type(arguments[name]).__name__, "DIP cannot cut this input", "leave it out")
        pixels, grids = arguments.get("pixel_values"), arguments.get("image_grid_thw")
        patches: list[int] = []
        if grids is not None and pixels is not None:
            patches = to_host(grids.reshape(-1, 3).long().prod(dim=1))[0].tolist()
        if pixels is not None and (pixels.dim() != 2 or pixels.shape[0] != sum(patches)):
            raise InputError(
                "forward_step: pixel_values", list(pixels.shape), f"are not the {sum(patches)} patches that image_grid_thw asks for",
                "give packed patches [V, values] and frames, rows and columns of each image",
            )
        return {"arguments": arguments, "patches": patches}

    def metadata(self, batch: Mapping[str, Any]) -> Microbatch:
        """Patches of each image, tokens of each sequence; {} where the rank was not given them. Raises InputError for sequences that cannot be divided."""
        tokens = batch["arguments"].get("input_ids")
        if tokens is None:
            return {}
        self._language.check_length(tokens.shape[1])
        microbatch: Microbatch = {LANGUAGE: [tokens.shape[1]] * tokens.shape[0]}
        if batch["patches"]:
            microbatch[VISION] = list(batch["patches"])
        return microbatch

    def typical_microbatch(self, sequences: int, length: int) -> Microbatch:
        """Half of a sequence's embeddings are those of images, one image at least."""
        patches = _TYPICAL_SIDE**2
        images = max(1, length * self._merge**2 // (2 * patches))
        return {VISION: [patches] * (images * sequences), LANGUAGE: [length] * sequences}

    def item_metadata(self, item: Any) -> Microbatch:
        """What :meth:`metadata` will say of a batch of examples/multimodal_dev's data loaders. Raises InputError for items of another form."""
        if not isinstance(item, dict) or "input_ids" not in item:
            raise InputError("data_iterator", type(item).__name__, "items of this form are not known before forward_step reads them",
                             "give dictionaries of the arguments of the model's forward, or --dip-look-ahead 0")
        tokens, grids = item["input_ids"], item.get("image_grid_thw")
        patches = [] if grids is None or item.get("pixel_values") is None else grids.reshape(-1, 3).prod(dim=1).tolist()
        return {LANGUAGE: [tokens.shape[1]] * tokens.shape[0], **({VISION: patches} if patches else {})}

    def num_instances(self, batch: Mapping[str, Any]) -> dict[str, int]:
        tokens = batch["arguments"].get("input_ids")
        return {} if tokens is None else {VISION: len(batch["patches"]), LANGUAGE: tokens.shape[0]}

    def without_stem_inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        pixels = batch["arguments"].get("pixel_values")
        return batch if pixels is None else {**batch, "arguments": {**batch["arguments"], "pixel_values": pixels.to("meta")}}

    def conditions(self, batch: Mapping[str, Any]) -> list[str]:
        return language_conditions(batch["arguments"], "attention_mask", "packed_seq_params")

    def build_chunk(self, partition: Partition, module: str, vp_stage: int, rank: int) -> PackedChunk:
        cut = ModuleCut.of_partition(partition, module)
        first, last = (vp_stage, rank) == cut.first, (vp_stage, rank) == cut.last
        if module == LANGUAGE:
            language = self._language.build_chunk(cut, vp_stage, rank)
            chunk = self._chunk(language.config, cut.vp_stage(vp_stage))  # type: ignore[arg-type]
            chunk.language_model = language
            chunk.pre_process, chunk.post_process = first, last  # type: ignore[assignment]
            chunk.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights  # type: ignore[assignment]
            if first:
                chunk.given = _Given(self._tower, self._merge, self._language.config.params_dtype)
                setattr(chunk, self._name, chunk.given)
            return chunk
        chunk = self._chunk(self._language.config, cut.vp_stage(vp_stage))
        if cut.rows[vp_stage][rank]:
            mark_uncut(self._tower, self._language.config.hidden_size)
            setattr(chunk, self._name, self._tower)
            return chunk
        if not cut.rows_have_layers(rank):
            self._tower.to("meta")
        setattr(chunk, self._name, Passing(None))
        return chunk

    def _chunk(self, config: TransformerConfig, vp_stage: int | None) -> PackedChunk:
        """Of the script's class, without its parts."""
        kind: Any = _chunk_class(type(self._sketch))  # type: ignore[arg-type]
        chunk: PackedChunk = kind.__new__(kind)
        MegatronModule.__init__(chunk, config=config)
        copy_attributes(self._sketch, chunk)
        for name, value in list(vars(chunk).items()):
            if name == "shared_embedding_or_output_weight":
                delattr(chunk, name)  # bound to the sketch's language model
            elif isinstance(value, types.MethodType) and value.__self__ is self._sketch:
                setattr(chunk, name, types.MethodType(value.__func__, chunk))
        chunk.tower_name, chunk.given, chunk.vp_stage = self._name, None, vp_stage  # type: ignore[assignment]
        chunk.language_model = None
        setattr(chunk, self._name, None)
        # Megatron's functions look for embedding and head where these say.
        chunk.pre_process = chunk.post_process = chunk.share_embeddings_and_output_weights = False  # type: ignore[assignment]
        return chunk

    def boundary(self, producer: PlanStage, consumer: PlanStage, batch: Mapping[str, Any], first_instance: int) -> PayloadSpec:
        if producer.module == LANGUAGE:
            return self._language.boundary(producer)
        patches = sum(batch["patches"][first_instance : first_instance + producer.instances])
        dtype = self._language.config.params_dtype
        if sum(producer.layers) == 0:
            return PayloadSpec((patches, batch["arguments"]["pixel_values"].shape[1]), dtype)
        return PayloadSpec((patches // self._merge**2, self._language.config.hidden_size), dtype)

    def output_slice(self, stage: PlanStage, batch: Any, first_instance: int) -> None:
        return None

    def run_chunk(
        self, chunk: torch.nn.Module, stage: PlanStage, batch: Mapping[str, Any], first_instance: int,
        inputs: Mapping[str, Sequence[torch.Tensor]],
    ) -> torch.Tensor:
        model, own, arguments = unwrap(chunk, PackedChunk), inputs.get(stage.module, ()), batch["arguments"]
        if stage.module == VISION:
            dtype = self._language.config.params_dtype
            end = first_instance + stage.instances
            grids = arguments["image_grid_thw"].reshape(-1, 3)[first_instance:end]
            if own:
                return model.run_vision(own[0], grids).to(dtype)
            start = sum(batch["patches"][:first_instance])
            patches = arguments["pixel_values"][start : start + sum(batch["patches"][first_instance:end])]
            return model.run_vision(patches.to(dtype), grids).to(dtype)
        if own:
            return model.run_language(None, own[0], arguments)
        parts = inputs.get(VISION, ())
        embeddings = torch.cat(list(parts)) if len(parts) > 1 else parts[0] if parts else None
        return model.run_language(embeddings, None, arguments)

