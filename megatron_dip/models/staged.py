"""One rank's chunks of a described model, as the executor runs them (:class:`megatron_dip.runtime.interface.StagedModel`)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.utils.checkpoint import checkpoint

from megatron_dip.cost.memory import StemBudget
from megatron_dip.models.description import ModelDescription
from megatron_dip.models.trained import transformer_blocks, uncut_layers
from megatron_dip.runtime.interface import BoundCall, ChunkKey, ForwardOutput, OutputPart, PayloadSpec
from megatron_dip.runtime.memory_meter import tensors_in
from megatron_dip.runtime.offload import ActivationOffload, host_memory_limit
from megatron_dip.schedule.rooms import offloaded_places
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan, PlanStage


class ModelCall(Protocol):
    """One captured call of the model by the user's forward_step."""

    @property
    def args(self) -> tuple[Any, ...]: ...

    @property
    def kwargs(self) -> Mapping[str, Any]: ...


def _tensor_bytes(value: Any) -> int:
    """Of the tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return 0 if value.is_meta else value.nbytes
    if isinstance(value, Mapping):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


class DescribedStagedModel:
    """Runs the chunks of one rank by their description. Not for use from several threads."""

    def __init__(
        self, description: ModelDescription, chunks: Mapping[ChunkKey, torch.nn.Module], *, host_memory_bytes: int | None = None
    ) -> None:
        """
        Args:
            chunks: this rank's chunks, perhaps inside DDP, in the order of the list that Megatron gets.
            host_memory_bytes: for offloaded activations; None: half of what the machine has free, shared by its ranks.
        """
        self.description = description
        self.chunks = dict(chunks)
        self.chunk_keys: Sequence[ChunkKey] = tuple(chunks)
        device = next((weight.device for chunk in chunks.values() for weight in chunk.parameters()), torch.device("cpu"))
        self.offload = ActivationOffload(device, host_memory_limit() if host_memory_bytes is None else host_memory_bytes)
        self._blocks: dict[ChunkKey, list[BlockStrategies | UncutStrategies]] = {
            key: [
                *(UncutStrategies(layer, self.offload) for layer in uncut_layers(chunk)),
                *(BlockStrategies(block, chunk, self.offload) for block in transformer_blocks(chunk)),
            ]
            for key, chunk in self.chunks.items()
        }
        self._stages: list[PlanStage] = []
        self._batches: list[BoundCall | None] = []
        self._recapture: Callable[[int], ModelCall] | None = None
        self._stem_modules = {module.name for module in description.model_spec.modules if module.kind != "lm"}
        """Those whose first chunk reads more than tokens."""
        self._stem_budget = StemBudget()
        self._stems_left: Counter[int] = Counter()
        """Microbatch -> its stem stages that have not run, on the rank that has the stems."""
        self._first_instance: dict[tuple[str, int, int], int] = {}
        self._num_parts: dict[tuple[str, int], int] = {}
        """(module, microbatch) -> its sub-microbatches."""

    def bind(self, call: ModelCall) -> BoundCall:
        whole = self.description.bind(call.args, call.kwargs)
        lean = self.description.without_stem_inputs(whole)
        has_stems = parallel_state.get_pipeline_model_parallel_rank() == 0
        keeps = has_stems and self._stem_budget.keeps(_tensor_bytes(whole) - _tensor_bytes(lean))
        return BoundCall(whole if keeps else lean, has_stems and not keeps, self.description.num_instances(whole))

    def begin_iteration(
        self, plan: Plan, microbatches: Sequence[BoundCall], recapture: Callable[[int], ModelCall], *, forward_only: bool
    ) -> None:
        """Raises InputError where a microbatch does not hold the instances that the plan was made for."""
        self._stages = plan.stages
        self._batches = list(microbatches)
        self._recapture = recapture
        counts = part_sizes(plan)
        self._num_parts = {key: len(parts) for key, parts in counts.items()}
        self._first_instance = first_instances(counts)
        for index, bound in enumerate(microbatches):
            for module, found in bound.num_instances.items():
                planned = sum(counts.get((module, index), {}).values())
                if planned != found:
                    raise InputError(
                        f"microbatch {index}", found, f"forward_step gives the model this many instances of {module}, the data iterator's item "
                        f"tells {planned}", "give the model what the item holds",
                    )
        self._stems_left = Counter(stage.microbatch for stage in plan.stages if self._is_stem(stage))

    def _is_stem(self, stage: PlanStage) -> bool:
        return stage.kind == "fw" and stage.vp_stage == stage.rank == 0 and stage.module in self._stem_modules

    def release(self, microbatch: int) -> None:
        self._batches[microbatch] = None

    def payload(self, producer: PlanStage, consumer: PlanStage) -> PayloadSpec:
        return self.description.boundary(producer, consumer, self._batch(producer.microbatch), self._first(producer))

    def _batch(self, microbatch: int) -> Any:
        bound = self._batches[microbatch]
        assert bound is not None, f"microbatch {microbatch} was let go"
        return bound.batch

    def _with_stem_inputs(self, microbatch: int) -> None:
        """Reads a microbatch's stem inputs once more where they were not kept."""
        bound = self._batches[microbatch]
        assert bound is not None
        assert self._recapture is not None
        if not bound.reads_again:
            return
        call = self._recapture(microbatch)
        again = BoundCall(self.description.bind(call.args, call.kwargs), False, bound.num_instances)
        if self.description.num_instances(again.batch) != bound.num_instances:
            raise InputError(
                f"microbatch {microbatch}", self.description.num_instances(again.batch),
                f"forward_step gave the model {bound.num_instances} instances at the first reading of the same item", "let it change no item in place",
            )
        self._batches[microbatch] = again

    def _without_stem_inputs(self, microbatch: int) -> None:
        """Lets stem inputs go behind a microbatch's last stem stage."""
        self._stems_left[microbatch] -= 1
        bound = self._batches[microbatch]
        if not self._stems_left[microbatch] and bound is not None:
            self._batches[microbatch] = BoundCall(self.description.without_stem_inputs(bound.batch), False, bound.num_instances)

    def _first(self, stage: PlanStage) -> int:
        return self._first_instance[stage.module, stage.microbatch, stage.sub_microbatch]

    def forward(self, stage: PlanStage, inputs: Mapping[int, torch.Tensor], consumers: Sequence[PlanStage]) -> ForwardOutput:
        producers = sorted((self._stages[producer] for producer in inputs), key=lambda producer: producer.sub_microbatch)
        by_module: dict[str, list[torch.Tensor]] = {}
        for producer in producers:
            by_module.setdefault(producer.module, []).append(inputs[producer.id])
        key = (stage.module, stage.vp_stage)
        is_stem = self._is_stem(stage)
        if is_stem:
            self._with_stem_inputs(stage.microbatch)
        batch, first = self._batch(stage.microbatch), self._first(stage)
        passes_on = any(payload.requires_grad for payload in inputs.values())
        with contextlib.ExitStack() as stack:
            for block in self._blocks[key]:
                stack.enter_context(block.under(stage.strategy, passes_on=passes_on))
            output = self.description.run_chunk(self.chunks[key], stage, batch, first, by_module)
        if is_stem:
            self._without_stem_inputs(stage.microbatch)
        if not consumers:
            return ForwardOutput(payloads={}, result=self._result(stage, output, batch, first))
        return ForwardOutput(payloads={consumer.id: output for consumer in consumers})

    def _result(self, stage: PlanStage, output: torch.Tensor, batch: Any, first_instance: int) -> torch.Tensor | OutputPart:
        if self._num_parts[stage.module, stage.microbatch] == 1:
            return output
        place = self.description.output_slice(stage, batch, first_instance)
        if place is None:
            raise InputError(
                f"sub_microbatch_size.{stage.module}", stage.sub_microbatch,
                "the module that ends in the loss is split within a microbatch, which this model does not allow",
                "make its sub-microbatch size as large as a microbatch's instances",
            )
        return OutputPart(output, place.dim, place.start, place.whole)

    def end_iteration(self) -> None:
        self._stages, self._batches, self._first_instance, self._num_parts = [], [], {}, {}
        self._recapture = None
        self._stem_budget = StemBudget()
        self.offload.forget()


