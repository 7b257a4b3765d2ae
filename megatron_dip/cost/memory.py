"""Bytes that a rank holds all the time: parameters, gradients and optimizer state of its chunks.

Source: Megatron-LM's accounting (fp16/bf16 parameter, fp32 main gradient, fp32 master copy and two Adam moments = 2 + 4 + 12 bytes a
parameter; the last 12 are split over the data-parallel ranks by the distributed optimizer). Biases and norm weights are counted as if
they were split over the tensor-parallel ranks too; they are less than 0.1 % of a layer. Not counted here: activations
(:mod:`megatron_dip.cost.modules`) and the margin for fragmentation (a share of the device's memory,
:class:`megatron_dip.cost.device.DeviceDescription`).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dip.cost.modules import MODULATIONS, STEM_INPUT, TIMESTEP_INPUT, VIT_MERGE
from megatron_dip.spec.model import ModuleSpec
from megatron_dip.spec.workload import Training


def layer_parameters(module: ModuleSpec) -> int:
    """Parameters of one layer, of all tensor-parallel ranks together."""
    hidden, head = module.hidden_size, module.hidden_size // module.num_attention_heads
    attention = 2 * hidden * hidden + 2 * hidden * module.query_groups * head
    cross = 4 * hidden * hidden if module.cross_attention else 0
    mlp = (3 if module.has_gated_mlp else 2) * hidden * module.ffn_hidden_size
    return (attention + cross + mlp) * (module.uncut_blocks or 1)


def first_parameters(module: ModuleSpec) -> int:
    """Parameters of the embedding or stem, and of a DiT's timestep embedding."""
    if module.kind == "lm":
        return (module.vocab_size or 0) * module.hidden_size
    timestep = (TIMESTEP_INPUT + (1 + MODULATIONS) * module.hidden_size) * module.hidden_size if module.kind == "dit" else 0
    return timestep + unsplit_first_parameters(module)


def unsplit_first_parameters(module: ModuleSpec) -> int:
    """Those of them that every tensor-parallel rank holds whole: a stem's."""
    return 0 if module.kind == "lm" else STEM_INPUT[module.kind] * module.hidden_size


def last_parameters(module: ModuleSpec, consumer: ModuleSpec | None) -> int:
    """Parameters of the projector or head."""
    if consumer is not None:
        if module.kind == "vit" and consumer.kind == "lm":
            return (VIT_MERGE * module.hidden_size + consumer.hidden_size) * consumer.hidden_size
        return module.hidden_size * consumer.hidden_size
    if module.kind == "lm":
        return (module.vocab_size or 0) * module.hidden_size
    return STEM_INPUT[module.kind] * module.hidden_size


def module_parameters(module: ModuleSpec, consumer: ModuleSpec | None) -> int:
    """All parameters of a module; tied embeddings count once."""
    last = 0 if module.tied_embeddings and consumer is None else last_parameters(module, consumer)
    return module.num_layers * layer_parameters(module) + first_parameters(module) + last


def input_bytes(module: ModuleSpec, lengths: Sequence[int], *, at_first: bool) -> int:
    """What a microbatch's data of a module take on a rank: token ids, labels and positions of 8 bytes and a loss mask of 4 for a language
    model, on every rank; the values of the stem's patches in fp32 for the others, where the stem is."""
    if module.kind == "lm":
        return 28 * sum(lengths)
    return 4 * STEM_INPUT[module.kind] * sum(lengths) if at_first else 0


KEPT_STEM_BYTES = 64 * 2**20
"""Of stem inputs (images, latents) that a rank keeps from the iteration's start on; microbatches beyond are read again when their stem runs."""


class StemBudget:
    """Which microbatches' stem inputs stay on the device: the first ones, in their order, as far as :data:`KEPT_STEM_BYTES` go."""

    def __init__(self) -> None:
        self._kept = 0

    def keeps(self, size: int) -> bool:
        """Whether the next microbatch's stay, of ``size`` bytes."""
        if self._kept + size > KEPT_STEM_BYTES:
            return False
        self._kept += size
        return True


def bytes_per_parameter(training: Training, *, trainable: bool, replicas: int) -> float:
    """Parameter, gradient and optimizer bytes; ``replicas`` = data- times context-parallel ranks."""
    width = 4 if training.dtype == "fp32" else 2
    if not trainable:
        return float(width)
    state = 8.0 if training.dtype == "fp32" else 12.0
    return width + 4.0 + (state / replicas if training.distributed_optimizer else state)
