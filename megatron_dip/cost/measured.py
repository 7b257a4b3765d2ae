"""A profile out of stage times measured while training, every rank busy: the loop from execution back to planning.

What comes in: how long stages of known chunks and batch shapes took. What goes out: a :class:`~megatron_dip.spec.profile.Profile`
whose costs give these stages' mean times back. A chunk of n layers takes n times the layer's time, plus the module's ``first`` and
``last`` parts where it holds them; the parts' times are the non-negative least-squares solution, the smallest one where chunks do
not tell the parts apart (predictions for the measured chunks are the same for each solution).

Where a module was measured at several lengths, the shapes seen seldom form the grid that a profile needs. Then the profile holds the
corners of the measured range, from a non-negative fit of every part's time as constant + a * instances + b * tokens.

Not modelled: ranks of unequal speed (their times are averaged), memory (activation bytes are those given), time beyond linear in the
length within the range of several measured lengths.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import CostModel, Part, PartCost
from megatron_dip.cost.profile import ProfileCost
from megatron_dip.cost.wrapped import WrappedCost
from megatron_dip.spec.plan import Plan, StageKind
from megatron_dip.spec.profile import ModuleProfile, PointToPoint, Profile, ProfileGrid, ProfilePoint
from megatron_dip.spec.timeline import plan_timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSample:
    """One measured stage."""

    module: str
    kind: StageKind
    num_layers: int
    has_first: bool
    has_last: bool
    instances: int
    tokens: int
    """Of all instances together."""
    split: bool
    """Of a backward: its weight gradients are a stage of their own."""
    duration_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PartBytes:
    """Sizes that are known beforehand, for one token."""

    activation: float
    """A layer's activations from forward to backward."""
    boundary: float
    """Message from one chunk to the next."""
    output: float
    """Message behind the module's last chunk."""


_PARTS = ("layer", "first", "last")


