"""The DiT computes what diffusers' WanTransformer3DModel computes with the same weights, clip by clip, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch

pytestmark = pytest.mark.distributed

HEADS, HEAD_SIZE, LAYERS, TEXT, FREQUENCIES, FFN, CHANNELS = 4, 12, 2, 20, 16, 96, 4
GRIDS = ((3, 2, 4), (1, 3, 2), (2, 2, 2))
TEXT_LENGTHS = (5, 3, 7)


def oracle() -> Any:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=HEADS, attention_head_dim=HEAD_SIZE, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT, freq_dim=FREQUENCIES, ffn_dim=FFN, num_layers=LAYERS, cross_attn_norm=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def converted(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of WanTransformer3DModel by our names."""

    def by_head(*parts: torch.Tensor) -> torch.Tensor:
        """Megatron keeps each head's query, key and value together."""
        return torch.stack([part.view(HEADS, HEAD_SIZE, -1) for part in parts], dim=1).flatten(0, 2)

    found = {
        "x_embedder.weight": state["patch_embedding.weight"].flatten(1), "x_embedder.bias": state["patch_embedding.bias"],
        "final_layer_modulation": state["scale_shift_table"],
        "final_layer_linear.bias": state["proj_out.bias"].view(4, CHANNELS).t().flatten(),
        # diffusers' head gives a patch's channels last, ours first.
        "final_layer_linear.weight": state["proj_out.weight"].view(4, CHANNELS, -1).transpose(0, 1).flatten(0, 1),
    }
    for kind in ("weight", "bias"):
        for part in ("linear_1", "linear_2"):
            found[f"t_embedder.{part}.{kind}"] = state[f"condition_embedder.time_embedder.{part}.{kind}"]
            found[f"text_embedding.{part}.{kind}"] = state[f"condition_embedder.text_embedder.{part}.{kind}"]
        found[f"t_embedder.time_proj.{kind}"] = state[f"condition_embedder.time_proj.{kind}"]
        for layer in range(LAYERS):
            theirs, ours = f"blocks.{layer}.", f"decoder.layers.{layer}."
            attention = [state[f"{theirs}attn1.to_{name}.{kind}"] for name in "qkv"]
            found[f"{ours}self_attention.linear_qkv.{kind}"] = by_head(*attention)
            found[f"{ours}cross_attention.linear_q.{kind}"] = state[f"{theirs}attn2.to_q.{kind}"]
            found[f"{ours}cross_attention.linear_kv.{kind}"] = by_head(*(state[f"{theirs}attn2.to_{name}.{kind}"] for name in "kv"))
            for name, attn in (("self_attention", "attn1"), ("cross_attention", "attn2")):
                found[f"{ours}{name}.linear_proj.{kind}"] = state[f"{theirs}{attn}.to_out.0.{kind}"]
                for head in "qk":
                    found[f"{ours}{name}.{head}_layernorm.weight"] = state[f"{theirs}{attn}.norm_{head}.weight"]
            found[f"{ours}pre_cross_attn_layernorm.{kind}"] = state[f"{theirs}norm2.{kind}"]
            found[f"{ours}mlp.linear_fc1.{kind}"] = state[f"{theirs}ffn.net.0.proj.{kind}"]
            found[f"{ours}mlp.linear_fc2.{kind}"] = state[f"{theirs}ffn.net.2.{kind}"]
            found[f"{ours}modulation"] = state[f"{theirs}scale_shift_table"]
    return {name: value.flatten() if name.endswith("bias") else value for name, value in found.items()}


def compare(rank: int, num_ranks: int) -> tuple[float, float, float]:
    """Largest relative differences of predictions, of the gradient to the text, and of the weights' gradients."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_dip.models.dit import DiTCrossAttentionModel, DiTSizes, gelu_tanh, packed_bounds, patchify, positions_of, unpatchify
    from megatron_dip.trainer.build import initialize_parallel

    initialize_parallel(Parallel(), device="cpu", seed=1, timeout_s=60)
    theirs = oracle()
    config = TransformerConfig(
        num_layers=LAYERS, hidden_size=HEADS * HEAD_SIZE, ffn_hidden_size=FFN, num_attention_heads=HEADS, kv_channels=HEAD_SIZE,
        activation_func=gelu_tanh, rotary_interleaved=True, layernorm_epsilon=1e-6, hidden_dropout=0.0, attention_dropout=0.0,
        use_cpu_initialization=True, apply_rope_fusion=False,
    )
    sizes = DiTSizes(in_channels=CHANNELS, freq_dim=FREQUENCIES, crossattn_emb_size=TEXT)
    ours = DiTCrossAttentionModel(config, sizes, LAYERS)
    missing, unexpected = ours.load_state_dict(converted(theirs.state_dict()), strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("_extra_state")]

    random = torch.Generator().manual_seed(3)
    latents = [torch.randn(CHANNELS, frames, 2 * rows, 2 * columns, generator=random) for frames, rows, columns in GRIDS]
    texts = [torch.randn(length, TEXT, generator=random, requires_grad=True) for length in TEXT_LENGTHS]
    times = torch.tensor([3.0, 977.25, 400.5])
    weights = [torch.randn(clip.shape, generator=random) for clip in latents]
    expected = []
    for clip, text, time, weight in zip(latents, texts, times, weights, strict=True):
        expected.append(theirs(clip[None], time[None], text[None]).sample[0])
        (expected[-1] * weight).sum().backward()
    text_gradients = torch.cat([text.grad for text in texts])

    grids = torch.tensor(GRIDS)
    packed_text = torch.cat([text.detach() for text in texts])[:, None].requires_grad_()
    x = torch.cat([patchify(clip, sizes) for clip in latents])[:, None]
    output = ours(x, times, packed_text, packed_bounds(grids, torch.tensor(TEXT_LENGTHS)), positions_of(grids))
    parts = output[:, 0].split(grids.prod(1).tolist())
    found = [unpatchify(part, grid, sizes) for part, grid in zip(parts, GRIDS, strict=True)]
    sum((clip * weight).sum() for clip, weight in zip(found, weights, strict=True)).backward()

    def difference(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one - other).abs().max() / other.abs().max())

    assert packed_text.grad is not None
    gradients = converted({name: parameter.grad for name, parameter in theirs.named_parameters()})
    return (
        max(difference(one, other) for one, other in zip(found, expected, strict=True)),
        difference(packed_text.grad[:, 0], text_gradients),
        max(difference(dict(ours.named_parameters())[name].grad, gradient) for name, gradient in gradients.items()),
    )


def test_equals_diffusers_on_the_same_weights() -> None:
    pytest.importorskip("diffusers")
    ((predictions, text, weights),) = launch(compare, 1)
    assert predictions < 1e-5
    assert text < 1e-5
    assert weights < 1e-5
