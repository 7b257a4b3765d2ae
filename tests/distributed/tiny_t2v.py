"""A text-to-video model so small that many cases run in one spawn, and its data; the counterpart of :mod:`tests.distributed.tiny_vlm`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.plan import Plan
from megatron_dip.spec.training import TextToVideoModel, VideoSpec
from megatron_dip.spec.workload import Microbatch, Parallel
from tests.distributed.launcher import launch
from tests.distributed.tiny_vlm import OPTIMIZER, Result, result_of

CLIPS = (3, 1, 4, 2)
"""Clips in each microbatch, where a test says nothing else."""
CHANNELS, TEXT_WIDTH, WORDS = 2, 12, 32


@dataclass(frozen=True)
class VideoCase:
    """One configuration of a parity test."""

    parallel: Parallel = field(default_factory=Parallel)
    chunks: tuple[int, int] = (1, 1)
    """K of the language model and of the DiT."""
    text: Literal["trained", "frozen", "precomputed"] = "trained"
    pooled_text: bool = False
    absolute_positions: bool = False
    sub_microbatch_size: tuple[int, int] = (8, 8)
    """Captions, clips."""
    clips: tuple[tuple[int, ...], ...] = (CLIPS,)
    """For each data-parallel replica the clips in each of its microbatches."""
    num_layers: tuple[int, int] = (8, 8)
    per_token: bool = False
    strategy: str | None = None
    """Memory strategy of every layer; None = the planner's."""
    split_backward: bool = False
    seed: int = 0
    steps: int = 0
    """Optimizer steps; 0 = one forward and backward."""
    layout: str | None = None
    """Of Megatron's own schedule instead of DIP's."""

    @property
    def modules(self) -> tuple[str, ...]:
        return ("dit",) if self.text == "precomputed" else ("lm", "dit")


def tiny_model(case: VideoCase) -> TextToVideoModel:
    lm = ModuleSpec(
        name="lm", kind="lm", role="backbone", num_layers=case.num_layers[0], hidden_size=16, ffn_hidden_size=32, num_attention_heads=4,
        num_query_groups=2, vocab_size=WORDS, trainable=case.text == "trained",
    )
    dit = ModuleSpec(
        name="dit", kind="dit", role="decoder", num_layers=case.num_layers[1], hidden_size=24, ffn_hidden_size=48, num_attention_heads=2,
        cross_attention=True,
    )
    precomputed = case.text == "precomputed"
    return TextToVideoModel(
        modules=ModelSpec(modules=[dit] if precomputed else [lm, dit]), sequence_length=64,
        video=VideoSpec(
            channels=CHANNELS, patch_spatial=2, freq_dim=8, text_width=TEXT_WIDTH if precomputed else None, pooled_text=case.pooled_text,
            absolute_positions=case.absolute_positions,
        ),
    )


def make_microbatch(seed: int, num_clips: int, case: VideoCase) -> dict[str, torch.Tensor]:
    """Clips of different frames and sizes, each with noise and a timestep of its own, drawn with the sample."""
    generator = torch.Generator().manual_seed(seed)
    grids = torch.stack([torch.randint(1, most, (num_clips,), generator=generator) for most in (5, 4, 4)], dim=1)
    lengths = torch.randint(1, 7, (num_clips,), generator=generator)
    patches, tokens = int(grids.prod(1).sum()), int(lengths.sum())
    item = {
        "x": torch.randn(patches, 1, CHANNELS * 4, generator=generator), "target": torch.randn(patches, 1, CHANNELS * 4, generator=generator),
        "timesteps": 1000 * torch.rand(num_clips, generator=generator), "weights": torch.rand(patches, 1, 1, generator=generator) + 0.5,
        "grid_sizes": grids, "text_lengths": lengths,
    }
    if case.text == "precomputed":
        item["crossattn_emb"] = torch.randn(tokens, 1, TEXT_WIDTH, generator=generator)
    else:
        item["tokens"] = torch.randint(0, WORDS, (1, tokens), generator=generator)
    return item


