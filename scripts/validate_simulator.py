"""Holds the simulator against published measurements, row by row, and against the motivating figures of the DIP paper.

Prints predicted beside measured with mean and largest error, and says which rows a parameter was fitted on. Run it from the
repository's root; it takes about a minute. ``--output FILE.md`` writes the same as a record.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dip.cli.calibrate_command import predict_points, profile_points
from megatron_dip.cost.analytic import AnalyticCost
from megatron_dip.cost.calibration import calibrate, with_efficiencies
from megatron_dip.cost.device import DeviceDescription, load_device
from megatron_dip.cost.fixed import FixedStrategyCost
from megatron_dip.cost.modules import Kernels
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.partition.offline import even_partition
from megatron_dip.report.records import machine, versions
from megatron_dip.report.tables import markdown_table
from megatron_dip.simulator.baselines import run_baseline
from megatron_dip.simulator.measured_steps import MeasuredStep, load_measured_steps, predict_step
from megatron_dip.simulator.step import SimulateOptions, make_costs, simulate
from megatron_dip.spec.codec import load_profile, load_workload, resolve_workload
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.named import named_setup
from megatron_dip.spec.profile import ModuleProfile, PointToPoint, Profile, ProfileGrid, ProfilePoint
from megatron_dip.spec.simulation import SimulationResult
from megatron_dip.spec.workload import Microbatch, Parallel, Training, Workload
from megatron_dip.workloads.generators import make_workload

ROOT = Path(__file__).resolve().parent.parent
SIMUMAX = ROOT / "docs" / "results" / "measured" / "simumax_b200.json"
KORTHIKANTI = ROOT / "docs" / "results" / "measured" / "korthikanti_2022.json"
GIB = 2**30

CPU_PROFILES = ROOT / "docs" / "results" / "measured"
CPU_START = {"training": 0.9, "memory": 0.8, "kernel_overhead_us": 20.0}
"""Efficiencies of the CPU's description before they were fitted."""
KORTHIKANTI_MEMORY = {"22B": (45.56, 59.25, 9.56), "175B": (45.56, 66.84, 12.35), "530B": (31.64, 114.02, 23.08), "1T": (32.96, 131.25, 26.56)}
"""GiB of the first pipeline rank: layers' parameters and optimizer, activations without recompute, with sequence parallel + selective."""


SIMUMAX_MEMORY = {"TP 1 PP 2": 66.55, "TP 2 PP 1 CP 1": 60.68, "TP 4": 39.07, "TP 8": 28.29, "TP 2 PP 1 CP 4": 68.43, "TP 1 PP 1 CP 8": 104.51}
"""How a step's name begins -> peak of the fullest rank in GiB."""


@dataclass(frozen=True, slots=True)
class MegatronRow:
    """Megatron-LM's H100 table (README of 2026): sequence 4096, vocabulary 131072, 48 replicas."""

    size: str
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    batch: int
    seconds: float
    """From the table's TFLOP/s."""


MEGATRON_H100 = tuple(MegatronRow(*row) for row in (
    ("1.7B", 16, 2048, 24, 1, 1, 192, 0.452), ("7.1B", 32, 4096, 30, 2, 1, 192, 0.800), ("32B", 56, 7168, 48, 8, 1, 192, 0.892),
    ("119B", 80, 10240, 92, 8, 4, 768, 3.648), ("314B", 128, 16384, 96, 8, 8, 1536, 8.399),
))
MEGATRON_H100_REPLICAS = 48


@dataclass(frozen=True, slots=True)
class NarayananRow:
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    teraflops: float
    """Per GPU, by the paper's formula."""


NARAYANAN = tuple(NarayananRow(*row) for row in (
    (24, 2304, 24, 1, 1, 32, 512, 137), (32, 3072, 30, 2, 1, 64, 512, 138), (32, 4096, 36, 4, 1, 128, 512, 142),
    (48, 6144, 40, 8, 1, 256, 1024, 135), (64, 8192, 48, 8, 2, 512, 1536, 138), (80, 10240, 60, 8, 4, 1024, 1792, 140),
    (96, 12288, 80, 8, 8, 1536, 2304, 148), (128, 16384, 96, 8, 16, 1920, 2160, 155), (128, 20480, 105, 8, 35, 2520, 2520, 163),
    (160, 25600, 128, 8, 64, 3072, 3072, 163),
))


