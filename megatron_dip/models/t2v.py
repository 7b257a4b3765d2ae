"""A text-to-video model of Megatron modules: a language model that encodes captions, a diffusion transformer that it conditions.

:class:`TextToVideoStage` is the part of the model that one place of a pipeline holds: some layers of the language model, some of the DiT,
or both. DIP gives each stage layers of one module; stock Megatron's layouts mix them; without a pipeline one stage is the whole model.
Checkpoint keys start with ``language_model.`` (those of a GPTModel without its head) and ``diffusion_model.`` (see
:class:`megatron_dip.models.dit.DiTCrossAttentionModel`).

The language model may be trained, frozen (it then only runs forward), or absent: text embeddings come with the data then. A microbatch
is a pack of n clips of any sizes with a caption each; an instance of the language model is a caption, one of the DiT a clip.

Letters: n clips, S patches of all clips, T caption tokens of all clips, W hidden size of the language model, H that of the DiT.

Not modelled: sequence, context and expert parallelism; dropout.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.built_in import BuiltInDescription, ChainCost, layer_parameters
from megatron_dip.models.description import OutputSlice, unwrap
from megatron_dip.models.dit import DiTCrossAttentionModel, DiTSizes, gelu_tanh, packed_bounds, positions_of, state_rows
from megatron_dip.models.initial_weights import draw_weights, global_name
from megatron_dip.models.layers import transformer_block_spec
from megatron_dip.models.layout import ModuleCut
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.plan import PlanStage
from megatron_dip.spec.training import TextToVideoModel, VideoSpec
from megatron_dip.spec.workload import Microbatch, Parallel
from megatron_dip.workloads.generators import typical_clips

LANGUAGE = "lm"
DIFFUSION = "dit"


@dataclass(frozen=True, slots=True, kw_only=True)
class TextToVideoConfig:
    """The whole model, before any cut."""

    model: TextToVideoModel
    """Modules named ``dit`` and, unless text embeddings come with the data, ``lm``; one that is not trainable is frozen."""
    parallel: Parallel
    dtype: torch.dtype = torch.float32
    seed: int = 1234
    """Of the weights: equal for every cut and every tensor-parallel size."""
    init_method_std: float = 0.02
    zero_std: float = 0.0
    """Standard deviation of the weights that adaLN-Zero and Wan's head start from zero; tests draw them, to see their gradients."""
    calculate_per_token_loss: bool = False
    """Megatron's: divide by the global batch's number of what the loss counts instead of each microbatch's."""
    transformer_engine: bool = False
    """The DiT's layers are Transformer Engine's."""
    use_cpu_initialization: bool = True

    def __post_init__(self) -> None:
        self.model.modules.validate("model")
        self.model.video.validate("model.video")
        names = [module.name for module in self.model.modules.modules]
        if sorted(names) not in ([DIFFUSION], sorted((DIFFUSION, LANGUAGE))):
            raise InputError("model.modules", names, f"a text-to-video model has the modules {[LANGUAGE, DIFFUSION]}", "name them so")
        if self.language is not None and self.language.vocab_size is None:
            raise InputError("model.lm.vocab_size", None, "the language model needs a vocabulary", "give its size")
        if (self.language is None) == (self.model.video.text_width is None):
            raise InputError(
                "model.video.text_width", self.model.video.text_width, "stands for text embeddings that come with the data",
                "give it where the model has no language model, and only there",
            )
        if self.parallel.context > 1:
            raise InputError("parallel.context", self.parallel.context, "a text-to-video model's attention is not divided", "use 1")
        if self.transformer_engine and importlib.util.find_spec("transformer_engine") is None:
            raise InputError(
                "--transformer-impl", "transformer_engine", "Transformer Engine is not installed", "install it, or use --transformer-impl local"
            )
        if self.parallel.sequence:
            raise InputError("parallel.sequence", True, "sequence parallelism is not supported in a text-to-video model", "leave it out")
        tensor = self.parallel.tensor
        for module in self.model.modules.modules:
            sizes = {"num_attention_heads": module.num_attention_heads, "num_query_groups": module.query_groups,
                     "ffn_hidden_size": module.ffn_hidden_size, "vocab_size": module.vocab_size or tensor}
            for field, value in sizes.items():
                if value % tensor:
                    raise InputError(
                        f"model.{module.name}.{field}", value, f"is not divisible by {tensor} tensor-parallel ranks",
                        "change it or the tensor-parallel size",
                    )
            if module.hidden_size % (2 * module.num_attention_heads):
                raise InputError(
                    f"model.{module.name}.hidden_size", module.hidden_size,
                    f"does not give {module.num_attention_heads} heads of even size, which rotary positions need", "change one of them",
                )
        if self.diffusion.query_groups != self.diffusion.num_attention_heads:
            raise InputError(
                "model.dit.num_query_groups", self.diffusion.query_groups, "Megatron's cross attention has no query groups", "leave it out"
            )

    @property
    def language(self) -> ModuleSpec | None:
        return next((module for module in self.model.modules.modules if module.name == LANGUAGE), None)

    @property
    def diffusion(self) -> ModuleSpec:
        return self.model.modules.module(DIFFUSION)

    @property
    def video(self) -> VideoSpec:
        return self.model.video

    @property
    def sizes(self) -> DiTSizes:
        video, language = self.video, self.language
        width = video.text_width if language is None else language.hidden_size
        assert width is not None
        return DiTSizes(
            in_channels=video.channels, patch_spatial=video.patch_spatial, patch_temporal=video.patch_temporal, freq_dim=video.freq_dim,
            crossattn_emb_size=width, pooled_text=video.pooled_text, absolute_positions=video.absolute_positions,
        )

    @property
    def model_spec(self) -> ModelSpec:
        return self.model.modules

    @property
    def outermost(self) -> str:
        return DIFFUSION

    @property
    def has_fixed_lengths(self) -> bool:
        return False

    def describe(self) -> TextToVideoDescription:
        return TextToVideoDescription(self)

    def build_stage(self, cuts: Mapping[str, ModuleCut], vp_stage: int, rank: int, *, is_chained: bool) -> TextToVideoStage:
        return TextToVideoStage(self, cuts, vp_stage, rank)

    def parameter_costs(self) -> dict[str, ChainCost]:
        diffusion, sizes = self.diffusion, self.sizes
        hidden = diffusion.hidden_size
        text = (2 if sizes.pooled_text else 1) * sizes.crossattn_emb_size
        embedders = sizes.patch_size + text + hidden + sizes.freq_dim + hidden + 6 * hidden
        costs = {
            DIFFUSION: ChainCost(
                layer=layer_parameters(diffusion), first=float(embedders * hidden), last=float(sizes.patch_size * hidden)
            )
        }
        if self.language is not None:
            words = float((self.language.vocab_size or 0) * self.language.hidden_size)
            costs[LANGUAGE] = ChainCost(layer=layer_parameters(self.language), first=words)
        return costs

    def transformer_config(self, module: ModuleSpec) -> TransformerConfig:
        """Megatron's config of a whole module."""
        is_diffusion = module.name == DIFFUSION
        activation = torch.nn.functional.silu if module.has_gated_mlp else gelu_tanh if is_diffusion else torch.nn.functional.gelu
        return TransformerConfig(
            num_layers=module.num_layers,
            hidden_size=module.hidden_size,
            ffn_hidden_size=module.ffn_hidden_size,
            num_attention_heads=module.num_attention_heads,
            num_query_groups=module.query_groups,
            gated_linear_unit=module.has_gated_mlp,
            activation_func=activation,
            rotary_interleaved=is_diffusion,
            layernorm_epsilon=1e-6 if is_diffusion else 1e-5,
            apply_rope_fusion=False,
            tensor_model_parallel_size=self.parallel.tensor,
            pipeline_dtype=self.dtype,
            params_dtype=self.dtype,
            bf16=self.dtype == torch.bfloat16,
            fp16=self.dtype == torch.float16,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            init_method_std=self.init_method_std,
            calculate_per_token_loss=self.calculate_per_token_loss,
            use_cpu_initialization=self.use_cpu_initialization,
            batch_p2p_comm=False,
            # Megatron refuses variable_seq_lengths, which the stock layouts need, under the other dispatchers; there are no experts here.
            moe_token_dispatcher_type="alltoall",
        )


