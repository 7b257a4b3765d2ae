"""Operator graphs of modality modules: a transformer layer (ViT, language model, DiT, audio), stems and embeddings, heads and losses.

What comes in: a module, how it is sharded, and the lengths of a stage's instances, packed into one sequence without padding. What
goes out: a forward graph and a backward graph of one tensor- and context-parallel shard.

Collectives are Megatron-Core's. With sequence parallel: all-gather before and reduce-scatter after each pair of products; in the
backward the input is gathered again beside the input gradient's product, and the reduce-scatter runs beside the weight gradient's.
Without: an all-reduce after each pair, in the backward beside the weight gradient's product. Context parallel passes keys and values
around beside the attention.

Activations (source: Korthikanti et al. 2022, section 4, whose formulas the saved tensors add up to): inputs of norms and products,
queries, keys, values, attention output; without fused attention also scores, mask and their dropped-out product.

``selective`` recompute is Megatron's: the core attention runs again. Fused attention keeps no scores, so there only its softmax
statistics would be saved. Assumptions on what the papers leave open: a ViT's projector joins 4 x 4 patches and is a two-layer MLP to the width
of its consumer; a DiT's timestep is embedded and projected once for all layers (adaLN-single), each of which scales and shifts its two
norms' outputs and gates its two blocks, in one pass over memory each; stems are not sharded, the timestep's products by columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_dip.cost.collectives import CollectiveKind, Group, Groups, collective_seconds
from megatron_dip.cost.device import DeviceDescription
from megatron_dip.cost.interface import Part
from megatron_dip.cost.operators import GraphBuilder, Lane, Operator, OperatorGraph
from megatron_dip.spec.model import ModuleSpec

TIMESTEP_INPUT = 256
"""Frequencies that a DiT's timestep embedding takes."""
MODULATIONS = 6
"""Vectors of the hidden size that a timestep gives a DiT's layers: scale, shift and gate of two blocks."""
VIT_MERGE = 16
"""Patches that become one token of the language model (spatial merge 4 in each direction)."""
STEM_INPUT = {"vit": 3 * 14 * 14, "dit": 16 * 2 * 2, "audio": 3 * 128}
"""Numbers in one patch (or frame window) that a stem projects to the hidden size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Which implementation trains; the defaults are those of Megatron-Core with Transformer Engine."""

    attention: Literal["fused", "unfused"] = "fused"
    dropout: bool = False
    """Dropout on attention and residuals (GPT of 2020 to 2022)."""
    overlap_tensor_parallel: bool = True
    """Backward collectives run beside products."""
    split_tensor_parallel: bool = False
    """Under sequence parallel, a layer's collectives travel in as many pieces as there are ranks, beside the product that needs or makes them:
    Megatron's ``--tp-comm-overlap``. One piece is exposed."""
    masks: bool = False
    """Unfused attention masks its scores by an operator that keeps the mask, a byte for each pair of positions."""
    rotary: frozenset[str] = frozenset()
    """Modules whose queries and keys are turned by their positions: turned copies stay, beside the product that values are a view of, and the
    cosines and sines by which they were turned."""
    scatter_gather: bool = False
    """Pipeline messages are split over the tensor-parallel ranks where activations are not (Narayanan et al. 2021, section 4.1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connector:
    """What stands between an encoder's layers and its consumer."""

    merge: int
    """Tokens that become one of the consumer's"""
    hidden: int | None
    """Width between its two linear layers; None: one linear layer"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharding:
    """One rank's share of the work."""

    tensor: int
    context: int
    sequence_parallel: bool
    bytes_per_number: int
    groups: Groups
    device: DeviceDescription
    kernels: Kernels


@dataclass(frozen=True, slots=True)
class PartGraphs:
    forward: OperatorGraph
    backward: OperatorGraph
    boundary_bytes: float