def gpt(hidden: int, heads: int, layers: int) -> ModelSpec:
    return ModelSpec(modules=[ModuleSpec(
        name="lm", kind="lm", role="backbone", num_layers=layers, hidden_size=hidden, ffn_hidden_size=4 * hidden, num_attention_heads=heads,
        vocab_size=51200, gated_mlp=False, tied_embeddings=True,
    )])


class Record:
    """Prints, and keeps what was printed."""

    def __init__(self, path: Path | None) -> None:
        self.lines: list[str] = []
        self.path = path

    def say(self, text: str = "") -> None:
        print(text, flush=True)
        self.lines.append(text)
        if self.path is not None:  # a run that is cut short leaves what it has
            self.path.write_text("\n".join(self.lines) + "\n")


def percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def summary(ratios: list[float]) -> str:
    errors = [abs(ratio - 1) for ratio in ratios]
    return f"mean error {100 * statistics.mean(errors):.2f} %, largest {100 * max(errors):.2f} %"


def korthikanti_times(record: Record, device: DeviceDescription) -> None:
    steps = load_measured_steps(KORTHIKANTI).steps
    record.say("\n## Korthikanti et al. 2022, table 5: seconds an iteration\n")
    rows, ratios = [], []
    for step in steps:
        predicted = predict_step(step, device)
        ratio = predicted.iteration_time_s / step.measured_s
        ratios.append(ratio)
        parts = predicted.breakdown_s
        rows.append([step.name, "held out" if step.held_out else "fitted", f"{step.measured_s:.2f}", f"{predicted.iteration_time_s:.2f}", percent(ratio),
                     f"{parts.compute:.2f}", f"{parts.tensor_parallel:.2f}", f"{parts.p2p:.2f}", f"{parts.bubble:.2f}", f"{parts.optimizer:.2f}"])
    header = ["step", "row", "measured", "simulated", "error", "compute", "TP", "P2P", "bubble", "optimizer"]
    record.say(markdown_table(header, rows))
    record.say(f"\nAll eight: {summary(ratios)}. Held out: {summary([r for r, s in zip(ratios, steps, strict=True) if s.held_out])}. "
               "Calculon on the same rows: 3.65 % and 8.87 %.")


def cross_validation(record: Record, device: DeviceDescription) -> None:
    """Fits on two models at a time from the unfitted constants: how much the choice of rows matters."""
    steps = load_measured_steps(KORTHIKANTI).steps
    start = with_efficiencies(device, {"training": 0.9, "memory": 0.8})
    measured = [step.measured_s for step in steps]

    def predict(candidate: DeviceDescription) -> list[float]:
        return [predict_step(step, candidate).iteration_time_s for step in steps]

    rows = []
    unfitted = [p / m for p, m in zip(predict(start), measured, strict=True)]
    rows.append(["none", "0.900", "0.800", "-", summary(unfitted)])
    for names in (("22B", "530B"), ("175B", "1T"), ("22B", "175B"), ("530B", "1T")):
        fitted = [step.name.split()[0] in names for step in steps]
        found = calibrate(start, predict, measured, fitted)
        held = found.held_out_after
        values = [f"{found.values[name][1]:.3f}" for name in ("training", "memory")]
        rows.append([" + ".join(names), *values, f"mean {100 * found.fitted_after.mean:.2f} %, largest {100 * found.fitted_after.worst:.2f} %",
                     f"mean error {100 * held.mean:.2f} %, largest {100 * held.worst:.2f} %"])
    record.say("\n## What the fit does: two parameters (training, memory), fitted on two models, tested on the other two\n")
    record.say(markdown_table(["fitted on", "training", "memory", "fitted rows", "held-out rows"], rows))


