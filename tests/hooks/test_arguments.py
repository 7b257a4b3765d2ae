"""The --dip-* flags: values, refusals with flag and remedy, and the frozen form."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from megatron_dip.hooks.arguments import REFUSALS, add_dip_args, options_from_args, validate_dip_args
from megatron_dip.spec.errors import InputError


def parse(*words: str, **others: Any) -> argparse.Namespace:
    args = add_dip_args(argparse.ArgumentParser(allow_abbrev=False)).parse_args(words)
    for name, value in others.items():
        setattr(args, name, value)
    return args


def test_defaults_are_valid() -> None:
    options = options_from_args(parse())
    assert options.chunks == {}
    assert options.planner_threads >= 1
    assert options.memory_limit_bytes is None


def test_values_arrive_in_their_units(tmp_path: Path) -> None:
    options = options_from_args(parse(
        "--dip-chunks", "vit=2", "lm=3", "--dip-sub-microbatch-size", "vit=8,lm=1", "--dip-memory-limit", "1.5", "--dip-trace-dir",
        str(tmp_path), "--dip-split-backward", "--dip-time-budget", "0.5", "--dip-planner-threads", "3", "--dip-look-ahead", "2",
        "--dip-seed", "7", "--dip-log-interval", "0",
    ))
    assert options.chunks == {"vit": 2, "lm": 3}
    assert options.sub_microbatch_size == {"vit": 8, "lm": 1}
    assert options.memory_limit_bytes == 3 << 29
    assert options.split_backward
    assert (options.time_budget_s, options.planner_threads, options.look_ahead, options.seed, options.log_interval) == (0.5, 3, 2, 7, 0)
    assert options.trace_dir == tmp_path


@pytest.mark.parametrize(("words", "flag"), [
    (["--dip-chunks", "vit"], "--dip-chunks"),
    (["--dip-chunks", "vit=0"], "--dip-chunks"),
    (["--dip-chunks", "vit=2", "vit=3"], "--dip-chunks"),
    (["--dip-sub-microbatch-size", "=3"], "--dip-sub-microbatch-size"),
    (["--dip-planner-threads", "0"], "--dip-planner-threads"),
    (["--dip-time-budget", "0"], "--dip-time-budget"),
    (["--dip-time-budget", "nan"], "--dip-time-budget"),
    (["--dip-evaluations", "0"], "--dip-evaluations"),
    (["--dip-memory-limit", "-3"], "--dip-memory-limit"),
    (["--dip-profile", "/nowhere/profile.json"], "--dip-profile"),
    (["--dip-partition", "/nowhere/partition.json"], "--dip-partition"),
    (["--dip-log-interval", "-1"], "--dip-log-interval"),
    (["--dip-look-ahead", "-1"], "--dip-look-ahead"),
    (["--dip-look-ahead", "99"], "--dip-look-ahead"),
    (["--dip-look-ahead", "0", "--dip-balance", "exchange"], "--dip-balance"),
])
def test_bad_values_name_their_flag(words: list[str], flag: str) -> None:
    with pytest.raises(InputError) as error:
        options_from_args(parse(*words))
    assert error.value.field == flag


def test_a_partition_file_excludes_chunks(tmp_path: Path) -> None:
    file = tmp_path / "partition.json"
    file.write_text("{}")
    with pytest.raises(InputError, match="--dip-partition"):
        options_from_args(parse("--dip-partition", str(file), "--dip-chunks", "vit=2"))


UNWANTED = {"cuda_graph_impl": "full_iteration", "iterations_to_skip": [3], "hybrid_layer_pattern": "M-M*"}


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.attribute)
def test_what_cannot_go_together_is_refused_with_a_remedy(refusal: Any) -> None:
    value = UNWANTED.get(refusal.attribute, 2)
    with pytest.raises(InputError) as error:
        validate_dip_args(parse(**{refusal.attribute: value}))
    assert error.value.field == refusal.flag
    assert error.value.problem
    assert error.value.remedy


def test_megatrons_defaults_are_not_refused() -> None:
    neutral = {refusal.attribute: None for refusal in REFUSALS}
    neutral |= {"cuda_graph_impl": "none", "context_parallel_size": 1, "iterations_to_skip": [],
                "enable_cuda_graph": False, "cpu_offloading": False, "mtp_num_layers": 0}
    for name, value in neutral.items():
        for refusal in REFUSALS:
            if refusal.attribute == name:
                assert not refusal.unwanted(value), name


def test_selective_recompute_is_of_core_attention() -> None:
    with pytest.raises(InputError, match=r"--recompute-modules = \['core_attn', 'mlp'\]: .* Remedy: leave it out or give core_attn"):
        validate_dip_args(parse(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]))


def test_full_recompute_is_the_planners_choice() -> None:
    with pytest.raises(InputError, match="--dip-memory-limit"):
        validate_dip_args(parse(recompute_granularity="full"))


@pytest.mark.parametrize(("others", "refused"), [
    ({}, True),
    ({"fp8_recipe": "tensorwise"}, False),
    ({"data_parallel_size": 1}, False),
    ({"fp8": None}, False),
])
def test_fp8_scales_are_not_reduced_over_replicas(others: dict[str, Any], refused: bool) -> None:
    args = parse(**{"fp8": "e4m3", "fp8_recipe": "delayed", "data_parallel_size": 2, **others})
    if refused:
        with pytest.raises(InputError, match="use a recipe whose scales are not kept"):
            validate_dip_args(args)
    else:
        validate_dip_args(args)


def test_experts_over_replicas_need_equal_plans() -> None:
    with pytest.raises(InputError, match=r"--expert-model-parallel-size.*--dip-evaluations"):
        validate_dip_args(parse(expert_model_parallel_size=2))
    validate_dip_args(parse("--dip-evaluations", "200", expert_model_parallel_size=2))


def test_every_flag_has_help() -> None:
    text = add_dip_args(argparse.ArgumentParser(prog="x")).format_help()
    for flag in ("--dip-profile", "--dip-planner-threads", "--dip-time-budget", "--dip-look-ahead", "--dip-chunks",
                 "--dip-sub-microbatch-size", "--dip-memory-limit", "--dip-split-backward", "--dip-trace-dir", "--dip-seed",
                 "--dip-log-interval"):
        assert flag in text
