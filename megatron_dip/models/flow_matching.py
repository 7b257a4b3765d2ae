"""Flow matching as Wan trains and samples with it: noise levels, targets, loss weights, and Euler steps from noise to a clip.

A clip x0 is mixed with noise, x = (1 - sigma) x0 + sigma noise, and the model learns the velocity noise - x0 (or x0 itself) from x and the
timestep 1000 sigma. ``shift`` moves noise levels to the noisy end: sigma = shift u / (1 + (shift - 1) u) for u in [0, 1].

Noise and noise levels are drawn with the sample, from a generator that the sample seeds: all ranks of a replica then hold the same ones,
which they would not if forward_step drew them (Megatron seeds pipeline ranks apart). Sources: Flow Matching (arXiv 2210.02747),
Stable Diffusion 3 (arXiv 2403.03206) for logit-normal levels and the shift, Wan (arXiv 2503.20314).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Literal

import msgspec
import torch

from megatron_dip.spec.errors import InputError

NUM_TRAIN_TIMESTEPS = 1000


class FlowMatching(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How noise levels are drawn; the defaults are those of Wan's pre-training in Megatron-Bridge."""

    shift: float = 2.5
    logit_mean: float = 0.0
    logit_std: float = 1.5
    """u is the sigmoid of a normal variable with this mean and standard deviation ..."""
    uniform_share: float = 0.2
    """... but in this share of the samples uniform between 0 and 1."""
    weighted: bool = True
    """Losses are weighted by 1 + shift * sigma; False: all alike."""
    predicts: Literal["velocity", "clip"] = "velocity"
    """What the model's output is. A clip has few degrees of freedom, noise has one for each value: a model narrower than a patch can learn to
    predict the one and not the other (arXiv 2511.13720). Its error is weighted by 1 / sigma^2, as the velocity's would weight it, up to
    ``most_weight``."""
    most_weight: float = 6.0

    def validate(self, where: str) -> None:
        if not self.shift > 0:
            raise InputError(f"{where}.shift", self.shift, "not above 0", "give for example 2.5; 1 = no shift")
        if not self.logit_std > 0:
            raise InputError(f"{where}.logit_std", self.logit_std, "not above 0", "give for example 1.5")
        if not self.most_weight > 0:
            raise InputError(f"{where}.most_weight", self.most_weight, "not above 0", "give for example 6")
        if not 0 <= self.uniform_share <= 1:
            raise InputError(f"{where}.uniform_share", self.uniform_share, "outside [0, 1]", "give a share")

    def draw_sigma(self, generator: torch.Generator) -> float:
        """One noise level in (0, 1)."""
        uniform, other, normal = torch.rand((), generator=generator), torch.rand((), generator=generator), torch.randn((), generator=generator)
        u = other if uniform < self.uniform_share else torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return float(shifted(u, self.shift))

    def loss_weight(self, sigma: torch.Tensor) -> torch.Tensor:
        weight = 1 + self.shift * sigma if self.weighted else torch.ones_like(sigma)
        return weight if self.predicts == "velocity" else weight * sigma.square().reciprocal().clamp(max=self.most_weight)

    def target(self, clip: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the model shall put out."""
        return velocity(clip, noise) if self.predicts == "velocity" else clip

    def velocity_of(self, output: torch.Tensor, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The velocity that an output at ``x`` says: x = clip + sigma * velocity."""
        return output if self.predicts == "velocity" else (x - output) / sigma


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    return shift * u / (1 + (shift - 1) * u)


def add_noise(clip: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """x at noise level ``sigma`` (a number, or broadcast over the clip)."""
    return (1 - sigma) * clip + sigma * noise


def velocity(clip: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """From a clip to noise."""
    return noise - clip


def timestep(sigma: torch.Tensor) -> torch.Tensor:
    """What the model is told of the noise level."""
    return NUM_TRAIN_TIMESTEPS * sigma


def sampling_levels(num_steps: int, shift: float) -> torch.Tensor:
    """Noise levels [num_steps + 1] from 1 down to 0 (diffusers' FlowMatchEulerDiscreteScheduler with the same shift)."""
    u = torch.linspace(1.0, 1.0 / NUM_TRAIN_TIMESTEPS, num_steps)
    return torch.cat([shifted(u, shift), torch.zeros(1)])


@torch.no_grad()
def sample(predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], noise: torch.Tensor, num_steps: int, shift: float) -> torch.Tensor:
    """Euler steps from pure noise to clips.

    Args:
        predict: (x, sigma as a scalar tensor) -> velocity, of x's shape.
    """
    x = noise
    for sigma, following in itertools.pairwise(sampling_levels(num_steps, shift)):
        x = x + (following - sigma) * predict(x, sigma)
    return x
