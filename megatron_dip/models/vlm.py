"""A vision-language model of Megatron modules: ViT with a patch stem, spatial merge and projector, GPT language model.

:class:`VlmStage` is the part of the model that one place of a pipeline holds: some layers of the ViT, some of the language model, or
both. DIP gives each stage layers of one module; stock Megatron's layouts mix them; without a pipeline one stage is the whole model. It
is the same code and the same weights everywhere, and checkpoint keys are those of Megatron's LLaVA: ``vision_model.``,
``vision_projection.``, ``language_model.``.

Letters: N images, C channels, S tokens of the packed sequence, t tokens of an image in it, H hidden size of the language model.

Not modelled: images of different sizes in one model, more than one packed sequence in a microbatch, context parallelism.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.built_in import ChainCost, layer_parameters
from megatron_dip.models.description import LANGUAGE, VISION, unwrap
from megatron_dip.models.initial_weights import draw_weights, global_name
from megatron_dip.models.layers import projector_spec, transformer_block_spec
from megatron_dip.models.layout import ModuleCut
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.training import ImageSpec, VisionLanguageModel
from megatron_dip.spec.workload import Microbatch, Parallel

FREEZABLE = ("vision_model", "vision_projection", "language_model")
"""Parts of the model, as their checkpoint prefixes name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VlmConfig:
    """The whole model, before any cut."""

    model: VisionLanguageModel
    """Modules named ``vit`` and ``lm``; a module that is not trainable is frozen whole (the ViT with its projector)."""
    parallel: Parallel
    frozen: frozenset[str] = frozenset()
    """Parts frozen beyond that, of :data:`FREEZABLE`."""
    dtype: torch.dtype = torch.float32
    seed: int = 1234
    """Of the weights: equal for every cut and every tensor-parallel size."""
    init_method_std: float = 0.02
    calculate_per_token_loss: bool = False
    """Megatron's: divide by the tokens of the global batch instead of each microbatch's."""
    use_cpu_initialization: bool = True

    def __post_init__(self) -> None:
        self.model.modules.validate("model")
        self.model.image.validate("model.image")
        names = sorted(module.name for module in self.model.modules.modules)
        if names != sorted((VISION, LANGUAGE)):
            raise InputError("model.modules", names, f"a vision-language model has the modules {[VISION, LANGUAGE]}", "name them so")
        if self.language.vocab_size is None:
            raise InputError("model.lm.vocab_size", None, "the language model needs a vocabulary", "give its size")
        for part in self.frozen:
            if part not in FREEZABLE:
                raise InputError("frozen", part, "the model has no such part", f"use some of {list(FREEZABLE)}")
        tensor = self.parallel.tensor
        for module in (self.vision, self.language):
            sizes = {"num_attention_heads": module.num_attention_heads, "num_query_groups": module.query_groups,
                     "ffn_hidden_size": module.ffn_hidden_size, "vocab_size": module.vocab_size or tensor}
            for field, value in sizes.items():
                if value % tensor:
                    raise InputError(
                        f"model.{module.name}.{field}", value, f"is not divisible by {tensor} tensor-parallel ranks",
                        "change it or the tensor-parallel size",
                    )
            if module.hidden_size % module.num_attention_heads:
                raise InputError(
                    f"model.{module.name}.hidden_size", module.hidden_size,
                    f"is not divisible by {module.num_attention_heads} attention heads", "change one of them",
                )
        if self.sequence_parallel and self.model.sequence_length % tensor:
            raise InputError(
                "model.sequence_length", self.model.sequence_length, f"cannot be spread over {tensor} sequence-parallel ranks",
                f"use a multiple of {tensor} or switch sequence parallelism off",
            )

    @property
    def vision(self) -> ModuleSpec:
        return self.model.modules.module(VISION)

    @property
    def language(self) -> ModuleSpec:
        return self.model.modules.module(LANGUAGE)

    @property
    def image(self) -> ImageSpec:
        return self.model.image

    @property
    def sequence_parallel(self) -> bool:
        """Of the language model; the ViT never uses it."""
        return self.parallel.sequence_parallel and self.parallel.tensor > 1

    @property
    def frozen_parts(self) -> frozenset[str]:
        frozen = set(self.frozen)
        if not self.vision.trainable:
            frozen |= {"vision_model", "vision_projection"}
        if not self.language.trainable:
            frozen.add("language_model")
        return frozenset(frozen)

    def transformer_config(self, module: ModuleSpec) -> TransformerConfig:
        """Megatron's config of a whole module."""
        return TransformerConfig(
            num_layers=module.num_layers,
            hidden_size=module.hidden_size,
            ffn_hidden_size=module.ffn_hidden_size,
            num_attention_heads=module.num_attention_heads,
            num_query_groups=module.query_groups,
            gated_linear_unit=module.has_gated_mlp,
            activation_func=torch.nn.functional.silu if module.has_gated_mlp else torch.nn.functional.gelu,
            sequence_parallel=self.sequence_parallel and module.name == LANGUAGE,
            **self._common(),
        )

    def projector_config(self) -> TransformerConfig:
        # It has no attention; Megatron wants numbers of heads that the tensor-parallel ranks divide.
        heads = self.language.num_attention_heads
        return TransformerConfig(
            num_layers=1, hidden_size=self.language.hidden_size, ffn_hidden_size=self.language.hidden_size, num_attention_heads=heads,
            **self._common(),
        )

    @property
    def model_spec(self) -> ModelSpec:
        return self.model.modules

    @property
    def outermost(self) -> str:
        return LANGUAGE

    @property
    def has_fixed_lengths(self) -> bool:
        return True

    def describe(self) -> VlmDescription:
        return VlmDescription(self)

    def build_stage(self, cuts: Mapping[str, ModuleCut], vp_stage: int, rank: int, *, is_chained: bool) -> VlmStage:
        return (ChainedVlmStage if is_chained else VlmStage)(self, cuts, vp_stage, rank)

    def parameter_costs(self) -> dict[str, ChainCost]:
        vision, language, image = self.vision, self.language, self.image
        words = float(language.vocab_size or 0) * language.hidden_size
        merged = vision.hidden_size * image.merge**2
        return {
            VISION: ChainCost(
                layer=layer_parameters(vision),
                first=float((image.channels * image.patch**2 + image.patches) * vision.hidden_size),
                last=float((merged + language.hidden_size) * language.hidden_size),
            ),
            LANGUAGE: ChainCost(layer=layer_parameters(language), first=words, last=words),
        }

    def _common(self) -> dict[str, Any]:
        return {
            "tensor_model_parallel_size": self.parallel.tensor,
            "pipeline_dtype": self.dtype,
            "params_dtype": self.dtype,
            "bf16": self.dtype == torch.bfloat16,
            "fp16": self.dtype == torch.float16,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "init_method_std": self.init_method_std,
            "calculate_per_token_loss": self.calculate_per_token_loss,
            "use_cpu_initialization": self.use_cpu_initialization,
            "batch_p2p_comm": False,
            # Megatron refuses variable_seq_lengths, which the stock layouts need, under the other dispatchers; there are no experts here.
            "moe_token_dispatcher_type": "alltoall",
        }