def korthikanti_memory(record: Record, device: DeviceDescription) -> None:
    record.say("\n## Korthikanti et al. 2022: memory of the first pipeline rank, GiB\n")
    steps = {step.name: step for step in load_measured_steps(KORTHIKANTI).steps}
    rows, ratios = [], []
    for name, published in KORTHIKANTI_MEMORY.items():
        plain, sequence = steps[f"{name} full recompute"], steps[f"{name} sequence parallel + selective"]
        module = plain.model.modules[0]
        costs = step_costs(plain, device)
        static = costs.static_bytes("lm", module.num_layers // plain.parallel.pipeline, first=False, last=False)
        found = (static / GIB, activations(plain, "none", device) / GIB, activations(sequence, "selective", device) / GIB)
        ratios += [a / b for a, b in zip(found, published, strict=True)]
        rows.append([name, *(f"{b:.2f} / {a:.2f} ({percent(a / b)})" for a, b in zip(found, published, strict=True))])
    record.say(markdown_table(["model", "parameters + optimizer", "activations, none", "activations, SP + selective"], rows))
    record.say(f"\nPublished / simulated. {summary(ratios)}. Nothing is fitted. The 22B row has no pipeline: its rank also holds the head's "
               "activations, which the published formula leaves out.")


def step_costs(step: MeasuredStep, device: DeviceDescription) -> AnalyticCost:
    return AnalyticCost(step.model, step.parallel, step.training, device, memory_capacity_bytes=10**15, microbatches=[step.microbatch],
                        kernels=step.kernels)


def activations(step: MeasuredStep, strategy: str, device: DeviceDescription) -> float:
    """Live activations of rank 0 at their peak, in bytes."""
    costs = step_costs(step, device)
    pipeline = step.parallel.pipeline
    # The first rank's peak stands long before the batch ends: some microbatches are enough.
    count = min(step.num_microbatches, 4 * pipeline)
    virtual = step.training.virtual_pipeline if step.training.virtual_pipeline > 1 else None
    found = run_baseline(step.training.schedule, step.model, pipeline, [step.microbatch] * count, FixedStrategyCost(costs, strategy),
                         virtual_pipeline=virtual)
    assert found is not None
    static = sum(costs.static_bytes("lm", row[0], first=index == 0, last=pipeline == 1) for index, row in enumerate(found.chunks["lm"]))
    return found.peak_bytes[0] - static


def narayanan(record: Record, device: DeviceDescription) -> None:
    record.say("\n## Narayanan et al. 2021, table 1: TFLOP/s per GPU, full recompute\n")
    rows, ratios = [], []
    for row in NARAYANAN:
        best = best_narayanan(row, device)
        ratios.append(best[0] / row.teraflops)
        rows.append([f"{row.hidden} x {row.layers}", f"{row.tensor}/{row.pipeline}/{row.gpus // row.tensor // row.pipeline}", row.batch, best[1], best[2],
                     f"{row.teraflops:.0f}", f"{best[0]:.1f}", percent(best[0] / row.teraflops)])
    record.say(markdown_table(["hidden x layers", "TP/PP/DP", "batch", "microbatch", "VP", "measured", "simulated", "error"], rows))
    record.say(f"\nAll ten: {summary(ratios)}. None of these rows is fitted. The table gives neither microbatch size nor VP: of microbatches 1, 2, 4, 8 "
               "and VP 1 to 6 that divide layers and batch and fit into 80 GB, the fastest is taken, so the simulator is expected to lie above. "
               "Implementation of 2021: unfused attention, dropout, no sequence parallel, collectives not overlapped, blocking messages.")


def best_narayanan(row: NarayananRow, device: DeviceDescription) -> tuple[float, int, int]:
    """(TFLOP/s, microbatch size, VP) of the fastest feasible setting."""
    model = gpt(row.hidden, row.heads, row.layers)
    data = row.gpus // row.tensor // row.pipeline
    parallel = Parallel(tensor=row.tensor, pipeline=row.pipeline, data=data, sequence=False)
    kernels = Kernels(attention="unfused", dropout=True, scatter_gather=True, overlap_tensor_parallel=False)
    options = SimulateOptions(kernels=kernels, blocking_messages=True, overlap_data_parallel=False, replicas=1)
    flops = 96 * row.batch * 2048 * row.layers * row.hidden**2 * (1 + 2048 / 6 / row.hidden + 51200 / 16 / row.layers / row.hidden)
    found = []
    for size in (1, 2, 4, 8):
        count, rest = divmod(row.batch, data * size)
        if rest or not count:
            continue
        for virtual in range(1, 7):
            # Megatron's interleaved schedule needs equal chunks and whole groups of microbatches.
            if virtual > 1 and (row.pipeline == 1 or row.layers % (row.pipeline * virtual) or count % row.pipeline):
                continue
            training = Training(dtype="fp16", distributed_optimizer=False, recompute="full", virtual_pipeline=virtual,
                                schedule="interleaved" if virtual > 1 else "1f1b")
            microbatches: list[Microbatch] = [{"lm": [2048] * size}] * (count * data)
            workload = Workload(format="megatron-dip/workload/1", model=model, parallel=parallel, training=training, device="a100",
                                microbatches=microbatches)
            costs = AnalyticCost(model, parallel, training, device, microbatches=microbatches[:1], kernels=kernels)
            try:
                result = simulate(workload, options=options, costs=FixedStrategyCost(costs, "full"))
            except InputError:
                continue
            found.append((flops / result.iteration_time_s / row.gpus / 1e12, size, virtual))
    return max(found)


def megatron_h100(record: Record, device: DeviceDescription) -> None:
    record.say("\n## Megatron-LM's H100 table (README of 2026): seconds an iteration\n")
    rows, ratios = [], []
    for row in MEGATRON_H100:
        best = best_megatron(row, device)
        ratios.append(best.result.iteration_time_s / row.seconds)
        parts = best.result.breakdown_s
        rows.append([row.size, f"{row.tensor}/{row.pipeline}", best.microbatch, best.virtual, f"{row.seconds:.3f}", f"{best.result.iteration_time_s:.3f}",
                     percent(ratios[-1]), f"{parts.compute:.3f}", f"{parts.tensor_parallel:.3f}", f"{parts.data_parallel:.3f}", f"{parts.bubble:.3f}"])
    record.say(markdown_table(["model", "TP/PP", "microbatch", "VP", "measured", "simulated", "error", "compute", "TP", "DP", "bubble"], rows))
    record.say(
        f"\nAll five: {summary(ratios)}. One parameter, the H100's training factor ({device.efficiency.training}), was set with these rows in view. The table gives "
        "neither microbatch size nor VP: of microbatches 1, 2, 4 and every VP that divides the layers, the fastest that fits is taken. Tensor-parallel "
        "collectives travel beside products in pieces (`--tp-comm-overlap`), gradients and parameters by buckets within the last and first passes. "
        "Expected of rows of this table that are not here: mean error 6 %, largest 12 %, small models too fast, since loading, logging and the host's own "
        "time are in the measurements and not in the simulation."
    )


@dataclass(frozen=True, slots=True)
class BestSetting:
    result: SimulationResult
    microbatch: int
    virtual: int


def best_megatron(row: MegatronRow, device: DeviceDescription) -> BestSetting:
    """The fastest feasible microbatch size and VP."""
    model = ModelSpec(modules=[ModuleSpec(
        name="lm", kind="lm", role="backbone", num_layers=row.layers, hidden_size=row.hidden, ffn_hidden_size=4 * row.hidden,
        num_attention_heads=row.heads, vocab_size=131072, gated_mlp=False,
    )])
    parallel = Parallel(tensor=row.tensor, pipeline=row.pipeline, data=MEGATRON_H100_REPLICAS)
    kernels = Kernels(split_tensor_parallel=True)
    found = []
    for size in (1, 2, 4):
        count, rest = divmod(row.batch, MEGATRON_H100_REPLICAS * size)
        chunks = row.layers // row.pipeline
        for virtual in range(1, chunks + 1):
            if rest or (virtual > 1 and (row.pipeline == 1 or chunks % virtual or count % row.pipeline)):
                continue
            training = Training(recompute="none", virtual_pipeline=virtual, schedule="interleaved" if virtual > 1 else "1f1b")
            microbatches: list[Microbatch] = [{"lm": [4096] * size}] * (count * MEGATRON_H100_REPLICAS)
            workload = Workload(format="megatron-dip/workload/1", model=model, parallel=parallel, training=training, device=device.name,
                                microbatches=microbatches)
            costs = AnalyticCost(model, parallel, training, device, microbatches=microbatches[:1], kernels=kernels)
            try:
                result = simulate(workload, options=SimulateOptions(kernels=kernels, replicas=1), costs=FixedStrategyCost(costs, "none"))
            except InputError:
                continue
            found.append(BestSetting(result, size, virtual))
    return min(found, key=lambda setting: setting.result.iteration_time_s)


def simumax_b200(record: Record, device: DeviceDescription) -> None:
    record.say("\n## SimuMax v1.2 on 8 x B200: Llama3-70B cut to 12 layers\n")
    rows, ratios, memory = [], [], []
    for step in load_measured_steps(SIMUMAX).steps:
        predicted = predict_step(step, device)
        ratios.append(predicted.iteration_time_s / step.measured_s)
        peak = max(predicted.peak_memory_bytes) / GIB
        published = next(gib for name, gib in reversed(SIMUMAX_MEMORY.items()) if step.name.startswith(name))
        memory.append(peak / published)
        parts = predicted.breakdown_s
        rows.append([step.name, f"{step.measured_s:.3f}", f"{predicted.iteration_time_s:.3f}", percent(ratios[-1]), f"{published:.2f}", f"{peak:.2f}",
                     percent(memory[-1]), f"{parts.compute:.3f}", f"{parts.tensor_parallel:.3f}", f"{parts.data_parallel:.3f}"])
    record.say(markdown_table(["step", "measured", "simulated", "error", "measured GiB", "simulated GiB", "error", "compute", "TP", "DP"], rows))
    record.say(
        f"\nAll fourteen: {summary(ratios)}; memory: {summary(memory)}. SimuMax's own error on its dense rows: mean 4.75 %, largest 11.4 %. Two parameters "
        f"(training {device.efficiency.training}, kernel gap {device.efficiency.kernel_overhead_us:g} us) were set with these rows in view; memory and ring "
        "figures are SimuMax's measurements of the node. Gradients are taken for not overlapped: the time that does not grow with microbatches is what "
        "optimizer and collectives take one after another. Expected of a second model on this node: mean error 5 %, largest 12 %, TP 8 too fast; memory 3 %."
    )


# --- the motivating figures of the DIP paper ---------------------------------------------------------------------------------------


def motivating(record: Record) -> None:
    record.say("\n## Motivating figures of DIP (arXiv 2504.14145), H800\n")
    setup = named_setup("vlm-m")
    costs = AnalyticCost(setup.model, Parallel(tensor=8, pipeline=4), Training(), "h800")
    rows = []
    for name, lengths, published in (("vit", [2704] * 8, 6.75), ("lm", [8192], 10.5)):
        cost = costs.part(name, "layer", lengths)
        found = (cost.forward_ns + cost.backward_input_ns + cost.backward_weight_ns) / 1e6
        rows.append([{"vit": "ViT 5B layer, 8 images, ms", "lm": "LM 32B layer, 8192 tokens, ms"}[name], published, f"{found:.2f}", percent(found / published)])
    bubbles, spread = static_split_bubbles(6.75, 10.5)
    rows.append(["best static split, 16 stages, 64 microbatches: bubbles, %", 22.8, f"{100 * bubbles:.1f}", f"stages {spread[0]:.1f} to {spread[1]:.1f} ms (63 to 73.5)"])
    plain = seconds_7b("nnscaler", PLAIN_7B, [0] * count_7b(PLAIN_7B, 0))
    static, dynamic = ratios_7b("nnscaler", VIT_BIG_G, 8, seeds=8)
    rows += [
        ["7B LM, s an iteration", 4.068, f"{plain:.3f}", percent(plain / 4.068)],
        ["ViT 2B + LM 5B, static data, over the plain LM", f"{STATIC_7B:.3f}", f"{static:.3f}", percent(static / STATIC_7B)],
        ["ViT 2B + LM 5B, dynamic over static data", f"{DYNAMIC_7B:.3f}", f"{dynamic:.3f}", percent(dynamic / DYNAMIC_7B)],
    ]
    record.say(markdown_table(["figure", "published", "simulated", "difference"], rows))
    record.say(
        "\nNot a blind test: the training factor of the H800's description (0.825, the middle of the sourced 10 to 25 % by which training "
        "stays below kernel benchmarks; the A100's is fitted above) was chosen with the two layer times in view; 0.9, chosen before, gives 6.37 and 9.64 ms. "
        "The layer times hold for TP 8 only (at TP 4 the published times would need more than the device's rate)."
    )
    record.say("\n### What the static and the dynamic ratio depend on\n")
    rows = []
    for label, vit in (("ViT-bigG", VIT_BIG_G), ("30 layers of the ViT 5B", VIT_30)):
        for images in (2, 4, 6, 8, 12):
            cells = []
            for schedule in ("nnscaler", "1f1b", "interleaved"):
                static, dynamic = ratios_7b(schedule, vit, images, seeds=3)
                cells.append(f"{static:.2f} / {dynamic:.2f}")
            rows.append([label, images, *cells])
    record.say(markdown_table(["ViT 2B", "images a microbatch", "best split by time", "split by parameters", "the same, interleaved"], rows))
    record.say(
        f"\nPublished: {STATIC_7B:.2f} / {DYNAMIC_7B:.2f} (static data over the plain LM / dynamic over static data). The paper gives neither the layers of "
        "the 2B + 5B model, nor its images, nor how it was split. Assumed: TP 2, PP 4, 12.8 PFLOP in each case; the LM 5B is 23 layers of the Llama 7B shape "
        "(32 layers for the plain 7B; FFN 11008, vocabulary 32000); the ViT 2B is ViT-bigG/14 (48 layers of 1664, FFN 8192, 16 heads, 1.8B parameters), "
        "the published one of that size; static data hold equally many images in every microbatch, dynamic data 0 to twice as many, uniform. With the best "
        "split by time both ratios come out within 4 % at 8 images; under Megatron's split by parameters they come nearest at 4 images (30 layers: 1.17 / "
        "1.39) or, interleaved, at 6 (ViT-bigG: 1.17 / 1.44); with more, the ViT's ranks are so overloaded that dynamic data make little difference. So the published pair lies within what plausible readings "
        "span, and the images a microbatch decide; the ViT's shape moves the static ratio by some 5 %: many thin layers are less efficient."
    )


def static_split_bubbles(vit_ms: float, lm_ms: float) -> tuple[float, tuple[float, float]]:
    """Bubbles of 64 + 64 layers of these times, cut into 16 stages as well as can be, under 1F1B; and the stages' spread in ms."""
    modules = []
    profiles = {}
    for name, kind, role, time_ms in (("vit", "vit", "encoder", vit_ms), ("lm", "lm", "backbone", lm_ms)):
        modules.append(ModuleSpec(name=name, kind=kind, role=role, num_layers=64, hidden_size=64, ffn_hidden_size=64, num_attention_heads=1))  # type: ignore[arg-type]
        point = ProfilePoint(instances=1, tokens=1, forward_ns=time_ms * 1e6 / 3, backward_input_ns=time_ms * 1e6 / 3,
                             backward_weight_ns=time_ms * 1e6 / 3, activation_bytes=0, boundary_bytes=0)
        profiles[name] = ModuleProfile(num_layers=64, layer=ProfileGrid(points=[point]))
    profile = Profile(format="megatron-dip/profile/1", modules=profiles, p2p=PointToPoint(latency_ns=0, bytes_per_second=1e12))
    found = run_baseline("nnscaler", ModelSpec(modules=modules), 16, [{"vit": [1], "lm": [1]}] * 64, ProfileCost(profile))
    assert found is not None
    stages = [sum(row[rank] for row in found.chunks["vit"]) * vit_ms + sum(row[rank] for row in found.chunks["lm"]) * lm_ms for rank in range(16)]
    return found.schedule.bubble_fraction, (min(stages), max(stages))


PARALLEL_7B = Parallel(tensor=2, pipeline=4)
STATIC_7B, DYNAMIC_7B = 4.567 / 4.068, 6.789 / 4.567


def lm_7b(layers: int) -> ModuleSpec:
    return ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=layers, hidden_size=4096, ffn_hidden_size=11008, num_attention_heads=32, vocab_size=32000)


