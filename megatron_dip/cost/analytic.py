"""Costs from operator graphs on a described device.

One part at one shape is simulated once (the sub-graph) and reused wherever it comes again: the same layer in every chunk, microbatch
and iteration. The backward's weight part is the sum of its weight-gradient operators; the input part is the rest of the whole
backward, in which collectives run beside those operators. So input + weight is the whole backward, and a split backward is costed as
if its collectives found something else to run beside.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_dip.cost.collectives import groups, message_bandwidth
from megatron_dip.cost.device import DeviceDescription, load_device
from megatron_dip.cost.interface import Part, PartCost
from megatron_dip.cost.memory import (
    bytes_per_parameter,
    first_parameters,
    input_bytes,
    last_parameters,
    layer_parameters,
    unsplit_first_parameters,
)
from megatron_dip.cost.modules import Connector, Kernels, PartGraphs, Sharding, build_part
from megatron_dip.cost.operators import Cause, LatencyRules, time_graph
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.profile import Offload, Strategy
from megatron_dip.spec.workload import Device, Microbatch, Parallel, Training

DEFAULT_CONTEXT_TOKENS = 128.0
"""Tokens that cross attention sees for each instance where no microbatch tells."""
DEFAULT_RULES = LatencyRules()
"""Rules of every AnalyticCost that is not given its own; register here to change an operator everywhere."""
_CACHE_LIMIT = 1 << 16
_WORTHWHILE = 0.98
"""A strategy that keeps more of the activations than this is not offered (selective recompute of fused attention)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartDetail:
    """A part's cost with what reports need besides."""

    cost: PartCost
    forward_flops: float
    backward_flops: float
    """Of the model; recomputation is not in here."""
    forward_exposed_ns: Mapping[Cause, float]
    backward_exposed_ns: Mapping[Cause, float]
    workspace_bytes: float
    """Transient peak above what is saved."""
    selective_flops: float
    """Of the forward operators that selective recompute runs again."""
    selective_forward: float
    """Share of the forward that selective recompute runs again."""
    selective_activation: float
    """Share of the activation bytes that it keeps."""


_Details = dict[tuple[str, Part, tuple[int, ...]], PartDetail]
_Strategies = dict[tuple[str, tuple[int, ...]], dict[str, Strategy]]


class KnownParts:
    """What parts cost, for cost models that differ in pipeline and data parallel sizes alone: no part's cost depends on these.

    A search over layouts makes one, and gives it to the costs of every layout: those whose parts are alike share what is known of them.
    """

    def __init__(self) -> None:
        self._of: list[tuple[tuple[object, ...], tuple[_Details, _Strategies]]] = []

    def alike(self, what: tuple[object, ...]) -> tuple[_Details, _Strategies]:
        """The memory of all costs that were described by an equal ``what``."""
        for described, memory in self._of:
            if described == what:
                return memory
        self._of.append((what, ({}, {})))
        return self._of[-1][1]