def check_item(config: VlmConfig, item: dict[str, Any]) -> None:
    """Raises InputError where the tensors of a microbatch item cannot go through the model."""
    image, images, tokens = config.image, item["images"], item["tokens"]
    wanted = (image.channels, image.size, image.size)
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
        raise InputError("images", list(images.shape), f"is not of shape [N, {', '.join(map(str, wanted))}]", "resize the images or the model")
    if tokens.ndim != 2 or tokens.shape[0] != 1:
        raise InputError("tokens", list(tokens.shape), "is not one packed sequence [1, S]", "pack the samples of a microbatch")
    if tokens.shape[1] > config.model.sequence_length:
        raise InputError(
            "tokens", list(tokens.shape), f"is longer than the model's {config.model.sequence_length} tokens",
            "shorten the sequence or raise model.sequence_length",
        )
    if config.sequence_parallel and tokens.shape[1] % config.parallel.tensor:
        raise InputError(
            "tokens", list(tokens.shape), f"cannot be spread over {config.parallel.tensor} sequence-parallel ranks", "pad the sequence"
        )
    for name in ("labels", "position_ids"):
        if item.get(name) is not None and item[name].shape != tokens.shape:
            raise InputError(name, list(item[name].shape), f"is not of the tokens' shape {list(tokens.shape)}", "give one value for each token")
    places = int((tokens == image.token_id).sum())
    if places != len(images) * image.tokens:
        raise InputError(
            "tokens", places, f"tokens with the image id {image.token_id} stand in the sequence; {len(images)} images need"
            f" {len(images) * image.tokens}", f"put {image.tokens} of them for each image",
        )
    bounds = item["cu_lengths"]
    if bounds.ndim != 1 or len(bounds) < 2 or int(bounds[0]) != 0 or int(bounds[-1]) != tokens.shape[1] or bool((bounds.diff() <= 0).any()):
        raise InputError(
            "cu_lengths", bounds.tolist(), f"does not rise from 0 to {tokens.shape[1]}", "give the bounds of the documents in the sequence"
        )


