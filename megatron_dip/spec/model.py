"""Modality modules of a multimodal model, and how they feed each other.

What comes in: module descriptions from a workload file or from code. What goes out: frozen :class:`ModelSpec` objects with every
default filled in. Widths are per module (not per tensor-parallel shard). Source of the sizes in :data:`NAMED_MODELS` (in
:mod:`megatron_dip.spec.named`): DIP (arXiv 2504.14145), tables of models and setups.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import msgspec

from megatron_dip.spec.errors import InputError

Role = Literal["encoder", "backbone", "decoder"]
ModuleKind = Literal["vit", "lm", "dit", "audio"]

_MAX_SIZE = 10**6
"""Of layers, widths and heads: above any real model, below what would overflow times or exhaust memory."""


_MAX_VOCABULARY = 10**8


class ModuleSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """One modality module: an encoder, the backbone or a decoder."""

    name: str
    """Unique within the model; used in microbatches, chunks and plans."""
    kind: ModuleKind
    """Which operators a layer has."""
    role: Role
    """Where it stands when ``inputs`` is absent: encoders feed the backbone, the backbone feeds the decoders."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int | None = None
    """Key/value heads; absent = ``num_attention_heads``."""
    trainable: bool = True
    """False = frozen: no weight gradients, no optimizer state."""
    vocab_size: int | None = None
    """Rows of the token embedding and of the output head; absent = the module has neither."""
    causal: bool | None = None
    """Causal attention; absent = true for ``lm``."""
    tied_embeddings: bool = False
    """Embedding and output head share one weight."""
    cross_attention: bool = False
    """Each layer also attends to what ``inputs`` deliver (DiT)."""
    gated_mlp: bool | None = None
    """SwiGLU (three MLP matrices instead of two); absent = true for ``lm``."""
    inputs: list[str] | None = None
    """Names of the modules that feed this one; absent = by ``role``."""
    uncut_blocks: int | None = None
    """Transformer blocks of a module that hides them: ``num_layers`` is then 1, its stem and all blocks are that layer, which every
    tensor-parallel rank runs whole; absent = layers are single blocks."""

    @property
    def query_groups(self) -> int:
        return self.num_attention_heads if self.num_query_groups is None else self.num_query_groups

    @property
    def is_causal(self) -> bool:
        return self.kind == "lm" if self.causal is None else self.causal

    @property
    def has_gated_mlp(self) -> bool:
        return self.kind == "lm" if self.gated_mlp is None else self.gated_mlp

    def validate(self, where: str) -> None:
        """Raises InputError (field named below ``where``) for sizes that cannot be."""
        if not self.name:
            raise InputError(f"{where}.name", self.name, "empty", "give each module a name")
        for field in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "query_groups"):
            value = getattr(self, field)
            if not 1 <= value <= _MAX_SIZE:
                shown = "num_query_groups" if field == "query_groups" else field
                raise InputError(f"{where}.{shown}", value, f"outside 1 to {_MAX_SIZE}", "give a positive whole number of a real model")
        if self.num_attention_heads % self.query_groups:
            raise InputError(
                f"{where}.num_query_groups", self.query_groups, f"does not divide {self.num_attention_heads} attention heads",
                "use a divisor of num_attention_heads",
            )
        if self.uncut_blocks is not None and (self.num_layers != 1 or not 1 <= self.uncut_blocks <= _MAX_SIZE or self.kind == "lm"):
            raise InputError(
                f"{where}.uncut_blocks", self.uncut_blocks, f"does not go with num_layers {self.num_layers} and kind {self.kind}",
                "give an encoder with num_layers 1 the number of its blocks, or leave it out",
            )
        if self.vocab_size is not None and not 1 <= self.vocab_size <= _MAX_VOCABULARY:
            raise InputError(f"{where}.vocab_size", self.vocab_size, f"outside 1 to {_MAX_VOCABULARY}", "give the vocabulary's size or leave it out")


@dataclass(frozen=True, slots=True)
class TrainableParts:
    """Which parts of a module have weights that are trained: all or none of them by a workload, any by a model that was built."""

    first: bool
    """What stands before the layers: embedding or stem."""
    layers: tuple[bool, ...]
    """Each layer, in order. A layer with a trained adapter is trained."""
    last: bool
    """What stands behind the layers: final norm, projector, head."""

    @property
    def any(self) -> bool:
        return self.first or self.last or any(self.layers)

    def stage(self, first_layer: int, num_layers: int, *, at_first: bool, at_last: bool, below: bool) -> StageBackward:
        """What the backward of one stage has to do.

        Args:
            first_layer: of the stage, within the module.
            at_first, at_last: whether the stage holds what stands before, or behind, all layers.
            below: whether a module that feeds this one, in the same microbatch, needs a gradient.
        """
        own = self.layers[first_layer : first_layer + num_layers]
        from_below = below or (self.first and not at_first) or any(self.layers[:first_layer])
        behind_first = from_below or (at_first and self.first)
        passed = num_layers if behind_first else next((num_layers - index for index, trained in enumerate(own) if trained), 0)
        return StageBackward(
            first=at_first and behind_first, layers=passed, last=at_last and (behind_first or passed > 0 or self.last),
            weight_first=at_first and self.first, weight_layers=sum(own), weight_last=at_last and self.last, needed=(
                behind_first or passed > 0 or (at_last and self.last)
            ),
        )


