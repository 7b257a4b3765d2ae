"""What the models that are built here, of Megatron's modules, have in common: how training makes them and cuts them.

A family of models is one config class with these methods (:class:`megatron_dip.models.vlm.VlmConfig`,
:class:`megatron_dip.models.t2v.TextToVideoConfig`); :func:`config_of` finds the one for an example's model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.description import ModelDescription, bind_arguments
from megatron_dip.models.layout import ModuleCut
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.training import TextToVideoModel, VisionLanguageModel
from megatron_dip.spec.workload import Microbatch, Parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainCost:
    """What one module weighs in a chain of all layers, in any unit: time, or parameters."""

    layer: float
    first: float = 0.0
    """Stem or embedding, on top of the first layer."""
    last: float = 0.0
    """Projector or head, on top of the last layer."""


class BuiltInConfig(Protocol):
    """A whole model, before any cut."""

    @property
    def parallel(self) -> Parallel: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def model_spec(self) -> ModelSpec: ...

    @property
    def outermost(self) -> str:
        """The module whose first and last chunk Megatron's functions look for at the ends of the chunk list, and whose config all share."""
        ...

    @property
    def has_fixed_lengths(self) -> bool:
        """Whether hidden states of the last module have one shape in all microbatches."""
        ...

    def transformer_config(self, module: ModuleSpec) -> TransformerConfig:
        """Megatron's config of a whole module."""
        ...

    def describe(self) -> ModelDescription: ...

    def build_stage(self, cuts: Mapping[str, ModuleCut], vp_stage: int, rank: int, *, is_chained: bool) -> Any:
        """What ``cuts`` put on one place of a pipeline, as one module.

        Args:
            is_chained: all stages hand something to the next one, also where a module has no work in a microbatch.
        """
        ...

    def parameter_costs(self) -> dict[str, ChainCost]:
        """Parameters of a layer of each module, and of what stands before its first and behind its last one."""
        ...


ConfigT = TypeVar("ConfigT", bound=BuiltInConfig)


class BuiltInDescription(ABC, Generic[ConfigT]):
    """What the descriptions of all models that are built here have alike; see :class:`megatron_dip.models.description.ModelDescription`."""

    stage_forward: ClassVar[Callable[..., Any]]
    """Of the family's stages, whose arguments a training script calls the model with."""
    check_item: ClassVar[Callable[..., None]]
    """(config, item): raises InputError for tensors that do not fit the model."""

    num_outputs = None

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @property
    def model_spec(self) -> ModelSpec:
        return self.config.model_spec

    @property
    def outermost(self) -> str:
        return self.config.outermost

    @abstractmethod
    def metadata(self, batch: Any) -> Microbatch:
        """Instance lengths of a bound batch, which each family of models reads in its own way."""

    def item_metadata(self, item: Any) -> Microbatch:
        self.check_item(self.config, item)
        return self.metadata(item)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return bind_arguments(type(self).stage_forward, args, kwargs)

    def build_chunk(self, partition: Partition, module: str, vp_stage: int, rank: int) -> Any:
        return self.config.build_stage({module: ModuleCut.of_partition(partition, module)}, vp_stage, rank, is_chained=False)


class WholeModel(MegatronModule):
    """What a training script's model provider returns for a model that is built here: its config, and nothing of its layers."""

    def __init__(self, whole: BuiltInConfig) -> None:
        super().__init__(config=whole.transformer_config(whole.model_spec.module(whole.outermost)))
        self.description = whole.describe()


def config_of(model: VisionLanguageModel | TextToVideoModel, parallel: Parallel, *, seed: int) -> BuiltInConfig:
    """The config of an example's model under parallel sizes; weights by the seed."""
    if isinstance(model, TextToVideoModel):
        from megatron_dip.models.t2v import TextToVideoConfig

        return TextToVideoConfig(model=model, parallel=parallel, seed=seed, init_method_std=model.init_method_std)
    from megatron_dip.models.vlm import VlmConfig

    return VlmConfig(model=model, parallel=parallel, seed=seed, init_method_std=model.init_method_std)


def layer_parameters(module: ModuleSpec) -> float:
    """Matrices of one layer: attention (twice where it also attends to text) and MLP."""
    hidden, kv = module.hidden_size, module.hidden_size // module.num_attention_heads * module.query_groups
    attention = 2 * hidden * (hidden + kv) + (4 * hidden * hidden if module.cross_attention else 0)
    return float(attention + (3 if module.has_gated_mlp else 2) * hidden * module.ffn_hidden_size)
