"""Times layers of modality modules, built of real Megatron modules, on the device at hand.

In: a model, the batch shapes to measure, the tensor-parallel size. Out: a :class:`~megatron_dip.spec.profile.Profile`. One process
measures one tensor-parallel shard: the layer is built with the shard's heads and FFN size, so its products have the shard's shapes;
collectives are not in it. Each figure is the median of warm runs, with the device synchronised around each.

The backward to the inputs is timed apart; the weights' part is the whole backward less it. Activation bytes are what autograd saves
(parameters left out, each storage once). Weights' gradients are added up as in training. ``first`` and ``last`` are the patch stem or the token embedding, and the projector or the
head with the loss. Copies to the host run beside copies back, as when one stage gives layers away and the next one fetches. Not measured: a DiT's head and modulation; messages (their figures are those of the device description).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.T5 import t5_spec
from megatron.core.models.vision.multimodal_projector import MultimodalProjector
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.cost.modules import STEM_INPUT, VIT_MERGE
from megatron_dip.models.layers import Norm, projector_spec, transformer_block_spec
from megatron_dip.models.vlm import document_bounds
from megatron_dip.runtime.offload import host_link_bytes_per_second
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.profile import ModuleProfile, Offload, PointToPoint, Profile, ProfileGrid, ProfilePoint, Strategy
from megatron_dip.spec.workload import Parallel
from megatron_dip.trainer.build import initialize_parallel

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    device: str
    """``cpu`` or ``cuda``."""
    dtype: str
    tensor: int = 1
    """Tensor-parallel size whose shard is measured."""
    sequence_parallel: bool = False
    """Messages between chunks carry a shard of the sequence."""
    context_tokens: int = 128
    """What cross attention sees for each instance."""
    seconds: float = 0.3
    """Spent on repetitions of one figure, after the warm-up."""
    repetitions: int = 5
    """At least."""
    seed: int = 1


@dataclass(frozen=True, slots=True)
class _Measured:
    forward_ns: float
    backward_input_ns: float
    backward_ns: float
    saved_bytes: float


def measure_model(
    model: ModelSpec, shapes: Mapping[str, tuple[Sequence[int], Sequence[int]]], settings: ProfileSettings, p2p: PointToPoint,
    progress: Callable[[str], None] = lambda text: None,
) -> Profile:
    """Measures every module of ``model``.

    Args:
        shapes: module -> (instance counts, lengths); every combination is measured.
        p2p: goes into the profile as it is.
        progress: is told what is measured next.

    Raises:
        InputError: a device that is not there, or sizes that tensor parallelism does not divide.
    """
    if settings.dtype not in _DTYPES:
        raise InputError("training.dtype", settings.dtype, "unknown", f"use one of {', '.join(_DTYPES)}")
    if not dist.is_initialized():
        # One rank: a store in memory needs no port.
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    initialize_parallel(Parallel(), device=settings.device, seed=settings.seed)
    progress("copies to the host and back")
    offload = Offload(bytes_per_second=host_link_bytes_per_second(torch.device(settings.device)), activation=0.0)
    modules: dict[str, ModuleProfile] = {}
    for module in model.modules:
        consumers = model.consumers_of(module.name)
        consumer = model.module(consumers[0]) if consumers else None
        modules[module.name] = _measure_module(module, consumer, *shapes[module.name], settings, offload, progress)
    return Profile(format="megatron-dip/profile/1", modules=modules, p2p=p2p)


def _measure_module(
    module: ModuleSpec, consumer: ModuleSpec | None, counts: Sequence[int], lengths: Sequence[int], settings: ProfileSettings,
    offload: Offload, progress: Callable[[str], None],
) -> ModuleProfile:
    config = _config(module, settings)
    layer = _Layer(module, config, settings)
    first = _first(module, config, settings)
    last = _last(module, consumer, config, settings)
    points: dict[str, list[ProfilePoint]] = {"layer": [], "first": [], "last": []}
    width = _DTYPES[settings.dtype].itemsize
    shard = settings.tensor if settings.sequence_parallel else 1
    plain: _Measured | None = None
    for count in counts:
        for length in lengths:
            boundary = float(count * length * module.hidden_size * width // shard)
            for part, runner in (("layer", layer), ("first", first), ("last", last)):
                if runner is None:
                    continue
                progress(f"{module.name} {part}: {count} x {length} tokens")
                sent = boundary if part == "layer" else 0.0
                if part == "last" and consumer is not None:
                    sent = float(count * _merged(module, length) * consumer.hidden_size * width // shard)
                found = _measure(runner, count, length, settings)
                if part == "layer":
                    plain = found
                points[part].append(ProfilePoint(
                    instances=count, tokens=count * length, forward_ns=found.forward_ns, backward_input_ns=found.backward_input_ns,
                    backward_weight_ns=max(0.0, found.backward_ns - found.backward_input_ns) if module.trainable else 0.0,
                    activation_bytes=found.saved_bytes, boundary_bytes=sent,
                ))
    # Shares of the memory strategies: at the last, largest shape.
    progress(f"{module.name}: memory strategies")
    layer.recompute_attention(True)
    selective = _measure(layer, counts[-1], lengths[-1], settings, split=False)
    assert plain is not None
    held = counts[-1] * lengths[-1] * module.hidden_size * width
    strategies = {
        "none": Strategy(),
        "selective": Strategy(
            extra_forward=max(0.0, selective.backward_ns - plain.backward_ns) / plain.forward_ns,
            activation=min(1.0, selective.saved_bytes / plain.saved_bytes),
        ),
        "full": Strategy(extra_forward=1.0, activation=min(1.0, held / plain.saved_bytes)),
        "offload": Strategy(offload=offload),
    }
    return ModuleProfile(
        num_layers=module.num_layers, layer=ProfileGrid(points=points["layer"]),
        first=ProfileGrid(points=points["first"]) if points["first"] else None,
        last=ProfileGrid(points=points["last"]) if points["last"] else None, strategies=strategies,
    )


def _config(module: ModuleSpec, settings: ProfileSettings) -> TransformerConfig:
    """Config of one shard's layer."""
    tensor = settings.tensor
    for field, size in (("num_attention_heads", module.num_attention_heads), ("ffn_hidden_size", module.ffn_hidden_size)):
        if size % tensor:
            raise InputError("parallel.tensor", tensor, f"does not divide {field} = {size} of module {module.name!r}", "use a divisor")
    dtype = _DTYPES[settings.dtype]
    return TransformerConfig(
        num_layers=1, hidden_size=module.hidden_size, ffn_hidden_size=module.ffn_hidden_size // tensor,
        num_attention_heads=module.num_attention_heads // tensor, num_query_groups=max(1, module.query_groups // tensor),
        kv_channels=module.hidden_size // module.num_attention_heads, gated_linear_unit=module.has_gated_mlp,
        activation_func=torch.nn.functional.silu if module.has_gated_mlp else torch.nn.functional.gelu, hidden_dropout=0.0,
        attention_dropout=0.0, params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16,
        use_cpu_initialization=settings.device == "cpu",
    )


