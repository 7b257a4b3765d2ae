"""The same model, weights and data under Megatron's own schedules: what DIP is compared with.

Three layouts:

* ``scripts``: as Megatron's scripts lay a vision-language model out, the whole ViT with its projector on the first rank, the language
  model's layers split evenly over all ranks. One chunk a rank: the scripts know no virtual stages.
* ``parameters``: the layers of both modules in one chain, cut into P * V stages with as equal parameters as can be (the baseline of
  the DIP paper; V > 1 runs Megatron's interleaved schedule).
* ``measured``: the same chain, cut by given times of the layers.

In a chain the tensors between stages differ in shape, so Megatron exchanges shapes (``variable_seq_lengths``), and where a microbatch
has no image one dummy token travels through the ViT's stages; it is added to the embeddings times zero, so that a gradient travels back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from megatron_dip.models.layout import ModuleCut
from megatron_dip.models.vlm import LANGUAGE, VISION, VlmConfig, VlmStage
from megatron_dip.spec.errors import InputError
from megatron_dip.trainer.build import TrainingModel, wrap_stages

StockLayout = Literal["scripts", "parameters", "measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainCost:
    """What one module weighs in the chain, in any unit: time, or parameters."""

    layer: float
    first: float = 0.0
    """Stem or embedding, on top of the first layer."""
    last: float = 0.0
    """Projector or head, on top of the last layer."""


class ChainStage(VlmStage):
    """A stage of a chain of both modules: a microbatch without images sends a dummy token from stage to stage."""

    def has_images(self, images: torch.Tensor | None, hidden: torch.Tensor | None) -> bool:
        return images is not None and len(images) > 0

    def pass_by(self, hidden: torch.Tensor | None) -> torch.Tensor | None:
        assert self.vision_model is not None
        parameter = self.vision_model.decoder.layers[0].mlp.linear_fc2.weight
        width = self.vlm_config.language.hidden_size if self.vision_projection is not None else self.vlm_config.vision.hidden_size
        dummy = torch.zeros(1, 1, width, dtype=parameter.dtype, device=parameter.device)
        return dummy if hidden is None else dummy + hidden.sum() * 0

    def merge_images(self, embeddings: torch.Tensor, image_embeddings: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        if not bool((tokens == self.vlm_config.image.token_id).any()):
            return embeddings + image_embeddings.sum() * 0
        return super().merge_images(embeddings, image_embeddings, tokens)


def parameter_costs(config: VlmConfig) -> dict[str, ChainCost]:
    """Parameters of the layers, and of what stands before and behind them."""
    vision, language, image = config.vision, config.language, config.image
    costs = {}
    for module in (vision, language):
        hidden, kv = module.hidden_size, module.hidden_size // module.num_attention_heads * module.query_groups
        matrices = 3 if module.has_gated_mlp else 2
        costs[module.name] = float(2 * hidden * (hidden + kv) + matrices * hidden * module.ffn_hidden_size)
    words = float(language.vocab_size or 0) * language.hidden_size
    merged = vision.hidden_size * image.merge**2
    return {
        VISION: ChainCost(
            layer=costs[VISION],
            first=float((image.channels * image.patch**2 + image.patches) * vision.hidden_size),
            last=float((merged + language.hidden_size) * language.hidden_size),
        ),
        LANGUAGE: ChainCost(layer=costs[LANGUAGE], first=words, last=words),
    }


def split_evenly(costs: Sequence[float], num_parts: int) -> list[int]:
    """Sizes of the contiguous, non-empty parts of ``costs`` whose heaviest part is as light as can be."""
    count = len(costs)
    assert 1 <= num_parts <= count, (num_parts, count)
    infinity = float("inf")
    best = [[infinity] * (count + 1) for _ in range(num_parts + 1)]
    cut = [[0] * (count + 1) for _ in range(num_parts + 1)]
    best[0][0] = 0.0
    for part in range(1, num_parts + 1):
        for end in range(part, count + 1):
            load = 0.0
            for start in range(end - 1, part - 2, -1):
                load += costs[start]
                heaviest = max(best[part - 1][start], load)
                if heaviest < best[part][end]:
                    best[part][end], cut[part][end] = heaviest, start
    sizes, end = [], count
    for part in range(num_parts, 0, -1):
        sizes.append(end - cut[part][end])
        end = cut[part][end]
    return sizes[::-1]


def stock_cuts(
    config: VlmConfig, layout: StockLayout, *, ranks: int, virtual: int = 1, layer_times: Mapping[str, ChainCost] | None = None
) -> dict[str, ModuleCut]:
    """Where each module's layers lie in a stock layout; stage k * P + r is chunk k on rank r."""
    vision, language = config.vision.num_layers, config.language.num_layers
    if layout == "scripts":
        if virtual != 1:
            raise InputError("virtual", virtual, "Megatron's scripts have no virtual stages for a vision-language model", "use 1")
        if language % ranks:
            raise InputError("model.lm.num_layers", language, f"is not divisible by {ranks} pipeline ranks", "change one of them")
        return {
            VISION: ModuleCut(((vision, *[0] * (ranks - 1)),), (0, 0), (0, 0)),
            LANGUAGE: ModuleCut((tuple([language // ranks] * ranks),), (0, 0), (0, ranks - 1)),
        }
    stages = ranks * virtual
    if stages > vision + language:
        raise InputError(
            "virtual", virtual, f"{vision + language} layers cannot fill {stages} stages ({ranks} pipeline ranks x {virtual})",
            "use fewer stages or more layers",
        )
    if layout == "measured" and layer_times is None:
        raise InputError("layer_times", None, "the measured layout needs the layers' times", "give them, or use the layout parameters")
    costs = parameter_costs(config) if layout == "parameters" or layer_times is None else dict(layer_times)
    chain: list[float] = []
    for module, layers in ((VISION, vision), (LANGUAGE, language)):
        part = [costs[module].layer] * layers
        part[0] += costs[module].first
        part[-1] += costs[module].last
        chain += part
    return _chain_cuts(split_evenly(chain, stages), vision, ranks)


def _chain_cuts(sizes: Sequence[int], vision_layers: int, ranks: int) -> dict[str, ModuleCut]:
    in_stage: dict[str, list[int]] = {VISION: [], LANGUAGE: []}
    start = 0
    for size in sizes:
        seen = max(0, min(size, vision_layers - start))
        in_stage[VISION].append(seen)
        in_stage[LANGUAGE].append(size - seen)
        start += size
    cuts = {}
    for module, layers in in_stage.items():
        held = [stage for stage, count in enumerate(layers) if count]
        rows = tuple(tuple(layers[i : i + ranks]) for i in range(0, len(layers), ranks))
        cuts[module] = ModuleCut(rows, divmod(held[0], ranks), divmod(held[-1], ranks))
    return cuts


def build_stock_model(
    config: VlmConfig, layout: StockLayout, *, virtual: int = 1, layer_times: Mapping[str, ChainCost] | None = None,
    distributed_optimizer: bool = False,
) -> TrainingModel:
    """This rank's stages, for :func:`stock_forward_backward`; ``layer_times`` are those of the layout ``measured``.

    Gradients are reduced at the end of the iteration: Megatron's overlapped reduction waits for a gradient of every weight in the last
    microbatch and fails where that one has no image.
    """
    ranks, rank = parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_pipeline_model_parallel_rank()
    if ranks == 1 and virtual > 1:
        raise InputError("virtual", virtual, "Megatron interleaves only with more than one pipeline rank", "use 1")
    cuts = stock_cuts(config, layout, ranks=ranks, virtual=virtual, layer_times=layer_times)
    if config.language.tied_embeddings and ranks > 1 and cuts[LANGUAGE].first != (0, 0):
        raise InputError(
            "model.lm.tied_embeddings", True, "Megatron ties embedding and head only where the first stage holds the embedding",
            "use the layout scripts, or untie them",
        )
    kind = VlmStage if layout == "scripts" else ChainStage
    stages = [kind(config, cuts, vp_stage, rank) for vp_stage in range(virtual)]
    training_config = replace(
        config.transformer_config(config.language),
        num_layers=ranks * virtual,
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=None if virtual == 1 else virtual,
        microbatch_group_size_per_vp_stage=ranks,
        variable_seq_lengths=layout != "scripts",
        # With two ranks and batched messages Megatron's interleaved schedule takes one neighbour's tensor for the other's, silently.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=False,
        # Deallocation frees tensors that gloo may still be sending.
        deallocate_pipeline_outputs=False,
    )
    return wrap_stages(config, stages, training_config, distributed_optimizer=distributed_optimizer)


def stock_forward_backward(*, virtual: int = 1) -> Callable[..., Any]:
    """Megatron's own function for the current pipeline size, with Megatron's keyword arguments."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return schedules.forward_backward_no_pipelining
    if virtual > 1:
        return schedules.forward_backward_pipelining_with_interleaving
    return schedules.forward_backward_pipelining_without_interleaving
