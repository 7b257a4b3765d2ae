"""A diffusion transformer for video of Megatron-Core blocks: cross attention to text, adaLN-Zero from the timestep, rotary 3-D positions.

Names and signature are those of NVIDIA's ``DiTCrossAttentionModel`` (NeMo DFM), the computation is that of Wan 2.1 (arXiv 2503.20314), so
that weights of diffusers' ``WanTransformer3DModel`` can be mapped onto it one to one. Clips of different sizes are packed: their patches
lie behind each other, and neither self attention nor cross attention looks beyond its own clip.

As in every Megatron DiT the timestep's modulation goes through Megatron's TransformerBlock as ``attention_mask``, the text as
``context``, the positions as ``rotary_pos_emb``, and ``packed_seq_params`` is a dict of the two attentions' bounds.

Under a pipeline, patches, text and timestep are embedded once, where the model begins. What the layers behind need of them travels with
the hidden states (:class:`DiTState`, one tensor), so that no weight has a copy on another rank and every chunk's gradient to text and
timestep comes back along the same way: their sum is one process's.

Letters: n clips, S patches of all clips, T text tokens of all clips, H hidden size, C latent channels, p patches' voxels pT * pH * pW.

Not modelled: dropout, sequence and context parallelism, image conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules, SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_dip.models.layers import PackedAttention

NUM_MODULATIONS = 6
"""Shift, scale and gate of self attention and of the MLP."""
STATE_ROWS_PER_CLIP = NUM_MODULATIONS + 1
"""Rows that a clip's timestep takes in a :class:`DiTState`: its modulations, and its embedding for the final layer."""
SELF, CROSS = "self_attention", "cross_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTSizes:
    """What a DiT has beyond a TransformerConfig; names as in Megatron-Bridge's providers."""

    in_channels: int = 16
    """C, of the latents that come in and go out."""
    patch_spatial: int = 2
    patch_temporal: int = 1
    freq_dim: int = 256
    """Sines and cosines of the timestep."""
    crossattn_emb_size: int = 4096
    """Width of the text's embeddings."""
    pooled_text: bool = False
    """The mean of a clip's text embeddings modulates the layers beside its timestep (Stable Diffusion 3's pooled projection); Wan has none."""
    absolute_positions: bool = False
    """Sines and cosines of a patch's place are added to its embedding, as in Latte and CogVideoX; Wan has rotary positions alone. These tell
    attention how far two patches are apart, but no patch where it is: with pure noise everywhere all places of a clip look alike."""

    @property
    def patch_size(self) -> int:
        """Values of one patch: C * p."""
        return self.in_channels * self.patch_temporal * self.patch_spatial**2


@dataclass(frozen=True, slots=True, kw_only=True)
class DiTState:
    """What one chunk hands to the next."""

    hidden: torch.Tensor
    """[S, 1, H]"""
    context: torch.Tensor
    """[T, 1, H], the text as all layers attend to it."""
    modulation: torch.Tensor
    """[n, 6, H]"""
    time_embedding: torch.Tensor
    """[n, H]"""

    def pack(self) -> torch.Tensor:
        """One tensor [S + T + 7 n, 1, H] (:func:`state_rows`)."""
        width = self.hidden.shape[-1]
        parts = (self.hidden, self.context, self.modulation.reshape(-1, 1, width), self.time_embedding[:, None])
        return torch.cat([part.to(self.hidden.dtype) for part in parts])

    @classmethod
    def unpack(cls, packed: torch.Tensor, num_patches: int, num_clips: int) -> DiTState:
        times = num_clips * STATE_ROWS_PER_CLIP
        hidden, context, times_rows = packed.split([num_patches, len(packed) - num_patches - times, times])
        modulation, time_embedding = times_rows[:, 0].split([num_clips * NUM_MODULATIONS, num_clips])
        return cls(
            hidden=hidden, context=context, modulation=modulation.view(num_clips, NUM_MODULATIONS, -1), time_embedding=time_embedding
        )


def state_rows(num_patches: int, num_text_tokens: int, num_clips: int) -> int:
    """Length of a packed :class:`DiTState`."""
    return num_patches + num_text_tokens + num_clips * STATE_ROWS_PER_CLIP


