"""Global batches dealt to the replicas in Megatron-LM's own training loop: ``pretrain_vlm.py`` on samples of zero to four images.

Two replicas of two pipeline ranks with batches read two iterations ahead; losses, gradient norms and what else the log says equal those
of the unpatched script in one process, which trains the same global batches.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_dip.checkouts.patching import read_version
from megatron_dip.partition.deal import deal
from megatron_dip.partition.second_pass import deal_by_plans
from tests.megatron_lm.runs import DIP, NO_EVALUATION, P2, VARYING, VLM, Run, finished, fresh, own_losses, start, words
from tests.megatron_lm.test_contract import assert_same_log, without
from tests.megatron_lm.test_experts import EXPERTS, SPREAD, saved_by_stock

DEALING = [*DIP, *P2, *words("--dip-chunks vit=2 lm=2 --dip-sub-microbatch-size vit=2 --dip-look-ahead 2 --dip-log-interval 1")]
LENGTHS = {"TEXT_LENGTHS": "vary"}
TOLD = {**LENGTHS, "TELLS_LENGTHS": "1"}
LONG = 10


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Kernels that are compiled while the first iterations train make their batches late."""
    work = np.arange(24).reshape(12, 2)
    deal_by_plans(work, deal(work, 4), max)


def num_dealt(run: Run) -> int:
    return int(re.findall(r"so far batches dealt: (\d+)", run.output)[-1])


def test_ten_iterations_of_exchanged_microbatches_and_of_dealt_indices(checkout: Path, patched_tree: Path, checkpoint: Path) -> None:
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, LONG)]
    stock = finished(start(checkout, VARYING, arguments, patched=False, environment=LENGTHS), LONG)
    for balance, environment in (("exchange", LENGTHS), ("auto", TOLD)):
        run = finished(start(patched_tree, VARYING, [*arguments, *DEALING, "--dip-balance", balance], ranks=4, environment=environment), LONG)
        np.testing.assert_allclose(run.losses[:3], stock.losses[:3], rtol=1e-5, err_msg=balance)
        np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-3, err_msg=balance)
        assert num_dealt(run) >= LONG // 2, balance
        sent = float(re.findall(r"sent \(MB\): (\S+)", run.output)[-1])
        assert (sent > 0) == (balance == "exchange")


@pytest.mark.parametrize(("balance", "environment"), [("exchange", LENGTHS), ("indices", TOLD)], ids=["exchange", "indices"])
def test_what_the_training_loop_does_around_dealt_batches(
    balance: str, environment: dict[str, str], checkout: Path, patched_tree: Path, checkpoint: Path
) -> None:
    """Loss per token with samples that have none to learn, clipping, evaluation, batch size ramp-up, a distributed optimizer with both
    overlaps, and every iteration run twice."""
    flags = words("--train-samples 38 --lr-decay-samples 40 --eval-iters 1 --eval-interval 2 --split 90,5,5 --clip-grad 0.5 --calculate-per-token-loss")
    left_out = {"--lr-decay-iters"}
    if tuple(map(int, read_version(checkout).split("."))) < (0, 18, 0):
        flags += words("--rampup-batch-size 2 2 12")
    else:  # thresholds in tokens, five a sample
        flags += ["--step-batch-size-schedule", "0:2 20:4 40:6 70:8", "--eval-global-batch-size", "8"]
        left_out.add("--global-batch-size")
    arguments = [*without(VLM, left_out), *flags, *fresh(checkpoint)]
    environment = {**environment, "UNSUPERVISED_EVERY": "3"}
    stock = start(checkout, VARYING, arguments, patched=False, environment=environment)
    ours = words("--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")
    run = start(
        patched_tree, VARYING, [*arguments, *DEALING, *ours, "--dip-balance", balance], ranks=4,
        environment={**environment, "RERUN_EVERY_ITERATION": "1"},
    )
    assert (run.exit_code, stock.exit_code) == (0, 0), run.output[-6000:]
    assert [line["global batch size"] for line in run.log] == ["2", "2", "4", "6", "8", "8", "8"]
    assert_same_log(run, stock, rtol=1e-4)
    np.testing.assert_allclose(run.validation, stock.validation, rtol=1e-4)
    assert num_dealt(run) >= 3


