"""Cuts that the flags ask for and that do not fit the model are refused before a chunk is built, with the remedy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_dip.hooks.arguments import add_dip_args, options_from_args
from megatron_dip.hooks.cut import given_partition
from megatron_dip.spec.codec import save
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition

RANKS = 2
SIZES: dict[str, Any] = {"hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 4}
SPEC = ModelSpec(modules=[
    ModuleSpec(name="vit", kind="vit", role="encoder", num_layers=4, **SIZES),
    ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=6, vocab_size=128, **SIZES),
])


def cut(*words: str) -> Partition:
    return given_partition(SPEC, RANKS, options_from_args(add_dip_args(argparse.ArgumentParser()).parse_args(words)))


def test_layers_need_not_divide() -> None:
    assert [sum(row) for row in zip(*cut("--dip-chunks", "lm=2").chunks["lm"], strict=True)] == [3, 3]


@pytest.mark.parametrize(("words", "problem"), [
    (["--dip-chunks", "vit=9"], "layers cannot fill"),
    (["--dip-chunks", "sound=2"], "the model has no such module"),
    (["--dip-sub-microbatch-size", "sound=2"], "the model has no such module"),
])
def test_flags_that_do_not_fit(words: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem) as error:
        cut(*words)
    assert error.value.remedy


@pytest.mark.parametrize("chunks", [
    {"vit": [[2, 2]], "lm": [[2, 2]]},
    {"vit": [[2, 2]], "lm": [[3, 3], [3, 3]]},
    {"vit": [[4]], "lm": [[6]]},
    {"vit": [[2, 1, 1]], "lm": [[2, 2, 2]]},
    {"lm": [[3, 3]]},
    {"vit": [[2, 2]], "lm": [[3, 3]], "sound": [[1, 1]]},
], ids=["too few layers", "too many layers", "fewer ranks", "more ranks", "a module missing", "a module too many"])
def test_files_that_do_not_fit(chunks: dict[str, list[list[int]]], tmp_path: Path) -> None:
    file = tmp_path / "partition.json"
    save(file, Partition(chunks=chunks, sub_microbatch_size=dict.fromkeys(chunks, 1)))
    with pytest.raises(InputError) as error:
        cut("--dip-partition", str(file))
    assert "--dip-partition" in str(error.value)
    assert error.value.remedy