class _Layer:
    """One transformer layer; called with (count, length) it gives its input and a function from input to output."""

    def __init__(self, module: ModuleSpec, config: TransformerConfig, settings: ProfileSettings) -> None:
        self._module, self._config, self._settings = module, config, settings
        spec = transformer_block_spec(1, causal=module.is_causal, packed=module.is_causal)
        if module.cross_attention:
            _add_cross_attention(spec)
        self.block = TransformerBlock(config=config, spec=spec, pre_process=True, post_process=False).to(_place(settings))
        if settings.dtype != "fp32":
            self.block.to(_DTYPES[settings.dtype])
        self.block.train()
        self._rotary = RotaryEmbedding(config.kv_channels, 1.0, use_cpu_initialization=settings.device == "cpu") if module.kind == "lm" else None

    def recompute_attention(self, value: bool) -> None:
        self.block.layers[0].self_attention.checkpoint_core_attention = value

    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.block.parameters())

    def __call__(self, count: int, length: int) -> tuple[torch.Tensor | None, Callable[[torch.Tensor | None], torch.Tensor]]:
        rotary = self._rotary(length) if self._rotary is not None else None
        context, bounds, shape = None, None, (length, count)
        if self._module.is_causal:  # as in training: documents of a packed sequence
            shape = (count * length, 1)
            tokens = torch.empty(1, count * length, device=_place(self._settings))
            bounds = document_bounds(torch.arange(0, count * length + 1, length, dtype=torch.int32, device=tokens.device), tokens)
        if self._module.cross_attention:
            context = _random((self._settings.context_tokens, count, self._module.hidden_size), self._settings)

        def forward(hidden: torch.Tensor | None) -> torch.Tensor:
            return self.block(
                hidden_states=hidden, attention_mask=None, context=context, rotary_pos_emb=rotary, packed_seq_params=bounds
            )

        return _random((*shape, self._module.hidden_size), self._settings), forward


