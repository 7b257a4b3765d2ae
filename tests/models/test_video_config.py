"""What a text-to-video model refuses before anything is built, and how a clip's text is pooled."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from megatron_dip.models.dit import CROSS, packed_bounds, pooled_over_clips
from megatron_dip.models.t2v import TextToVideoConfig
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Parallel
from tests.distributed.tiny_t2v import VideoCase, tiny_model


def refused(field: str, **changes: Any) -> None:
    with pytest.raises(InputError, match=field):
        TextToVideoConfig(**{"model": tiny_model(VideoCase()), "parallel": Parallel(), **changes})


def test_what_the_layers_do_not_do_is_refused() -> None:
    refused("parallel.context = 2", parallel=Parallel(context=2))
    refused("parallel.sequence", parallel=Parallel(tensor=2, sequence=True))
    refused("num_attention_heads", parallel=Parallel(tensor=3, sequence=False))
    if importlib.util.find_spec("transformer_engine") is None:
        refused("--transformer-impl", transformer_engine=True)


def test_pooled_text_is_the_mean_of_each_clip() -> None:
    lengths = torch.tensor([2, 1, 4])
    text = torch.randn(7, 1, 5)
    found = pooled_over_clips(text, packed_bounds(torch.ones(3, 3, dtype=torch.int64), lengths)[CROSS])
    expected = torch.stack([part.mean(dim=(0, 1)) for part in text.split(lengths.tolist())])
    assert torch.allclose(found, expected, atol=1e-6)