class VisionTransformer(MegatronModule):
    """Consecutive layers of the ViT, with the patch stem where ``pre_process`` and the final norm where ``post_process``."""

    def __init__(self, config: TransformerConfig, image: ImageSpec, num_layers: int, pre_process: bool, post_process: bool, vp_stage: int | None):
        super().__init__(config=config)
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        if pre_process:
            self.conv1 = torch.nn.Conv2d(image.channels, config.hidden_size, kernel_size=image.patch, stride=image.patch)
            self.position_embeddings = torch.nn.Embedding(image.patches, config.hidden_size)
        self.decoder = TransformerBlock(
            config=config, spec=transformer_block_spec(num_layers, causal=False), pre_process=pre_process, post_process=post_process,
            vp_stage=vp_stage,
        )

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        self.decoder.set_input_tensor(input_tensor)

    def forward(self, images: torch.Tensor | None) -> torch.Tensor:
        """Images [N, C, height, width] (None behind the stem, where the input tensor counts) -> [patches, N, hidden]."""
        hidden = None
        if self.pre_process:
            assert images is not None
            hidden = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).permute(2, 0, 1)
            # Through the module's forward, where Megatron's DDP waits for gathered weights.
            positions = self.position_embeddings(torch.arange(hidden.shape[0], device=hidden.device))
            hidden = (hidden + positions[:, None]).contiguous()
        return self.decoder(hidden_states=hidden, attention_mask=None)