def _add_cross_attention(spec: TransformerBlockSubmodules) -> None:
    """Gives the layers Megatron's T5 cross attention."""
    source = t5_spec.decoder_model_with_local_spec().submodules
    for layer in spec.layer_specs:
        layer.submodules.pre_cross_attn_layernorm = Norm
        layer.submodules.cross_attention = source.cross_attention
        layer.submodules.cross_attn_bda = source.cross_attn_bda


class _Part:
    """Modules and a function that runs them, in the form of :class:`_Layer`."""

    def __init__(self, modules: Sequence[torch.nn.Module], settings: ProfileSettings, make: Callable[[int, int], Any]) -> None:
        for module in modules:
            module.to(_place(settings))
            if settings.dtype != "fp32":
                module.to(_DTYPES[settings.dtype])
        self._modules, self._make = modules, make

    def parameters(self) -> list[torch.nn.Parameter]:
        return [parameter for module in self._modules for parameter in module.parameters()]

    def __call__(self, count: int, length: int) -> tuple[torch.Tensor | None, Callable[[torch.Tensor | None], torch.Tensor]]:
        return self._make(count, length)


def _first(module: ModuleSpec, config: TransformerConfig, settings: ProfileSettings) -> _Part | None:
    if module.kind != "lm":
        stem = torch.nn.Linear(STEM_INPUT[module.kind], module.hidden_size)

        def make_stem(count: int, length: int) -> Any:
            patches = _random((length, count, STEM_INPUT[module.kind]), settings)
            return None, lambda unused: stem(patches)

        return _Part([stem], settings, make_stem)
    if module.vocab_size is None:
        return None
    embedding = _gpt(module, config).embedding

    def make_embedding(count: int, length: int) -> Any:
        tokens = torch.randint(_shard_vocabulary(module, settings), (count, length), device=_place(settings))
        return None, lambda unused: embedding(input_ids=tokens, position_ids=None)

    return _Part([embedding], settings, make_embedding)


