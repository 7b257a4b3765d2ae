"""The parts that Megatron's multimodal models are made of, cut into chunks: vision models, and language models between two ranks.

Letters: n images (tiles) in a sub-microbatch, s tokens of an image in the vision model, S tokens of a sequence, b sequences, h hidden.

Context and sequence parallelism divide the language model's sequences. Vision models run whole images on every rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.vision.clip_vit_model import CLIPViTModel
from megatron.core.models.vision.radio import RADIOViTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.description import LANGUAGE
from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.provided import Sketch, cut_config
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModuleSpec as Module
from megatron_dip.spec.plan import PlanStage

VISION_MODELS = (CLIPViTModel, RADIOViTModel)

STEM = ("conv1", "patch_embed", "position_embeddings", "class_token", "embedder", "video_embedder", "mask_token", "ln_pre")
"""What stands before the layers, in the vision models."""

_VARYING = ("dynamic_resolution", "temporal_ckpt_compat", "separate_video_embedder")
"""Arguments of vision models whose images differ in length."""


def vision_chunk_class(builder: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The vision model's class, with a forward from and to hidden states [s, n, h], as its layers have them, where others stand before or
    behind: turned, as the whole model takes and gives them, each chunk would keep its input twice."""

    class VisionChunk(builder):  # type: ignore[valid-type, misc]
        has_stem = has_end = True

        def keep(self, *, stem: bool, end: bool) -> None:
            """Drops what stands before the layers, or behind them."""
            self.has_stem, self.has_end = stem, end
            if not stem:
                for name in STEM:
                    if hasattr(self, name):
                        delattr(self, name)
            if not end:
                self.ln_post = None

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.has_stem:
                hidden = super().forward(x, *args, **kwargs)
                return hidden if self.has_end else hidden.permute(1, 0, 2)
            hidden = self.decoder(x, attention_mask=None)
            if not self.has_end:
                return hidden
            hidden = hidden.permute(1, 0, 2).contiguous()
            return hidden if self.ln_post is None else self.ln_post(hidden)

    VisionChunk.__name__ = VisionChunk.__qualname__ = f"{builder.__name__}Chunk"
    return VisionChunk


