"""Which description belongs to a model: a new kind of model is one more entry here.

In: a script's model as :func:`megatron_dip.models.provided.sketch_model` gives it. Out: its :class:`~megatron_dip.models.description.ModelDescription`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.models.multimodal.llava_model import LLaVAModel
from megatron.core.transformer.module import MegatronModule

from megatron_dip.models.built_in import WholeModel
from megatron_dip.models.description import ModelDescription
from megatron_dip.models.gpt import GptDescription
from megatron_dip.models.llava import LlavaDescription
from megatron_dip.models.mimo import MimoDescription
from megatron_dip.models.packed_vision import PackedVisionDescription
from megatron_dip.models.provided import MimoModel

Provider = Callable[..., MegatronModule]

DESCRIPTIONS: dict[type[MegatronModule], Callable[[Any, Provider, Mapping[str, Any]], ModelDescription]] = {
    LLaVAModel: lambda sketch, provider, arguments: LlavaDescription(sketch),
    MimoModel: lambda sketch, provider, arguments: MimoDescription(sketch),
    GPTModel: GptDescription,
    WholeModel: lambda sketch, provider, arguments: sketch.description,
}
"""Class of the sketch -> (sketch, the script's provider, what Megatron hands to it) -> description."""


def describe(sketch: MegatronModule, provider: Provider, arguments: Mapping[str, Any]) -> ModelDescription:
    """The description of a model of one of the known classes, or of a class made from one, or of the form that has a description of its own."""
    known = next((base for base in type(sketch).__mro__ if base in DESCRIPTIONS), None)
    return PackedVisionDescription(sketch) if known is None else DESCRIPTIONS[known](sketch, provider, arguments)
