"""Draws of forward_step: given by their place in the run alone, and without a trace in the rank's own random states."""

# ruff: noqa: NPY002  (the global states that user code draws from are what is tested)

from __future__ import annotations

import itertools
import random

import numpy as np
import torch

from megatron_dip.iteration.randomness import DrawPlace, drawing


def draw() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def test_equal_seeds_give_equal_draws_and_the_states_are_put_back() -> None:
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = draw()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    with drawing(7):
        first = draw()
    with drawing(7):
        again = draw()
    with drawing(8):
        other = draw()
    assert first == again
    assert all(one != two for one, two in zip(first, other, strict=True))
    assert draw() == expected


def test_states_are_put_back_after_an_error() -> None:
    before = torch.get_rng_state()
    try:
        with drawing(7):
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(torch.get_rng_state(), before)


def test_every_place_has_a_seed_of_its_own_that_is_the_same_in_every_process() -> None:
    seeds = {
        DrawPlace(seed=seed, iteration=iteration, evaluation=evaluation, replica=replica).of_microbatch(microbatch)
        for seed, iteration, evaluation, replica, microbatch in itertools.product(range(3), range(12), range(3), range(3), range(12))
    }
    assert len(seeds) == 3 * 12 * 3 * 3 * 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert DrawPlace(seed=1, iteration=2, evaluation=0, replica=3).of_microbatch(4) == 295671155806394214
