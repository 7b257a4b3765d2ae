"""Flow matching against its definitions, and its sampling levels against diffusers' scheduler."""

from __future__ import annotations

import pytest
import torch

from megatron_dip.models.flow_matching import FlowMatching, add_noise, sample, sampling_levels, shifted, timestep, velocity
from megatron_dip.spec.errors import InputError


def test_shift_moves_levels_to_the_noisy_end_and_keeps_the_ends() -> None:
    u = torch.linspace(0, 1, 11)
    assert torch.allclose(shifted(u, 1.0), u)
    moved = shifted(u, 2.5)
    assert torch.allclose(moved[[0, -1]], u[[0, -1]])
    assert bool((moved[1:-1] > u[1:-1]).all())
    assert torch.allclose(moved[1:], 2.5 / (2.5 + (1 / u[1:] - 1))), "Megatron-Bridge's form"


def test_levels_are_drawn_by_the_samples_generator_alone() -> None:
    flow = FlowMatching()
    levels = [flow.draw_sigma(torch.Generator().manual_seed(seed)) for seed in range(400)]
    torch.rand(3)
    assert levels == [flow.draw_sigma(torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert all(0 < level < 1 for level in levels)
    assert 0.6 < sum(levels) / len(levels) < 0.75


def test_a_predicted_clip_says_the_velocity() -> None:
    flow = FlowMatching(predicts="clip", weighted=False, most_weight=5.0)
    clip, noise = torch.randn(2, 4, 3)
    x = add_noise(clip, noise, 0.3)
    assert torch.allclose(flow.velocity_of(flow.target(clip, noise), x, torch.tensor(0.3)), velocity(clip, noise), atol=1e-5)
    # An error of the clip is one of 1 / sigma times as much of the velocity.
    assert flow.loss_weight(torch.tensor([0.8, 0.1])).tolist() == pytest.approx([1 / 0.8**2, 5.0])


def test_the_velocity_leads_from_noise_to_the_clip() -> None:
    clip, noise = torch.randn(3, 4), torch.randn(3, 4)
    x = add_noise(clip, noise, 0.3)
    assert torch.allclose(x - 0.3 * velocity(clip, noise), clip, atol=1e-6)
    found = sample(lambda x, sigma: velocity(clip, noise), noise, 7, shift=3.0)
    assert torch.allclose(found, clip, atol=1e-5)
    assert float(timestep(torch.tensor(0.25))) == 250.0
    assert torch.allclose(FlowMatching(shift=2.0).loss_weight(torch.tensor([0.0, 0.5])), torch.tensor([1.0, 2.0]))


def test_sampling_levels_are_those_of_diffusers() -> None:
    pytest.importorskip("diffusers")
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(20)
    assert torch.allclose(sampling_levels(20, 1.0), scheduler.sigmas, atol=1e-6)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError, match=r"flow\.uniform_share = 2"):
        FlowMatching(uniform_share=2).validate("flow")