def check_batch(config: TextToVideoConfig, batch: Mapping[str, Any]) -> None:
    """Raises InputError where the tensors of a microbatch cannot go through the model."""
    grids, lengths = batch.get("grid_sizes"), batch.get("text_lengths")
    if grids is None or grids.ndim != 2 or grids.shape[1] != 3 or not len(grids) or bool((grids < 1).any()):
        raise InputError(
            "grid_sizes", None if grids is None else grids.tolist(), "is not [n, 3] patches of at least one clip, each at least 1",
            "give every clip's patches along time, height and width; leave clips without frames out",
        )
    if lengths is None or lengths.shape != grids.shape[:1] or bool((lengths < 1).any()):
        raise InputError(
            "text_lengths", None if lengths is None else lengths.tolist(), f"does not give each of the {len(grids)} clips a caption",
            "give every clip at least one text token",
        )
    patches, tokens = int(grids.prod(dim=1).sum()), int(lengths.sum())
    wanted = {"x": (patches, 1, config.sizes.patch_size), "timesteps": (len(grids),)}
    if config.language is None:
        wanted["crossattn_emb"] = (tokens, 1, config.sizes.crossattn_emb_size)
    else:
        wanted["tokens"] = (1, tokens)
    for name, shape in wanted.items():
        value = batch.get(name)
        if value is None or tuple(value.shape) != shape:
            raise InputError(
                name, None if value is None else list(value.shape), f"is not of shape {list(shape)}, which grid_sizes and text_lengths ask for",
                "pack latents and captions of the same clips, in the sizes of the model",
            )
    if tokens > config.model.sequence_length:
        raise InputError(
            "text_lengths", tokens, f"are more than the model's {config.model.sequence_length} tokens",
            "shorten the captions or raise model.sequence_length",
        )