PLAIN_7B = ModelSpec(modules=[lm_7b(32)])
VIT_BIG_G = ModuleSpec(name="vit", kind="vit", role="encoder", num_layers=48, hidden_size=1664, ffn_hidden_size=8192, num_attention_heads=16)
VIT_30 = ModuleSpec(name="vit", kind="vit", role="encoder", num_layers=30, hidden_size=1792, ffn_hidden_size=15360, num_attention_heads=16)


def seconds_7b(schedule: str, model: ModelSpec, images: list[int]) -> float:
    """Seconds of an iteration with so many images in each microbatch."""
    microbatches: list[Microbatch] = [{"vit": [2704] * n, "lm": [8192]} if n else {"lm": [8192]} for n in images]
    workload = Workload(format="megatron-dip/workload/1", model=model, parallel=PARALLEL_7B, training=Training(), device="h800", microbatches=microbatches)
    return simulate(workload, schedule).iteration_time_s  # type: ignore[arg-type]


def count_7b(model: ModelSpec, images: int) -> int:
    """Microbatches of 12.8 PFLOP."""
    return round(12.8e15 / flops_of(model, PARALLEL_7B, images))


def ratios_7b(schedule: str, vit: ModuleSpec, images: int, seeds: int) -> tuple[float, float]:
    """Static data over the plain language model, and dynamic over static data, each of 12.8 PFLOP."""
    model = ModelSpec(modules=[vit, lm_7b(23)])
    count = count_7b(model, images)
    static = seconds_7b(schedule, model, [images] * count)
    dynamic = []
    for seed in range(seeds):
        drawn = np.random.default_rng(seed).integers(0, 2 * images + 1, size=count).tolist()
        # The same FLOPs as the static batch: the sum of images is brought to that.
        rng = np.random.default_rng(seed + 100)
        while sum(drawn) != images * count:
            index = int(rng.integers(count))
            change = 1 if sum(drawn) < images * count else -1
            drawn[index] = min(2 * images, max(0, drawn[index] + change))
        dynamic.append(seconds_7b(schedule, model, drawn))
    return static / seconds_7b(schedule, PLAIN_7B, [0] * count_7b(PLAIN_7B, 0)), statistics.mean(dynamic) / static


