"""Megatron's MimoModel as DIP cuts it: the encoder of every modality in chunks, with its projection, and the language model in chunks.

Every chunk is a MimoModel that holds some of the parts, so that Megatron's own code runs encoders and projections, places embeddings at
the special tokens, and names checkpoint keys (``modality_submodules.<modality>.``, ``language_model.``). The parts come from the
script's own provider (:mod:`megatron_dip.models.provided`).

Letters: n inputs (images) of an encoder in a sub-microbatch, s tokens of an input, S tokens of a sequence, b sequences, h hidden sizes.

Modules: one for each modality, called as in ``modality_submodules_spec`` (an instance is an input of its encoder, its length s), and
``lm`` (an instance is a sequence). The language model's microbatch is never divided, since its loss belongs to the whole.

Modelled: modalities with one encoder each, a CLIPViTModel or a RADIOViTModel, or another that hides its layers and runs whole
(:mod:`megatron_dip.models.uncut`; its inputs may have other shapes, of one length in a microbatch), all modules with one
parallel layout (``module_to_grid_map`` absent). Context and sequence parallelism divide the merged sequences, by MimoModel's own
``PartitionAdapter``. Not modelled: inputs of different sizes, outputs of other modalities. MimoModel is experimental in Megatron-Core;
what is relied on here is in 0.16 and later, context parallelism and sharded checkpoints from 0.17, sequence parallelism from 0.19.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.description import LANGUAGE, bind_arguments, unwrap
from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.parts import LanguageModel, VisionTower, copy_attributes, language_conditions
from megatron_dip.models.provided import MimoModel, Sketch
from megatron_dip.models.uncut import UncutTower, tower_of
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.workload import Microbatch

_USE_STOCK = "use --pipeline-schedule default for this model"


class MimoChunk(MimoModel):
    """A MimoModel with consecutive layers of one of its modules."""

    partition_adapter: Any

    def __init__(self, sketch: MimoModel, config: TransformerConfig, vp_stage: int | None) -> None:
        """Args:
        sketch: the whole model, its parts sketches.
        config: the language model's, as in the whole model: Megatron's wrappers and its finishing of gradients read a rank's first chunk's.
        """
        super(MimoModel, self).__init__(config=config)
        copy_attributes(sketch, self)
        self.vp_stage = vp_stage
        self.language_model: Any = None
        # What Megatron's finalize_model_grads looks for, which MimoModel as a whole leaves to its language model.
        self.pre_process = self.post_process = False
        self.share_embeddings_and_output_weights = False

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if "sharded_state_dict" not in vars(MimoModel):
            raise InputError(
                "--ckpt-format", "torch_dist", "this release of Megatron-Core numbers the layers of a MimoModel's encoders anew in every chunk",
                "use Megatron-LM 0.17 or later, or --ckpt-format torch, which fits one cut",
            )
        return super().sharded_state_dict(*args, **kwargs)  # type: ignore[no-any-return]

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return None if self.language_model is None else self.language_model.shared_embedding_or_output_weight()


class EncoderChunk(MimoChunk):
    """Layers of one modality's encoder; the last one has the projection."""

    def __init__(self, sketch: MimoModel, modality: Modality, encoder: torch.nn.Module, *, vp_stage: int | None, last: bool) -> None:
        super().__init__(sketch, sketch.config, vp_stage)
        self._modality = modality
        self._last = last
        projections = [modality.projection.build()] if last and modality.projection is not None else []
        submodule = modality.submodule_class(
            encoders={modality.encoder_name: encoder}, input_projections=projections, **modality.parameters
        )
        self.modality_submodules = torch.nn.ModuleDict({modality.name: submodule})

    def run(self, inputs_or_hidden: torch.Tensor, between: torch.dtype) -> torch.Tensor:
        """Inputs [n, 3, height, width] or hidden states [s, n, h] -> hidden states [s, n, h], or embeddings [n * s, h] of the projection.

        Args:
            between: type of what goes to the next chunk of the encoder.
        """
        submodule: Any = self.modality_submodules[self._modality.name]
        if not self._last:
            return submodule.encoders[self._modality.encoder_name](inputs_or_hidden).to(between)  # type: ignore[no-any-return]
        return submodule.forward(encoder_inputs={self._modality.encoder_name: {self._modality.input_name: inputs_or_hidden}})  # type: ignore[no-any-return]


