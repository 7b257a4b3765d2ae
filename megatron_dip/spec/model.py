"""Modality modules of a multimodal model, and how they feed each other.

What comes in: module descriptions from a workload file or from code. What goes out: frozen :class:`ModelSpec` objects with every
default filled in. Widths are per module (not per tensor-parallel shard). Source of the sizes in :data:`NAMED_MODELS` (in
:mod:`megatron_dip.spec.named`): DIP (arXiv 2504.14145), tables of models and setups.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from megatron_dip.spec.errors import InputError

Role = Literal["encoder", "backbone", "decoder"]
ModuleKind = Literal["vit", "lm", "dit", "audio"]

_MAX_SIZE = 10**6
"""Of layers, widths and heads: above any real model, below what would overflow times or exhaust memory."""


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
        if self.vocab_size is not None and self.vocab_size < 1:
            raise InputError(f"{where}.vocab_size", self.vocab_size, "must be at least 1", "give the vocabulary's size or leave it out")


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
        needs: dict[str, bool] = {}
        for name in self.topological():
            needs[name] = self.module(name).trainable or any(needs[source] for source in self.inputs_of(name))
        return needs

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