def fit_profile(
    samples: Iterable[StageSample], num_layers: Mapping[str, int], bytes_per_token: Mapping[str, PartBytes], p2p: PointToPoint
) -> Profile:
    """Fits one profile point for each (module, instances, tokens) that was measured, as far as these form a grid.

    Args:
        samples: at least a forward and a backward of every module.
        num_layers: of each whole module.
        bytes_per_token: module -> sizes.
    """
    times: dict[str, dict[tuple[int, int], dict[str, dict[tuple[int, bool, bool], list[int]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )
    for sample in samples:
        kind = "backward" if sample.kind == "bw" and not sample.split else sample.kind
        chunk = (sample.num_layers, sample.has_first, sample.has_last)
        times[sample.module][sample.instances, sample.tokens][kind][chunk].append(sample.duration_ns)
    modules: dict[str, ModuleProfile] = {}
    for module, shapes in times.items():
        measured = {shape: _shape_times(kinds) for shape, kinds in sorted(shapes.items()) if "fw" in kinds}
        if not measured:
            continue
        sizes = bytes_per_token[module]
        points: dict[str, list[ProfilePoint]] = {part: [] for part in _PARTS}
        for (instances, tokens), solved in _on_a_grid(measured).items():
            for part, (forward, inputs, weights) in zip(_PARTS, solved.tolist(), strict=True):
                points[part].append(
                    ProfilePoint(
                        instances=instances, tokens=tokens, forward_ns=forward, backward_input_ns=inputs, backward_weight_ns=weights,
                        activation_bytes=sizes.activation * tokens if part == "layer" else 0.0,
                        boundary_bytes={"layer": sizes.boundary, "first": 0.0, "last": sizes.output}[part] * tokens,
                    )
                )
        modules[module] = ModuleProfile(
            num_layers=num_layers[module], layer=ProfileGrid(points=points["layer"]),
            first=ProfileGrid(points=points["first"]), last=ProfileGrid(points=points["last"]),
        )
    return Profile(format="megatron-dip/profile/1", modules=modules, p2p=p2p)


def slowdown(samples: Iterable[StageSample], costs: CostModel) -> float:
    """Time that stages took over what ``costs`` say of them, all together; a stage counts for at most twice its cost, so that one long
    interruption says little. Instances of a stage are taken to be of equal length. 1 where nothing was to be done."""
    took = predicted = 0.0
    for sample in samples:
        cost = stage_ns(sample, costs)
        took += min(sample.duration_ns, 2 * cost)
        predicted += cost
    return took / predicted if predicted > 0 else 1.0


def waiting(plan: Plan, rank: int, spans: Mapping[int, tuple[int, int]]) -> float:
    """How much longer a rank took from its first stage to its last than planned, beyond what its own stages took longer.

    Stages vary, and a rank waits for the later of two: a plan of mean times is too short even where every mean is right. 1 = no more
    waiting than planned, or a rank without stages.

    Args:
        spans: stage id -> measured (start, end) in ns, of the rank's stages.
    """
    if not spans:
        return 1.0
    planned = [bar for bar in plan_timeline(plan, "").bars if bar.rank == rank]
    planned_span = max(bar.end for bar in planned) - min(bar.start for bar in planned)
    planned_work = sum(bar.end - bar.start for bar in planned)
    span = max(end for _, end in spans.values()) - min(start for start, _ in spans.values())
    work = sum(end - start for start, end in spans.values())
    return span / planned_span * planned_work / work


def stage_ns(sample: StageSample, costs: CostModel) -> float:
    """What a stage takes by these costs, nothing recomputed. Instances are taken to be of equal length."""
    lengths = (sample.tokens // sample.instances,) * sample.instances
    parts: list[tuple[Part, int]] = [("layer", sample.num_layers), ("first", sample.has_first), ("last", sample.has_last)]
    total = 0.0
    for part, count in parts:
        if count:
            cost = costs.part(sample.module, part, lengths)
            inputs = cost.backward_input_ns + (0.0 if sample.split else cost.backward_weight_ns)
            total += count * {"fw": cost.forward_ns, "bw": inputs, "w": cost.backward_weight_ns}[sample.kind]
    return total


def strategy_share(sample: StageSample, strategy: Sequence[str], costs: CostModel) -> StageSample:
    """The sample as if all had been kept, by these costs' shares: backwards recompute, and copies to the host may take longer than layers.

    Args:
        strategy: name of each layer's memory strategy, as the stage ran; empty for stages that have none.
    """
    if not strategy:
        return sample
    lengths = (sample.tokens // sample.instances,) * sample.instances
    known, layer = costs.strategies(sample.module, lengths), costs.part(sample.module, "layer", lengths)
    used = [known[name] for name in strategy if name in known]
    extra, time = 0.0, layer.forward_ns
    if sample.kind == "bw":
        extra = sum(one.extra_forward for one in used) * layer.forward_ns
        time = layer.backward_input_ns if sample.split else layer.backward_input_ns + layer.backward_weight_ns
    copies = sum(
        layer.activation_bytes * one.activation * (1.0 - one.offload.activation) * 1e9 / one.offload.bytes_per_second
        for one in used if one.offload is not None
    )
    extra += max(0.0, copies - len(used) * time)
    bare = stage_ns(sample, costs)
    return replace(sample, duration_ns=round(sample.duration_ns * bare / (bare + extra))) if extra > 0 else sample


class MeasuredCost(WrappedCost):
    """``costs`` with the times of a fitted profile; bytes and memory strategies stay.

    A module that has not been measured yet is scaled as all measured ones are together. Where backwards were only measured whole, they
    are divided into input and weight parts as ``costs`` divides them.

    Args:
        samples: what the profile was fitted to; none for a profile that is taken as it stands.
    """

    def __init__(self, costs: CostModel, profile: Profile, samples: Sequence[StageSample]) -> None:
        super().__init__(costs)
        self.p2p_latency_ns = float(profile.p2p.latency_ns)
        self.p2p_bytes_per_second = float(profile.p2p.bytes_per_second)
        self._times = ProfileCost(profile, field="measured costs")
        self._modules = frozenset(profile.modules)
        self._divided = {sample.module for sample in samples if sample.split} if samples else self._modules
        given = sum(stage_ns(sample, costs) for sample in samples)
        self._scale = sum(sample.duration_ns for sample in samples) / given if given > 0 else 1.0

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        given = self.costs.part(module, part, lengths)
        if module not in self._modules:
            return _scaled(given, self._scale)
        took = self._times.part(module, part, lengths)
        inputs, weights = took.backward_input_ns, took.backward_weight_ns
        whole = given.backward_input_ns + given.backward_weight_ns
        if module not in self._divided and whole > 0:
            weights = (inputs + weights) * given.backward_weight_ns / whole
            inputs = took.backward_input_ns + took.backward_weight_ns - weights
        return replace(given, forward_ns=took.forward_ns, backward_input_ns=max(0.0, inputs), backward_weight_ns=weights)


def _scaled(cost: PartCost, factor: float) -> PartCost:
    return replace(
        cost, forward_ns=factor * cost.forward_ns, backward_input_ns=factor * cost.backward_input_ns,
        backward_weight_ns=factor * cost.backward_weight_ns,
    )


class SlowedCost(WrappedCost):
    """``costs`` with every stage ``factor`` times as long: a machine's speed moves (clocks, neighbours) while its stages' ratios stay.

    The order that a plan chooses is the same for every factor, as far as messages take no time; its makespan is what is foretold better.
    """

    def __init__(self, costs: CostModel, factor: float) -> None:
        super().__init__(costs)
        self._factor = factor

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        return _scaled(self.costs.part(module, part, lengths), self._factor)


def message_excess_ns(plan: Plan, spans: Mapping[int, tuple[int, int]]) -> float | None:
    """By how much messages took longer than planned, in the median of those that a rank stood waiting for; None where none did.

    Messages to and fro on idle ranks are faster than those beside computing ranks, so their latency is corrected by this.

    Args:
        spans: stage id -> measured (start, end) in ns, of all ranks on one clock.
    """
    excess = []
    for order in plan.order:
        free = -math.inf
        for stage_id in order:
            start, end = spans[stage_id]
            stage = plan.stages[stage_id]
            last = max(stage.deps, key=lambda dep: spans[dep.stage][1] + dep.lag, default=None)
            if last is not None and plan.stages[last.stage].rank != stage.rank and spans[last.stage][1] > free:
                excess.append(start - spans[last.stage][1] - last.lag)
            free = end
    return statistics.median(excess) if excess else None


def _shape_times(kinds: Mapping[str, Mapping[tuple[int, bool, bool], list[int]]]) -> NDArray[np.float64]:
    """[part, (forward, backward to the inputs, backward to the weights)] in ns, of one batch shape."""
    solved = {kind: _solve_parts(chunks) for kind, chunks in kinds.items()}
    whole = solved.get("backward", np.zeros(len(_PARTS)))
    return np.stack([solved["fw"], solved.get("bw", whole / 2), solved.get("w", whole / 2)], axis=1)


def _on_a_grid(measured: Mapping[tuple[int, int], NDArray[np.float64]]) -> Mapping[tuple[int, int], NDArray[np.float64]]:
    """The measured shapes (instances, tokens), or where they form no grid over (instances, length) the corners of their range."""
    counts = sorted({instances for instances, _ in measured})
    lengths = sorted({tokens / instances for instances, tokens in measured})
    if len(measured) == len(counts) * len(lengths):
        return measured
    rows = np.array([[1.0, instances, tokens] for instances, tokens in measured])
    times = np.stack(list(measured.values()))
    corners = {}
    for instances in {counts[0], counts[-1]}:
        for length in {math.ceil(lengths[0]), math.ceil(lengths[-1])}:
            row = np.array([1.0, instances, instances * length])
            corner = [[row @ _solve_nonnegative(rows, times[:, part, kind]) for kind in range(3)] for part in range(len(_PARTS))]
            corners[instances, instances * length] = np.array(corner)
    return corners


def _solve_parts(chunks: Mapping[tuple[int, bool, bool], list[int]]) -> NDArray[np.float64]:
    """[layer, first, last] times in ns out of the chunks' expected times."""
    rows = np.array([[count, first, last] for count, first, last in chunks], dtype=np.float64)
    return _solve_nonnegative(rows, np.array([expected_time(values) for values in chunks.values()], dtype=np.float64))


def expected_time(durations_ns: Sequence[int]) -> float:
    """Mean of the durations, each counted as at most twice their median.

    A makespan sums up what stages really take, so their mean counts: the distribution leans to the right, and plans from medians
    are too short. The cut keeps a rare long interruption from raising a stage's time for good.
    """
    limit = 2 * statistics.median(durations_ns)
    return statistics.fmean(min(duration, limit) for duration in durations_ns)


def _solve_nonnegative(rows: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative x of least |rows @ x - values|.

    Three unknowns: every choice of which are zero is tried, and of those without a negative value the one with the least error (then
    with the most unknowns, whose norm is the smallest) is taken.
    """
    best, best_error = np.zeros(rows.shape[1]), np.inf
    for size in range(rows.shape[1], 0, -1):
        for chosen in itertools.combinations(range(rows.shape[1]), size):
            columns = rows[:, chosen]
            solution = np.linalg.lstsq(columns, values, rcond=None)[0]
            error = float(np.square(columns @ solution - values).sum())
            if (solution >= 0).all() and error < best_error * (1 - 1e-9) - 1e-6:
                best = np.zeros(rows.shape[1])
                best[list(chosen)] = solution
                best_error = error
    return best