def _last(module: ModuleSpec, consumer: ModuleSpec | None, config: TransformerConfig, settings: ProfileSettings) -> _Part | None:
    norm = Norm(config, module.hidden_size)
    if consumer is not None:
        merge = VIT_MERGE if module.kind == "vit" and consumer.kind == "lm" else 1
        target = consumer.hidden_size
        projector_config = TransformerConfig(
            num_layers=1, hidden_size=target, ffn_hidden_size=max(1, target // settings.tensor), num_attention_heads=1, num_query_groups=1,
            params_dtype=config.params_dtype, bf16=config.bf16, fp16=config.fp16, use_cpu_initialization=config.use_cpu_initialization,
        )
        projector = MultimodalProjector(projector_config, projector_spec(), "mlp", module.hidden_size * merge)

        def make_projector(count: int, length: int) -> Any:
            rows = _merged(module, length) if merge > 1 else length

            def forward(hidden: torch.Tensor) -> torch.Tensor:
                kept = norm(hidden)[: rows * merge] if length >= merge else norm(hidden).repeat(merge, 1, 1)[: rows * merge]
                return projector(kept.reshape(rows, count, merge * module.hidden_size))

            return _random((length, count, module.hidden_size), settings), forward

        return _Part([norm, projector], settings, make_projector)
    if module.vocab_size is None:
        return None
    model = _gpt(module, config)
    head = model.output_layer

    def make_head(count: int, length: int) -> Any:
        labels = torch.randint(_shard_vocabulary(module, settings), (count, length), device=_place(settings))

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            logits, _ = head(norm(hidden))
            return model.compute_language_model_loss(labels, logits)

        return _random((length, count, module.hidden_size), settings), forward

    return _Part([norm, head], settings, make_head)


def _shard_vocabulary(module: ModuleSpec, settings: ProfileSettings) -> int:
    assert module.vocab_size is not None
    return max(1, module.vocab_size // settings.tensor)


def _gpt(module: ModuleSpec, config: TransformerConfig) -> GPTModel:
    """A model of one layer, for its embedding and head; the vocabulary is the shard's."""
    assert module.vocab_size is not None
    tensor = module.ffn_hidden_size // config.ffn_hidden_size
    return GPTModel(
        config=config, transformer_layer_spec=transformer_block_spec(1, causal=True), vocab_size=max(1, module.vocab_size // tensor),
        max_sequence_length=1 << 20, position_embedding_type="rope",
    )


def _merged(module: ModuleSpec, length: int) -> int:
    """Tokens that an instance hands to a language model."""
    return max(1, length // VIT_MERGE) if module.kind == "vit" else length


def _place(settings: ProfileSettings) -> torch.device:
    return torch.device("cpu") if settings.device == "cpu" else torch.device("cuda", torch.cuda.current_device())


def _random(shape: tuple[int, ...], settings: ProfileSettings) -> torch.Tensor:
    return torch.randn(shape, device=_place(settings), dtype=_DTYPES[settings.dtype])


# --- measuring ---------------------------------------------------------------------------------------------------------------------


def _measure(runner: _Layer | _Part, count: int, length: int, settings: ProfileSettings, *, split: bool = True) -> _Measured:
    """``split``: the backward to the inputs alone, too; Megatron's checkpointed attention refuses that."""
    hidden, forward = runner(count, length)
    parameters = [parameter for parameter in runner.parameters() if parameter.requires_grad]
    if hidden is not None:
        hidden.requires_grad_()
    saved = _saved_bytes(lambda: forward(hidden), parameters)

    def run_forward() -> tuple[torch.Tensor, torch.Tensor]:
        out = forward(hidden)
        return out, torch.ones_like(out)

    def run_backward(made: tuple[torch.Tensor, torch.Tensor]) -> None:
        # Weights' gradients add up, as over the microbatches of an iteration: another pass over memory that training has too.
        made[0].backward(made[1])
        if hidden is not None:
            hidden.grad = None

    input_ns = 0.0
    if hidden is not None and split:
        input_ns = _median(run_forward, lambda made: torch.autograd.grad(made[0], hidden, made[1]), settings)
    return _Measured(
        forward_ns=_median(lambda: None, lambda unused: forward(hidden), settings), backward_input_ns=input_ns,
        backward_ns=_median(run_forward, run_backward, settings), saved_bytes=saved,
    )


def _median(prepare: Callable[[], Any], run: Callable[[Any], Any], settings: ProfileSettings) -> float:
    """Median ns of ``run`` on what ``prepare`` made, after two runs that warm up."""
    times: list[int] = []
    deadline = 0.0
    turn = 0
    while turn < 2 + settings.repetitions or time.perf_counter() < deadline:
        if turn == 2:
            deadline = time.perf_counter() + settings.seconds
        made = prepare()
        _synchronize(settings)
        begin = time.perf_counter_ns()
        result = run(made)
        _synchronize(settings)
        if turn >= 2:
            times.append(time.perf_counter_ns() - begin)
        del result, made
        turn += 1
    return float(statistics.median(times))


def _synchronize(settings: ProfileSettings) -> None:
    if settings.device != "cpu":
        torch.cuda.synchronize()


def _saved_bytes(forward: Callable[[], torch.Tensor], parameters: Sequence[torch.nn.Parameter]) -> float:
    """Bytes of the storages that autograd keeps for the backward, without the parameters'."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no other storage takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    del out
    return float(sum(sizes.values()))