class AnalyticCost:
    """Implements :class:`megatron_dip.cost.interface.CostModel` by operator graphs.

    Args:
        model: resolved model (not a name).
        device: a device's name or file, its figures, or its description.
        memory_capacity_bytes: what a rank may use, instead of the device's memory less its margin.
        microbatches: tell how many tokens cross attention sees for each instance; may be absent.
        kernels: which implementation trains.
        rules: latency rules of operators; absent = :data:`DEFAULT_RULES`.
        connectors: of the modules whose connector is known; others have the one of :func:`megatron_dip.cost.modules.build_part`.
        undivided: modules that run every sequence whole on all context- and sequence-parallel ranks, as Megatron's vision models do.
        known: shares what parts cost with other costs; absent = nothing is shared.

    Raises:
        InputError: parallel sizes that do not fit the model, an unknown device, impossible figures.
    """

    def __init__(
        self, model: ModelSpec, parallel: Parallel, training: Training, device: str | Device | DeviceDescription | None, *,
        memory_capacity_bytes: int | None = None, microbatches: Sequence[Microbatch] = (), kernels: Kernels | None = None,
        rules: LatencyRules | None = None, undivided: Collection[str] = (), connectors: Mapping[str, Connector] | None = None,
        known: KnownParts | None = None,
    ) -> None:
        model.validate()
        check_parallel(model, parallel)
        self.model = model
        self.parallel = parallel
        self.training = training
        self.device = load_device(device)
        self.groups = groups(parallel)
        self.rules = DEFAULT_RULES if rules is None else rules
        self.sharding = Sharding(
            tensor=parallel.tensor, context=parallel.context, sequence_parallel=parallel.sequence_parallel and parallel.tensor > 1,
            bytes_per_number=4 if training.dtype == "fp32" else 2, groups=self.groups, device=self.device,
            kernels=Kernels() if kernels is None else kernels,
        )
        self._undivided = frozenset(undivided)
        self._connectors = dict(connectors or {})
        alone = replace(self.groups, context=replace(self.groups.context, size=1))
        self._whole = replace(self.sharding, context=1, sequence_parallel=False, groups=alone)
        self._unsharded = replace(self._whole, tensor=1, groups=replace(alone, tensor=replace(alone.tensor, size=1)))
        if memory_capacity_bytes is not None and memory_capacity_bytes < 1:
            raise InputError("memory_capacity_bytes", memory_capacity_bytes, "must be at least 1", "give the bytes of a rank or leave it out")
        self._capacity = self.device.memory_bytes() if memory_capacity_bytes is None else memory_capacity_bytes
        self.p2p_latency_ns = self.device.network_latency_us * 1e3
        self.p2p_bytes_per_second = message_bandwidth(self.groups.pipeline, self.device)
        self._modules = {module.name: module for module in model.modules}
        self._runs_backward = model.backward_modules()
        self._trained = {module.name: model.trainable_parts(module.name).any for module in model.modules}
        self._consumer: dict[str, ModuleSpec | None] = {}
        for module in model.modules:
            consumers = model.consumers_of(module.name)
            self._consumer[module.name] = self._modules[consumers[0]] if consumers else None
        self._context_tokens = {name: self._mean_context(name, microbatches) for name in self._modules}
        near = (self.sharding.tensor, self.sharding.context, self.sharding.sequence_parallel, self.sharding.kernels)
        self._cache, self._strategies = (KnownParts() if known is None else known).alike(
            (*near, model, training, self.device, self.rules, self.rules.version, self._undivided, self._connectors, self._context_tokens)
        )
        self._rules_version = self.rules.version

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        return self.detail(module, part, lengths).cost

    def detail(self, module: str, part: Part, lengths: Sequence[int]) -> PartDetail:
        """Everything the graphs of a part tell, remembered by the lengths (in any order)."""
        if self._rules_version != self.rules.version:
            self._cache.clear()
            self._strategies.clear()
            self._rules_version = self.rules.version
        key = (module, part, tuple(sorted(lengths)))
        found = self._cache.get(key)
        if found is None:
            if len(self._cache) >= _CACHE_LIMIT:
                self._cache.clear()
            found = self._cache[key] = self._simulate(module, part, key[2])
        return found

    def graphs(self, module: str, part: Part, lengths: Sequence[int]) -> PartGraphs | None:
        """The operator graphs behind a part; None where the module has no such part."""
        return build_part(
            self._module(module), part, lengths, self._sharding_of(module, part), consumer=self._consumer[module],
            context_tokens=self._context_tokens[module], connector=self._connectors.get(module),
        )

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        key = (module, tuple(sorted(lengths)))
        found = self._strategies.get(key)
        if found is None:
            detail = self.detail(module, "layer", lengths)
            saved = detail.cost.activation_bytes
            # What any strategy must keep: the layer's input.
            kept = min(1.0, self._input_bytes(module, lengths) / saved) if saved else 0.0
            found = {"none": Strategy()}
            # What stands within a layer that is not cut is out of reach.
            if detail.selective_activation <= _WORTHWHILE and self._module(module).uncut_blocks is None:
                found["selective"] = Strategy(extra_forward=detail.selective_forward, activation=detail.selective_activation)
            found |= {
                "full": Strategy(extra_forward=1.0, activation=kept),
                "offload": Strategy(offload=Offload(bytes_per_second=self.device.host_gbs * 1e9, activation=0.0)),
            }
            if len(self._strategies) >= _CACHE_LIMIT:
                self._strategies.clear()
            self._strategies[key] = found
        return found

    def static_bytes(self, module: str, num_layers: int, *, first: bool, last: bool) -> int:
        trainable = self._module(module).trainable
        each = bytes_per_parameter(self.training, trainable=trainable, replicas=self.groups.data.size)
        return int(self.chunk_parameters(module, num_layers, first=first, last=last) * each)

    def chunk_parameters(self, module: str, num_layers: int, *, first: bool, last: bool) -> float:
        """Parameters of a chunk on one tensor-parallel rank."""
        spec, consumer = self._module(module), self._consumer[module]
        parameters, unsplit = num_layers * layer_parameters(spec), 0
        if spec.uncut_blocks is not None:
            parameters, unsplit = 0, parameters
        if last:
            parameters += last_parameters(spec, consumer)
        if first:
            stem = unsplit_first_parameters(spec)
            unsplit += stem
            parameters += first_parameters(spec) - stem
        return parameters / self.parallel.tensor + unsplit

    def memory_capacity_bytes(self) -> int | None:
        return self._capacity

    def counts_all_memory(self) -> bool:
        return True

    def input_bytes(self, module: str, lengths: Sequence[int], *, at_first: bool) -> int:
        return input_bytes(self._module(module), lengths, at_first=at_first)

    def _module(self, name: str) -> ModuleSpec:
        if name not in self._modules:
            raise InputError("module", name, "the model has no such module", f"use one of {sorted(self._modules)}")
        return self._modules[name]

    def _sharding_of(self, module: str, part: Part) -> Sharding:
        if part != "last" and self._module(module).uncut_blocks is not None:
            return self._unsharded
        return self._whole if module in self._undivided else self.sharding

    def _input_bytes(self, module: str, lengths: Sequence[int]) -> float:
        sharding = self._sharding_of(module, "layer")
        tokens = sum(lengths) / sharding.context / (sharding.tensor if sharding.sequence_parallel else 1)
        return tokens * self._module(module).hidden_size * sharding.bytes_per_number

    def _mean_context(self, name: str, microbatches: Sequence[Microbatch]) -> float:
        """Tokens of the feeding modules for each instance, over all microbatches that hold both."""
        sources = self.model.inputs_of(name)
        tokens = instances = 0
        for microbatch in microbatches:
            own = len(microbatch.get(name, []))
            if own:
                instances += own
                tokens += sum(sum(microbatch.get(source, [])) for source in sources)
        return tokens / instances if instances and tokens else DEFAULT_CONTEXT_TOKENS

    def _simulate(self, name: str, part: Part, lengths: tuple[int, ...]) -> PartDetail:
        built = self.graphs(name, part, lengths) if lengths else None
        if built is None:
            return _NOTHING
        runs_backward, trains = self._runs_backward[name], self._trained[name]
        forward = time_graph(built.forward, self.device, self.rules)
        backward = time_graph(built.backward, self.device, self.rules)
        # Where no backward follows, they are an upper bound of what lives within the part for a moment.
        saved = built.forward.saved_bytes()
        weight_ns = input_ns = backward_flops = 0.0
        exposed: Mapping[Cause, float] = {}
        if runs_backward:
            weight_ns = sum(end - start for operator, start, end in zip(built.backward.operators, backward.start_ns, backward.end_ns)
                            if operator.weight_gradient) if trains else 0.0
            input_ns = backward.total_ns - weight_ns
            backward_flops = _model_flops(built.backward.operators)
            exposed = backward.exposed_ns
        if forward.total_ns + backward.total_ns > _LONGEST_PART_NS:
            raise InputError(
                f"{name}.{part}", f"{(forward.total_ns + backward.total_ns) / 1e9:.3g} s",
                f"is longer than {_LONGEST_PART_NS / 1e9:g} s with {len(lengths)} instances of up to {max(lengths)} tokens on {self.device.name}",
                "check the device's rates, the module's sizes and the tokens of its instances",
            )
        again = sum(end - start for operator, start, end in zip(built.forward.operators, forward.start_ns, forward.end_ns)
                    if operator.recompute)
        return PartDetail(
            cost=PartCost(forward_ns=forward.total_ns, backward_input_ns=input_ns, backward_weight_ns=weight_ns, activation_bytes=saved,
                          boundary_bytes=built.boundary_bytes if not (part == "last" and self._consumer[name] is None) else 0.0),
            forward_flops=sum(operator.flops for operator in built.forward.operators), backward_flops=backward_flops,
            forward_exposed_ns=forward.exposed_ns, backward_exposed_ns=exposed,
            selective_flops=sum(operator.flops for operator in built.forward.operators if operator.recompute),
            workspace_bytes=max(forward.peak_bytes - built.forward.saved_bytes(), backward.peak_bytes if runs_backward else 0.0, 0.0),
            selective_forward=again / forward.total_ns if forward.total_ns else 0.0,
            selective_activation=built.forward.saved_bytes(selective=True) / saved if saved else 1.0,
        )