@pytest.mark.parametrize(("of_replicas", "balance", "environment"), [([], "exchange", LENGTHS), (SPREAD, "indices", TOLD)], ids=["in every replica", "over replicas"])
def test_experts_and_their_auxiliary_loss(
    of_replicas: Sequence[str], balance: str, environment: dict[str, str], mended_tree: Path, tmp_path: Path
) -> None:
    """Experts over replicas run one joint plan, of what was dealt: indices are dealt before it, whole microbatches cannot be."""
    common = [*VLM, *EXPERTS, *NO_EVALUATION]
    arguments = [*common, *fresh(saved_by_stock(mended_tree, VARYING, common, tmp_path / "weights"), 4)]
    stock = finished(start(mended_tree, VARYING, arguments, patched=False, environment=environment), 4)
    dealing = [*DEALING, *of_replicas, "--dip-balance", balance]
    run = finished(start(mended_tree, VARYING, [*arguments, *dealing], ranks=4, environment=environment), 4)
    assert num_dealt(run) >= 1
    np.testing.assert_allclose(run.losses[:3], stock.losses[:3], rtol=1e-5)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-4)


@pytest.mark.parametrize(("balance", "environment"), [("exchange", LENGTHS), ("indices", TOLD)], ids=["exchange", "indices"])
def test_resuming_in_the_middle_with_as_many_replicas_and_with_others(
    balance: str, environment: dict[str, str], checkout: Path, patched_tree: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Whatever was read ahead and dealt, the next run goes on behind the last global batch that was trained."""
    folder, common = tmp_path / "saved", [*VLM, *NO_EVALUATION, "--train-iters", "6"]
    dealing = [*DEALING, "--dip-balance", balance]
    whole = finished(start(checkout, VARYING, [*common, *fresh(checkpoint)], patched=False, environment=environment), 6)
    save = [*common, *dealing, *fresh(checkpoint), "--save", str(folder), *words("--save-interval 3 --exit-interval 3")]
    first = finished(start(patched_tree, VARYING, save, ranks=4, environment=environment), 3)
    assert num_dealt(first) >= 1
    for replicas in (2, 1):
        resumed = finished(start(patched_tree, VARYING, [*common, *dealing, "--load", str(folder)], ranks=2 * replicas, environment=environment), 3)
        np.testing.assert_allclose(own_losses(first) + own_losses(resumed), own_losses(whole), rtol=1e-3, err_msg=f"{replicas} replicas")
        assert [line["consumed samples"] for line in resumed.log] == ["32", "40", "48"]


def test_indices_need_a_data_set_that_tells_lengths(patched_tree: Path, checkpoint: Path) -> None:
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, 1), *DIP, "--dip-balance", "indices"]
    run = start(patched_tree, VARYING, arguments, ranks=2)
    assert run.exit_code != 0
    assert "--dip-balance = 'indices'" in run.output
    assert "instance_lengths(index)" in run.output


@pytest.mark.parametrize(
    ("environment", "message"),
    [({"UNREADABLE_SAMPLE": "21"}, "sample 21 cannot be read"), ({"SIGKILL_AT_SAMPLE": "21"}, "lost another rank|one of them may have ended")], ids=["raises", "killed"],
)
def test_a_replica_whose_data_fail_ends_all_ranks_with_the_cause(
    environment: dict[str, str], message: str, patched_tree: Path, checkpoint: Path
) -> None:
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, LONG), *DEALING, "--dip-balance", "exchange", *words("--distributed-timeout-minutes 1")]
    run = start(patched_tree, VARYING, arguments, ranks=4, environment={**LENGTHS, **environment})
    assert run.exit_code != 0
    assert re.search(message, run.output), run.output[-6000:]
    assert len(run.losses) < LONG


def test_a_replica_whose_loader_ends_early_ends_the_run_with_what_all_have_read(patched_tree: Path, checkpoint: Path) -> None:
    """Three iterations have data everywhere, a fourth does not."""
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, LONG), *DEALING, "--dip-balance", "exchange", *words("--dataloader-type external")]
    run = start(patched_tree, VARYING, arguments, ranks=4, environment={**LENGTHS, "SAMPLES": "40,14"})
    assert run.exit_code != 0
    assert "data_iterator" in run.output, run.output[-6000:]
    assert len(run.losses) == 3, run.output[-6000:]


def test_lengths_that_lie_lose_nothing(checkout: Path, patched_tree: Path, checkpoint: Path) -> None:
    """They are dealt by, badly; plans are made of what the batches turn out to be."""
    arguments = [*VLM, *NO_EVALUATION, *fresh(checkpoint, 4)]
    stock = finished(start(checkout, VARYING, arguments, patched=False, environment=LENGTHS), 4)
    lies = {**LENGTHS, "TELLS_LENGTHS": "lies"}
    run = finished(start(patched_tree, VARYING, [*arguments, *DEALING, "--dip-balance", "indices"], ranks=4, environment=lies), 4)
    np.testing.assert_allclose(run.losses, stock.losses, rtol=1e-4)
    assert num_dealt(run) >= 1