def build_part(
    module: ModuleSpec, part: Part, lengths: Sequence[int], sharding: Sharding, *, consumer: ModuleSpec | None, context_tokens: float,
    connector: Connector | None = None,
) -> PartGraphs | None:
    """The graphs of one part, or None where the module has no such part.

    Args:
        consumer: the module that takes this one's output, None at the model's end.
        context_tokens: tokens that cross attention sees for each instance.
        connector: between the module and its consumer; absent: as wide as the consumer, and where a ViT feeds a language model with
            :data:`VIT_MERGE` tokens for one.
    """
    builder = _PartBuilder(module, lengths, sharding)
    boundary = builder.boundary
    if part == "layer":
        if module.uncut_blocks is not None:
            builder.stem(STEM_INPUT[module.kind])
        for block in range(module.uncut_blocks or 1):
            builder.forward.within = f"{block}." if block else ""
            builder.attention_block(causal=module.is_causal)
            if module.cross_attention:
                builder.cross_attention_block(context_tokens * len(lengths) / sharding.context)
            builder.mlp_block()
    elif part == "first":
        if module.uncut_blocks is not None:
            return None
        if module.kind == "lm":
            if module.vocab_size is None:
                return None
            builder.embedding(module.vocab_size)
        else:
            if module.kind == "dit":
                builder.timestep()
            builder.stem(STEM_INPUT[module.kind])
    elif consumer is not None:
        if connector is None:
            merge = VIT_MERGE if module.kind == "vit" and consumer.kind == "lm" else 1
            connector = Connector(merge=merge, hidden=consumer.hidden_size if merge > 1 else None)
        boundary = builder.connector(consumer.hidden_size, connector)
    elif module.vocab_size is not None:
        builder.vocabulary_head(module.vocab_size)
    elif module.kind == "lm":
        return None
    else:
        builder.regression_head(STEM_INPUT[module.kind])
    return PartGraphs(builder.forward.graph(), builder.backward_graph(), boundary)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """Seconds of a collective."""

    alone: float
    beside: float