class TextEncoder(MegatronModule):
    """Consecutive layers of a language model without a head; with the embedding where ``pre_process``, the final norm where
    ``post_process``."""

    def __init__(
        self, config: TransformerConfig, vocab_size: int, max_sequence_length: int, num_layers: int, pre_process: bool, post_process: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.pre_process = pre_process
        if pre_process:
            self.embedding = LanguageModelEmbedding(config, vocab_size, max_sequence_length, position_embedding_type="rope")
        assert config.kv_channels is not None
        self.rotary_pos_emb = RotaryEmbedding(config.kv_channels, rotary_percent=1.0, use_cpu_initialization=config.use_cpu_initialization)
        self.decoder = TransformerBlock(
            config=config, spec=transformer_block_spec(num_layers, causal=True, packed=True), pre_process=pre_process,
            post_process=post_process, vp_stage=vp_stage,
        )

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        self.decoder.set_input_tensor(input_tensor)  # type: ignore[arg-type]

    def forward(self, tokens: torch.Tensor | None, text_lengths: torch.Tensor) -> torch.Tensor:
        """Captions behind each other, int64 [1, T] (None behind the embedding), and their lengths [n] -> [T, 1, W]."""
        bounds = torch.nn.functional.pad(text_lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(text_lengths.max())
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        hidden = None
        if self.pre_process:
            assert tokens is not None
            hidden = self.embedding(input_ids=tokens, position_ids=None)
        return self.decoder(
            hidden_states=hidden, attention_mask=None, rotary_pos_emb=self.rotary_pos_emb(longest), packed_seq_params=packed
        )


class TextToVideoStage(MegatronModule):
    """The part of the model on one place of a pipeline (see the module's docstring).

    What :meth:`set_input_tensor` takes depends on what stands first here: hidden states [T, 1, W] of the language model's layers, its
    output of the same shape for the DiT's first layers, a packed :class:`~megatron_dip.models.dit.DiTState` after them.
    """

    def __init__(self, config: TextToVideoConfig, cuts: Mapping[str, ModuleCut], vp_stage: int, rank: int) -> None:
        """Builds what ``cuts`` put on this place.

        Args:
            cuts: of the modules that this stage may hold; see :class:`ModuleCut`.
            vp_stage: the stage's number on its rank, in every module of ``cuts``.
            rank: pipeline rank.
        """
        place = (vp_stage, rank)
        diffusion_config = config.transformer_config(config.diffusion)
        super().__init__(config=diffusion_config)
        self.t2v_config = config
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = False
        self.input_tensor: torch.Tensor | None = None
        self.language_model: TextEncoder | None = None
        self.diffusion_model: DiTCrossAttentionModel | None = None
        language, diffusion = cuts.get(LANGUAGE), cuts.get(DIFFUSION)
        if language is not None and language.is_present(*place):
            assert config.language is not None
            assert config.language.vocab_size is not None
            self.language_model = TextEncoder(
                language.config(config.transformer_config(config.language)), config.language.vocab_size, config.model.sequence_length,
                language.rows[vp_stage][rank], pre_process=place == language.first, post_process=place == language.last,
                vp_stage=language.vp_stage(vp_stage),
            )
        if diffusion is not None and diffusion.is_present(*place):
            self.diffusion_model = DiTCrossAttentionModel(
                diffusion.config(diffusion_config), config.sizes, diffusion.rows[vp_stage][rank], pre_process=place == diffusion.first,
                post_process=place == diffusion.last, vp_stage=diffusion.vp_stage(vp_stage), transformer_engine=config.transformer_engine,
            )
        # Read by Megatron's finalize_model_grads and checkpointing.
        self.pre_process = self.language_model is not None and self.language_model.pre_process
        self.post_process = self.diffusion_model is not None and self.diffusion_model.post_process
        self.vp_stage = vp_stage
        if config.dtype != torch.float32:
            self.to(config.dtype)
        initialize_weights(self, config)
        for part, module in ((self.language_model, config.language), (self.diffusion_model, config.diffusion)):
            if part is not None and module is not None and not module.trainable:
                part.requires_grad_(False)

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor | None] | None) -> None:
        """Megatron's hand-over of what the stage before this one made; see the class."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def held_modules(self) -> list[str]:
        """Modules of which it has layers, in the order of data."""
        parts = ((LANGUAGE, self.language_model), (DIFFUSION, self.diffusion_model))
        return [name for name, part in parts if part is not None]

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return None

    def forward(
        self,
        x: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        crossattn_emb: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        grid_sizes: torch.Tensor | None = None,
        text_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs what the stage holds.

        Args:
            x: noised patches of all clips [S, 1, C * p]; needed where the DiT begins, like ``timesteps`` of each clip [n].
            crossattn_emb: text embeddings of all clips [T, 1, text width], where the model has no language model.
            tokens: captions of all clips behind each other, int64 [1, T], where it has one.
            grid_sizes: int64 [n, 3], patches of each clip along time, height and width.
            text_lengths: int64 [n], text tokens of each clip.

        Returns:
            Behind the final layer the predicted velocity [S, 1, C * p], else what the next stage's :meth:`set_input_tensor` takes.
        """
        hidden, self.input_tensor = self.input_tensor, None
        assert text_lengths is not None
        if self.language_model is not None:
            self.language_model.set_input_tensor(hidden)
            hidden = self.language_model(tokens, text_lengths)
        if self.diffusion_model is None:
            assert hidden is not None
            return hidden
        assert grid_sizes is not None
        if self.diffusion_model.pre_process:
            text = crossattn_emb if hidden is None else hidden
        else:
            text = None
            self.diffusion_model.set_input_tensor(hidden)
        return self.diffusion_model(x, timesteps, text, packed_bounds(grid_sizes, text_lengths), positions_of(grid_sizes))


