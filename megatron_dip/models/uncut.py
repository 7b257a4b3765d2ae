"""A vision tower that hides its layers: any module from images to embeddings, run as one layer that is not cut.

In: a script's module, or the sketch of one (a Hugging Face vision model behind a wrapper, as LLaVAModel's ``hf://`` types and the encoders of
examples/mimo are). Out: the same interface as :class:`megatron_dip.models.parts.VisionTower` has. In partitions the module has one layer; the
rank that has it holds the whole tower, once, under its names in the whole model. A rank before it passes images on, the last one holds the
projector. Sub-microbatches are planned like any others; their cost is estimated from the tower's sizes until stages were measured.

Every tensor-parallel rank runs the whole tower on all images, as Megatron does with towers that are not its own: their gradients are the same.

Letters: n images in a sub-microbatch, s tokens of an image, h width of the tower's output.

Not modelled: outputs whose length is not one and the same for images of one size; towers of which only some weights are trained are taken for trained whole.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.parts import VISION_MODELS, VisionTower
from megatron_dip.models.provided import Sketch
from megatron_dip.models.trained import mark_uncut
from megatron_dip.runtime.interface import PayloadSpec
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModuleSpec
from megatron_dip.spec.plan import PlanStage

Shape = tuple[int, ...]

_USUAL_LENGTH = 256
"""Tokens of an image of 224 pixels in patches of 14."""

_SIZES = {
    "hidden_size": ("hidden_size", "embed_dim", "d_model"), "intermediate_size": ("intermediate_size", "ffn_hidden_size", "encoder_ffn_dim"),
    "num_hidden_layers": ("num_hidden_layers", "depth", "num_layers", "encoder_layers"),
    "num_attention_heads": ("num_attention_heads", "num_heads", "encoder_attention_heads"),
}
"""What transformers' configs call a tower's sizes."""


class Passing(torch.nn.Module):
    """Stands for a tower on the ranks that do not hold it: gives on what it is given."""

    def __init__(self, class_token_len: int | None) -> None:
        super().__init__()
        if class_token_len is not None:
            self.class_token_len = class_token_len

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (value,) = (*args, *kwargs.values())
        return value


class UncutTower:
    """A script's tower, which stays whole."""

    def __init__(self, part: torch.nn.Module, params_dtype: torch.dtype, image: Shape | None) -> None:
        """Builds the tower on this process, where only its sketch is there: what comes out of it is in no config.

        Args:
            part: the tower or its sketch, frozen where the script froze it.
            params_dtype: of the model's weights, and of what is sent between ranks.
            image: shape of one image; None: batches tell it.

        Raises:
            InputError: for towers that do not give [n, s, h] or [n * s, h].
        """
        self._tower = part.build() if isinstance(part, Sketch) else part
        self.trainable = part.trainable if isinstance(part, Sketch) else any(weight.requires_grad for weight in part.parameters())
        self.params_dtype = params_dtype
        self._class_token_len: int | None = getattr(self._tower, "class_token_len", None)
        self._outputs: dict[Shape, Shape] = {}
        self._image = _image_of_config(self._tower) if image is None else image

    @property
    def length(self) -> int:
        """s, of images of the usual size; a guess where only batches tell the size."""
        return _USUAL_LENGTH if self._image is None else self.length_of(None)

    def length_of(self, images: torch.Tensor | None) -> int:
        """s of images [n, ...], which may be on the meta device; None: of the usual size."""
        return self._output(self._shape_of(images))[0]

    def spec(self, name: str, *, trainable: bool) -> ModuleSpec:
        """Args:
        trainable: whether the module is, its projector included.
        """
        width = self._output(self._shape_of(None))[1] if self._image is not None else None
        return ModuleSpec(name=name, kind="vit", role="encoder", num_layers=1, causal=False, trainable=trainable, **sizes_of(self._tower, width))

    def dtype_between(self, residual: torch.dtype) -> torch.dtype:
        """Of what goes from chunk to chunk: the tower's weights have no say in it."""
        return self.params_dtype

    def boundary(self, producer: PlanStage, residual: torch.dtype, images: torch.Tensor | None) -> PayloadSpec:
        """Between two chunks: images where the tower is behind the message, [n, s, h] or [n * s, h] where it is before.

        Args:
            images: of the stages' microbatch.
        """
        image, count = self._shape_of(images), producer.instances
        if sum(producer.layers) == 0:
            return PayloadSpec((count, *image), self.params_dtype)
        length, width, is_flat = self._output(image)
        return PayloadSpec((count * length, width) if is_flat else (count, length, width), self.params_dtype)

    def build_chunk(self, cut: ModuleCut, vp_stage: int, rank: int) -> torch.nn.Module:
        """The tower itself for the rank that has it; the others let its weights go."""
        if cut.rows[vp_stage][rank]:
            mark_uncut(self._tower, self._output(self._shape_of(None))[1] if self._image is not None else None)
            return self._tower
        if not cut.rows_have_layers(rank):
            self._tower.to("meta")  # output shapes are still asked for
        return Passing(self._class_token_len)

    def _shape_of(self, images: torch.Tensor | None) -> Shape:
        if images is not None:
            return tuple(images.shape[1:])
        if self._image is None:
            raise InputError(
                "model_provider: vision tower", type(self._tower).__name__, "tells no image_size, and this rank was given no images",
                "give images to all pipeline ranks, or the tower a config with num_channels and image_size",
            )
        return self._image

    def _output(self, image: Shape) -> tuple[int, int, bool]:
        """(s, h, whether outputs are [n * s, h] instead of [n, s, h]) of images of one shape."""
        if image not in self._outputs:
            self._outputs[image] = _output_shape(self._tower, image)
        shape = self._outputs[image]
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
            raise InputError(
                "model_provider: vision tower", list(shape), f"is what {type(self._tower).__name__} makes of one image {list(image)}",
                "let its forward give [images, tokens, width]",
            )
        return shape[-2], shape[-1], len(shape) == 2