def microbatches(case: VideoCase, replica: int, step: int = 0) -> list[dict[str, torch.Tensor]]:
    counts = case.clips[replica]
    turned = counts[step % len(counts) :] + counts[: step % len(counts)]
    return [make_microbatch(1000 * replica + 100 * step + index, count, case) for index, count in enumerate(turned)]


def loss_func(target: torch.Tensor, weights: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    loss = ((output.float() - target).square().mean(-1, keepdim=True) * weights).sum()
    count = torch.tensor(len(target), dtype=torch.int)
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}


ARGUMENTS = ("x", "timesteps", "crossattn_emb", "tokens", "grid_sizes", "text_lengths")


def forward_step(data_iterator: Iterator[dict[str, torch.Tensor]], model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    item = next(data_iterator)
    output = model(**{name: item.get(name) for name in ARGUMENTS})
    return output, partial(loss_func, item["target"], item["weights"])


def config_of(case: VideoCase) -> Any:
    from megatron_dip.models.t2v import TextToVideoConfig

    return TextToVideoConfig(
        model=tiny_model(case), parallel=case.parallel, init_method_std=0.2, zero_std=0.2, calculate_per_token_loss=case.per_token
    )


def cut_of(case: VideoCase) -> Partition:
    from megatron_dip.partition.offline import even_partition

    chunks = dict(zip(("lm", "dit"), case.chunks, strict=True))
    sizes = dict(zip(("lm", "dit"), case.sub_microbatch_size, strict=True))
    return even_partition(
        tiny_model(case).modules, case.parallel.pipeline, {name: chunks[name] for name in case.modules},
        {name: sizes[name] for name in case.modules},
    )


def metadata_of(case: VideoCase, replica: int, step: int) -> list[Microbatch]:
    return [
        {name: lengths for name, lengths in (("lm", item["text_lengths"].tolist()), ("dit", item["grid_sizes"].prod(1).tolist()))
         if name in case.modules}
        for item in microbatches(case, replica, step)
    ]


def plans_of(case: VideoCase) -> list[list[Plan]]:
    """For each replica the plans of its steps, by a short search on made-up costs."""
    from megatron_dip.cost.profile import ProfileCost
    from megatron_dip.planner.iteration import PlanOptions, plan_iteration
    from megatron_dip.spec.profile import ModuleProfile, PointToPoint, Profile, ProfileGrid, ProfilePoint, Strategy

    point = ProfilePoint(
        instances=1, tokens=16, forward_ns=2000, backward_input_ns=2200, backward_weight_ns=1800, activation_bytes=16000, boundary_bytes=1600
    )
    strategies = {
        "none": Strategy(), "selective": Strategy(extra_forward=0.2, activation=0.5), "full": Strategy(extra_forward=1.0, activation=0.1),
    }
    profile = Profile(
        format="megatron-dip/profile/1", p2p=PointToPoint(latency_ns=1000, bytes_per_second=1e9),
        modules={
            module.name: ModuleProfile(num_layers=module.num_layers, layer=ProfileGrid(points=[point]), strategies=strategies)
            for module in tiny_model(case).modules.modules
        },
    )
    options = PlanOptions(evaluations=30, seed=case.seed, strategy=case.strategy, split_backward=case.split_backward)
    return [
        [
            plan_iteration(tiny_model(case).modules, cut_of(case), metadata_of(case, replica, step), ProfileCost(profile), options)
            for step in range(max(1, case.steps))
        ]
        for replica in range(len(case.clips))
    ]


def _run(case: VideoCase, build: Callable[[], Any], run_step: Callable[[Any, Any, list[dict[str, torch.Tensor]], int], list[Any]]) -> Result:
    from megatron.core import parallel_state

    from megatron_dip.trainer.build import build_optimizer, initialize_parallel

    initialize_parallel(case.parallel, device="cpu", seed=1, timeout_s=60)
    model = build()
    replica = parallel_state.get_data_parallel_rank()
    optimizer = build_optimizer(model, OPTIMIZER) if case.steps else None
    losses, norms = [], []
    for step in range(max(1, case.steps)):
        model.zero_grad()
        if optimizer is not None:
            optimizer.zero_grad()
        losses.append([float(report["lm loss"][0]) for report in run_step(model, optimizer, microbatches(case, replica, step), step)])
        if optimizer is not None:
            norms.append(float(optimizer.step()[1]))
    return result_of(model, losses, norms)


def run_pipeline(rank: int, num_ranks: int, cases: Sequence[VideoCase], plans: Sequence[list[list[Plan]]]) -> list[Result]:
    """This rank's part of every case, under DIP or one of Megatron's own schedules."""
    results = []
    for case, of_replicas in zip(cases, plans, strict=True):
        made: list[Any] = []

        def run_step(
            model: Any, optimizer: Any, items: list[dict[str, torch.Tensor]], step: int, case: VideoCase = case, made: list[Any] = made,
            of_replicas: list[list[Plan]] = of_replicas,
        ) -> list[Any]:
            from megatron.core import parallel_state

            from megatron_dip.iteration.forward_backward import DipForwardBackward, IterationSettings
            from megatron_dip.trainer.stock_layouts import stock_forward_backward

            if not made and case.layout is not None:
                made.append(stock_forward_backward(virtual=case.chunks[0]))
            elif not made:
                left = list(of_replicas[parallel_state.get_data_parallel_rank()])
                made.append(DipForwardBackward(
                    staged_model=model.staged, chunks=model.chunks, partition=cut_of(case),
                    settings=IterationSettings(
                        device=torch.device("cpu"), timeout_s=30.0, metadata=model.staged.description.item_metadata,
                        plan_function=lambda *_: left.pop(0), plan_deadline_s=30.0,
                    ),
                ))
            if case.layout is None:
                return made[0](
                    forward_step_func=forward_step, data_iterator=iter(items), model=model.chunks, num_microbatches=len(items), seq_length=64,
                    micro_batch_size=1, forward_only=False,
                )
            iterators = [iter(items) for _ in model.chunks]
            return made[0](
                forward_step_func=forward_step, data_iterator=iterators if len(iterators) > 1 else iterators[0],
                model=list(model.chunks) if len(iterators) > 1 else model.chunks[0], num_microbatches=len(items), seq_length=64,
                decoder_seq_length=64, micro_batch_size=1, forward_only=False,
            )

        results.append(_run(case, lambda case=case: _build(case), run_step))  # type: ignore[misc]
    return results


def _build(case: VideoCase) -> Any:
    from megatron_dip.trainer.build import build_dip_model
    from megatron_dip.trainer.stock_layouts import build_stock_model

    if case.layout is not None:
        return build_stock_model(config_of(case), case.layout, virtual=case.chunks[0])  # type: ignore[arg-type]
    return build_dip_model(config_of(case), cut_of(case))


def run_reference(rank: int, num_ranks: int, cases: Sequence[VideoCase]) -> list[Result]:
    """One process, one chunk, a plain loop over the microbatches of all replicas: what every parallel run must equal."""
    from megatron_dip.trainer.stock_layouts import build_stock_model

    results = []
    for case in cases:

        def run_step(model: Any, optimizer: Any, items: Any, step: int, case: VideoCase = case) -> list[Any]:
            reports, total = [], torch.zeros([], dtype=torch.int)
            for replica in range(len(case.clips)):
                batch = microbatches(case, replica, step)
                for item in batch:
                    output, loss_function = forward_step(iter([item]), model.chunks[0])
                    loss, count, report = loss_function(output)
                    (loss if case.per_token else loss / count / len(batch) / len(case.clips)).backward()
                    total += count
                    reports.append(report)
            model.config.finalize_model_grads_func(model.chunks, total if case.per_token else None)
            return reports

        results.append(_run(case, lambda case=case: build_stock_model(config_of(case), "scripts"), run_step))  # type: ignore[misc]
    return results


def references(cases: Sequence[VideoCase]) -> list[Result]:
    """Cases that differ only in what a pipeline changes are run once."""
    alone = [
        replace(case, parallel=Parallel(), chunks=(1, 1), sub_microbatch_size=(8, 8), seed=0, strategy=None, split_backward=False, layout=None)
        for case in cases
    ]
    distinct = list(dict.fromkeys(alone))
    results = dict(zip(distinct, launch(run_reference, 1, distinct)[0], strict=True))
    return [results[case] for case in alone]