_FROM_ZERO = ("modulation", "t_embedder.time_proj.weight", "final_layer_linear.weight")
_BY_INPUTS = ("x_embedder.weight", "linear_1.weight", "linear_2.weight", "text_embedder.weight")
_POOLED_GAIN = 3.0
"""By which the pooled text's matrix is larger: in a mean over tokens what single words say is small."""


def initialize_weights(stage: TextToVideoStage, config: TextToVideoConfig) -> None:
    """Draws every matrix by its checkpoint name (:mod:`megatron_dip.models.initial_weights`).

    Layers have Megatron's standard deviations (``init_method_std``, divided by sqrt(2 * layers) for what writes into the residual
    stream), the DiT's embedders 1 / sqrt(inputs), and what gates layers (adaLN-Zero) and the head start from zero.
    """

    def std_of(name: str, parameter: torch.nn.Parameter) -> float:
        if name.endswith(_FROM_ZERO):
            return config.zero_std
        if name.endswith(_BY_INPUTS):
            return parameter.shape[1] ** -0.5 * (_POOLED_GAIN if name.endswith("text_embedder.weight") else 1.0)
        if ".embedding." in name and config.model.embedding_init_method_std is not None:
            return config.model.embedding_init_method_std
        if not name.endswith(("linear_proj.weight", "mlp.linear_fc2.weight")):
            return config.init_method_std
        module = config.language if name.startswith("language_model") else config.diffusion
        assert module is not None
        return config.init_method_std / (2 * module.num_layers) ** 0.5

    draw_weights(
        stage, seed=config.seed, tensor_parallel=config.parallel.tensor, std_of=std_of, key_of=lambda name: global_name(stage, name)
    )