@dataclass(frozen=True, slots=True)
class StageBackward:
    """What the backward of one stage passes: from the stage's end down to the first thing that is trained, or on to the stage before."""

    needed: bool
    """Whether there is a backward: something trained stands in the stage or before it."""
    first: bool
    """A gradient passes the embedding or stem."""
    layers: int
    """How many of the stage's layers a gradient passes, counted from the last one. The others run without a graph."""
    last: bool
    """A gradient passes the projector or head."""
    weight_first: bool
    """These have weight gradients; likewise below."""
    weight_layers: int
    weight_last: bool

    @property
    def has_weights(self) -> bool:
        return self.weight_first or self.weight_layers > 0 or self.weight_last


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A multimodal model: its modules in any order that their inputs allow."""

    modules: list[ModuleSpec]

    def module(self, name: str) -> ModuleSpec:
        for module in self.modules:
            if module.name == name:
                return module
        raise InputError("module", name, "the model has no such module", f"use one of {[m.name for m in self.modules]}")

    def inputs_of(self, name: str) -> tuple[str, ...]:
        """Names of the modules that feed ``name``, in the model's order, by ``inputs`` or else by role."""
        module = self.module(name)
        if module.inputs is not None:
            return tuple(module.inputs)
        encoders = tuple(m.name for m in self.modules if m.role == "encoder")
        backbones = tuple(m.name for m in self.modules if m.role == "backbone")
        if module.role == "backbone":
            return encoders
        if module.role == "decoder":
            return backbones or encoders
        return ()

    def consumers_of(self, name: str) -> tuple[str, ...]:
        """Names of the modules that ``name`` feeds, in the model's order."""
        return tuple(m.name for m in self.modules if name in self.inputs_of(m.name))

    def topological(self) -> tuple[str, ...]:
        """Module names so that every module stands behind those that feed it. Raises InputError on a cycle."""
        done: list[str] = []
        left = [m.name for m in self.modules]
        while left:
            ready = [name for name in left if all(source in done for source in self.inputs_of(name))]
            if not ready:
                raise InputError("model.modules[*].inputs", left, "the modules feed each other in a cycle", "remove one of the inputs")
            done.extend(ready)
            left = [name for name in left if name not in done]
        return tuple(done)

    def backward_modules(self) -> dict[str, bool]:
        """Which modules run backward stages: those that are trainable or stand behind a trainable one (DIP.md: frozen modules).

        A frozen module behind a trainable one passes gradients to its inputs but has no weight gradient; a module with nothing
        trainable at or before it runs no backward at all.
        """
        below = self._gradients_into(self.topological())
        return {name: passed or self.trainable_parts(name).any for name, passed in below.items()}

    def gradients_into(self, present: Collection[str]) -> dict[str, bool]:
        """For each module of a microbatch whether what feeds it needs a gradient, in topological order.

        By a workload file all microbatches are alike in this, also those that lack a feeding module: who reads the file and the plan
        can tell from the modules alone which stages there are.

        Args:
            present: modules that have instances in the microbatch.
        """
        below = self._gradients_into(self.topological())
        return {name: needed for name, needed in below.items() if name in present}

    def _gradients_into(self, names: Collection[str]) -> dict[str, bool]:
        """As above, with nothing but ``names`` (in topological order) in the microbatch."""
        below: dict[str, bool] = {}
        for name in names:
            below[name] = any(below[source] or self.trainable_parts(source).any for source in self.inputs_of(name) if source in below)
        return below

    def trainable_parts(self, name: str) -> TrainableParts:
        """Which parts of a module are trained: all or none, as the module says of itself."""
        module = self.module(name)
        return TrainableParts(module.trainable, (module.trainable,) * module.num_layers, module.trainable)

    def validate(self, where: str = "model") -> None:
        if not self.modules:
            raise InputError(f"{where}.modules", [], "no modules", "name at least one module")
        seen: set[str] = set()
        for index, module in enumerate(self.modules):
            module.validate(f"{where}.modules[{index}]")
            if module.name in seen:
                raise InputError(f"{where}.modules[{index}].name", module.name, "used twice", "give each module its own name")
            seen.add(module.name)
        for index, module in enumerate(self.modules):
            for source in self.inputs_of(module.name):
                if source not in seen:
                    raise InputError(
                        f"{where}.modules[{index}].inputs", source, "no such module", f"use one of {sorted(seen)}"
                    )
        self.topological()


class BuiltModelSpec(ModelSpec, frozen=True, kw_only=True):
    """A model whose chunks were built: of each part it is known whether it is trained. In memory only, no file holds this."""

    parts: dict[str, TrainableParts]
    """By module."""

    def gradients_into(self, present: Collection[str]) -> dict[str, bool]:
        """A module that is absent from a microbatch feeds nothing there and needs no gradient: text alone through a frozen language model
        has no backward."""
        return self._gradients_into([name for name in self.topological() if name in present])

    def trainable_parts(self, name: str) -> TrainableParts:
        return self.parts[name]
