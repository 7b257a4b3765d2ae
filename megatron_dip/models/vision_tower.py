"""A vision tower of Megatron blocks for images of any size and number: what Qwen2.5-VL (arXiv 2502.13923) and Qwen3-VL have before their
language models.

Images are cut into patches that lie packed behind each other; a layer attends within each frame, or within windows of it. Positions are
rotary, by a patch's row and column, and perhaps also learned on a grid that is interpolated to each frame. The frames of a video are
frames like any other. Weights of transformers' vision models can be mapped onto it one to one.

Order of patches, as in transformers: frame by frame, row by row of merged blocks, and within a block row by row, so that the patches which
become one token of the language model lie next to each other. Under window attention the blocks of a window lie together from the stem to
the last layer.

Some layers' outputs may be wanted beside the last one's (deepstack). They travel behind the hidden states, in one tensor [S * (1 + k), 1, H]
behind k such layers, so that nothing is computed twice and chunks may end anywhere.

Letters: F frames, S patches of all frames, C channels, H hidden size, m patches along a side of a block.

Not modelled: dropout, sequence and context parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_dip.models.layers import Norm, PackedAttention, projector_spec, transformer_block_spec
from megatron_dip.spec.training import ImageSpec, TowerSpec

ROTARY_BASE = 10000.0


def frames_of(image_grid_thw: torch.Tensor) -> torch.Tensor:
    """int64 [F, 2], patches along height and width of every frame, of images and clips [N, 3] of (frames, height, width)."""
    return torch.repeat_interleave(image_grid_thw[:, 1:], image_grid_thw[:, 0], dim=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerLayout:
    """Where the patches of frames lie in the tower's layers."""

    order: torch.Tensor
    """int64 [S / m^2]: place in the layers -> block of the frames' own order."""
    positions: torch.Tensor
    """int64 [S, 2]: row and column of each patch, in the layers' order."""
    sizes: torch.Tensor
    """int64 [S, 2]: patches along height and width of each patch's frame."""
    bounds: TowerBounds

    @classmethod
    def of_frames(cls, frames: torch.Tensor, image: ImageSpec, tower: TowerSpec, device: torch.device) -> TowerLayout:
        """Args:
        frames: int64 [F, 2], each a multiple of ``image.merge``; on the host, which need not wait for the device then.
        device: where the layers run.
        """
        merge = image.merge
        sizes: list[list[int]] = frames.tolist()
        window = None if tower.window_size is None else tower.window_size // (image.patch * merge)
        order, windows = _window_order([[rows // merge, columns // merge] for rows, columns in sizes], window)
        places = torch.cat([_patch_positions(rows, columns, merge) for rows, columns in sizes]).view(-1, merge * merge, 2)
        return cls(
            order=order.to(device), positions=places[order].view(-1, 2).to(device), sizes=frames.repeat_interleave(frames.prod(dim=1), dim=0).to(device),
            bounds=TowerBounds.make([rows * columns for rows, columns in sizes], [blocks * merge * merge for blocks in windows], device),
        )


@dataclass
class TowerBounds(PackedSeqParams):
    """Bounds of the frames, which Megatron's layers see, and of the windows."""

    windows: PackedSeqParams | None = None

    @classmethod
    def make(cls, frames: Sequence[int], windows: Sequence[int], device: torch.device) -> TowerBounds:
        return cls(**_bounds(frames, device), windows=PackedSeqParams(**_bounds(windows, device)))


def _bounds(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
    longest = max(lengths)
    return {"qkv_format": "thd", "cu_seqlens_q": ends, "cu_seqlens_kv": ends, "max_seqlen_q": longest, "max_seqlen_kv": longest}


def _patch_positions(rows: int, columns: int, merge: int) -> torch.Tensor:
    """int64 [rows * columns, 2] of one frame, block by block."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(rows // merge, merge, columns // merge, merge, 2)
    return grid.transpose(1, 2).reshape(-1, 2)


def _window_order(frames: Sequence[Sequence[int]], window: int | None) -> tuple[torch.Tensor, list[int]]:
    """The blocks of all frames window by window, and the blocks in each window.

    Args:
        frames: blocks along height and width.
        window: blocks along a window's side; None = a frame is one window.
    """
    parts, sizes, start = [], [], 0
    for rows, columns in frames:
        blocks = torch.arange(start, start + rows * columns).view(rows, columns)
        start += rows * columns
        high, wide = (rows, columns) if window is None else (window, window)
        for band in blocks.split(high, dim=0):
            for block in band.split(wide, dim=1):
                parts.append(block.flatten())
                sizes.append(block.numel())
    return torch.cat(parts), sizes


class _InWindows:
    """A core attention that stays within windows in all layers but some; mixed into one that takes bounds of packed sequences."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, full_layers: frozenset[int], **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)  # type: ignore[call-arg]
        self.in_windows = layer_number - 1 not in full_layers

    def forward(self, *args: Any, packed_seq_params: TowerBounds, **kwargs: Any) -> torch.Tensor:
        bounds = packed_seq_params.windows if self.in_windows else packed_seq_params
        return super().forward(*args, packed_seq_params=bounds, **kwargs)  # type: ignore[misc]


class WindowAttention(_InWindows, PackedAttention):  # type: ignore[misc]
    """Local attention within windows or frames."""


def _core_attention(tower: TowerSpec, num_layers: int, transformer_engine: bool) -> ModuleSpec:
    module: type = WindowAttention
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        module = type("TEWindowAttention", (_InWindows, TEDotProductAttention), {})
    full = range(num_layers) if tower.window_size is None else tower.full_attention_layers
    return ModuleSpec(module=module, params={"full_layers": frozenset(full)})


class KeepingLayer(TransformerLayer):
    """A layer that hands what earlier layers left on behind its own output, and leaves that too where it is one of ``kept_layers``."""

    def __init__(self, config: TransformerConfig, *args: Any, kept_layers: tuple[int, ...], layer_number: int = 1, **kwargs: Any) -> None:
        super().__init__(config, *args, layer_number=layer_number, **kwargs)
        number = self.layer_number - 1
        self.num_before = sum(layer < number for layer in kept_layers)
        self.is_kept = number in kept_layers

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]
        length = len(hidden_states) // (1 + self.num_before)
        output, context = super().forward(hidden_states[:length], *args, **kwargs)
        parts = [output, *([hidden_states[length:]] if self.num_before else []), *([output] if self.is_kept else [])]
        return torch.cat(parts) if len(parts) > 1 else output, context


class VisionTower(MegatronModule):
    """Consecutive layers of the tower, with the patch stem where ``pre_process`` and the final norm where ``post_process``."""

    has_rotary_positions = True

    def __init__(
        self, config: TransformerConfig, image: ImageSpec, tower: TowerSpec, num_layers: int, pre_process: bool, post_process: bool,
        vp_stage: int | None, *, depth: int, transformer_engine: bool = False,
    ) -> None:
        """Args:
        num_layers: of this part.
        depth: layers of the whole tower.
        """
        super().__init__(config=config)
        self.image, self.tower = image, tower
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        if pre_process:
            values = image.channels * tower.frames_per_patch * image.patch**2
            self.patch_embed = torch.nn.Linear(values, config.hidden_size, bias=tower.patch_bias)
            if tower.learned_positions is not None:
                self.position_embeddings = torch.nn.Embedding(tower.learned_positions**2, config.hidden_size)
        spec = transformer_block_spec(
            num_layers, causal=False, packed=True, transformer_engine=transformer_engine,
            core_attention=_core_attention(tower, depth, transformer_engine),
        )
        if tower.deepstack_layers:
            for layer in spec.layer_specs:
                layer.module, layer.params = KeepingLayer, {"kept_layers": tuple(tower.deepstack_layers)}
        # The final norm is for the last layer's output alone, so it stands outside of the block.
        self.decoder = TransformerBlock(
            config=config, spec=spec, pre_process=pre_process, post_process=post_process, post_layer_norm=False, vp_stage=vp_stage
        )
        if post_process:
            self.final_layernorm = Norm(config, config.hidden_size, config.layernorm_epsilon)

    def set_input_tensor(self, input_tensor: torch.Tensor | None) -> None:
        self.decoder.set_input_tensor(input_tensor)  # type: ignore[arg-type]

    def forward(self, patches: torch.Tensor | None, layout: TowerLayout) -> torch.Tensor:
        """Patches [S, C * frames * height * width] in the frames' order (None behind the stem) -> [S * (1 + k), 1, H] in the layers' order,
        the outputs of k earlier layers behind the last one's."""
        hidden = None
        if self.pre_process:
            assert patches is not None
            hidden = self.patch_embed(patches.to(self.patch_embed.weight.dtype)).view(-1, self.image.merge**2, self.config.hidden_size)
            hidden = hidden[layout.order].view(-1, 1, self.config.hidden_size)
            if self.tower.learned_positions is not None:
                hidden = hidden + self._learned(layout)[:, None]
            hidden = hidden.contiguous()
        angles = rotary_angles(layout.positions, self.config.kv_channels or 0)
        hidden = self.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=angles, packed_seq_params=layout.bounds)
        if not self.post_process:
            return hidden
        length = len(layout.positions)
        normed = self.final_layernorm(hidden[:length])
        return torch.cat([normed, hidden[length:]]) if len(hidden) > length else normed

    def _learned(self, layout: TowerLayout) -> torch.Tensor:
        """[S, H]: the grid of learned positions, bilinear with its corners at each frame's corner patches."""
        side = self.tower.learned_positions
        assert side is not None
        at = layout.positions * ((side - 1) / (layout.sizes - 1).clamp(min=1).to(torch.float32))
        low = at.long().clamp(max=side - 1)
        high = (low + 1).clamp(max=side - 1)
        share = at - low
        weights = self.position_embeddings.weight.dtype
        total: torch.Tensor | None = None
        for row, of_row in ((low[:, 0], 1 - share[:, 0]), (high[:, 0], share[:, 0])):
            for column, of_column in ((low[:, 1], 1 - share[:, 1]), (high[:, 1], share[:, 1])):
                part = self.position_embeddings(row * side + column) * (of_row * of_column)[:, None].to(weights)
                total = part if total is None else total + part
        assert total is not None
        return total


def rotary_angles(positions: torch.Tensor, head_size: int) -> torch.Tensor:
    """Angles [S, 1, 1, head_size] by which queries and keys turn: half of the pairs of channels by the row, half by the column."""
    rates = 1.0 / ROTARY_BASE ** (torch.arange(0, head_size // 2, 2, dtype=torch.float32, device=positions.device) / (head_size // 2))
    half = (positions[:, :, None].float() * rates).flatten(1)
    return torch.cat([half, half], dim=-1)[:, None, None]


class DeepstackProjection(MegatronModule):
    """What one of the tower's earlier layers becomes in the language model: norm of the merged patches, and a projector."""

    def __init__(self, config: TransformerConfig, projector_config: TransformerConfig, width: int) -> None:
        """Args:
        config: the tower's, for its norm.
        width: of merged patches.
        """
        super().__init__(config=projector_config)
        self.norm = Norm(config, width, config.layernorm_epsilon)
        self.projection = MultimodalProjector(projector_config, projector_spec(), "mlp", width)

    def forward(self, merged: torch.Tensor) -> torch.Tensor:
        """[T, 1, width] -> [T, 1, hidden of the language model]"""
        return self.projection(self.norm(merged))


@dataclass
class ImagePlaces(PackedSeqParams):
    """Bounds of the documents of a language model, and the places of the images' tokens, int64 [T]."""

    image_places: torch.Tensor | None = None


class AddingLayer(TransformerLayer):
    """A layer of the language model behind which the output of one of the tower's layers is added to the images' tokens.

    What is still to be added behind it stands behind the hidden states: [S + k * T, 1, H] comes in, [S + (k - 1) * T, 1, H] goes out.
    """

    def __init__(self, config: TransformerConfig, *args: Any, num_added: int, layer_number: int = 1, **kwargs: Any) -> None:
        super().__init__(config, *args, layer_number=layer_number, **kwargs)
        self.num_left = max(0, num_added - (self.layer_number - 1))

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, *args: Any, packed_seq_params: ImagePlaces, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        places = packed_seq_params.image_places
        left = 0 if places is None else self.num_left * len(places)
        if not left:
            return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)
        assert places is not None
        length = len(hidden_states) - left
        output, context = super().forward(hidden_states[:length], *args, packed_seq_params=packed_seq_params, **kwargs)
        features = hidden_states[length:]
        output = output.index_add(0, places, features[: len(places)])
        return torch.cat([output, features[len(places) :]]) if self.num_left > 1 else output, context


class InterleavedMultimodalRotary(torch.nn.Module):
    """Rotary positions in frame, row and column whose pairs of channels alternate (Qwen3-VL); called as Megatron's own."""

    def __init__(self, head_size: int, rotary_base: int) -> None:
        super().__init__()
        self.head_size, self.rotary_base = head_size, rotary_base

    def forward(self, position_ids: torch.Tensor, mrope_section: list[int], cp_group: Any = None, **unused: Any) -> torch.Tensor:
        """Positions [3, 1, S] -> angles [S, 1, 1, head_size]."""
        size = self.head_size
        rates = 1.0 / self.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32, device=position_ids.device) / size)
        of_axis = position_ids[:, 0, :, None].float() * rates
        half = of_axis[0].clone()
        for axis in (1, 2):
            half[:, axis : 3 * mrope_section[axis] : 3] = of_axis[axis, :, axis : 3 * mrope_section[axis] : 3]
        return torch.cat([half, half], dim=-1)[:, None, None]