def packed_bounds(grid_sizes: torch.Tensor, text_lengths: torch.Tensor) -> dict[str, PackedSeqParams]:
    """Bounds of the clips for both attentions.

    Args:
        grid_sizes: int [n, 3], patches of each clip along time, height and width.
        text_lengths: int [n], text tokens of each clip.
    """
    patches = _bounds(grid_sizes.prod(dim=1))
    text = _bounds(text_lengths)
    longest, longest_text = int(patches.diff().max()), int(text.diff().max())
    return {
        SELF: PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=patches, cu_seqlens_kv=patches, max_seqlen_q=longest, max_seqlen_kv=longest
        ),
        CROSS: PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=patches, cu_seqlens_kv=text, max_seqlen_q=longest, max_seqlen_kv=longest_text
        ),
    }


def _bounds(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def positions_of(grid_sizes: torch.Tensor) -> torch.Tensor:
    """``pos_ids`` int64 [S, 3] of packed clips: frame, row and column of each patch in its clip's grid; columns run fastest."""
    grids = [
        torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, 3) for grid in grid_sizes.tolist()
    ]
    return torch.cat(grids).to(grid_sizes.device)


def patchify(latents: torch.Tensor, sizes: DiTSizes) -> torch.Tensor:
    """A clip's latents [C, frames, height, width] as patches [frames / pT * height / pH * width / pW, C * pT * pH * pW]."""
    channels, frames, height, width = latents.shape
    time, space = sizes.patch_temporal, sizes.patch_spatial
    blocks = latents.view(channels, frames // time, time, height // space, space, width // space, space)
    return blocks.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, sizes.patch_size)


def unpatchify(patches: torch.Tensor, grid: tuple[int, int, int], sizes: DiTSizes) -> torch.Tensor:
    """The inverse of :func:`patchify` for a clip of ``grid`` patches."""
    time, space = sizes.patch_temporal, sizes.patch_spatial
    blocks = patches.view(*grid, sizes.in_channels, time, space, space)
    return blocks.permute(3, 0, 4, 1, 5, 2, 6).reshape(sizes.in_channels, grid[0] * time, grid[1] * space, grid[2] * space)


# ---- parts of a layer ---------------------------------------------------------------------------------------------------------------


class PlainLayerNorm(torch.nn.Module):
    """LayerNorm without weights: what adaLN modulates."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(hidden, (self.hidden_size,), eps=self.eps)


class AffineLayerNorm(torch.nn.LayerNorm):
    """LayerNorm with weights, in Megatron's way of building it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps)


