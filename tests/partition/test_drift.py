"""Drifted batches are what they say, and a cut chosen with them is robust; a module that the sample lacks is cut evenly."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given

from megatron_dip.partition import joint
from megatron_dip.partition.drift import _of_one_length, drifted_batches
from megatron_dip.partition.joint import choose_partition, judged_batches
from megatron_dip.partition.offline import cheapest_work_ns, largest_count
from megatron_dip.planner.partitioning import joint_partition
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.workload import check_consumers
from tests.strategies import Case, arrangements, vlm_case


@given(case=arrangements())
def test_drifts_change_one_module_and_never_exceed_the_fullest_microbatch(case: Case) -> None:
    batches = [case.microbatches, case.microbatches[::-1]]
    drifted = drifted_batches(case.model, batches)
    packed = _of_one_length(case.model.topological()[-1], batches)
    assert len(packed) in (0, 2)
    for number, batch in enumerate(drifted):
        assert len(batch) == len(case.microbatches)
        for module in case.model.modules:
            assert largest_count(module.name, [batch]) <= largest_count(module.name, batches)
        if number >= len(drifted) - len(packed):
            continue
        # Every module but one is as in one of the sample's batches.
        changed = min(
            (
                [name for name in (module.name for module in case.model.modules) if any(
                    # An encoder that feeds nothing any more goes with what it fed.
                    mine.get(name, []) != list(theirs.get(name, [])) and (case.model.module(name).role != "encoder" or name in mine)
                    for mine, theirs in zip(batch, other, strict=True)
                )] for other in batches
            ), key=len,
        )
        assert len(changed) <= 1


def test_packed_clips_come_as_long_ones_alone_and_as_short_ones_with_long_captions() -> None:
    batch = [{"lm": [5, 9], "dit": [64, 16]}, {"lm": [7], "dit": [80]}, {"lm": [6, 6, 8], "dit": [32, 24, 16]}]
    long, short = _of_one_length("dit", [batch])
    assert long == [{"lm": [5], "dit": [80]}] * 3
    assert short == [{"lm": [9, 9, 9], "dit": [16, 16, 16]}] * 3
    # Sequences of text come alone: there is nothing to pack otherwise.
    assert not _of_one_length("lm", [[{"vit": [4, 4], "lm": [16]}, {"vit": [4], "lm": [12]}]])


def test_scales_are_kept_over_a_batch() -> None:
    case = vlm_case(num_microbatches=8)
    batch = [{"vit": [4] * 8, "lm": [16]} for _ in range(8)]
    most = [{"vit": [4] * 32, "lm": [16]}] * 8
    none, quarter, half, double, humps = drifted_batches(case.model, [batch, batch, batch, [*batch[:7], most[0]], batch])
    assert all("vit" not in microbatch for microbatch in none)
    assert [len(microbatch["vit"]) for microbatch in quarter] == [2] * 8
    assert [len(microbatch["vit"]) for microbatch in half] == [4] * 8
    assert [len(microbatch["vit"]) for microbatch in double] == [16] * 7 + [32]
    assert [len(microbatch.get("vit", [])) for microbatch in humps] == [0, 16] * 4
    assert all(microbatch["lm"] == [16] for microbatch in none)
    # A quarter of two images a microbatch: one in every second, not none in all.
    few = [{"vit": [4] * 2, "lm": [16]} for _ in range(8)]
    assert sum(len(microbatch.get("vit", [])) for microbatch in drifted_batches(case.model, [few])[1]) == 4


def test_every_judged_batch_counts_by_its_own_free_bound() -> None:
    case = vlm_case(num_microbatches=8)
    heavy = [{"vit": [4] * 12, "lm": [64]}] * 8
    asked: list[int] = []

    def evaluate(partition, batch, thorough):
        # Heavy batches like K = 1, all others K = 2: by seconds the heavy ones would decide.
        asked.append(len(batch))
        images = sum(len(microbatch.get("vit", [])) for microbatch in batch)
        wanted = 1 if images > 60 else 2
        return (1.0 + 0.2 * abs(len(partition.chunks["vit"]) - wanted)) * (1e9 if images > 60 else 1e5)

    given_batches, drifted = judged_batches(case.model, [heavy])
    assert (len(given_batches), len(drifted)) == (1, 5)
    choice = choose_partition(case.model, 2, [heavy], case.costs(), evaluate)
    assert choice.judged == 6
    assert len(asked) <= 6 * choice.candidates


class _JudgesAll(joint._Descent):
    """The slow twin: every candidate is judged on every batch, and the best are those that sorting finds."""

    def score(self, cut, thorough, limit=math.inf):
        return super().score(cut, thorough, math.inf)

    def best_of(self, cuts, thorough, count):
        return sorted(cuts, key=lambda cut: self.score(cut, thorough))[:count]


@pytest.mark.parametrize("seed", range(8))
def test_judging_only_until_it_shows_chooses_what_judging_all_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = vlm_case(num_microbatches=6)
    costs = case.costs()
    asked = 0

    def evaluate(partition, batch, thorough):
        nonlocal asked
        asked += 1
        drawn = random.Random(f"{seed} {partition} {batch} {thorough}")
        if drawn.random() < 0.02:
            return math.inf
        return cheapest_work_ns(case.model, batch, costs) / 2 * (1.0 + 0.3 * drawn.random())

    found = choose_partition(case.model, 2, [case.microbatches], costs, evaluate)
    few, asked = asked, 0
    monkeypatch.setattr(joint, "_Descent", _JudgesAll)
    assert choose_partition(case.model, 2, [case.microbatches], costs, evaluate) == found
    assert few < asked


def test_a_module_without_work_in_the_sample_is_cut_evenly_with_a_warning() -> None:
    case = vlm_case(num_microbatches=6)
    text = [{"lm": list(microbatch["lm"])} for microbatch in case.microbatches]
    choice = joint_partition(case.model, 2, [text], case.costs())
    layers = [layers for row in choice.partition.chunks["vit"] for layers in row]
    assert max(layers) - min(layers) <= 1
    assert choice.partition.sub_microbatch_size["vit"] > 1
    assert len(choice.warnings) == 1
    assert "vit" in choice.warnings[0]
    assert joint_partition(case.model, 2, [case.microbatches], case.costs()).warnings == ()


@pytest.mark.parametrize("chunks", [1, 2])
def test_given_choices_hold_for_unseen_modules_too(chunks: int) -> None:
    case = vlm_case(num_microbatches=4)
    text = [{"lm": list(microbatch["lm"])} for microbatch in case.microbatches]
    choice = joint_partition(case.model, 2, [text], case.costs(), chunks={"vit": chunks}, sizes={"vit": 3})
    assert len(choice.partition.chunks["vit"]) == chunks
    assert choice.partition.sub_microbatch_size["vit"] == 3


def test_an_encoder_goes_with_the_module_that_it_feeds() -> None:
    """Without its only consumer an encoder ends in no loss, which no workload may hold."""
    encoder = ModuleSpec(name="ear", kind="audio", role="encoder", num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    backbone = ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    decoder = ModuleSpec(name="dit", kind="dit", role="decoder", num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    model = ModelSpec(modules=[encoder, backbone, decoder])
    drifted = drifted_batches(model, [[{"ear": [3, 3], "lm": [4, 4], "dit": [5, 5]}] * 4])
    for batch in drifted:
        check_consumers(model, batch)
    lost = [microbatch for batch in drifted for microbatch in batch if "lm" not in microbatch]
    assert lost
    assert all("ear" not in microbatch for microbatch in lost)
