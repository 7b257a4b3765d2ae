"""What a text-to-video model refuses before anything is built, how a clip's text is pooled, and how it starts."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from megatron_dip.models.dit import CROSS, VideoPositionEmbedding, packed_bounds, pooled_over_clips, positions_of
from megatron_dip.models.t2v import TextToVideoConfig
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.workload import Parallel
from tests.distributed.launcher import launch
from tests.distributed.tiny_t2v import ARGUMENTS, VideoCase, config_of, make_microbatch, tiny_model


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


def test_every_place_has_an_embedding_of_its_own() -> None:
    places = positions_of(torch.tensor([[3, 2, 4], [2, 2, 2]]))
    found = VideoPositionEmbedding(24)(places)[:, 0]
    assert found.shape == (32, 24)
    assert len(found[:24].unique(dim=0)) == 24
    # The same place of another clip, whose grid is smaller.
    assert torch.equal(found[24 + 7], found[places[:24].tolist().index([1, 1, 1])])


def outputs_of_equal_patches(rank: int, num_ranks: int) -> list[float]:
    """How far predictions for equal patches of one clip differ from each other, with rotary positions alone and with absolute ones too;
    the spread of the words' embeddings at the start."""
    from megatron_dip.trainer.build import initialize_parallel
    from megatron_dip.trainer.stock_layouts import build_stock_model

    initialize_parallel(Parallel(), device="cpu", seed=1, timeout_s=60)
    found = []
    for absolute in (False, True):
        case = VideoCase(num_layers=(2, 2), absolute_positions=absolute)
        whole = config_of(case)
        whole = replace(whole, model=msgspec.structs.replace(whole.model, embedding_init_method_std=1.5))
        model = build_stock_model(whole, "parameters").chunks[0]
        item = make_microbatch(3, 1, case) | {"grid_sizes": torch.tensor([[3, 2, 2]]), "x": torch.ones(12, 1, 8)}
        with torch.no_grad():
            output = model(**{name: item.get(name) for name in ARGUMENTS})
        found.append(float((output - output[:1]).abs().max()))
    words = next(value for name, value in model.named_parameters() if "word_embeddings" in name)
    return [*found, float(words.detach().std())]


@pytest.mark.distributed
def test_rotary_positions_alone_do_not_tell_where_a_patch_is() -> None:
    rotary, absolute, words = launch(outputs_of_equal_patches, 1)[0]
    assert rotary < 1e-4
    assert absolute > 1e-2
    assert words == pytest.approx(1.5, rel=0.1)
