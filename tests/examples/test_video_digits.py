"""The clips example's data: deterministic, packed as the model takes it, legible to the readers that score it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from megatron_dip.spec.codec import load_example
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Parallel

FOLDER = Path(__file__).parents[2] / "examples" / "t2v" / "digits"


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("clips_example", FOLDER / "example.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def dataset(example: Any, **changes: Any) -> Any:
    config = load_example(FOLDER / "config.json")
    return example.Dataset(config.model, {**config.data, **changes}, seed=1)


def test_noise_and_noise_levels_come_with_the_sample(example: Any) -> None:
    """Whatever was drawn before, on any rank: the same batches."""
    first = dataset(example).microbatches(7, 3)
    torch.manual_seed(99)
    torch.randn(5)
    second = dataset(example).microbatches(7, 3)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert len(set(one["timesteps"].tolist())) == len(one["timesteps"])


def test_items_fit_the_model(example: Any) -> None:
    from megatron_dip.models.t2v import TextToVideoConfig, TextToVideoDescription

    data = dataset(example)
    description = TextToVideoDescription(TextToVideoConfig(model=data.model, parallel=Parallel()))
    for item in data.microbatches(0, 4):
        microbatch = description.item_metadata(item)
        assert len(microbatch["lm"]) == len(microbatch["dit"])
        # Velocity = noise - clip and x = (1 - sigma) clip + sigma noise: together they give back the clip.
        sigma = (item["timesteps"] / 1000).repeat_interleave(item["grid_sizes"].prod(1))[:, None, None]
        velocity = data.options.flow.velocity_of(item["target"], item["x"], sigma)
        clips = data.clips((item["x"] - sigma * velocity)[:, 0], item["grid_sizes"])
        assert all(float(clip.min()) > -1.001 and float(clip.max()) < 1.001 for clip in clips)
        assert {len(clip) for clip in clips} <= set(range(2, 17, 2))
    broken = {**item, "text_lengths": item["text_lengths"] * 0}
    with pytest.raises(InputError, match="a caption"):
        description.item_metadata(broken)
    with pytest.raises(InputError, match="without frames"):
        description.item_metadata({**item, "grid_sizes": item["grid_sizes"] * 0})


def test_readers_read_real_clips_that_they_never_saw(example: Any) -> None:
    data = dataset(example)
    readers = example.Readers(data)
    stories = data.stories(np.random.default_rng(1), 200, data.held_out_scans)
    seen = np.array([readers.read(data.render(story), story, data.labels) for story in stories])
    assert seen.mean(axis=0).tolist() >= [0.95, 0.98]


def test_wrong_settings_are_named(example: Any) -> None:
    with pytest.raises(InputError, match=r"data\.frames = \[3, 16\]"):
        dataset(example, frames=[3, 16])
    config = load_example(FOLDER / "config.json")
    with pytest.raises(InputError, match="missing required field"):
        example.Dataset(config.model, {"held_out": 3}, seed=1)
    assert isinstance(msgspec.to_builtins(load_example(FOLDER / "config.json"))["model"]["video"], dict)
