"""A vision-language model of Megatron modules: ViT with a patch stem, spatial merge and projector, GPT language model.

The ViT takes images of one size (:class:`VisionTransformer`), or is a tower for images of any size and number, packed
(:class:`megatron_dip.models.vision_tower.VisionTower`).

:class:`VlmStage` is the part of the model that one place of a pipeline holds: some layers of the ViT, some of the language model, or
both. DIP gives each stage layers of one module; stock Megatron's layouts mix them; without a pipeline one stage is the whole model. It
is the same code and the same weights everywhere, and checkpoint keys are those of Megatron's LLaVA: ``vision_model.``,
``vision_projection.``, ``language_model.``.

Letters: N images, C channels, S tokens of the packed sequence, t tokens of an image in it, H hidden size of the language model; with a
tower, F frames of images and clips, V patches of all frames, T tokens of all frames.

Not modelled: more than one packed sequence in a microbatch, context parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.activations import quick_gelu
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_dip.models.built_in import BuiltInDescription, ChainCost, layer_parameters
from megatron_dip.models.description import LANGUAGE, VISION, unwrap
from megatron_dip.models.dit import gelu_tanh
from megatron_dip.models.initial_weights import draw_weights, global_name
from megatron_dip.models.layers import Norm, projector_spec, transformer_block_spec
from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.vision_tower import (
    AddingLayer,
    DeepstackProjection,
    ImagePlaces,
    InterleavedMultimodalRotary,
    TowerLayout,
    VisionTower,
    frames_of,
)
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.training import ImageSpec, LayerOptions, TowerSpec, VisionLanguageModel, VitSpec
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
    transformer_engine: bool = False
    """Layers are Transformer Engine's."""

    def __post_init__(self) -> None:
        self.model.validate("model")
        names = sorted(module.name for module in self.model.modules.modules)
        if names != sorted((VISION, LANGUAGE)):
            raise InputError("model.modules", names, f"a vision-language model has the modules {[VISION, LANGUAGE]}", "name them so")
        if self.language.vocab_size is None:
            raise InputError("model.lm.vocab_size", None, "the language model needs a vocabulary", "give its size")
        for part in self.frozen:
            if part not in FREEZABLE:
                raise InputError("frozen", part, "the model has no such part", f"use some of {list(FREEZABLE)}")
        if self.parallel.context > 1:
            raise InputError("parallel.context", self.parallel.context, "is not supported in the models built here", "use 1")
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
            if self.layer_options(module).kv_channels is None and module.hidden_size % module.num_attention_heads:
                raise InputError(
                    f"model.{module.name}.hidden_size", module.hidden_size,
                    f"is not divisible by {module.num_attention_heads} attention heads", "change one of them",
                )
        if self.tower is not None and self.head_size(self.vision) % 4:
            raise InputError(
                "model.vit.hidden_size", self.vision.hidden_size, f"gives heads of {self.head_size(self.vision)} channels, and rotary positions "
                "in two dimensions take a multiple of 4", "change it or the number of heads",
            )
        section = self.model.language_layers.mrope_section
        if section is not None and 2 * sum(section) != self.head_size(self.language):
            raise InputError(
                "model.language_layers.mrope_section", section, f"does not add up to half of a head's {self.head_size(self.language)} channels",
                "give the pairs of channels for frame, row and column",
            )
        if self.num_deepstack > self.language.num_layers:
            raise InputError(
                "model.tower.deepstack_layers", self.num_deepstack, f"are more than the {self.language.num_layers} layers of the language model",
                "name fewer",
            )
        if self.sequence_parallel and self.num_deepstack:
            raise InputError(
                "parallel.sequence", True, "is not supported with outputs of several vision layers (deepstack)", "switch sequence parallelism off"
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
    def tower(self) -> TowerSpec | None:
        return self.model.tower

    @property
    def num_deepstack(self) -> int:
        """Outputs of the vision module into the language model's first layers, beside the one into its embeddings."""
        return 0 if self.tower is None else len(self.tower.deepstack_layers)

    def layer_options(self, module: ModuleSpec) -> LayerOptions:
        return self.model.vision_layers if module.name == VISION else self.model.language_layers

    def head_size(self, module: ModuleSpec) -> int:
        """Channels of an attention head."""
        return self.layer_options(module).kv_channels or module.hidden_size // module.num_attention_heads

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
        options = self.layer_options(module)
        return TransformerConfig(
            num_layers=module.num_layers,
            hidden_size=module.hidden_size,
            ffn_hidden_size=module.ffn_hidden_size,
            num_attention_heads=module.num_attention_heads,
            num_query_groups=module.query_groups,
            kv_channels=self.head_size(module),
            gated_linear_unit=module.has_gated_mlp,
            activation_func=_ACTIVATIONS[options.activation or ("silu" if module.has_gated_mlp else "gelu")],
            normalization=options.normalization,
            layernorm_epsilon=options.layernorm_epsilon,
            add_bias_linear=options.add_bias_linear,
            add_qkv_bias=options.add_qkv_bias,
            qk_layernorm=options.qk_layernorm,
            mrope_section=options.mrope_section,
            apply_rope_fusion=False,
            sequence_parallel=self.sequence_parallel and module.name == LANGUAGE,
            **self._common(),
        )

    def projector_config(self) -> TransformerConfig:
        # It has no attention; Megatron wants numbers of heads that the tensor-parallel ranks divide.
        heads = self.language.num_attention_heads
        inner = self.language.hidden_size if self.tower is None else self.vision.hidden_size * self.image.merge**2
        return TransformerConfig(
            num_layers=1, hidden_size=self.language.hidden_size, ffn_hidden_size=inner, num_attention_heads=heads,
            kv_channels=self.head_size(self.language), **self._common(),
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
        values, positions, inner = image.channels * image.patch**2, image.patches, language.hidden_size
        if self.tower is not None:
            values, positions, inner = values * self.tower.frames_per_patch, (self.tower.learned_positions or 0) ** 2, merged
        return {
            VISION: ChainCost(
                layer=layer_parameters(vision), first=float((values + positions) * vision.hidden_size),
                last=float((merged + language.hidden_size) * inner),
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


_ACTIVATIONS = {"gelu": torch.nn.functional.gelu, "gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu, "silu": torch.nn.functional.silu}


def check_item(config: VlmConfig, item: Mapping[str, Any]) -> None:
    """Raises InputError where the tensors of a microbatch item cannot go through the model."""
    image, tokens = config.image, item["tokens"]
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
    positions = (3, *tokens.shape) if config.model.language_layers.mrope_section is not None else tuple(tokens.shape)
    for name, shape in (("labels", tuple(tokens.shape)), ("position_ids", positions)):
        if item.get(name) is not None and tuple(item[name].shape) != shape:
            raise InputError(name, list(item[name].shape), f"is not of the shape {list(shape)}", "give the values of each token")
    needed = _check_images(config, item) if config.tower is None else _check_frames(config, item)
    places = int((tokens == image.token_id).sum())
    if places != needed:
        raise InputError(
            "tokens", places, f"tokens with the image id {image.token_id} stand in the sequence; its images need {needed}",
            f"put one for each {image.merge} x {image.merge} patches of each image{' and one behind them' if image.end_token else ''}",
        )
    bounds = item["cu_lengths"]
    if bounds.ndim != 1 or len(bounds) < 2 or int(bounds[0]) != 0 or int(bounds[-1]) != tokens.shape[1] or bool((bounds.diff() <= 0).any()):
        raise InputError(
            "cu_lengths", bounds.tolist(), f"does not rise from 0 to {tokens.shape[1]}", "give the bounds of the documents in the sequence"
        )


def _check_images(config: VlmConfig, item: Mapping[str, Any]) -> int:
    """Tokens of the images of an item, which all have the model's size."""
    image, images = config.image, item["images"]
    wanted = (image.channels, image.size, image.size)
    if images.ndim != 4 or tuple(images.shape[1:]) != wanted:
        raise InputError("images", list(images.shape), f"is not of shape [N, {', '.join(map(str, wanted))}]", "resize the images or the model")
    return len(images) * image.tokens


def _check_frames(config: VlmConfig, item: Mapping[str, Any]) -> int:
    """Tokens of the images of an item, of any size up to the model's."""
    image, patches, grids, tower = config.image, item["images"], item["image_grid_thw"], config.tower
    assert tower is not None
    if grids.ndim != 2 or grids.shape[1] != 3 or bool((grids < 1).any()):
        raise InputError("image_grid_thw", grids.tolist(), "is not [N, 3] patches, each at least 1", "give frames, rows and columns of each image")
    if bool((grids[:, 1:] % image.merge).any()):
        raise InputError(
            "image_grid_thw", grids.tolist(), f"has sides that are no multiples of {image.merge} patches, which become one token",
            f"resize images to multiples of {image.merge * image.patch} pixels",
        )
    largest = image.size // image.patch
    if bool((grids[:, 1:] > largest).any()):
        raise InputError(
            "image_grid_thw", grids.tolist(), f"has sides beyond the model's limit of {largest} patches", "resize the images or raise model.image.size"
        )
    wanted = (int(grids.prod(dim=1).sum()), image.channels * tower.frames_per_patch * image.patch**2)
    if tuple(patches.shape) != wanted:
        raise InputError("images", list(patches.shape), f"is not of shape {list(wanted)}, which image_grid_thw asks for", "give the patches of all images")
    return wanted[0] // image.merge**2


class ScaledLayer(TransformerLayer):
    """A layer whose attention's and MLP's outputs are multiplied by learned factors, ``ls1`` and ``ls2`` [H] as Megatron-LM's InternViT calls them."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.ls1 = torch.nn.Parameter(torch.ones(config.hidden_size))
        self.ls2 = torch.nn.Parameter(torch.ones(config.hidden_size))
        assert config.hidden_dropout == 0
        self.self_attn_bda = lambda training, fused: partial(_add_scaled, self.ls1)
        self.mlp_bda = lambda training, fused: partial(_add_scaled, self.ls2)


def _add_scaled(
    scale: torch.Tensor, output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
) -> torch.Tensor:
    """In the place of Megatron's addition of a bias and the residual."""
    output, bias = output_with_bias
    return residual + scale * (output if bias is None else output + bias)


class ImageProjector(MultimodalProjector):
    """Merged patches to the language model, with what stands around the two products in some models."""

    def __init__(self, config: TransformerConfig, width: int, *, norm: bool, end_token: bool) -> None:
        """Args:
        width: of merged patches.
        norm: before the products.
        end_token: a learned embedding goes behind each image's.
        """
        super().__init__(config, projector_spec(), "mlp", width)
        self.norm = Norm(config, width, config.layernorm_epsilon) if norm else None
        self.end_token = torch.nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if end_token else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[t, N, width] -> [t (+ 1), N, H]"""
        output: torch.Tensor = super().forward(hidden_states if self.norm is None else self.norm(hidden_states))
        return output if self.end_token is None else torch.cat([output, self.end_token.expand(1, output.shape[1], -1)])


class VisionTransformer(MegatronModule):
    """Consecutive layers of the ViT, with the patch stem where ``pre_process`` and the final norm where ``post_process``."""

    def __init__(
        self, config: TransformerConfig, image: ImageSpec, vit: VitSpec, num_layers: int, pre_process: bool, post_process: bool,
        vp_stage: int | None, *, transformer_engine: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        if pre_process:
            self.conv1 = torch.nn.Conv2d(image.channels, config.hidden_size, kernel_size=image.patch, stride=image.patch, bias=vit.patch_bias)
            self.position_embeddings = torch.nn.Embedding(image.patches, config.hidden_size)
            self.class_token = torch.nn.Parameter(torch.zeros(1, 1, config.hidden_size)) if image.class_token else None
            self.ln_pre = Norm(config, config.hidden_size, config.layernorm_epsilon) if vit.first_norm else None
        spec = transformer_block_spec(num_layers, causal=False, transformer_engine=transformer_engine)
        if vit.layer_scale:
            for layer in spec.layer_specs or ():
                layer.module = ScaledLayer
        self.decoder = TransformerBlock(
            config=config, spec=spec, pre_process=pre_process, post_process=post_process, post_layer_norm=vit.final_norm, vp_stage=vp_stage,
        )

    def set_input_tensor(self, input_tensor: torch.Tensor) -> None:
        self.decoder.set_input_tensor(input_tensor)

    def forward(self, images: torch.Tensor | None) -> torch.Tensor:
        """Images [N, C, height, width] (None behind the stem, where the input tensor counts) -> [patches, N, hidden]."""
        hidden = None
        if self.pre_process:
            assert images is not None
            hidden = self.conv1(images.to(self.conv1.weight.dtype)).flatten(2).permute(2, 0, 1)
            if self.class_token is not None:
                hidden = torch.cat([self.class_token.expand(1, hidden.shape[1], -1), hidden])
            # Through the module's forward, where Megatron's DDP waits for gathered weights.
            positions = self.position_embeddings(torch.arange(hidden.shape[0], device=hidden.device))
            hidden = (hidden + positions[:, None]).contiguous()
            if self.ln_pre is not None:
                hidden = self.ln_pre(hidden)
        return self.decoder(hidden_states=hidden, attention_mask=None)


class VlmStage(MegatronModule):
    """The part of the model on one place of a pipeline (see the module's docstring).

    What :meth:`set_input_tensor` takes depends on what stands first here: hidden states [patches, N, hidden] of the ViT's layers ([V, 1,
    hidden] of a tower's), embeddings [N * t, 1, H] ([T, 1, H]) of the images for the language model's first layers (None: no image), hidden
    states [S, 1, H] after them.
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
        self.vision_model: VisionTransformer | VisionTower | None = None
        self.vision_projection: MultimodalProjector | None = None
        self.language_model: GPTModel | None = None
        vision, language = cuts.get(VISION), cuts.get(LANGUAGE)
        if vision is not None and vision.is_present(*place):
            self.vision_model = _vision_part(config, vision, vp_stage, rank)
            if place == vision.last:
                self.vision_projection = ImageProjector(
                    config.projector_config(), config.vision.hidden_size * config.image.merge**2, norm=config.model.vit.projector_norm,
                    end_token=config.image.end_token,
                )
                if config.num_deepstack:
                    self.deepstack_projections = torch.nn.ModuleList(
                        DeepstackProjection(
                            config.transformer_config(config.vision), config.projector_config(), config.vision.hidden_size * config.image.merge**2
                        )
                        for _ in range(config.num_deepstack)
                    )
        if language is not None and language.is_present(*place):
            self.language_model = GPTModel(
                config=language.config(language_config),
                transformer_layer_spec=_language_spec(config, language.rows[vp_stage][rank]),
                vocab_size=config.language.vocab_size,
                max_sequence_length=config.model.sequence_length,
                pre_process=place == language.first,
                post_process=place == language.last,
                share_embeddings_and_output_weights=config.language.tied_embeddings,
                position_embedding_type="rope" if config.model.language_layers.mrope_section is None else "mrope",
                rotary_base=config.model.language_layers.rotary_base,
                # Image embeddings are merged into the whole sequence, which is spread afterwards.
                scatter_embedding_sequence_parallel=False,
                vp_stage=language.vp_stage(vp_stage),
            )
            if config.model.language_layers.mrope_interleaved:
                self.language_model.rotary_pos_emb = InterleavedMultimodalRotary(
                    config.head_size(config.language), config.model.language_layers.rotary_base
                )
        # Read by Megatron's finalize_model_grads and checkpointing.
        self.pre_process = self.language_model is not None and self.language_model.pre_process
        self.post_process = self.language_model is not None and self.language_model.post_process
        self.vp_stage = vp_stage
        if config.dtype != torch.float32:
            self.to(config.dtype)
        initialize_weights(self, config)
        for part in config.frozen_parts:
            for module in (getattr(self, part), getattr(self, "deepstack_projections", None) if part == "vision_projection" else None):
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
        image_grid_thw: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs what the stage holds.

        Args:
            images: [N, C, height, width], or patches of images of any size [V, C * frames * height * width]; needed where the stem stands.
            tokens, position_ids, labels: int64 [1, S]; tokens with the image id stand t times in a row for each image. Where tokens have
                positions in frame, row and column, ``position_ids`` is [3, 1, S].
            cu_lengths: int32 [D + 1], bounds of the documents, which do not attend to each other.
            image_grid_thw: int64 [N, 3], patches of each image or clip along time, height and width; of images of any size.

        Returns:
            Behind the head: the loss of each token [1, S], or without ``labels`` the logits [1, S, vocabulary / TP]. Else what the
            next stage's :meth:`set_input_tensor` takes.
        """
        hidden, self.input_tensor = self.input_tensor, None
        if self.vision_model is not None:
            hidden = self._encode(images, image_grid_thw, hidden) if self.has_images(images, hidden) else self.pass_by(hidden)
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

    def _encode(self, images: torch.Tensor | None, image_grid_thw: torch.Tensor | None, hidden: torch.Tensor | None) -> torch.Tensor:
        model, config = self.vision_model, self.vlm_config
        assert model is not None
        model.set_input_tensor(hidden)  # type: ignore[arg-type]
        if isinstance(model, VisionTransformer):
            hidden = model(images)
            if self.vision_projection is None:
                return hidden
            hidden = hidden[1:] if config.image.class_token else hidden
            # [t, N, H] -> [N * t, 1, H]: in the order of the sequence.
            return self.vision_projection(merge_patches(hidden, config.image)).transpose(0, 1).reshape(-1, 1, config.language.hidden_size)
        assert image_grid_thw is not None
        assert config.tower is not None
        device = next(model.parameters()).device
        layout = TowerLayout.of_frames(frames_of(image_grid_thw.cpu()), config.image, config.tower, device)
        hidden = model(images, layout)
        if self.vision_projection is None:
            return hidden
        return torch.cat(self.project(hidden, layout))

    def project(self, hidden: torch.Tensor, layout: TowerLayout) -> list[torch.Tensor]:
        """What the tower's last layer, and then its deepstack layers, become in the language model: [T, 1, H] each, in the frames' order.

        Args:
            hidden: [V * (1 + k), 1, hidden of the tower]
        """
        assert self.vision_projection is not None
        blocks = len(layout.order)
        back = layout.order.argsort()
        projections = [self.vision_projection, *getattr(self, "deepstack_projections", ())]
        parts = hidden.view(len(projections), blocks, 1, -1).unbind()
        return [projection(part)[back] for projection, part in zip(projections, parts, strict=True)]

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
        bounds = document_bounds(cu_lengths, tokens, self.image_places(tokens) if self.vlm_config.num_deepstack else None)
        return model(
            tokens, position_ids, None, decoder_input=decoder_input, labels=labels if model.post_process else None, packed_seq_params=bounds
        )

    def image_places(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [T], where the images' tokens stand in [1, S]."""
        return (tokens[0] == self.vlm_config.image.token_id).nonzero(as_tuple=True)[0]

    def _embed(self, image_embeddings: torch.Tensor | None, tokens: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings [S (/ TP), 1, H] with those of the images at their places; what goes into later layers stands behind them."""
        assert self.language_model is not None
        embeddings = self.language_model.embedding(input_ids=tokens, position_ids=position_ids)
        if image_embeddings is not None:
            own, *later = image_embeddings.chunk(1 + self.vlm_config.num_deepstack)
            embeddings = self.merge_images(embeddings, own, tokens)
            if later:
                embeddings = torch.cat([embeddings, *(part.to(embeddings.dtype) for part in later)])
        if self.config.sequence_parallel:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
        return embeddings

    def merge_images(self, embeddings: torch.Tensor, image_embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return embeddings.index_copy(0, self.image_places(tokens), image_embeddings.to(embeddings.dtype))


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
    return blocks.permute(0, 2, 4, 1, 3, 5).reshape((side // merge) ** 2, count, merge * merge * width)


def document_bounds(cu_lengths: torch.Tensor | None, tokens: torch.Tensor, image_places: torch.Tensor | None = None) -> ImagePlaces:
    """Bounds of the documents of tokens [1, S]; None: they are one document."""
    bounds = torch.tensor([0, tokens.shape[1]], dtype=torch.int32, device=tokens.device) if cu_lengths is None else cu_lengths
    longest = int(bounds.diff().max())
    return ImagePlaces(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest, image_places=image_places
    )


def _language_spec(config: VlmConfig, num_layers: int) -> TransformerBlockSubmodules:
    spec = transformer_block_spec(
        num_layers, causal=True, packed=True, qk_layernorm=config.model.language_layers.qk_layernorm, transformer_engine=config.transformer_engine
    )
    if config.num_deepstack:
        for layer in spec.layer_specs or ():
            layer.module, layer.params = AddingLayer, {"num_added": config.num_deepstack}
    return spec


def _vision_part(config: VlmConfig, cut: ModuleCut, vp_stage: int, rank: int) -> VisionTransformer | VisionTower:
    """The layers of the ViT that ``cut`` puts on a place."""
    place, own = (vp_stage, rank), cut.config(config.transformer_config(config.vision))
    ends = {"pre_process": place == cut.first, "post_process": place == cut.last}
    engine = config.transformer_engine
    if config.tower is None:
        return VisionTransformer(
            own, config.image, config.model.vit, cut.rows[vp_stage][rank], **ends, vp_stage=cut.vp_stage(vp_stage), transformer_engine=engine
        )
    return VisionTower(
        own, config.image, config.tower, cut.rows[vp_stage][rank], **ends, vp_stage=cut.vp_stage(vp_stage), depth=config.vision.num_layers,
        transformer_engine=engine,
    )


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


class VlmDescription(BuiltInDescription[VlmConfig]):
    """The vision-language model as :class:`megatron_dip.models.description.ModelDescription`."""

    stage_forward = VlmStage.forward
    check_item = staticmethod(check_item)
    undivided = ()

    def typical_microbatch(self, sequences: int, length: int) -> Microbatch:
        """Packed sequences of which images are a half."""
        patches, longest = self.config.image.patches, min(length, self.config.model.sequence_length)
        return {VISION: [patches] * max(1, sequences * longest // (2 * patches)), LANGUAGE: [longest] * sequences}

    def metadata(self, batch: dict[str, Any]) -> Microbatch:
        """Patches of each image or frame, tokens of the packed sequence."""
        microbatch: Microbatch = {LANGUAGE: [batch["tokens"].shape[1]]}
        if self.config.tower is not None:
            lengths = self._frames(batch).prod(dim=1).tolist()
        else:
            lengths = [self.config.image.patches] * (0 if batch.get("images") is None else len(batch["images"]))
        if lengths:
            microbatch[VISION] = lengths
        return microbatch

    def _frames(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Patches along height and width of each frame, int64 [F, 2]; on the host, where bound batches have the grids already."""
        grids = batch.get("image_grid_thw")
        return torch.zeros(0, 2, dtype=torch.int64) if grids is None else frames_of(grids.cpu())

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        arguments = super().bind(args, kwargs)
        if arguments.get("image_grid_thw") is not None:
            arguments["image_grid_thw"] = arguments["image_grid_thw"].cpu()
        return arguments

    def num_instances(self, batch: dict[str, Any]) -> dict[str, int]:
        return {VISION: len(self.metadata(batch).get(VISION, ())), LANGUAGE: 1}

    def without_stem_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch if batch.get("images") is None else {**batch, "images": batch["images"].to("meta")}

    def conditions(self, batch: dict[str, Any]) -> list[str]:
        return []  # every rank is given every batch

    def boundary(self, producer: PlanStage, consumer: PlanStage, batch: Any, first_instance: int) -> PayloadSpec:
        config = self.config
        last_layer = sum(producer.layers)  # the number of layers up to the producer's end
        kept = 0 if config.tower is None else sum(layer < last_layer for layer in config.tower.deepstack_layers)
        if producer.module == VISION and consumer.module == VISION:
            rows = (config.image.patches, producer.instances) if config.tower is None else (producer.tokens * (1 + kept), 1)
            shape = (*rows, config.vision.hidden_size)
        elif producer.module == VISION:
            tokens = producer.instances * config.image.tokens if config.tower is None else producer.tokens // config.image.merge**2 * (1 + kept)
            shape = (tokens, 1, config.language.hidden_size)
        else:
            tokens = producer.tokens // config.parallel.tensor if config.sequence_parallel else producer.tokens
            left = max(0, config.num_deepstack - last_layer)
            if left:
                tokens += left * (int(self._frames(batch).prod(dim=1).sum()) // config.image.merge**2)
            shape = (tokens, 1, config.language.hidden_size)
        return PayloadSpec(shape, config.dtype)

    def output_slice(self, stage: PlanStage, batch: Any, first_instance: int) -> None:
        return None

    def run_chunk(
        self, chunk: torch.nn.Module, stage: PlanStage, batch: dict[str, Any], first_instance: int,
        inputs: Mapping[str, Sequence[torch.Tensor]],
    ) -> torch.Tensor:
        model = unwrap(chunk, VlmStage)
        own = inputs.get(stage.module, ())
        if stage.module == VISION:
            model.set_input_tensor(own[0] if own else None)
            if self.config.tower is None:
                return chunk(images=None if own else batch["images"][first_instance : first_instance + stage.instances])
            frames = self._frames(batch)
            mine = frames[first_instance : first_instance + stage.instances]
            start = int(frames[:first_instance].prod(dim=1).sum())
            grids = torch.cat([torch.ones(len(mine), 1, dtype=torch.int64), mine], dim=1)
            return chunk(images=None if own else batch["images"][start : start + stage.tokens], image_grid_thw=grids)
        if own:
            model.set_input_tensor(own[0])
        else:
            # By payload the tokens of its images, for the embeddings and then for each of the first layers.
            payloads = inputs.get(VISION, ())
            parts = [payload.chunk(1 + self.config.num_deepstack) for payload in payloads]
            together = payloads[0] if len(payloads) == 1 else torch.cat([part for layer in zip(*parts, strict=True) for part in layer]) if parts else None
            model.set_input_tensor(together)
        return chunk(**{name: value for name, value in batch.items() if name not in ("images", "image_grid_thw")})