_LONGEST_PART_NS = 1e13
"""Of one layer, forward and backward: times of whole iterations must fit into 64 bits."""

_NOTHING = PartDetail(cost=PartCost(), forward_flops=0.0, backward_flops=0.0, forward_exposed_ns={}, backward_exposed_ns={},
                      workspace_bytes=0.0, selective_flops=0.0, selective_forward=0.0, selective_activation=1.0)


def _model_flops(operators: Sequence) -> float:
    """FLOPs that the model asks for: fused attention's backward counts twice its forward, not 2.5 times (it runs scores again)."""
    return sum(operator.flops * (0.8 if operator.kind == "attention" else 1.0) for operator in operators)


def check_parallel(model: ModelSpec, parallel: Parallel) -> None:
    """Raises InputError for parallel sizes that are impossible, or impossible for this model."""
    for field in ("tensor", "pipeline", "data", "context"):
        value = getattr(parallel, field)
        if value < 1:
            raise InputError(f"parallel.{field}", value, "must be at least 1", "give a positive whole number")
    for module in model.modules:
        if module.uncut_blocks is not None:
            continue  # every rank runs it whole
        for what, size in (("num_attention_heads", module.num_attention_heads), ("ffn_hidden_size", module.ffn_hidden_size),
                           ("hidden_size", module.hidden_size)):
            if size % parallel.tensor:
                raise InputError("parallel.tensor", parallel.tensor, f"does not divide {what} = {size} of module {module.name!r}",
                                 "use a tensor-parallel size that divides it")
    if parallel.sequence_parallel and parallel.tensor == 1 and parallel.sequence:
        raise InputError("parallel.sequence", True, "needs tensor parallel", "set parallel.tensor above 1 or leave sequence out")
