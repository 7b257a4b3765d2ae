"""Cuts say to Megatron how many layers a chunk builds and with which numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dip.models.layout import ModuleCut, check_enough_layers, chunk_order
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.partition import Partition


def partition(rows: list[list[int]]) -> Partition:
    return Partition(chunks={"lm": rows}, sub_microbatch_size={"lm": 1})


def transformer_config(num_layers: int) -> TransformerConfig:
    return TransformerConfig(num_layers=num_layers, hidden_size=8, num_attention_heads=2, pipeline_dtype=torch.float32)


@given(st.integers(1, 4).flatmap(lambda ranks: st.lists(st.lists(st.integers(0, 3), min_size=ranks, max_size=ranks), min_size=1, max_size=4)))
def test_layers_and_offsets_are_those_of_the_partition(rows: list[list[int]]) -> None:
    ranks, total = len(rows[0]), sum(map(sum, rows))
    given_partition = partition(rows)
    cut = ModuleCut.of_partition(given_partition, "lm")
    if total == 0 or ranks * len(rows) == 1:
        return
    config = cut.config(transformer_config(total))
    layout = config.pipeline_model_parallel_layout
    for vp_stage in range(len(rows)):
        for rank in range(ranks):
            first, count = given_partition.layer_range("lm", vp_stage, rank)
            assert layout.get_num_layers_to_build(vp_stage=cut.vp_stage(vp_stage), pp_rank=rank) == count
            assert layout.get_layer_offset(vp_stage=cut.vp_stage(vp_stage), pp_rank=rank) == first
    assert config.virtual_pipeline_model_parallel_size == (len(rows) if len(rows) > 1 else None)


def test_an_uncut_module_keeps_its_config() -> None:
    config = transformer_config(3)
    assert ModuleCut.of_partition(partition([[3]]), "lm").config(config) is config


def test_cuts_do_not_share_a_config() -> None:
    """Recompute is set on a chunk's config right before its forward, so no two chunks may hold one object."""
    config, cut = transformer_config(4), ModuleCut.of_partition(partition([[1, 1], [1, 1]]), "lm")
    assert cut.config(config) is not cut.config(config)


def test_too_few_layers_are_refused() -> None:
    check_enough_layers(partition([[1, 1], [1, 1]]))
    with pytest.raises(InputError, match=r"chunks\.lm = 2: 3 layers cannot fill 4 chunks.*at most 1 chunks a rank"):
        check_enough_layers(partition([[1, 1], [1, 0]]))


@pytest.mark.parametrize("num_chunks", [{"vit": 2, "lm": 1}, {"vit": 1, "lm": 3}, {"audio": 2, "lm": 2, "vit": 1}], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_embedding_and_head_stand_at_the_ends_of_the_chunk_list(num_chunks: dict[str, int], ranks: int) -> None:
    cut = Partition(
        chunks={name: [[1] * ranks] * count for name, count in num_chunks.items()}, sub_microbatch_size=dict.fromkeys(num_chunks, 1)
    )
    orders = [chunk_order(cut, rank, "lm") for rank in range(ranks)]
    for order in orders:
        assert sorted(order) == sorted((name, vp_stage) for name, count in num_chunks.items() for vp_stage in range(count))
    assert orders[0][0] == ("lm", 0)
    # With all in one chunk of one rank, Megatron looks for both in the first.
    assert ranks * num_chunks["lm"] == 1 or orders[-1][-1] == ("lm", num_chunks["lm"] - 1)