def flops_of(model: ModelSpec, parallel: Parallel, images: int) -> float:
    """FLOPs of one microbatch, forward and backward."""
    costs = AnalyticCost(model, parallel, Training(), "h800")
    total = 0.0
    for module in model.modules:
        lengths = [2704] * images if module.name == "vit" else [8192]
        for part, times in (("layer", module.num_layers), ("first", 1), ("last", 1)):
            detail = costs.detail(module.name, part, lengths)  # type: ignore[arg-type]
            total += times * (detail.forward_flops + detail.backward_flops)
    return total * parallel.tensor


def cpu(record: Record) -> None:
    """The CPU's device file against profiles of local Megatron layers, before and after its fit."""
    device = load_device("cpu")
    fitted = {name: getattr(device.efficiency, name) for name in CPU_START}
    rows = []
    for label, candidate in (("data sheet and guesses", with_efficiencies(device, CPU_START)), ("fitted", device)):
        ratios: dict[str, list[float]] = {"fitted": [], "held out": [], "layers alone": []}
        for size in ("small", "larger"):
            workload = load_workload(CPU_PROFILES / f"cpu_{size}_workload.json")
            points = profile_points(load_profile(CPU_PROFILES / f"cpu_{size}_profile.json"), workload, CPU_PROFILES)
            for point, seconds in zip(points, predict_points(points, workload, candidate, Kernels(attention="unfused")), strict=True):
                ratios["held out" if point.is_held_out else "fitted"].append(seconds / point.seconds)
                if point.part == "layer":
                    ratios["layers alone"].append(seconds / point.seconds)
        rows.append([label, *(summary(values) for values in ratios.values())])
    values = ", ".join(f"{name} {value:.3g} (before {CPU_START[name]:g})" for name, value in fitted.items())
    record.say("\n## The CPU's description against profiles of Megatron layers on one core\n")
    record.say(markdown_table(["description", "fitted shapes", "held-out shapes", "layers alone"], rows))
    record.say(
        f"\nTwo models (hidden sizes 128 and 256, 512 and 768; 144 to 2048 tokens), profiled by `megatron-dip profile` on one core of an Intel Xeon with AVX-512; "
        f"every fourth batch shape is held out. Fitted by `megatron-dip calibrate`: {values}. The description of before, a tenth of a TFLOP/s and GPU-like "
        "efficiencies, was off by 252 % in the mean. The largest errors are embeddings and stems, which take a hundredth of a layer's time, and causal "
        "attention over 1024 tokens and more, whose mask is a pass of its own in local layers. Plans for a CPU are better made with a profile."
    )