def tower_of(part: torch.nn.Module, params_dtype: torch.dtype, image: Shape | None) -> VisionTower | UncutTower:
    """A script's tower, cut into layers where it is one of Megatron's, else whole; arguments as :class:`UncutTower` takes them."""
    if isinstance(part, Sketch) and isinstance(part.builder, type) and issubclass(part.builder, VISION_MODELS):
        return VisionTower(part)
    return UncutTower(part, params_dtype, image)


def _output_shape(tower: torch.nn.Module, image: Shape) -> Shape:
    """Of one image, found without computing where the tower's operators can do without values."""
    named = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
    dtype = next((tensor.dtype for tensor in named.values() if tensor.is_floating_point()), torch.float32)
    with torch.no_grad():
        try:
            output = torch.func.functional_call(
                tower, {name: tensor.to("meta") for name, tensor in named.items()}, (torch.zeros(1, *image, dtype=dtype, device="meta"),)
            )
        except (RuntimeError, NotImplementedError):  # it asks for values
            device = next((tensor.device for tensor in named.values()), torch.device("cpu"))
            output = tower(torch.zeros(1, *image, dtype=dtype, device=device))
    if not isinstance(output, torch.Tensor):
        raise InputError(
            "model_provider: vision tower", type(output).__name__, f"is what {type(tower).__name__} gives instead of a tensor",
            "wrap it in a module whose forward gives [images, tokens, width]",
        )
    return tuple(output.shape)


def _configs(tower: torch.nn.Module) -> list[Any]:
    return [config for module in tower.modules() if (config := getattr(module, "config", None)) is not None]


def _image_of_config(tower: torch.nn.Module) -> Shape | None:
    for config in _configs(tower):
        size = getattr(config, "image_size", None)
        if isinstance(size, int):
            return (getattr(config, "num_channels", 3), size, size)
    return None


def sizes_of(tower: torch.nn.Module, width: int | None) -> dict[str, Any]:
    """Of a spec, from the first config within that has them all; else those of plain blocks with as many weights."""
    for config in _configs(tower):
        found = {size: next((value for name in names if isinstance(value := getattr(config, name, None), int)), None) for size, names in _SIZES.items()}
        hidden, inner, blocks, heads = (found[size] for size in _SIZES)
        if hidden and inner and blocks and heads and hidden % heads == 0:
            return {"hidden_size": hidden, "ffn_hidden_size": inner, "num_attention_heads": heads, "uncut_blocks": blocks}
    hidden = max(1, width or 1024)
    weights = sum(weight.numel() for weight in tower.parameters())
    heads = next(heads for heads in range(max(1, hidden // 64), 0, -1) if hidden % heads == 0)
    return {"hidden_size": hidden, "ffn_hidden_size": 4 * hidden, "num_attention_heads": heads, "uncut_blocks": max(1, round(weights / (12 * hidden**2)))}