def part_sizes(plan: Plan) -> dict[tuple[str, int], dict[int, int]]:
    """(module, microbatch) -> number of a sub-microbatch -> its instances."""
    counts: dict[tuple[str, int], dict[int, int]] = {}
    for stage in plan.stages:
        if stage.kind == "fw":
            counts.setdefault((stage.module, stage.microbatch), {})[stage.sub_microbatch] = stage.instances
    return counts


def first_instances(counts: Mapping[tuple[str, int], Mapping[int, int]]) -> dict[tuple[str, int, int], int]:
    """(module, microbatch, sub-microbatch) -> number of its first instance within the microbatch."""
    first: dict[tuple[str, int, int], int] = {}
    for (module, microbatch), parts in counts.items():
        before = 0
        for part in sorted(parts):
            first[module, microbatch, part] = before
            before += parts[part]
    return first


_SELECTIVE = (
    "checkpoint_core_attention", "recompute_input_layernorm", "recompute_pre_mlp_layernorm", "recompute_mlp", "recompute_up_proj",
    "moe_layer_recompute", "shared_experts_recompute", "activation_recompute",
)
"""Attributes by which Megatron's modules know that ``--recompute-granularity selective`` meant them."""


class BlockStrategies:
    """The layers of a chunk, which keep, recompute or offload as a stage's strategies say, and recompute at least what the user's flags say."""

    def __init__(self, block: TransformerBlock, chunk: torch.nn.Module, offload: ActivationOffload) -> None:
        """Args:
        chunk: the block's, perhaps inside Megatron's wrappers.
        """
        self._block = block
        self._offload = offload
        self._offloaded: frozenset[int] = frozenset()
        """Layers that the forward at hand offloads."""
        trained = [any(weight.requires_grad for weight in layer.parameters()) for layer in block.layers]
        inside = {id(weight) for layer in block.layers for weight in layer.parameters()}
        trains_elsewhere = any(weight.requires_grad and id(weight) not in inside for weight in chunk.parameters())
        self._has_trained_layers = any(trained)
        self._frozen_below = 0 if trains_elsewhere or not any(trained) else trained.index(True)
        """First layers that no gradient passes unless one goes on to the stage before."""
        self._asked_for: list[list[tuple[torch.nn.Module, str]]] = [
            [(module, name) for module in layer.modules() for name in _SELECTIVE if getattr(module, name, False)] for layer in block.layers
        ]
        block.register_forward_pre_hook(self._give_input_a_gradient, with_kwargs=True)
        for index, layer in enumerate(block.layers):
            layer.forward = partial(self._run_layer, index, layer, layer.forward)  # type: ignore[method-assign]

    @contextlib.contextmanager
    def under(self, strategies: Sequence[str], *, passes_on: bool) -> Iterator[None]:
        """For one forward: layers keep what they need (``none``), recompute core attention (``selective``) or all (``full``), or ``offload``.

        Layers of a chunk are alike, so only the counts matter. Megatron's ``block`` method recomputes the first ones in full. Offloaded
        layers are spread among those that keep all: these run while copies do.

        Args:
            passes_on: whether the stage sends a gradient to the one before.
        """
        unknown = set(strategies) - {"none", "selective", "full", "offload"}
        assert not unknown, f"memory strategies {sorted(unknown)} are not known to the models"
        first = 0 if passes_on else self._frozen_below  # layers below keep nothing whatever they do
        num_full, num_selective = strategies.count("full"), strategies.count("selective")
        whole = range(first + num_full if num_full else 0)
        selective = range(first + num_full, first + num_full + num_selective)
        config: Any = self._block.config
        config.recompute_granularity = "full" if num_full else None
        config.recompute_method = "block" if num_full else None
        config.recompute_num_layers = len(whole) if num_full else None
        self._set_flags(lambda index: index in selective, lambda index: index not in whole)
        places = offloaded_places(strategies.count("offload"), len(self._block.layers) - selective.stop)
        self._offloaded = frozenset(selective.stop + place for place in places)
        try:
            yield
        finally:
            # A backward runs layers again that are recomputed whole: nothing within them is to be recomputed once more.
            self._set_flags(lambda index: False, lambda index: False)
            self._offloaded = frozenset()

    def _set_flags(self, core_attention: Callable[[int], bool], as_asked: Callable[[int], bool]) -> None:
        """Args:
        core_attention: index of a layer -> whether it recomputes its core attention.
        as_asked: whether what the user's flags ask for is on in it.
        """
        for index, (layer, asked_for) in enumerate(zip(self._block.layers, self._asked_for, strict=True)):
            layer.self_attention.checkpoint_core_attention = core_attention(index)  # type: ignore[union-attr]
            for module, name in asked_for:
                setattr(module, name, as_asked(index))

    def _run_layer(self, index: int, layer: torch.nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if index not in self._offloaded or not torch.is_grad_enabled() or not self._offload.is_collecting:
            return forward(*args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        with self._offload.layer(layer, [tensor for tensor in tensors_in((args, kwargs)) if tensor is not hidden]):
            return forward(*args, **kwargs)

    def _give_input_a_gradient(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Megatron recomputes whole layers in a re-entrant autograd function, which gives no gradient to its layers' weights unless its
        input requires one. Behind frozen embeddings, and first in a module whose encoder is frozen, it would not."""
        if block.config.recompute_granularity != "full" or not torch.is_grad_enabled() or not self._has_trained_layers:
            return None
        if not block.pre_process:
            block.input_tensor = _with_gradient(block.input_tensor)
        elif "hidden_states" in kwargs:
            kwargs = {**kwargs, "hidden_states": _with_gradient(kwargs["hidden_states"])}
        else:
            args = (_with_gradient(args[0]), *args[1:])
        return args, kwargs


class UncutStrategies:
    """A layer of any kind, the only one of its chunk, which keeps, recomputes or offloads what it saves as a stage's strategy says."""

    def __init__(self, layer: torch.nn.Module, offload: ActivationOffload) -> None:
        self._layer, self._offload = layer, offload
        self._strategy = "none"
        self._forward = layer.forward
        layer.forward = self._run  # type: ignore[method-assign]

    @contextlib.contextmanager
    def under(self, strategies: Sequence[str], *, passes_on: bool) -> Iterator[None]:
        """For one forward; see :meth:`BlockStrategies.under`."""
        assert set(strategies) <= {"none", "full", "offload"}, f"memory strategies {sorted(set(strategies))} are not known to a layer that is not cut"
        self._strategy = next(iter(strategies), "none")
        try:
            yield
        finally:
            self._strategy = "none"  # a backward runs it again as it is

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or self._strategy == "none":
            return self._forward(*args, **kwargs)
        if self._strategy == "full":
            return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)
        if not self._offload.is_collecting:
            return self._forward(*args, **kwargs)
        with self._offload.layer(self._layer, ()):
            return self._forward(*args, **kwargs)


def _with_gradient(hidden: torch.Tensor) -> torch.Tensor:
    return hidden if hidden.requires_grad else hidden.detach().requires_grad_()