class VlmStage(MegatronModule):
    """The part of the model on one place of a pipeline (see the module's docstring).

    What :meth:`set_input_tensor` takes depends on what stands first here: hidden states [patches, N, hidden] of the ViT's layers,
    embeddings [N * t, 1, H] of the images for the language model's first layers (None: no image), hidden states [S, 1, H] after them.
    """

    def __init__(self, config: VlmConfig, cuts: Mapping[str, ModuleCut], vp_stage: int, rank: int) -> None:
        """Builds what ``cuts`` put on this place.

        Args:
            cuts: of the modules that this stage may hold; see :class:`ModuleCut`.
            vp_stage: the stage's number on its rank, in every module of ``cuts``.
            rank: pipeline rank.
        """
        place = (vp_stage, rank)
        language_config = config.transformer_config(config.language)
        super().__init__(config=language_config)
        self.vlm_config = config
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = config.language.tied_embeddings
        self.input_tensor: torch.Tensor | None = None
        self.vision_model: VisionTransformer | None = None
        self.vision_projection: MultimodalProjector | None = None
        self.language_model: GPTModel | None = None
        vision, language = cuts.get(VISION), cuts.get(LANGUAGE)
        if vision is not None and vision.is_present(*place):
            self.vision_model = VisionTransformer(
                vision.config(config.transformer_config(config.vision)), config.image, vision.rows[vp_stage][rank],
                pre_process=place == vision.first, post_process=place == vision.last, vp_stage=vision.vp_stage(vp_stage),
            )
            if place == vision.last:
                self.vision_projection = MultimodalProjector(
                    config.projector_config(), projector_spec(), "mlp", config.vision.hidden_size * config.image.merge**2
                )
        if language is not None and language.is_present(*place):
            self.language_model = GPTModel(
                config=language.config(language_config),
                transformer_layer_spec=transformer_block_spec(language.rows[vp_stage][rank], causal=True),
                vocab_size=config.language.vocab_size,
                max_sequence_length=config.model.sequence_length,
                pre_process=place == language.first,
                post_process=place == language.last,
                share_embeddings_and_output_weights=config.language.tied_embeddings,
                position_embedding_type="rope",
                # Image embeddings are merged into the whole sequence, which is spread afterwards.
                scatter_embedding_sequence_parallel=False,
                vp_stage=language.vp_stage(vp_stage),
            )
        # Read by Megatron's finalize_model_grads and checkpointing.
        self.pre_process = self.language_model is not None and self.language_model.pre_process
        self.post_process = self.language_model is not None and self.language_model.post_process
        self.vp_stage = vp_stage
        if config.dtype != torch.float32:
            self.to(config.dtype)
        initialize_weights(self, config)
        for part in config.frozen_parts:
            module = getattr(self, part)
            if module is not None:
                module.requires_grad_(False)

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """Megatron's hand-over of what the stage before this one made; see the class."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def held_modules(self) -> list[str]:
        """Modules of which it has layers, in the order of data."""
        parts = ((VISION, self.vision_model), (LANGUAGE, self.language_model))
        return [name for name, part in parts if part is not None]

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return None if self.language_model is None else self.language_model.shared_embedding_or_output_weight()

    def forward(
        self,
        images: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cu_lengths: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs what the stage holds.

        Args:
            images: [N, C, height, width]; needed where the stem stands.
            tokens, position_ids, labels: int64 [1, S]; tokens with the image id stand t times in a row for each image.
            cu_lengths: int32 [D + 1], bounds of the documents, which do not attend to each other.

        Returns:
            Behind the head: the loss of each token [1, S], or without ``labels`` the logits [1, S, vocabulary / TP]. Else what the
            next stage's :meth:`set_input_tensor` takes.
        """
        hidden, self.input_tensor = self.input_tensor, None
        if self.vision_model is not None:
            hidden = self._encode(images, hidden) if self.has_images(images, hidden) else self.pass_by(hidden)
        if self.language_model is None:
            assert hidden is not None
            return hidden
        assert tokens is not None
        return self._decode(hidden, tokens, position_ids, cu_lengths, labels)

    def has_images(self, images: torch.Tensor | None, hidden: torch.Tensor | None) -> bool:
        """Whether the ViT's layers have work: without an image there is nothing to encode."""
        assert self.vision_model is not None
        return len(images) > 0 if self.vision_model.pre_process and images is not None else hidden is not None

    def pass_by(self, hidden: torch.Tensor | None) -> torch.Tensor | None:
        """What goes on where there is no image."""
        return None

    def _encode(self, images: torch.Tensor | None, hidden: torch.Tensor | None) -> torch.Tensor:
        assert self.vision_model is not None
        self.vision_model.set_input_tensor(hidden)  # type: ignore[arg-type]
        hidden = self.vision_model(images)
        if self.vision_projection is not None:
            merged = merge_patches(hidden, self.vlm_config.image)
            # [t, N, H] -> [N * t, 1, H]: in the order of the sequence.
            hidden = self.vision_projection(merged).transpose(0, 1).reshape(-1, 1, self.vlm_config.language.hidden_size)
        return hidden

    def _decode(
        self, hidden: torch.Tensor | None, tokens: torch.Tensor, position_ids: torch.Tensor | None, cu_lengths: torch.Tensor | None,
        labels: torch.Tensor | None,
    ) -> torch.Tensor:
        model = self.language_model
        assert model is not None
        decoder_input = None
        if model.pre_process:
            decoder_input = self._embed(hidden, tokens, position_ids)
        else:
            model.set_input_tensor(hidden)  # type: ignore[arg-type]
        mask = document_mask(cu_lengths, tokens.shape[1], tokens.device)
        return model(tokens, position_ids, mask, decoder_input=decoder_input, labels=labels if model.post_process else None)

    def _embed(self, image_embeddings: torch.Tensor | None, tokens: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings [S (/ TP), 1, H] with those of the images at their places."""
        assert self.language_model is not None
        embeddings = self.language_model.embedding(input_ids=tokens, position_ids=position_ids)
        if image_embeddings is not None:
            embeddings = self.merge_images(embeddings, image_embeddings, tokens)
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        return embeddings

    def merge_images(self, embeddings: torch.Tensor, image_embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        places = (tokens[0] == self.vlm_config.image.token_id).nonzero(as_tuple=True)[0]
        return embeddings.index_copy(0, places, image_embeddings.to(embeddings.dtype))


class ChainedVlmStage(VlmStage):
    """A stage of a chain of both modules: a microbatch without images sends a dummy token from stage to stage."""

    def has_images(self, images: torch.Tensor | None, hidden: torch.Tensor | None) -> bool:
        return images is not None and len(images) > 0

    def pass_by(self, hidden: torch.Tensor | None) -> torch.Tensor | None:
        assert self.vision_model is not None
        parameter = self.vision_model.decoder.layers[0].mlp.linear_fc2.weight
        width = self.vlm_config.language.hidden_size if self.vision_projection is not None else self.vlm_config.vision.hidden_size
        dummy = torch.zeros(1, 1, width, dtype=parameter.dtype, device=parameter.device)
        return dummy if hidden is None else dummy + hidden.sum() * 0

    def merge_images(self, embeddings: torch.Tensor, image_embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if not bool((tokens == self.vlm_config.image.token_id).any()):
            return embeddings + image_embeddings.sum() * 0
        return super().merge_images(embeddings, image_embeddings, tokens)


def merge_patches(hidden: torch.Tensor, image: ImageSpec) -> torch.Tensor:
    """Joins merge x merge neighbouring patches: [patches, N, hidden] -> [t, N, merge * merge * hidden]."""
    side, merge = image.size // image.patch, image.merge
    count, width = hidden.shape[1], hidden.shape[2]
    blocks = hidden.view(side // merge, merge, side // merge, merge, count, width)
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape(image.tokens, count, merge * merge * width)


def document_mask(cu_lengths: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor:
    """Mask [1, 1, S, S], true where a token may not look: behind itself, and into other documents."""
    later = torch.ones(length, length, dtype=torch.bool, device=device).triu_(1)
    if cu_lengths is not None:
        document = torch.bucketize(torch.arange(length, device=device), cu_lengths.to(device)[1:], right=True)
        later |= document[:, None] != document[None, :]
    return later[None, None]


def initialize_weights(stage: VlmStage, config: VlmConfig) -> None:
    """Draws every matrix by its checkpoint name (:mod:`megatron_dip.models.initial_weights`).

    Matrices are normal with Megatron's standard deviations (``init_method_std``, and for the matrices that write into the residual
    stream divided by sqrt(2 * layers)); biases and norms keep Megatron's zeros and ones. The head of tied embeddings takes the
    embedding's values.
    """

    def std_of(name: str, parameter: torch.nn.Parameter) -> float:
        if not name.endswith(("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")):
            return config.init_method_std
        layers = (config.vision if name.startswith("vision_model") else config.language).num_layers
        return config.init_method_std / (2 * layers) ** 0.5

    def key_of(name: str) -> str:
        key = global_name(stage, name)
        tied = key == "language_model.output_layer.weight" and stage.share_embeddings_and_output_weights
        return "language_model.embedding.word_embeddings.weight" if tied else key

    draw_weights(stage, seed=config.seed, tensor_parallel=config.parallel.tensor, std_of=std_of, key_of=key_of)


_FORWARD_SIGNATURE = inspect.signature(VlmStage.forward)


class VlmDescription:
    """The vision-language model as :class:`megatron_dip.models.description.ModelDescription`."""

    def __init__(self, config: VlmConfig) -> None:
        self.config = config

    @property
    def model_spec(self) -> ModelSpec:
        return self.config.model.modules

    num_outputs = None

    def item_metadata(self, item: Any) -> Microbatch:
        """Raises InputError for tensors that do not fit the model."""
        check_item(self.config, item)
        return self.metadata(item)

    def metadata(self, batch: dict[str, Any]) -> Microbatch:
        """Patches of each image, tokens of the packed sequence."""
        microbatch: Microbatch = {LANGUAGE: [batch["tokens"].shape[1]]}
        images = batch.get("images")
        if images is not None and len(images):
            microbatch[VISION] = [self.config.image.patches] * len(images)
        return microbatch

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        arguments = _FORWARD_SIGNATURE.bind(None, *args, **kwargs).arguments
        del arguments["self"]
        return arguments

    def num_instances(self, batch: dict[str, Any]) -> dict[str, int]:
        images = batch.get("images")
        return {VISION: 0 if images is None else len(images), LANGUAGE: 1}

    def without_stem_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch if batch.get("images") is None else {**batch, "images": batch["images"].to("meta")}

    def conditions(self, batch: dict[str, Any]) -> list[str]:
        return []  # every rank is given every batch

    def build_chunk(self, partition: Partition, module: str, vp_stage: int, rank: int) -> VlmStage:
        return VlmStage(self.config, {module: ModuleCut.of_partition(partition, module)}, vp_stage, rank)

    def boundary(self, producer: PlanStage, consumer: PlanStage, batch: Any, first_instance: int) -> PayloadSpec:
        config = self.config
        if producer.module == VISION and consumer.module == VISION:
            shape = (config.image.patches, producer.instances, config.vision.hidden_size)
        elif producer.module == VISION:
            shape = (producer.instances * config.image.tokens, 1, config.language.hidden_size)
        else:
            tokens = producer.tokens // config.parallel.tensor if config.sequence_parallel else producer.tokens
            shape = (tokens, 1, config.language.hidden_size)
        return PayloadSpec(shape, config.dtype)

    outermost = LANGUAGE

    def output_slice(self, stage: PlanStage, batch: Any, first_instance: int) -> None:
        return None

    def run_chunk(
        self, chunk: torch.nn.Module, stage: PlanStage, batch: dict[str, Any], first_instance: int,
        inputs: Mapping[str, Sequence[torch.Tensor]],
    ) -> torch.Tensor:
        model = unwrap(chunk, VlmStage)
        own = inputs.get(stage.module, ())
        if stage.module == VISION:
            images = None if own else batch["images"][first_instance : first_instance + stage.instances]
            model.set_input_tensor(own[0] if own else None)
            return chunk(images=images)
        if own:
            model.set_input_tensor(own[0])
        else:
            embeddings = inputs.get(VISION, ())
            model.set_input_tensor(torch.cat(list(embeddings)) if len(embeddings) > 1 else embeddings[0] if embeddings else None)
        return chunk(**{name: value for name, value in batch.items() if name != "images"})
