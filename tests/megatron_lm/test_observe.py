"""--dip-observe: the stock schedule's losses to the letter, files of batches and stage times, and what DIP would have taken."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_dip.spec.codec import load_timeline, load_workload
from tests.megatron_lm.runs import NO_EVALUATION, VARYING, VLM, finished, fresh, start, words

ITERATIONS = 6
STOCK = words("--pipeline-model-parallel-size 2 --encoder-num-layers 4")


def test_nothing_changes_and_batches_are_recorded(patched_tree: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = [*VLM, *NO_EVALUATION, *STOCK, *fresh(checkpoint, ITERATIONS)]
    plain = finished(start(patched_tree, VARYING, arguments, ranks=2), ITERATIONS)
    folder = tmp_path / "observed"
    watched = finished(start(patched_tree, VARYING, [*arguments, "--dip-observe", str(folder), "--dip-device", "cpu"], ranks=2), ITERATIONS)
    assert watched.loss_lines == plain.loss_lines
    assert re.search(r"the stock schedule took \S+ ms an iteration \(mean of 4\); DIP would have taken about \S+ ms", watched.output), watched.output[-3000:]
    for iteration in range(3, ITERATIONS + 1):
        workload = load_workload(folder / f"iteration_{iteration:06d}.json")
        assert len(workload.microbatches) == 8
        assert {module.name for module in workload.model_spec.modules} == {"vit", "lm"}
        bars = load_timeline(folder / f"iteration_{iteration:06d}_measured.json").bars
        assert sorted((bar.rank, bar.kind, bar.microbatch) for bar in bars) == sorted(
            (rank, kind, microbatch) for rank in range(2) for kind in ("fw", "bw") for microbatch in range(8)
        )
    counts = {len(microbatch.get("vit", [])) for microbatch in workload.microbatches}
    assert len(counts) > 1