class RMSNormAcrossHeads(MegatronModule):
    """RMSNorm of queries or keys over all heads together (Wan's ``rms_norm_across_heads``), on each tensor rank's share of the heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        """Args:
        hidden_size: of one head.
        """
        super().__init__(config=config)
        self.eps = eps
        self.whole = hidden_size * config.num_attention_heads
        self.num_shares = config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(self.whole // self.num_shares))
        if self.num_shares > 1:
            self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.weight.partition_dim = 0  # type: ignore[attr-defined]
            self.weight.partition_stride = 1  # type: ignore[attr-defined]

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """[..., heads of this rank, head size]"""
        flat = heads.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if self.num_shares > 1:
            squares = _sum_over_tensor_ranks(squares)
        normed = flat * torch.rsqrt(squares / self.whole + self.eps)
        return (normed.to(heads.dtype) * self.weight).view_as(heads)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None) -> Any:
        """For Megatron's distributed checkpoints: the tensor ranks' shares are parts of one weight."""
        return make_sharded_tensors_for_checkpoint(self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets)


def _sum_over_tensor_ranks(value: torch.Tensor) -> torch.Tensor:
    from megatron.core import parallel_state
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(value, group=parallel_state.get_tensor_model_parallel_group())


@dataclass
class DiTCrossAttentionSubmodules(CrossAttentionSubmodules):
    q_layernorm: ModuleSpec | type | None = None
    k_layernorm: ModuleSpec | type | None = None


class DiTCrossAttention(CrossAttention):
    """Megatron's cross attention with normed queries and keys."""

    def __init__(self, config: TransformerConfig, submodules: DiTCrossAttentionSubmodules, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        size = {"config": config, "hidden_size": self.hidden_size_per_attention_head, "eps": config.layernorm_epsilon}
        self.q_layernorm = None if submodules.q_layernorm is None else build_module(submodules.q_layernorm, **size)
        self.k_layernorm = None if submodules.k_layernorm is None else build_module(submodules.k_layernorm, **size)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        return query, key, value


class DiTLayerWithAdaLN(TransformerLayer):
    """Self attention, cross attention and MLP; the first and the last modulated by the timestep (adaLN-Zero).

    ``modulation`` [1, 6, H] is the layer's own share, added to that of the timestep; Wan's ``scale_shift_table``.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.modulation = torch.nn.Parameter(torch.zeros(1, NUM_MODULATIONS, config.hidden_size))

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        rotary_pos_emb: torch.Tensor | None = None,
        packed_seq_params: Mapping[str, PackedSeqParams] | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Args:
        hidden_states: [S, 1, H]
        attention_mask: the timesteps' modulation [n, 6, H] (the convention of all Megatron DiTs)
        context: text [T, 1, H]
        rotary_pos_emb: angles [S, 1, 1, head size]
        packed_seq_params: bounds of the clips for ``self_attention`` and ``cross_attention``
        """
        assert attention_mask is not None
        assert packed_seq_params is not None
        bounds = packed_seq_params[SELF]
        modulation = of_clips((self.modulation + attention_mask).to(hidden_states.dtype), bounds)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.split(1, dim=1)
        normed = self.input_layernorm(hidden_states) * (1 + scale) + shift
        output, bias = self.self_attention(normed, attention_mask=None, rotary_pos_emb=rotary_pos_emb, packed_seq_params=bounds)
        hidden_states = hidden_states + gate * _with_bias(output, bias)
        normed = self.pre_cross_attn_layernorm(hidden_states)
        output, bias = self.cross_attention(
            normed, attention_mask=None, key_value_states=context, packed_seq_params=packed_seq_params[CROSS]
        )
        hidden_states = hidden_states + _with_bias(output, bias)
        normed = self.pre_mlp_layernorm(hidden_states) * (1 + mlp_scale) + mlp_shift
        output, bias = self.mlp(normed)
        return hidden_states + mlp_gate * _with_bias(output, bias), context


def _with_bias(output: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return output if bias is None else output + bias


def of_clips(values: torch.Tensor, bounds: PackedSeqParams) -> torch.Tensor:
    """Values of each clip [n, ...] for each of its patches [S, ...]; as they are where there is one clip."""
    if len(values) == 1:
        return values
    return torch.repeat_interleave(values, bounds.cu_seqlens_q.diff(), dim=0)


def gelu_tanh(value: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(value, approximate="tanh")


# ---- specs --------------------------------------------------------------------------------------------------------------------------


def get_dit_adaln_block_with_local_spec(num_layers: int) -> TransformerBlockSubmodules:
    """``num_layers`` layers of Megatron's own linear layers, for any device."""
    return _block_spec(num_layers, ColumnParallelLinear, RowParallelLinear, PackedAttention)


def get_dit_adaln_block_with_transformer_engine_spec(num_layers: int) -> TransformerBlockSubmodules:
    """The same of Transformer Engine's linear layers and attention. Raises ImportError where it is not installed."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TEDotProductAttention, TERowParallelLinear

    return _block_spec(num_layers, TEColumnParallelLinear, TERowParallelLinear, TEDotProductAttention)


def _block_spec(num_layers: int, column: type, row: type, core_attention: type) -> TransformerBlockSubmodules:
    no_mask = {"attn_mask_type": AttnMaskType.no_mask}
    layer = ModuleSpec(
        module=DiTLayerWithAdaLN,
        submodules=TransformerLayerSubmodules(
            input_layernorm=PlainLayerNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params=no_mask,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column, core_attention=core_attention, linear_proj=row, q_layernorm=RMSNormAcrossHeads,
                    k_layernorm=RMSNormAcrossHeads,
                ),
            ),
            pre_cross_attn_layernorm=AffineLayerNorm,
            cross_attention=ModuleSpec(
                module=DiTCrossAttention,
                params=no_mask,
                submodules=DiTCrossAttentionSubmodules(
                    linear_q=column, linear_kv=column, core_attention=core_attention, linear_proj=row, q_layernorm=RMSNormAcrossHeads,
                    k_layernorm=RMSNormAcrossHeads,
                ),
            ),
            pre_mlp_layernorm=PlainLayerNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers)


# ---- embeddings ---------------------------------------------------------------------------------------------------------------------


class Timesteps(torch.nn.Module):
    """Cosines, then sines of timesteps [n] -> [n, freq_dim] (diffusers' ``Timesteps`` with ``flip_sin_to_cos``)."""

    def __init__(self, freq_dim: int) -> None:
        super().__init__()
        self.freq_dim = freq_dim

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        half = self.freq_dim // 2
        frequencies = torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float32, device=timesteps.device))
        angles = timesteps.float()[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(MegatronModule):
    """Timesteps [n] -> what modulates the layers [n, 6, H] and what modulates the final layer [n, H]."""

    def __init__(self, config: TransformerConfig, sizes: DiTSizes) -> None:
        super().__init__(config=config)
        hidden = config.hidden_size
        self.timesteps = Timesteps(sizes.freq_dim)
        self.linear_1 = torch.nn.Linear(sizes.freq_dim, hidden)
        self.linear_2 = torch.nn.Linear(hidden, hidden)
        self.time_proj = torch.nn.Linear(hidden, NUM_MODULATIONS * hidden)

        if sizes.pooled_text:
            self.text_embedder = torch.nn.Linear(sizes.crossattn_emb_size, hidden)

    def forward(self, timesteps: torch.Tensor, pooled: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Args:
        pooled: text of each clip [n, crossattn_emb_size], where ``pooled_text`` says so.
        """
        silu = torch.nn.functional.silu
        frequencies = self.timesteps(timesteps).to(self.linear_1.weight.dtype)
        embedding = self.linear_2(silu(self.linear_1(frequencies)))
        if pooled is not None:
            embedding = embedding + self.text_embedder(pooled.to(embedding.dtype))
        return self.time_proj(silu(embedding)).view(len(embedding), NUM_MODULATIONS, -1), embedding


def pooled_over_clips(text: torch.Tensor, bounds: PackedSeqParams) -> torch.Tensor:
    """Text [T, 1, W] -> the mean of each clip's tokens [n, W]."""
    lengths = bounds.cu_seqlens_kv.diff()
    clips = torch.repeat_interleave(torch.arange(len(lengths), device=text.device), lengths)
    sums = torch.zeros(len(lengths), text.shape[-1], dtype=text.dtype, device=text.device).index_add(0, clips, text[:, 0])
    return sums / lengths[:, None]


class TextEmbedding(MegatronModule):
    """The text encoder's output [T, 1, crossattn_emb_size] -> what all layers attend to [T, 1, H]."""

    def __init__(self, config: TransformerConfig, sizes: DiTSizes) -> None:
        super().__init__(config=config)
        self.linear_1 = torch.nn.Linear(sizes.crossattn_emb_size, config.hidden_size)
        self.linear_2 = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.linear_2(gelu_tanh(self.linear_1(text.to(self.linear_1.weight.dtype))))


class VideoRotaryEmbedding(torch.nn.Module):
    """Rotary angles of 3-D positions: a third of each head's pairs turns with the row, a third with the column, the rest with time."""

    def __init__(self, head_size: int, theta: float = 10000.0) -> None:
        super().__init__()
        space = 2 * (head_size // 6)
        self.sizes = (head_size - 2 * space, space, space)
        self.theta = theta

    def forward(self, pos_ids: torch.Tensor) -> torch.Tensor:
        """int [S, 3] -> angles [S, 1, 1, head size] for Megatron's interleaved rotation: each twice in a row."""
        angles = []
        for axis, size in enumerate(self.sizes):
            exponents = torch.arange(0, size, 2, dtype=torch.float64, device=pos_ids.device) / size
            angles.append(pos_ids[:, axis, None] * self.theta**-exponents)
        return torch.cat(angles, dim=1).repeat_interleave(2, dim=1)[:, None, None].float()


class VideoPositionEmbedding(torch.nn.Module):
    """Absolute 3-D positions: the angles of :class:`VideoRotaryEmbedding` for a head of the whole width, their cosines and sines in turns."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.angles = VideoRotaryEmbedding(hidden_size)

    def forward(self, pos_ids: torch.Tensor) -> torch.Tensor:
        """int [S, 3] -> [S, 1, H]"""
        angles = self.angles(pos_ids)[:, :, 0, ::2]
        return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(2)


# ---- the model ----------------------------------------------------------------------------------------------------------------------


class DiTCrossAttentionModel(MegatronModule):
    """Consecutive layers of the DiT, with the embeddings where ``pre_process`` and the final layer where ``post_process``.

    Args:
        config: with ``rotary_interleaved`` and a bias on every linear layer; no sequence parallelism.
        num_layers: that this part builds; must agree with what Megatron counts from ``config``.
    """

    has_rotary_positions = True

    def __init__(
        self, config: TransformerConfig, sizes: DiTSizes, num_layers: int, *, pre_process: bool = True, post_process: bool = True,
        vp_stage: int | None = None, transformer_engine: bool = False,
    ) -> None:
        super().__init__(config=config)
        assert config.rotary_interleaved, "the DiT's positions turn neighbouring pairs"
        assert not config.sequence_parallel, "the DiT has no sequence parallelism"
        self.sizes = sizes
        self.pre_process, self.post_process = pre_process, post_process
        self.vp_stage = vp_stage
        hidden = config.hidden_size
        if pre_process:
            self.x_embedder = torch.nn.Linear(sizes.patch_size, hidden)
            self.t_embedder = TimestepEmbedding(config, sizes)
            self.text_embedding = TextEmbedding(config, sizes)
            self.place_embedder = VideoPositionEmbedding(hidden) if sizes.absolute_positions else None
        assert config.kv_channels is not None
        self.pos_embedder = VideoRotaryEmbedding(config.kv_channels)
        spec = get_dit_adaln_block_with_transformer_engine_spec if transformer_engine else get_dit_adaln_block_with_local_spec
        self.decoder = TransformerBlock(
            config=config, spec=spec(num_layers), pre_process=pre_process, post_process=post_process, post_layer_norm=False,
            vp_stage=vp_stage,
        )
        if post_process:
            self.final_layernorm = PlainLayerNorm(config, hidden, config.layernorm_epsilon)
            self.final_layer_modulation = torch.nn.Parameter(torch.zeros(1, 2, hidden))
            self.final_layer_linear = torch.nn.Linear(hidden, sizes.patch_size)
        self.input_tensor: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        """A packed :class:`DiTState` of the part before this one."""
        self.input_tensor = input_tensor

    def forward(
        self,
        x: torch.Tensor | None,
        timesteps: torch.Tensor | None,
        crossattn_emb: torch.Tensor | None,
        packed_seq_params: Mapping[str, PackedSeqParams],
        pos_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Runs the layers.

        Args:
            x: noised patches of all clips [S, 1, C * p]; not read behind the embeddings, like the two that follow.
            timesteps: of each clip [n], 0 to 1000.
            crossattn_emb: text of all clips [T, 1, crossattn_emb_size].
            packed_seq_params: see :func:`packed_bounds`.
            pos_ids: see :func:`positions_of`.

        Returns:
            Behind the final layer the prediction [S, 1, C * p], else a packed :class:`DiTState`.
        """
        bounds = packed_seq_params[SELF]
        packed, self.input_tensor = self.input_tensor, None
        if self.pre_process:
            assert x is not None
            assert timesteps is not None
            assert crossattn_emb is not None
            pooled = pooled_over_clips(crossattn_emb, packed_seq_params[CROSS]) if self.sizes.pooled_text else None
            modulation, time_embedding = self.t_embedder(timesteps, pooled)
            hidden = self.x_embedder(x.to(self.x_embedder.weight.dtype))
            if self.place_embedder is not None:
                hidden = hidden + self.place_embedder(pos_ids).to(hidden.dtype)
            state = DiTState(
                hidden=hidden, context=self.text_embedding(crossattn_emb), modulation=modulation, time_embedding=time_embedding
            )
        else:
            assert packed is not None
            state = DiTState.unpack(packed, len(pos_ids), len(bounds.cu_seqlens_q) - 1)
        self.decoder.set_input_tensor(state.hidden)
        hidden = self.decoder(
            hidden_states=state.hidden, attention_mask=state.modulation, context=state.context,
            rotary_pos_emb=self.pos_embedder(pos_ids), packed_seq_params=packed_seq_params,
        )
        if isinstance(hidden, tuple):
            hidden = hidden[0]
        if not self.post_process:
            return DiTState(
                hidden=hidden, context=state.context, modulation=state.modulation, time_embedding=state.time_embedding
            ).pack()
        modulation = of_clips((self.final_layer_modulation + state.time_embedding[:, None]).to(hidden.dtype), bounds)
        shift, scale = modulation.split(1, dim=1)
        return self.final_layer_linear(self.final_layernorm(hidden) * (1 + scale) + shift)
