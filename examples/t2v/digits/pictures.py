"""Makes clips with a trained checkpoint and draws them: one PNG with frames beside their captions, one GIF in which they move.

    python examples/t2v/digits/pictures.py --load CHECKPOINTS --output docs/t2v_digits

One process; the checkpoint may come from any cut.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dip.spec.codec import load_example
from megatron_dip.spec.training import RunSettings, SchedulePlan
from megatron_dip.spec.workload import Parallel
from megatron_dip.trainer.loop import build_system, load_example_module, start_rank

SHOWN = 10
"""Clips, one for each digit."""
COLUMNS = 8
"""Frames of a clip in the PNG."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--load", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="pictures without suffix")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    folder = Path(__file__).parent
    config = load_example(folder / "config.json")
    settings = RunSettings(
        schedule=SchedulePlan(name="1f1b"), parallel=Parallel(), device="cpu", seed=args.seed, iterations=config.iterations,
        num_microbatches=config.num_microbatches, data=config.data,
    )
    example = load_example_module(folder, config, settings)
    start_rank(settings)
    system = build_system(settings.schedule, example, settings)
    iteration = system.load(args.load)
    module: Any = example.module
    dataset: Any = example.dataset
    random = np.random.default_rng(args.seed)
    stories = _one_of_each_digit(dataset, module, random)
    captions = [dataset.caption(story, random, False) for story in stories]
    system.model.train(False)

    def predict(items: list[Any]) -> list[torch.Tensor]:
        return [report["output"] for report in system.run_everywhere(module.prediction_step, items)]

    made = module.make_clips(dataset, predict, stories, captions, args.seed)
    texts = [" ".join(module.VOCABULARY[token] for token in caption[1:-1]) for caption in captions]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    _draw(made.clips, texts, args.output)
    print(f"wrote {args.output}.png and .gif of iteration {iteration}")


def _one_of_each_digit(dataset: Any, module: Any, random: np.random.Generator) -> list[Any]:
    """A story for each digit with all motions among them, 16 frames long."""
    found = []
    for digit in range(SHOWN):
        scans = dataset.held_out_scans[dataset.labels[dataset.held_out_scans] == digit]
        motion = module.MOTIONS[digit % len(module.MOTIONS)]
        target = None
        if motion == "turns":
            target = int(dataset.held_out_scans[dataset.labels[dataset.held_out_scans] == (digit + 1) % 10][0])
        found.append(module.Story(int(random.choice(scans)), motion, 16, target))
    return found


def _draw(clips: list[torch.Tensor], texts: list[str], output: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure, axes = plt.subplots(len(clips), COLUMNS, figsize=(COLUMNS * 0.8 + 2, len(clips) * 0.8))
    for row, clip, text in zip(axes, clips, texts, strict=True):
        for axis, frame in zip(row, np.linspace(0, len(clip) - 1, COLUMNS).round().astype(int), strict=True):
            axis.imshow(clip[frame], vmin=-1, vmax=1, cmap="gray")
            axis.set_axis_off()
        row[0].text(-0.2, 0.5, text, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    figure.subplots_adjust(left=0.3, right=0.99, top=0.99, bottom=0.01, wspace=0.05, hspace=0.05)
    figure.savefig(output.with_suffix(".png"), dpi=100)
    plt.close(figure)

    figure, axes = plt.subplots(2, len(clips) // 2, figsize=(len(clips) * 0.75, 3.6))
    pictures = []
    for axis, clip, text in zip(axes.flat, clips, texts, strict=True):
        pictures.append(axis.imshow(clip[0], vmin=-1, vmax=1, cmap="gray"))
        axis.set_axis_off()
        axis.set_title(text, fontsize=8)
    figure.tight_layout()

    def show(frame: int) -> list[Any]:
        for picture, clip in zip(pictures, clips, strict=True):
            picture.set_data(clip[min(frame, len(clip) - 1)])
        return pictures

    FuncAnimation(figure, show, frames=20, blit=False).save(output.with_suffix(".gif"), writer=PillowWriter(fps=8), dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main()