class LanguageChunk(MimoChunk):
    """Layers of the language model; the first one merges text and embeddings."""

    def __init__(self, sketch: MimoModel, language: torch.nn.Module, *, vp_stage: int | None, first: bool, last: bool) -> None:
        super().__init__(sketch, language.config, vp_stage)  # type: ignore[arg-type]
        self.pre_process, self.post_process = first, last
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights  # type: ignore[assignment]
        self.language_model = language
        # MimoModel.forward asks these for a modality's embeddings: here they are given, and no module of this chunk.
        self.modality_submodules = {name: _Given() for name in sketch.modality_submodules}  # type: ignore[assignment]
        if not first and getattr(self, "partition_adapter", None) is not None:
            self.partition_adapter = _LabelsAdapter(self.partition_adapter)
        self._hidden: torch.Tensor | None = None

    def run(self, embeddings: Mapping[str, torch.Tensor], hidden: torch.Tensor | None, inputs: Mapping[str, Any]) -> Any:
        """Embeddings [n * s, h] of modalities for the first chunk, hidden states [S (/ TP), b, h] for the others -> hidden states, or
        for the last chunk what MimoModel returns: (losses [b, S] or logits, loss mask)."""
        self._hidden = hidden
        self.language_model.set_input_tensor(hidden)
        output = self(**{**inputs, "modality_inputs": dict(embeddings) or None})
        self._hidden = None
        self.language_model.set_input_tensor(None)
        return output if self.post_process else output[0]

    def get_text_embeddings(self, input_ids: torch.Tensor, position_ids: torch.Tensor, special_token_ids: dict[str, int]) -> torch.Tensor:
        if self.pre_process:
            return super().get_text_embeddings(input_ids, position_ids, special_token_ids)  # type: ignore[no-any-return]
        assert self._hidden is not None
        return self._hidden  # nobody reads it

    def align_embeddings_by_token_positions(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.pre_process:
            return super().align_embeddings_by_token_positions(*args, **kwargs)  # type: ignore[no-any-return]
        assert self._hidden is not None
        return self._hidden  # for its length; the layers take it from set_input_tensor


class _LabelsAdapter:
    """A chunk's ``PartitionAdapter`` behind the first one: labels and loss mask [b, S] are divided, hidden states came divided."""

    def __init__(self, adapter: Any) -> None:
        self.cfg = adapter.cfg
        self._adapter = adapter

    def shard(self, embeddings: torch.Tensor, **others: Any) -> tuple[Any, ...]:
        _, *divided = self._adapter.shard(embeddings=None, **others)
        return (embeddings, *divided)


class _Given:
    """Stands for a modality's encoder and projection where their embeddings are there already."""

    def forward(self, encoder_inputs: torch.Tensor) -> torch.Tensor:
        return encoder_inputs


@dataclass(frozen=True, slots=True)
class Modality:
    """A modality's parts, as a script's provider gives them."""

    name: str
    encoder_name: str
    tower: VisionTower | UncutTower
    input_name: str
    """Of the encoder's forward: what holds the n inputs."""
    projection: Sketch | None
    submodule_class: Any
    parameters: Mapping[str, Any]
    """Further arguments of the submodule's class."""

    @property
    def trainable(self) -> bool:
        return self.tower.trainable or (self.projection is not None and self.projection.trainable)

    @classmethod
    def of(cls, name: str, submodule: torch.nn.Module, spec: Any, params_dtype: torch.dtype) -> Modality:
        """Args:
        params_dtype: of the language model's weights.

        Raises InputError for submodules that DIP cannot cut."""
        where = f"modality_submodules_spec[{name!r}]"
        encoders: dict[str, torch.nn.Module] = dict(submodule.encoders.named_children())  # type: ignore[union-attr]
        if name in (LANGUAGE, "text"):
            raise InputError(where, name, "is the language model's own name", "give the modality another name")
        if len(encoders) != 1 or len(submodule.decoders) or len(submodule.output_projections):  # type: ignore[arg-type]
            raise InputError(
                where, list(encoders), "DIP can cut modalities with one encoder and nothing behind the language model", _USE_STOCK
            )
        (encoder_name, encoder), = encoders.items()
        assert isinstance(encoder, Sketch), type(encoder)
        projections: list[Any] = list(submodule.input_projections)  # type: ignore[arg-type]
        input_name = list(inspect.signature(encoder.builder.forward).parameters)[1]  # type: ignore[attr-defined]  # behind self
        return cls(
            name, encoder_name, tower_of(encoder, params_dtype, None), input_name, projections[0] if projections else None, type(submodule), spec.params or {}
        )


class MimoDescription:
    """A script's MimoModel as :class:`megatron_dip.models.description.ModelDescription`."""

    def __init__(self, sketch: MimoModel) -> None:
        """Args:
        sketch: from :func:`megatron_dip.models.provided.sketch_model`.

        Raises:
            InputError: for parts that DIP cannot cut.
        """
        if getattr(sketch.mimo_config, "module_to_grid_map", None):
            raise InputError(
                "MimoModelConfig.module_to_grid_map", sorted(sketch.mimo_config.module_to_grid_map),
                "DIP lays all modules out over the same ranks, with one parallel layout", "leave it out: DIP spreads the encoders itself",
            )
        language = sketch.language_model
        if not isinstance(language, Sketch) or language.builder.__name__ != "GPTModel":
            found = language.builder.__name__ if isinstance(language, Sketch) else type(language).__name__
            raise InputError("language_model_spec", found, "DIP can cut language models that are a GPTModel", _USE_STOCK)
        self._sketch = sketch
        self._language = LanguageModel(language)
        _check_division(sketch, self._language.config)
        specs = sketch.mimo_config.modality_submodules_spec
        dtype = self._language.config.params_dtype
        self._modalities = {name: Modality.of(name, submodule, specs[name], dtype) for name, submodule in sketch.modality_submodules.items()}

    @property
    def model_spec(self) -> ModelSpec:
        encoders = [modality.tower.spec(name, trainable=modality.trainable) for name, modality in self._modalities.items()]
        return ModelSpec(modules=[*encoders, self._language.spec])

    num_outputs = 2
    """MimoModel returns losses or logits, and a loss mask."""

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return bind_arguments(MimoModel.forward, args, kwargs)

    def metadata(self, batch: Mapping[str, Any]) -> Microbatch:
        """Lengths of a bound batch's instances, {} where the rank was not given it. Raises InputError for inputs that do not fit, and for
        sequences that cannot be divided."""
        tokens = batch.get("input_ids")
        if tokens is None:
            return {}
        self._language.check_length(tokens.shape[1])
        microbatch: Microbatch = {LANGUAGE: [tokens.shape[1]] * tokens.shape[0]}
        for name, modality in self._modalities.items():
            inputs = self._inputs(batch, modality)
            count = 0 if inputs is None else inputs.shape[0]
            length = modality.tower.length_of(inputs) if count else 0
            places = int((tokens == self._sketch.special_token_ids[name]).sum())
            if places != count * length:
                raise InputError(
                    f"forward_step: modality_inputs[{name!r}]", count, f"{count} inputs make {count * length} embeddings, the "
                    f"sequences have {places} special tokens for them", "give as many special tokens as the encoder makes embeddings",
                )
            if count:
                microbatch[name] = [length] * count
        return microbatch

    undivided = (LANGUAGE,)

    def typical_microbatch(self, sequences: int, length: int) -> Microbatch:
        """Half of a sequence's embeddings are those of inputs, alike of all modalities, one input of each at least."""
        share = length // (2 * max(1, len(self._modalities)))
        inputs = {
            name: [modality.tower.length] * (sequences * max(1, share // modality.tower.length)) for name, modality in self._modalities.items()
        }
        return {**inputs, LANGUAGE: [length] * sequences}

    def item_metadata(self, item: Any) -> Microbatch:
        """What :meth:`metadata` will say of a batch of examples/mimo's data loaders. Raises InputError for items of another form."""
        if not isinstance(item, dict) or not {"input_ids", "modality_inputs"} <= item.keys():
            raise InputError("data_iterator", type(item).__name__, "items of this form are not known before forward_step reads them",
                             "give dictionaries of the arguments of MimoModel.forward, or --dip-look-ahead 0")
        return self.metadata(item)

    def num_instances(self, batch: Mapping[str, Any]) -> dict[str, int]:
        if batch.get("input_ids") is None:
            return {}
        inputs = {name: self._inputs(batch, modality) for name, modality in self._modalities.items()}
        return {**{name: 0 if given is None else given.shape[0] for name, given in inputs.items()}, LANGUAGE: batch["input_ids"].shape[0]}

    def without_stem_inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**batch, "modality_inputs": _on_meta(batch.get("modality_inputs"))}

    def conditions(self, batch: Mapping[str, Any]) -> list[str]:
        return language_conditions(batch, "attention_mask", "packing_kwargs")

    def build_chunk(self, partition: Partition, module: str, vp_stage: int, rank: int) -> MimoChunk:
        cut = ModuleCut.of_partition(partition, module)
        first, last, stage = (vp_stage, rank) == cut.first, (vp_stage, rank) == cut.last, cut.vp_stage(vp_stage)
        if module == LANGUAGE:
            language = self._language.build_chunk(cut, vp_stage, rank)
            return LanguageChunk(self._sketch, language, vp_stage=stage, first=first, last=last)
        modality = self._modalities[module]
        return EncoderChunk(self._sketch, modality, modality.tower.build_chunk(cut, vp_stage, rank), vp_stage=stage, last=last)

    def boundary(self, producer: PlanStage, consumer: PlanStage, batch: Any, first_instance: int) -> PayloadSpec:
        if producer.module == LANGUAGE:
            return self._language.boundary(producer)
        tower = self._modalities[producer.module].tower
        given = self._inputs(batch, self._modalities[producer.module])
        if consumer.module == producer.module:
            return tower.boundary(producer, self._language.dtype, given)
        return PayloadSpec((producer.instances * tower.length_of(given), self._language.config.hidden_size), self._language.dtype)

    outermost = LANGUAGE

    def output_slice(self, stage: PlanStage, batch: Any, first_instance: int) -> None:
        return None

    def run_chunk(
        self, chunk: torch.nn.Module, stage: PlanStage, batch: Mapping[str, Any], first_instance: int,
        inputs: Mapping[str, Sequence[torch.Tensor]],
    ) -> Any:
        own = inputs.get(stage.module, ())
        if stage.module != LANGUAGE:
            modality, encoder = self._modalities[stage.module], unwrap(chunk, EncoderChunk)
            if own:
                return encoder.run(own[0], modality.tower.dtype_between(self._language.dtype))
            given = self._inputs(batch, modality)
            assert given is not None
            own_inputs = given[first_instance : first_instance + stage.instances]
            return encoder.run(own_inputs.to(modality.tower.params_dtype), modality.tower.dtype_between(self._language.dtype))
        embeddings = {name: torch.cat(list(parts)) if len(parts) > 1 else parts[0] for name, parts in inputs.items() if name != LANGUAGE}
        return unwrap(chunk, LanguageChunk).run(embeddings, own[0] if own else None, batch)

    def _inputs(self, batch: Mapping[str, Any], modality: Modality) -> torch.Tensor | None:
        """The n inputs of a modality's encoder in a microbatch."""
        of_modality = (batch.get("modality_inputs") or {}).get(modality.name)
        if not of_modality:
            return None
        where = f"forward_step: modality_inputs[{modality.name!r}]"
        if set(of_modality) != {modality.encoder_name}:
            raise InputError(where, sorted(of_modality), f"the modality has the encoder {modality.encoder_name!r}", "give its inputs under its name")
        arguments = of_modality[modality.encoder_name]
        others = sorted(name for name, value in arguments.items() if name != modality.input_name and value is not None)
        if others or arguments.get(modality.input_name) is None:
            raise InputError(
                where, others or sorted(arguments), f"DIP can divide {modality.input_name!r} of this encoder", f"give {modality.input_name!r} alone"
            )
        given: torch.Tensor = arguments[modality.input_name]
        return given


def _check_division(sketch: MimoModel, config: TransformerConfig) -> None:
    """Raises InputError for context or sequence parallelism that this release's MimoModel does not do."""
    adapter = getattr(sketch, "partition_adapter", None)
    if config.context_parallel_size > 1 and adapter is None:
        raise InputError(
            "--context-parallel-size", config.context_parallel_size, "this release's MimoModel gives every rank whole sequences",
            "use Megatron-LM 0.17 or later, or --context-parallel-size 1",
        )
    # Until 0.18 the adapter takes batches first and scatters their first dimension; it still takes an attention mask then.
    if config.sequence_parallel and (adapter is None or "attention_mask" in inspect.signature(adapter.shard).parameters):
        raise InputError(
            "--sequence-parallel", True, "this release's MimoModel does not divide its sequences over tensor-parallel ranks",
            "use Megatron-LM 0.19 or later, or leave it out",
        )


def _on_meta(inputs: Any) -> Any:
    """Nested inputs of modalities as shapes alone."""
    if isinstance(inputs, torch.Tensor):
        return inputs.to("meta")
    return {name: _on_meta(value) for name, value in inputs.items()} if isinstance(inputs, dict) else inputs