class _PartBuilder:
    """Adds forward operators and, for each, the closure that adds its backward; the backward runs the closures from the end.

    Long since it has a method for each operator, and all of them write to the same sums.
    """

    def __init__(self, module: ModuleSpec, lengths: Sequence[int], sharding: Sharding) -> None:
        self.module = module
        self.sharding = sharding
        self.width = sharding.bytes_per_number
        self.tensor = sharding.tensor
        self.tensor_lane = self._lane(sharding.groups.tensor)
        self.tokens = sum(lengths) / sharding.context
        self.stream_tokens = self.tokens / self.tensor if sharding.sequence_parallel else self.tokens
        self.length_counts = sorted(Counter(lengths).items())
        self.num_instances = len(lengths)
        self.hidden = module.hidden_size
        self.forward = GraphBuilder(module.name)
        self.backward = GraphBuilder(module.name)
        self._steps: list[Callable[[str], str]] = []
        self._count = 0
        self.stream_bytes = self.stream_tokens * self.hidden * self.width
        self.full_bytes = self.tokens * self.hidden * self.width
        self.boundary = self.stream_bytes
        if sharding.kernels.scatter_gather and not sharding.sequence_parallel:
            self.boundary = self.full_bytes / self.tensor
        self.x = self.forward.tensor("input", self.stream_bytes)

    # Blocks: each takes self.x (the residual stream) and leaves the new one there.

    def attention_block(self, *, causal: bool) -> None:
        head = self.hidden // self.module.num_attention_heads
        kv_heads = max(self.module.query_groups / self.tensor, 1.0)
        query = self.hidden / self.tensor
        key_value = 2.0 * kv_heads * head
        self.norm("attention_norm")
        self.modulate("attention_modulate")
        self.column_linear("qkv", self.hidden, query + key_value)
        if self.module.kind == "lm":
            self.elementwise("rope", 2.0 * self.tokens * (query + key_value / 2.0) * self.width)
        self.forward.save(self.x)
        if self.module.name in self.sharding.kernels.rotary:
            turned = self.tokens * (query + key_value / 2.0)
            # Cosines and sines, for queries and for keys.
            self.forward.tensor(self._name("attention_turned"), (turned + 4.0 * self.tokens * head) * self.width, saved=True)
        work = [(float(length), count * 4.0 * length * length * query / self.sharding.context) for length, count in self.length_counts]
        self.core_attention("attention", work, self.tokens * query * self.width, causal=causal,
                            exchanged_bytes=self.tokens * self.sharding.context * key_value * self.width)
        self.row_linear("proj", query, self.hidden)
        self.gate("attention_gate")
        self.residual("attention_residual")

    def cross_attention_block(self, context: float) -> None:
        query = self.hidden / self.tensor
        self.norm("cross_norm")
        self.column_linear("cross_q", self.hidden, query)
        self.forward.save(self.x)
        # Keys and values of the context: their products hang beside the main path.
        self.side_linear("cross_kv", context, self.hidden, 2.0 * query)
        each = context / max(1, self.num_instances)
        work = [(max(each, 1.0), 4.0 * self.tokens * each * query)]
        self.core_attention("cross_attention", work, self.tokens * query * self.width, causal=False, exchanged_bytes=0.0)
        self.row_linear("cross_proj", query, self.hidden)
        self.residual("cross_residual")

    def mlp_block(self) -> None:
        inner = self.module.ffn_hidden_size / self.tensor
        wide = inner * (2 if self.module.has_gated_mlp else 1)
        self.norm("mlp_norm")
        self.modulate("mlp_modulate")
        self.column_linear("fc1", self.hidden, wide)
        self.forward.save(self.x)
        self.activation_function("act", self.tokens * wide * self.width, self.tokens * inner * self.width)
        self.row_linear("fc2", inner, self.hidden)
        self.gate("mlp_gate")
        self.residual("mlp_residual")

    def embedding(self, vocabulary: int) -> None:
        name = self._name("embedding")
        out = self._make("embedded", self.full_bytes)
        self._forward(Operator(name=name, kind="elementwise", inputs=(), outputs=(out,), memory_bytes=2.0 * self.full_bytes))
        rows = vocabulary / self.tensor * self.hidden

        def back(gradient: str) -> str:
            # A dense gradient: written, then added to the fp32 main gradient.
            dense = self._make_backward(rows * self.width)
            self._backward(Operator(name=f"{name}.wgrad", kind="elementwise", inputs=(gradient,), outputs=(dense,), weight_gradient=True, backward=True,
                                    memory_bytes=2.0 * self.full_bytes + rows * (2.0 * self.width + 8.0)))
            return gradient

        self._steps.append(back)
        self.x = out
        self._exit_collective("embedding")

    def timestep(self) -> None:
        """A DiT's timestep of each instance: embedding of two products, and the projection to all layers' modulation."""
        rows = float(self.num_instances)
        self.x = self.forward.tensor("frequencies", rows * TIMESTEP_INPUT * self.width, saved=True)
        inner = TIMESTEP_INPUT
        for label, columns in (("time_fc1", self.hidden), ("time_fc2", self.hidden), ("time_projection", MODULATIONS * self.hidden)):
            size = rows * columns * self.width
            self._product(label, self.x, rows, inner, columns / self.tensor, size, input_gradient=inner != TIMESTEP_INPUT)
            if label != "time_projection":
                self.forward.save(self.x)
                self.activation_function(f"{label}_act", size, size)
            inner = columns

    def stem(self, numbers: int) -> None:
        self.x = self.forward.tensor("pixels", self.tokens * numbers * self.width, saved=True)
        self._product("stem", self.x, self.tokens, numbers, self.hidden, self.full_bytes, input_gradient=False)

    def connector(self, consumer_hidden: int, connector: Connector) -> float:
        """Projector to the consumer's width. Returns the message's bytes."""
        rows, inner = self.tokens / connector.merge, self.hidden * connector.merge
        self.norm("final_norm")
        self._enter_collective("projector_fc1")
        shared = rows * consumer_hidden * self.width
        if connector.hidden is not None:
            columns = connector.hidden / self.tensor
            between = rows * columns * self.width
            self._product("projector_fc1", self.x, rows, inner, columns, between)
            self.forward.save(self.x)
            self.activation_function("projector_act", between, between)
            self._product("projector_fc2", self.x, rows, columns, consumer_hidden, shared)
            self._exit_collective("projector_fc2", size=shared)
        else:
            self._product("projector", self.x, rows, inner, consumer_hidden / self.tensor, shared / self.tensor)
        split = self.sharding.sequence_parallel or self.sharding.kernels.scatter_gather
        return shared / self.tensor if split else shared

    def vocabulary_head(self, vocabulary: int) -> None:
        columns = vocabulary / self.tensor
        numbers = self.tokens * columns
        self.norm("final_norm")
        self.column_linear("logits", self.hidden, columns, splits=False)
        # Vocabulary-parallel cross entropy on fp32 logits: cast, maximum, difference, exponential, sum and quotient, one pass each.
        name = self._name("loss")
        probabilities = self._make("probabilities", 4.0 * numbers, saved=True)
        self._forward(Operator(name=name, kind="elementwise", inputs=(self.x,), outputs=(probabilities,),
                               memory_bytes=numbers * (self.width + 36.0)))
        losses = self._make("losses", 4.0 * self.tokens)
        seconds = 3.0 * self._collective_seconds("all_reduce", 4.0 * self.tokens, self.sharding.groups.tensor)
        if seconds:
            self._forward(Operator(name=f"{name}.all_reduce", kind="collective", lane=self.tensor_lane, cause="tensor_parallel",
                                   inputs=(probabilities,), outputs=(losses,), traffic_seconds=seconds))

        def back(gradient: str) -> str:
            made = self._make_backward(numbers * self.width)
            self._backward(Operator(name=f"{name}.dgrad", kind="elementwise", inputs=(gradient,), outputs=(made,), backward=True,
                                    memory_bytes=numbers * (12.0 + self.width)))
            return made

        self._steps.append(back)

    def regression_head(self, numbers: int) -> None:
        self.norm("final_norm")
        self._enter_collective("output")
        self._product("output", self.x, self.tokens, self.hidden, numbers, self.tokens * numbers * self.width)
        self.elementwise("loss", 3.0 * self.tokens * numbers * 4.0)

    # Pieces of blocks.

    def norm(self, label: str) -> None:
        """A norm on the residual stream, whose input is saved; its output is what a product saves."""
        self.forward.save(self.x)
        self._unary(label, 2.0 * self.stream_bytes, 4.0 * self.stream_bytes, self.stream_bytes)
        self.forward.save(self.x)

    def modulate(self, label: str) -> None:
        """A DiT's scale and shift of a norm's output, which the scale's gradient needs again."""
        if self.module.kind == "dit":
            self._unary(label, 2.0 * self.stream_bytes, 3.0 * self.stream_bytes, self.stream_bytes)
            self.forward.save(self.x)

    def gate(self, label: str) -> None:
        """A DiT's gate on a block's output, which the gate's gradient needs again."""
        if self.module.kind == "dit":
            self.forward.save(self.x)
            self._unary(label, 2.0 * self.stream_bytes, 3.0 * self.stream_bytes, self.stream_bytes)

    def activation_function(self, label: str, bytes_in: float, bytes_out: float) -> None:
        self._unary(label, bytes_in + bytes_out, 2.0 * bytes_in + bytes_out, bytes_out)
        self.forward.save(self.x)

    def elementwise(self, label: str, moved: float) -> None:
        self._unary(label, moved, moved, self.forward.tensors[self.x].bytes)

    def residual(self, label: str) -> None:
        """Adds a block's output to the stream, with dropout where the model has it."""
        size, numbers = self.stream_bytes, self.stream_bytes / self.width
        masked = self.sharding.kernels.dropout
        self._unary(label, 3.0 * size + (numbers if masked else 0.0), 2.0 * size + numbers if masked else size, size)
        if masked:
            self.forward.tensor(f"{label}_mask", numbers, saved=True)

    def column_linear(self, label: str, inner: float, columns: float, *, splits: bool = True) -> None:
        """A product whose columns are split: the stream is gathered first; in the backward its gradient is summed.

        ``splits``: whether the implementation can send the stream in pieces beside the product (not that of the logits).
        """
        shard = self.x
        beside = self._enter_collective(label, splits=splits)
        self._product(label, self.x, self.tokens, inner, columns, self.tokens * columns * self.width, gathered_from=shard, beside_forward=beside)

    def row_linear(self, label: str, inner: float, columns: float) -> None:
        """A product whose inner size is split: partial sums are reduced afterwards."""
        self.forward.save(self.x)
        kind: CollectiveKind = "reduce_scatter" if self.sharding.sequence_parallel else "all_reduce"
        beside = self._split(self._collective_seconds(kind, self.full_bytes, self.sharding.groups.tensor)).beside
        gather = self._collective_seconds("all_gather", self.full_bytes, self.sharding.groups.tensor)
        self._product(label, self.x, self.tokens, inner, columns, self.tokens * columns * self.width, beside_forward=beside,
                      beside_input_gradient=self._split(gather).beside)
        self._exit_collective(label, splits=True)

    def side_linear(self, label: str, rows: float, inner: float, columns: float) -> None:
        """A product beside the main path, of an input that other layers share."""
        main = self.x
        side = self.forward.tensor(f"{label}_input", rows * inner * self.width)
        self._product(label, side, rows, inner, columns, rows * columns * self.width)
        self.forward.save(self.x)
        self.x = main
        step = self._steps.pop()

        def back(gradient: str) -> str:
            step(gradient)
            return gradient

        self._steps.append(back)

    def core_attention(
        self, label: str, work: list[tuple[float, float]], out_bytes: float, *, causal: bool, exchanged_bytes: float
    ) -> None:
        """``work``: (length, FLOPs of full attention) of each group of equal sequences on this rank."""
        if self.sharding.kernels.attention == "unfused":
            self._unfused_attention(label, work, out_bytes)
            return
        name = self._name(label)
        share = 0.5 if causal else 1.0
        heads = self.module.num_attention_heads / self.tensor * max(1, self.num_instances)
        forward_work = tuple((length, flops * share) for length, flops in work)
        flops = sum(f for _, f in forward_work)
        source, out = self.x, self._make(f"{label}_out", out_bytes, saved=True)
        moved = self.forward.tensors[source].bytes + out_bytes
        statistics = self.forward.tensor(f"{label}_statistics", 4.0 * out_bytes / self.width / (self.hidden / self.module.num_attention_heads),
                                         saved=True, dropped_by_selective=True)
        exchange = self._collective_seconds("all_gather", exchanged_bytes, self.sharding.groups.context)
        lane = self._lane(self.sharding.groups.context)
        self._forward(Operator(name=name, kind="attention", inputs=(source,), outputs=(out, statistics), flops=flops, memory_bytes=moved,
                               attention_work=forward_work, heads=heads, causal=causal, recompute=True))
        after = out
        if exchange:
            # Keys and values travel beside the attention; what follows waits for both.
            after = self.forward.tensor(f"{label}_exchanged", 0.0)
            self._forward(Operator(name=f"{name}.exchange", kind="collective", lane=lane, cause="context_parallel", inputs=(source,),
                                   outputs=(after,), traffic_seconds=exchange))
            joined = self.forward.tensor(f"{label}_joined", 0.0)
            self._forward(Operator(name=f"{name}.join", kind="copy", inputs=(out, after), outputs=(joined,)))

        def back(gradient: str) -> str:
            made = self._make_backward(self.forward.tensors[source].bytes)
            backward_work = tuple((length, 2.5 * f) for length, f in forward_work)
            self._backward(Operator(name=f"{name}.dgrad", kind="attention", inputs=(gradient,), outputs=(made,), flops=2.5 * flops,
                                    memory_bytes=2.5 * moved, attention_work=backward_work, heads=heads, causal=causal, backward=True))
            if not exchange:
                return made
            sent, joined_back = self._make_backward(0.0), self._make_backward(0.0)
            self._backward(Operator(name=f"{name}.exchange_dgrad", kind="collective", lane=lane, cause="context_parallel",
                                    inputs=(gradient,), outputs=(sent,), traffic_seconds=2.0 * exchange, backward=True))
            self._backward(Operator(name=f"{name}.join_dgrad", kind="copy", inputs=(made, sent), outputs=(joined_back,), backward=True))
            return joined_back

        self._steps.append(back)
        self.x = out

    def _unfused_attention(self, label: str, work: list[tuple[float, float]], out_bytes: float) -> None:
        """Scores, softmax, dropout and weighted values as kernels of their own, over all pairs of positions."""
        head = self.hidden / self.module.num_attention_heads
        half = sum(f for _, f in work) / 2.0
        scores = half / (2.0 * head) * self.width
        rows = max(length for length, _ in work)
        source = self.x
        masked = self.sharding.kernels.dropout
        mask = scores / self.width if masked else 0.0

        def product(part: str, taken: str, size: float, *, dropped: bool) -> str:
            name, out = self._name(f"{label}_{part}"), self._make(f"{label}_{part}", size)
            self._forward(Operator(name=name, kind="gemm", inputs=(taken,), outputs=(out,), flops=half, rows=rows, inner=head,
                                   memory_bytes=scores + 2.0 * out_bytes, recompute=True))

            def back(gradient: str) -> str:
                made = self._make_backward(self.forward.tensors[taken].bytes)
                self._backward(Operator(name=f"{name}.dgrad", kind="gemm", inputs=(gradient,), outputs=(made,), flops=2.0 * half,
                                        rows=rows, inner=head, memory_bytes=2.0 * (scores + 2.0 * out_bytes), backward=True))
                return made

            self._steps.append(back)
            if dropped:
                self.forward.save(out, dropped_by_selective=True)
            return out

        self.x = product("scores", source, scores, dropped=False)
        self._unary(f"{label}_softmax", 2.0 * scores, 3.0 * scores, scores, recompute=True)
        self.forward.save(self.x, dropped_by_selective=True)
        if self.sharding.kernels.masks:
            pairs = scores / self.width / (self.module.num_attention_heads / self.tensor)
            self.forward.tensor(self._name(f"{label}_pairs"), pairs, saved=True, dropped_by_selective=True)
        if masked:
            self._unary(f"{label}_dropout", 2.0 * scores + mask, 2.0 * scores + mask, scores, recompute=True)
            self.forward.save(self.x, dropped_by_selective=True)
            self.forward.tensor(f"{label}_mask", mask, saved=True, dropped_by_selective=True)
        self.x = product("weighted", self.x, out_bytes, dropped=False)
        self.forward.save(self.x)

    def _unary(self, label: str, moved: float, moved_backward: float, size: float, *, recompute: bool = False) -> None:
        name, source = self._name(label), self.x
        out = self._make(label, size)
        self._forward(Operator(name=name, kind="elementwise", inputs=(source,), outputs=(out,), memory_bytes=moved, recompute=recompute))

        def back(gradient: str) -> str:
            made = self._make_backward(self.forward.tensors[source].bytes)
            self._backward(Operator(name=f"{name}.dgrad", kind="elementwise", inputs=(gradient,), outputs=(made,),
                                    memory_bytes=moved_backward, backward=True))
            return made

        self._steps.append(back)
        self.x = out

    def _product(
        self, label: str, source: str, rows: float, inner: float, columns: float, out_bytes: float, *, input_gradient: bool = True,
        gathered_from: str | None = None, beside_forward: float = 0.0, beside_input_gradient: float = 0.0,
    ) -> None:
        """A matrix product [rows, inner] x [inner, columns] with its two backward products.

        ``gathered_from``: the stream before the gather; then the backward gathers it again and sums the input's gradient.
        ``beside_forward`` and ``beside_input_gradient``: seconds of the pieces of a collective that travel beside the product.
        """
        name = self._name(label)
        out = self._make(label, out_bytes)
        flops = 2.0 * rows * inner * columns
        moved = self.width * (rows * inner + inner * columns + rows * columns)
        narrow = min(inner, columns)
        self._forward(Operator(name=name, kind="gemm", inputs=(source,), outputs=(out,), flops=flops, memory_bytes=moved, rows=rows,
                               inner=narrow, traffic_seconds=beside_forward, beside_seconds=beside_forward))
        module_trains = self.module.trainable

        def back(gradient: str) -> str:
            group = self.sharding.groups.tensor
            size = self.full_bytes
            needs_sum = gathered_from is not None and self.tensor > 1
            overlap = self.sharding.kernels.overlap_tensor_parallel
            gather_seconds = sum_seconds = 0.0
            taken = "saved"
            if needs_sum and self.sharding.sequence_parallel and module_trains:
                taken = self._make_backward(size)
                gather_seconds = self._collective_seconds("all_gather", size, group)
                self._backward(Operator(name=f"{name}.gather_input", kind="collective", lane=self.tensor_lane, cause="tensor_parallel",
                                        inputs=(gradient,), outputs=(taken,), traffic_seconds=gather_seconds, backward=True))
            made = self._make_backward(rows * inner * self.width) if input_gradient else gradient
            if input_gradient:
                waits = (gradient,) if overlap or taken == "saved" else (gradient, taken)
                self._backward(Operator(name=f"{name}.dgrad", kind="gemm", inputs=waits, outputs=(made,), flops=flops, memory_bytes=moved,
                                        rows=rows, inner=narrow, backward=True, traffic_seconds=beside_input_gradient,
                                        beside_seconds=beside_input_gradient + (gather_seconds if overlap else 0.0)))
            summed = made
            if needs_sum:
                kind: CollectiveKind = "reduce_scatter" if self.sharding.sequence_parallel else "all_reduce"
                summed = self._make_backward(self.stream_bytes)
                sum_seconds = self._collective_seconds(kind, size, group)
                self._backward(Operator(name=f"{name}.sum_gradient", kind="collective", lane=self.tensor_lane, cause="tensor_parallel",
                                        inputs=(made,), outputs=(summed,), traffic_seconds=sum_seconds, backward=True))
            if module_trains:
                waits = (gradient,) if taken == "saved" else (gradient, taken)
                if not overlap:
                    waits = (*waits, summed)
                # The weight's gradient is added to the fp32 main gradient in place.
                self._backward(Operator(name=f"{name}.wgrad", kind="gemm", inputs=waits, flops=flops, rows=rows, inner=narrow,
                                        memory_bytes=self.width * rows * (inner + columns) + 8.0 * inner * columns,
                                        weight_gradient=True, backward=True, beside_seconds=sum_seconds if overlap else 0.0))
            return summed

        self._steps.append(back)
        self.x = out

    def _enter_collective(self, label: str, *, splits: bool = False) -> float:
        """All-gather of the stream under sequence parallel; its gradient is summed by the product that follows.

        Returns the seconds of its pieces that travel beside that product.
        """
        if self.tensor == 1 or not self.sharding.sequence_parallel:
            return 0.0
        seconds = self._collective_seconds("all_gather", self.full_bytes, self.sharding.groups.tensor)
        split = self._split(seconds) if splits else _Split(alone=seconds, beside=0.0)
        source, out = self.x, self._make(f"{label}_gathered", self.full_bytes)
        self._forward(Operator(name=self._name(f"{label}.gather"), kind="collective", lane=self.tensor_lane, cause="tensor_parallel",
                               inputs=(source,), outputs=(out,), traffic_seconds=split.alone))
        self.x = out
        return split.beside

    def _exit_collective(self, label: str, size: float | None = None, *, splits: bool = False) -> None:
        """Reduce-scatter (sequence parallel; its gradient is gathered) or all-reduce (its gradient needs nothing).

        ``splits``: the product before it carries the pieces that travel beside it.
        """
        if self.tensor == 1:
            return
        size = self.full_bytes if size is None else size
        sequence = self.sharding.sequence_parallel
        source = self.x
        out = self._make(f"{label}_summed", size / self.tensor if sequence else size)
        group = self.sharding.groups.tensor
        kind: CollectiveKind = "reduce_scatter" if sequence else "all_reduce"

        def exposed(of: CollectiveKind) -> float:
            seconds = self._collective_seconds(of, size, group)
            return self._split(seconds).alone if splits else seconds

        self._forward(Operator(name=self._name(f"{label}.sum"), kind="collective", lane=self.tensor_lane, cause="tensor_parallel", inputs=(source,),
                               outputs=(out,), traffic_seconds=exposed(kind)))
        self.x = out

        def back(gradient: str) -> str:
            if not sequence:
                return gradient
            made = self._make_backward(size)
            self._backward(Operator(name=self._name(f"{label}.gather_gradient"), kind="collective", lane=self.tensor_lane, cause="tensor_parallel",
                                    inputs=(gradient,), outputs=(made,), backward=True, traffic_seconds=exposed("all_gather")))
            return made

        self._steps.append(back)

    # Plumbing.

    def _split(self, seconds: float) -> _Split:
        """What of a layer's collective stands alone, and what runs beside its product."""
        if not (self.sharding.kernels.split_tensor_parallel and self.sharding.sequence_parallel and self.tensor > 1):
            return _Split(alone=seconds, beside=0.0)
        return _Split(alone=seconds / self.tensor, beside=seconds * (self.tensor - 1) / self.tensor)

    def backward_graph(self) -> OperatorGraph:
        gradient = self.backward.tensor("output_gradient", self.stream_bytes)
        for step in reversed(self._steps):
            gradient = step(gradient)
        return self.backward.graph()

    def _lane(self, group: Group) -> Lane:
        """The link that a group's collectives are bound by."""
        return "nvlink" if group.within_node(self.sharding.device) else "network"

    def _collective_seconds(self, kind: CollectiveKind, size: float, group: Group) -> float:
        return collective_seconds(kind, size, group, self.sharding.device)

    def _name(self, label: str) -> str:
        return f"{self.module.name}.{self.forward.within}{label}"

    def _make(self, label: str, size: float, *, saved: bool = False) -> str:
        return self.forward.tensor(label, size, saved=saved)

    def _make_backward(self, size: float) -> str:
        self._count += 1
        return self.backward.tensor(f"gradient_{self._count}", size)

    def _forward(self, operator: Operator) -> None:
        self.forward.add(operator)

    def _backward(self, operator: Operator) -> None:
        self.backward.add(operator)