def speed(record: Record) -> None:
    costs = AnalyticCost(named_setup("vlm-xl-16k").model, Parallel(tensor=8, pipeline=16, data=128), Training(), "h100")
    new_shapes = []
    for length in range(8000, 8040):
        began = time.process_time()
        costs.part("lm", "layer", [length])
        new_shapes.append(time.process_time() - began)
    began = time.process_time()
    for _ in range(1000):
        costs.part("lm", "layer", [8000])
    again = (time.process_time() - began) / 1000
    setup = named_setup("vlm-xl-16k")
    microbatches = make_workload("vlm-xl-16k", seed=0, num_microbatches=128 * 32).microbatches
    workload = Workload(format="megatron-dip/workload/1", model=setup.model, parallel=Parallel(tensor=8, pipeline=16, data=128), device="h100",
                        microbatches=microbatches)
    partition = even_partition(setup.model, 16, {"lm": 2}, {"vit": 6})
    iterations = []
    for _ in range(4):
        began = time.process_time()
        result = simulate(workload, "dip", partition=partition, options=SimulateOptions(evaluations=100))
        iterations.append(time.process_time() - began)
    large = resolve_workload(make_workload("vlm-l", seed=0, num_microbatches=32), Path("vlm-l"))
    cut = even_partition(large.model_spec, large.parallel.pipeline, {"lm": 2}, {"vit": 6})
    milliseconds: dict[str, list[float]] = {"1f1b": [], "dip": []}
    large_costs = make_costs(large, SimulateOptions())
    for name, times in milliseconds.items():
        for _ in range(6):
            began = time.process_time()
            simulate(large, name, partition=cut, options=SimulateOptions(evaluations=10), costs=large_costs)  # type: ignore[arg-type]
            times.append(1e3 * (time.process_time() - began))
    about = ", ".join(f"{key} {value}" for key, value in {**machine(), **versions()}.items())
    record.say("\n## Speed (seconds of one core)\n")
    record.say(f"Operator graphs of a stage's layer, median: {1e3 * statistics.median(new_shapes):.2f} ms for a new shape, {1e6 * again:.1f} us for a known one. "
               f"One iteration of VLM-XL-16k on 16384 GPUs, 32 microbatches a replica, two replicas simulated with 100 schedules tried each: "
               f"{statistics.median(iterations[1:]):.2f} s, {iterations[0]:.2f} s with loading the kernels; MFU {result.mfu:.3f}. One of VLM-L (94B) with 32 microbatches: "
               f"{statistics.median(milliseconds['1f1b'][1:]):.0f} ms under 1F1B, {statistics.median(milliseconds['dip'][1:]):.0f} ms under DIP with 10 schedules tried.")
    record.say(f"\nMachine and versions: {about}.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the record there too")
    parser.add_argument("--quick", action="store_true", help="leave the cross validation out")
    args = parser.parse_args()
    record = Record(args.output)
    device = load_device("a100")
    record.say("# The simulator against published measurements\n")
    record.say("`python scripts/validate_simulator.py`. *Measured* figures are the papers', *simulated* ones this repository's. Two parameters of the A100's "
               f"description are fitted (training = {device.efficiency.training}, memory = {device.efficiency.memory}), on the four rows of Korthikanti et al. that are "
               "marked. The optimizer's passes and the loss of overlapped kernels are modelling choices that were made with the 22B rows in view; everything else comes "
               "from data sheets and kernel benchmarks; what H100 and B200 were set with stands at their tables.")
    korthikanti_times(record, device)
    if not args.quick:
        cross_validation(record, device)
    korthikanti_memory(record, device)
    narayanan(record, device)
    megatron_h100(record, load_device("h100"))
    simumax_b200(record, load_device("b200"))
    motivating(record)
    cpu(record)
    speed(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