class TextToVideoDescription(BuiltInDescription[TextToVideoConfig]):
    """The text-to-video model as :class:`megatron_dip.models.description.ModelDescription`."""

    stage_forward = TextToVideoStage.forward
    check_item = staticmethod(check_batch)
    undivided = ()

    def typical_microbatch(self, sequences: int, length: int) -> Microbatch:
        """Packed clips, each with its caption."""
        clips = typical_clips(length) * sequences
        microbatch: Microbatch = {DIFFUSION: [clip for clip, _ in clips]}
        if self.config.language is not None:
            microbatch[LANGUAGE] = [caption for _, caption in clips]
        return microbatch

    def metadata(self, batch: Mapping[str, Any]) -> Microbatch:
        """Patches of each clip, tokens of each caption."""
        if batch.get("grid_sizes") is None:
            return {}
        microbatch: Microbatch = {DIFFUSION: batch["grid_sizes"].prod(dim=1).tolist()}
        if self.config.language is not None:
            microbatch[LANGUAGE] = batch["text_lengths"].tolist()
        return microbatch

    def num_instances(self, batch: Mapping[str, Any]) -> dict[str, int]:
        return {module: len(lengths) for module, lengths in self.metadata(batch).items()}

    def without_stem_inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        read = {name: batch[name].to("meta") for name in ("x", "crossattn_emb") if batch.get(name) is not None}
        return {**batch, **read}

    def conditions(self, batch: Mapping[str, Any]) -> list[str]:
        return [name for name in ("grid_sizes", "text_lengths") if batch.get(name) is not None]

    def boundary(self, producer: PlanStage, consumer: PlanStage, batch: Mapping[str, Any], first_instance: int) -> PayloadSpec:
        if producer.module == LANGUAGE:
            assert self.config.language is not None
            return PayloadSpec((producer.tokens, 1, self.config.language.hidden_size), self.config.dtype)
        clips = slice(first_instance, first_instance + producer.instances)
        rows = state_rows(producer.tokens, int(batch["text_lengths"][clips].sum()), producer.instances)
        return PayloadSpec((rows, 1, self.config.diffusion.hidden_size), self.config.dtype)

    def output_slice(self, stage: PlanStage, batch: Mapping[str, Any], first_instance: int) -> OutputSlice:
        patches = batch["grid_sizes"].prod(dim=1)
        return OutputSlice(dim=0, start=int(patches[:first_instance].sum()), whole=int(patches.sum()))

    def run_chunk(
        self, chunk: torch.nn.Module, stage: PlanStage, batch: Mapping[str, Any], first_instance: int,
        inputs: Mapping[str, Sequence[torch.Tensor]],
    ) -> torch.Tensor:
        model = unwrap(chunk, TextToVideoStage)
        own = inputs.get(stage.module, ())
        clips = slice(first_instance, first_instance + stage.instances)
        lengths = batch["text_lengths"]
        text = _rows(lengths, clips)
        arguments: dict[str, Any] = {"text_lengths": lengths[clips]}
        if stage.module == LANGUAGE:
            model.set_input_tensor(own[0] if own else None)
            return chunk(tokens=None if own else batch["tokens"][:, text], **arguments)
        arguments["grid_sizes"] = batch["grid_sizes"][clips]
        if own:
            model.set_input_tensor(own[0])
            return chunk(**arguments)
        if self.config.language is None:
            arguments["crossattn_emb"] = batch["crossattn_emb"][text]
        else:
            # All captions of the microbatch arrive; a part of the clips takes theirs.
            captions = inputs[LANGUAGE]
            model.set_input_tensor((torch.cat(list(captions)) if len(captions) > 1 else captions[0])[text])
        patches = _rows(batch["grid_sizes"].prod(dim=1), clips)
        return chunk(x=batch["x"][patches], timesteps=batch["timesteps"][clips], **arguments)


def _rows(lengths: torch.Tensor, instances: slice) -> slice:
    """Where consecutive instances lie in what is packed with these lengths."""
    start = int(lengths[: instances.start].sum())
    return slice(start, start + int(lengths[instances].sum()))
