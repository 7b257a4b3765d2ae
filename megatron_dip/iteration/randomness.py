"""What forward_step draws is the same on all ranks of a replica.

Every rank runs the user's forward_step, and each takes from it what its own chunks need: one rank the noised clip, another the noise that
the loss compares with. Megatron seeds pipeline ranks apart, so that they would draw different numbers. Here each call runs under random
states that are made of (seed, iteration, microbatch, replica), and the rank's own states are put back behind it: layers (dropout) go on
drawing as if forward_step had drawn nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawPlace:
    """Where in a run numbers are drawn; the same on all ranks of a replica."""

    seed: int
    iteration: int
    """Of training; the same again when an iteration is repeated, or a run is resumed before it."""
    evaluation: int
    """Number of the evaluation step since that iteration; 0: training."""
    replica: int

    def of_microbatch(self, microbatch: int) -> int:
        """Seed of one microbatch's draws, below 2**63."""
        text = f"{self.seed} {self.iteration} {self.evaluation} {self.replica} {microbatch}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@contextlib.contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Runs a block under random states of Python, NumPy and torch (CPU and device) that ``seed`` gives; puts back what they were."""
    python, numpy, host = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  (the states that user code draws from)
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    try:
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        if device is not None:
            torch.cuda.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device)
