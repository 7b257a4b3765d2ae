"""Which schedule a call gets from the function that stands in front of the stock one."""

from __future__ import annotations

import sys
from argparse import Namespace
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_dip.hooks import build, megatron_lm
from megatron_dip.hooks.megatron_lm import dip_schedule
from megatron_dip.spec.errors import InputError


def stock(**arguments: Any) -> list[Any]:
    return ["stock", arguments["num_microbatches"]]


def test_a_model_that_was_not_cut_here_gets_the_stock_schedule() -> None:
    model = torch.nn.Linear(1, 1)
    assert dip_schedule(stock)(model=model, num_microbatches=3, forward_only=False) == ["stock", 3]
    assert dip_schedule(stock)(model=[model], num_microbatches=3, forward_only=True) == ["stock", 3]


def test_what_megatron_asks_of_the_last_rank_alone_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(1, 1)
    monkeypatch.setitem(build._built, id(model), object())
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
    with pytest.raises(InputError, match="needs all of its ranks") as error:
        dip_schedule(stock)(model=[model], num_microbatches=3, forward_only=True, collect_non_loss_data=True)
    assert error.value.remedy


def test_the_time_limit_is_megatrons_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    training = ModuleType("megatron.training")
    training.get_args = lambda: Namespace(distributed_timeout_minutes=45)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megatron.training", training)
    assert megatron_lm._timeout_s() == 45 * 60
    monkeypatch.setitem(sys.modules, "megatron.training", None)  # another training loop than Megatron's
    assert megatron_lm._timeout_s() == 600
