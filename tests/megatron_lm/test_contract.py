"""What Megatron-LM's training loop does around a schedule, under --pipeline-schedule dip: loss scaling, batch size ramp-up, validation of
results by re-running, leaving and saving on a signal, log lines. Each against the stock script in one process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_dip.checkouts.patching import read_version
from tests.megatron_lm.runs import DIP, NO_EVALUATION, P2, VARYING, VLM, Run, finished, fresh, own_losses, start, words

CHUNKS = words("--dip-chunks vit=2 lm=2 --dip-sub-microbatch-size vit=2")


def assert_same_log(run: Run, stock: Run, rtol: float) -> None:
    """Every name of every line: losses and norms within ``rtol``, the others letter by letter."""
    assert len(run.log) == len(stock.log) > 0
    for mine, other in zip(run.log, stock.log, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if name in ("lm loss", "grad norm", "params norm", "num zeros"):
                # A gradient that is nothing but rounding is zero in one order of sums and not in another.
                np.testing.assert_allclose(float(mine[name]), float(value), rtol=1e-2 if name == "num zeros" else rtol, err_msg=name)
            else:
                assert mine[name] == value, name


def without(arguments: Sequence[str], flags: set[str]) -> list[str]:
    """The arguments less these flags of one value."""
    return [word for before, word in zip(["", *arguments], arguments, strict=False) if not {word, before} & flags]


@pytest.mark.parametrize(("of_both", "flags"), [
    ([], [*P2, *CHUNKS]),
    (["--use-distributed-optimizer"], ["--overlap-grad-reduce", "--overlap-param-gather"]),
], ids=["P 2", "DP 2, distributed optimizer"])
def test_fp16_skips_the_same_steps_by_dynamic_loss_scaling(
    of_both: list[str], flags: list[str], checkout: Path, patched_tree: Path, checkpoint: Path
) -> None:
    """Where replicas share the batch, gradients of fewer microbatches are summed in fp16 and overflow elsewhere: there stock has two too
    (and no overlap, which it cannot do where a microbatch has no image)."""
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, 6), *words("--fp16 --initial-loss-scale 1048576 --loss-scale-window 2 --hysteresis 1"), *of_both]
    stock = start(checkout, VARYING, arguments, ranks=2 if of_both else 1, patched=False)
    assert stock.exit_code == 0, stock.output[-6000:]
    skipped = [line["number of skipped iterations"] for line in stock.log]
    assert skipped[0] == "1"
    assert "0" in skipped
    assert len({line["loss scale"] for line in stock.log}) > 2  # down on overflow, up after two good iterations
    run = start(patched_tree, VARYING, [*arguments, *DIP, *flags], ranks=2)
    assert run.exit_code == 0, run.output[-6000:]
    assert_same_log(run, stock, rtol=2e-3)


def test_ramp_up_evaluation_clipping_and_timers(checkout: Path, patched_tree: Path, checkpoint: Path) -> None:
    """Global batches of 2, 2, 4, 6, 8 and 8 samples, evaluated with 8; the look-ahead foresees the changes."""
    flags = words("--train-samples 30 --lr-decay-samples 40 --eval-iters 1 --eval-interval 2 --split 90,5,5 --clip-grad 0.5")
    flags += words("--log-params-norm --log-num-zeros-in-grad --timing-log-level 2 --timing-log-option max")
    left_out = {"--lr-decay-iters"}
    if tuple(map(int, read_version(checkout).split("."))) < (0, 18, 0):
        flags += words("--rampup-batch-size 2 2 12")
    else:  # thresholds in tokens, five a sample
        flags += ["--step-batch-size-schedule", "0:2 20:4 40:6 70:8", "--eval-global-batch-size", "8"]
        left_out.add("--global-batch-size")
    arguments = [*without(VLM, left_out), *flags, *fresh(checkpoint)]
    stock = start(checkout, VARYING, arguments, patched=False)
    run = start(patched_tree, VARYING, [*arguments, *DIP, *P2, *CHUNKS, *words("--dip-look-ahead 3 --dip-log-interval 1")], ranks=2)
    assert (run.exit_code, stock.exit_code) == (0, 0), run.output[-6000:]
    assert [line["global batch size"] for line in run.log] == ["2", "2", "4", "6", "8", "8"]
    assert_same_log(run, stock, rtol=1e-4)
    assert len(run.validation) == len(stock.validation) == 5
    np.testing.assert_allclose(run.validation, stock.validation, rtol=1e-4)
    for timer in ("forward-backward", "forward-compute", "backward-compute", "optimizer"):
        assert re.search(rf"^ +{timer} \.*: +\(?[\d.]+", stock.output, re.MULTILINE), timer
        assert re.search(rf"^ +{timer} \.*: +\(?[\d.]+", run.output, re.MULTILINE), timer
    assert len(re.findall(r"\[DIP\] iteration", run.output)) == 6


@pytest.mark.parametrize(("flags", "environment", "message"), [
    ("--exit-signal-handler", {"SIGTERM_AT_SAMPLE": "20"}, "exiting program after receiving SIGTERM"),
    ("--exit-duration-in-mins 1", {"STARTED_EARLIER_MINUTES": "5"}, "exiting program after"),
], ids=["signal", "duration"])
def test_leaving_saves_and_the_data_go_on_where_they_were(
    flags: str, environment: dict[str, str], message: str, checkout: Path, patched_tree: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """With batches read two iterations ahead, the sample counted by Megatron is the last one trained on."""
    folder = tmp_path / "saved"
    common = [*VLM, *NO_EVALUATION, "--train-iters", "6"]
    dip = [*DIP, *P2, *CHUNKS, "--dip-look-ahead", "2"]
    left = start(
        patched_tree, VARYING, [*common, *dip, *fresh(checkpoint), "--save", str(folder), "--save-interval", "1000", *flags.split()], ranks=2, environment=environment
    )
    assert left.exit_code == 0, left.output[-6000:]
    assert message in left.output
    done = len(left.losses)
    assert 1 <= done <= 3
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == str(done)
    whole = finished(start(checkout, VARYING, [*common, *fresh(checkpoint)], patched=False), 6)
    resumed = finished(start(patched_tree, VARYING, [*common, *dip, "--load", str(folder)], ranks=2), 6 - done)
    assert [line["consumed samples"] for line in resumed.log] == [line["consumed samples"] for line in whole.log[done:]]
    np.testing.assert_allclose(own_losses(left) + own_losses(resumed), own_losses(whole), rtol=1e-4)


def test_every_iteration_run_twice_gives_the_same_numbers(checkout: Path, patched_tree: Path, checkpoint: Path) -> None:
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, 4)]
    stock = finished(start(checkout, VARYING, arguments, patched=False), 4)
    run = start(
        patched_tree, VARYING, [*arguments, *DIP, *P2, *CHUNKS, *words("--dip-look-ahead 2 --dip-log-interval 1")], ranks=2,
        environment={"RERUN_EVERY_ITERATION": "1"},
    )
    finished(run, 4)
    assert_same_log(run, stock, rtol=1e-4)
    planned = re.findall(r"\[DIP\] iteration +(\d+) \| planned \(ms\): (\S+)", run.output)
    assert [int(iteration) for iteration, _ in planned] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert planned[::2] == planned[1::2]


def test_a_result_found_wrong_is_run_again_saved_and_found_again_after_a_restart(patched_tree: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Megatron's own injection of errors: the first validated result of iteration 2 is said to be wrong, and comes out the same again; a
    run from the checkpoint, elsewhere and with other plans, confirms it."""
    folder = tmp_path / "saved"
    arguments = [*VLM, *NO_EVALUATION, *DIP, *P2, *CHUNKS, *words("--train-iters 4 --error-injection-rate 1 --error-injection-type correct_result")]
    first = start(patched_tree, VARYING, [*arguments, *fresh(checkpoint), "--save", str(folder), "--save-interval", "1000"], ranks=2)
    assert first.exit_code == 16, first.output[-6000:]
    assert "unexpected result is reproducible within the tolerance" in first.output
    assert len(first.losses) == 1
    elsewhere = start(
        patched_tree, VARYING, [*arguments, "--load", str(folder), *words("--dip-seed 99 --dip-split-backward")], ranks=2,
        environment={"NODE_NAME": "elsewhere"},
    )
    confirmed = re.findall(r"Second rerun: unexpected result is reproducible on a different GPU.*\((\S+) = (\S+)\)", elsewhere.output)
    assert len(confirmed) == 2  # a loss on the last pipeline rank, a gradient's norm on the first
    assert all(found == before for found, before in confirmed)
