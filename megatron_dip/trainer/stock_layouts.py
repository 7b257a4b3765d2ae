"""The same model, weights and data under Megatron's own schedules: what DIP is compared with.

Three layouts:

* ``scripts``: as Megatron's scripts lay a vision-language model out, the whole ViT with its projector (a text-to-video model: the language
  model) on the first rank, the last module's layers split evenly over all ranks. One chunk a rank: the scripts know no virtual stages.
* ``parameters``: the layers of all modules in one chain, cut into P * V stages with as equal parameters as can be (the baseline of
  the DIP paper; V > 1 runs Megatron's interleaved schedule).
* ``measured``: the same chain, cut by given times of the layers.

In a chain the tensors between stages differ in shape, so Megatron exchanges shapes (``variable_seq_lengths``), and where a microbatch
has no image one dummy token travels through the ViT's stages; it is added to the embeddings times zero, so that a gradient travels back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from megatron_dip.models.built_in import BuiltInConfig, ChainCost
from megatron_dip.models.layout import ModuleCut
from megatron_dip.spec.errors import InputError
from megatron_dip.trainer.build import TrainingModel, wrap_stages

StockLayout = Literal["scripts", "parameters", "measured"]


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
    config: BuiltInConfig, layout: StockLayout, *, ranks: int, virtual: int = 1, layer_times: Mapping[str, ChainCost] | None = None
) -> dict[str, ModuleCut]:
    """Where each module's layers lie in a stock layout; stage k * P + r is chunk k on rank r."""
    spec = config.model_spec
    order = spec.topological()
    layers = {name: spec.module(name).num_layers for name in order}
    if layout == "scripts":
        *before, last = order
        if virtual != 1:
            raise InputError("virtual", virtual, "Megatron's scripts have no virtual stages for a multimodal model", "use 1")
        if layers[last] % ranks:
            raise InputError(f"model.{last}.num_layers", layers[last], f"is not divisible by {ranks} pipeline ranks", "change one of them")
        return {
            **{name: ModuleCut(((layers[name], *[0] * (ranks - 1)),), (0, 0), (0, 0)) for name in before},
            last: ModuleCut((tuple([layers[last] // ranks] * ranks),), (0, 0), (0, ranks - 1)),
        }
    stages, total = ranks * virtual, sum(layers.values())
    if stages > total:
        raise InputError(
            "virtual", virtual, f"{total} layers cannot fill {stages} stages ({ranks} pipeline ranks x {virtual})",
            "use fewer stages or more layers",
        )
    if layout == "measured" and layer_times is None:
        raise InputError("layer_times", None, "the measured layout needs the layers' times", "give them, or use the layout parameters")
    costs = config.parameter_costs() if layout == "parameters" or layer_times is None else dict(layer_times)
    chain: list[float] = []
    for name in order:
        part = [costs[name].layer] * layers[name]
        part[0] += costs[name].first
        part[-1] += costs[name].last
        chain += part
    return _chain_cuts(split_evenly(chain, stages), layers, ranks)


def _chain_cuts(sizes: Sequence[int], layers: Mapping[str, int], ranks: int) -> dict[str, ModuleCut]:
    """Args:
    sizes: layers of each stage of the chain.
    layers: of each module, in the chain's order.
    """
    cuts = {}
    begin = 0
    for name, count in layers.items():
        in_stage, start = [], 0
        for size in sizes:
            in_stage.append(max(0, min(start + size, begin + count) - max(start, begin)))
            start += size
        held = [stage for stage, held_layers in enumerate(in_stage) if held_layers]
        rows = tuple(tuple(in_stage[i : i + ranks]) for i in range(0, len(in_stage), ranks))
        cuts[name] = ModuleCut(rows, divmod(held[0], ranks), divmod(held[-1], ranks))
        begin += count
    return cuts


def build_stock_model(
    config: BuiltInConfig, layout: StockLayout, *, virtual: int = 1, layer_times: Mapping[str, ChainCost] | None = None,
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
    outermost = config.model_spec.module(config.outermost)
    if outermost.tied_embeddings and ranks > 1 and cuts[outermost.name].first != (0, 0):
        raise InputError(
            f"model.{outermost.name}.tied_embeddings", True, "Megatron ties embedding and head only where the first stage holds the embedding",
            "use the layout scripts, or untie them",
        )
    # Where one module feeds the next on the same rank, as the scripts have it, a stage need not hand on what is not there.
    stages = [config.build_stage(cuts, vp_stage, rank, is_chained=layout != "scripts") for vp_stage in range(virtual)]
    training_config = replace(
        config.transformer_config(outermost),
        num_layers=ranks * virtual,
        pipeline_model_parallel_size=ranks,
        virtual_pipeline_model_parallel_size=None if virtual == 1 else virtual,
        microbatch_group_size_per_vp_stage=ranks,
        variable_seq_lengths=layout != "scripts" or not config.has_fixed_lengths,
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