class VisionTower:
    """A script's vision model, to be cut."""

    def __init__(self, sketch: Sketch) -> None:
        """Raises InputError for vision models whose images differ in length, or are divided over ranks."""
        self._sketch = sketch
        self._chunk_class = vision_chunk_class(sketch.builder)  # type: ignore[arg-type]
        defaults = {name: parameter.default for name, parameter in inspect.signature(sketch.builder.__init__).parameters.items()}
        self._arguments = {**defaults, **sketch.arguments}
        self.config: TransformerConfig = self._arguments["transformer_config"]
        for name in _VARYING:
            if self._arguments.get(name):
                raise InputError(f"--{name.replace('_', '-')}", True, "images of different sizes cannot be divided yet", "leave it out")
        if self.config.sequence_parallel or self.config.context_parallel_size > 1:
            raise InputError(
                "model_provider: transformer_config of the vision model",
                {"sequence_parallel": self.config.sequence_parallel, "context_parallel_size": self.config.context_parallel_size},
                f"Megatron-Core's {sketch.builder.__name__} takes whole images on every rank",
                "set sequence_parallel=False and context_parallel_size=1 in its config, as pretrain_vlm.py does",
            )

    @property
    def trainable(self) -> bool:
        return self._sketch.trainable

    @property
    def params_dtype(self) -> torch.dtype:
        return self.config.params_dtype

    def length_of(self, images: torch.Tensor | None) -> int:
        """s, of images [n, 3, height, width] or without any."""
        return self.length

    @property
    def length(self) -> int:
        """s."""
        given = self._arguments
        patches = (given["img_h"] // given["patch_dim"]) * (given["img_w"] // given["patch_dim"])
        return int(patches + (given["class_token_len"] if given["add_class_token"] else 0))

    def spec(self, name: str, *, trainable: bool) -> Module:
        """Args:
        trainable: whether the module is, its projector included.
        """
        return module_spec(name, "vit", "encoder", self.config, trainable=trainable, causal=False)

    def dtype_between(self, residual: torch.dtype) -> torch.dtype:
        """Of what goes from chunk to chunk, where hidden states have the type ``residual``."""
        return residual

    def boundary(self, producer: PlanStage, residual: torch.dtype, images: torch.Tensor | None) -> PayloadSpec:
        """Hidden states between two chunks: [s, n, h]."""
        dtype = self.dtype_between(residual)
        return PayloadSpec((self.length, producer.instances, self.config.hidden_size), dtype)

    def build_chunk(self, cut: ModuleCut, vp_stage: int, rank: int) -> torch.nn.Module:
        """Frozen where the script froze it."""
        changes = {"transformer_config": cut_config(self.config, cut), "vp_stage": cut.vp_stage(vp_stage)}
        chunk = self._chunk_class(**{**self._sketch.arguments, **changes})
        if not self.trainable:
            chunk.requires_grad_(False)
        chunk.keep(stem=(vp_stage, rank) == cut.first, end=(vp_stage, rank) == cut.last)  # type: ignore[operator]
        return chunk


class LanguageModel:
    """A script's GPTModel, to be cut."""

    def __init__(self, sketch: Sketch) -> None:
        self._sketch = sketch
        self.config: TransformerConfig = sketch.arguments["config"]

    @property
    def spec(self) -> Module:
        given = self._sketch.arguments
        return module_spec(
            LANGUAGE, "lm", "backbone", self.config, trainable=self._sketch.trainable, causal=True, vocab_size=given["vocab_size"],
            tied_embeddings=bool(given.get("share_embeddings_and_output_weights", False)),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and embeddings between chunks, of encoders too."""
        return torch.float32 if self.config.fp32_residual_connection else self.config.params_dtype

    @property
    def divisor(self) -> int:
        """What S must be a multiple of: under context parallelism a rank has two pieces of each sequence, one from either end."""
        pieces = 2 * self.config.context_parallel_size if self.config.context_parallel_size > 1 else 1
        return pieces * (self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1)

    def check_length(self, length: int) -> None:
        """Raises InputError for sequences of ``length`` tokens that context and sequence parallelism cannot divide."""
        if length % self.divisor:
            raise InputError(
                "forward_step: input_ids", length, "sequences with their embeddings are this long, which context and sequence parallelism cannot "
                "divide", f"pad to a multiple of {self.divisor}",
            )

    def boundary(self, producer: PlanStage) -> PayloadSpec:
        """Hidden states between two chunks: [S / CP (/ TP under sequence parallelism), b, h]."""
        length = producer.tokens // producer.instances // self.config.context_parallel_size
        if self.config.sequence_parallel:
            length //= self.config.tensor_model_parallel_size
        return PayloadSpec((length, producer.instances, self.config.hidden_size), self.dtype)

    def build_chunk(self, cut: ModuleCut, vp_stage: int, rank: int) -> torch.nn.Module:
        """With the cut's layers, embedding and head; frozen where the script froze it."""
        return self._sketch.build(
            config=cut_config(self.config, cut), pre_process=(vp_stage, rank) == cut.first, post_process=(vp_stage, rank) == cut.last,
            vp_stage=cut.vp_stage(vp_stage),
            transformer_layer_spec=cut_layer_spec(self._sketch.arguments["transformer_layer_spec"], cut, vp_stage, rank),
        )


def cut_layer_spec(spec: Any, cut: ModuleCut, vp_stage: int, rank: int, *, perhaps_cut: bool = False) -> Any:
    """A spec for the layers of one chunk, from one for the whole module.

    A spec of one layer stands for all of them; one that lists the layers (as for a mixture of experts) would be built as it is.

    Args:
        perhaps_cut: whether the script was asked for this chunk, so that it may have listed the chunk's layers.

    Raises:
        InputError: for another number of layers.
    """
    block = spec.submodules if isinstance(spec, ModuleSpec) else spec
    if not isinstance(block, TransformerBlockSubmodules) or block.layer_specs is None:
        return spec
    if perhaps_cut and len(block.layer_specs) == cut.rows[vp_stage][rank]:
        return spec
    before = sum(map(sum, cut.rows[:vp_stage])) + sum(cut.rows[vp_stage][:rank])
    if len(block.layer_specs) != sum(map(sum, cut.rows)):
        raise InputError(
            "model_provider: transformer_layer_spec", len(block.layer_specs), f"lists other than the model's {sum(map(sum, cut.rows))} layers",
            "give the spec of the whole model, whatever the pipeline rank",
        )
    own = replace(block, layer_specs=block.layer_specs[before : before + cut.rows[vp_stage][rank]])
    return replace(spec, submodules=own) if isinstance(spec, ModuleSpec) else own


def module_spec(name: str, kind: Any, role: Any, config: TransformerConfig, *, causal: bool, trainable: bool, **others: Any) -> Module:
    """A module's spec from Megatron's config."""
    return Module(
        name=name, kind=kind, role=role, num_layers=config.num_layers, hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size, num_attention_heads=config.num_attention_heads, num_query_groups=config.num_query_groups,
        causal=causal, gated_mlp=bool(config.gated_linear_unit), trainable=trainable, **others,
    )


def language_conditions(batch: Mapping[str, Any], *names: str) -> list[str]:
    """Those of ``names`` that a bound batch has and that change what a language model's layers attend to."""
    return [name for name in names if batch.get(name) is not None and not (name == "attention_mask" and _is_causal(batch[name]))]


def _is_causal(mask: torch.Tensor) -> bool:
    """Whether a mask says no more than that nobody looks ahead, which layers without a mask do by themselves.

    Args:
        mask: [1 or b, 1, S, S], or the rows [1 or b, 1, S / CP, S] of a context-parallel rank.
    """
    if mask.dim() != 4:
        return False
    rows, length = mask.shape[-2:]
    position = torch.arange(length, device=mask.device)
    row_position = position
    if rows != length:
        ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
        if rows * ranks != length or rows % 2:
            return False
        pieces = position.view(2 * ranks, rows // 2)  # as Megatron's get_batch_on_this_cp_rank divides them
        row_position = torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])
    # In blocks: beside the layers there need not be room for another two of S x S. One answer, since each makes the host wait.
    agrees = [
        (mask[..., at : at + _BLOCK, :] == (position > row_position[at : at + _BLOCK, None])).all() for at in range(0, rows, _BLOCK)
    ]
    return bool(torch.stack(agrees).all()) if agrees else True


_BLOCK = 256
"""Rows of a mask that are looked at in one go."""


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of integers as flat int64 on the host, in one copy where they lie on one device: each makes the host wait for it."""
    flat = [tensor.detach().flatten().long() for tensor in tensors]
    if len({one.device for one in flat}) > 1:
        return [one.cpu() for one in flat]
    return list(torch.cat(flat).cpu().split([one.numel() for one in flat]))


def copy_attributes(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """What a model of Megatron's class was given and derived, for a chunk of it that is built without its constructor."""
    own = vars(target)
    for name, value in vars(source).items():
        if name not in own:
            setattr(target, name, value)
