"""Random models, profiles and batches for property tests: small, but of any shape that the formats allow."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from megatron_dip.cost.profile import ProfileCost
from megatron_dip.partition.offline import even_partition
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition
from megatron_dip.spec.profile import ModuleProfile, PointToPoint, Profile, ProfileGrid, ProfilePoint, Strategy
from megatron_dip.spec.workload import Microbatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Everything that a plan needs."""

    model: ModelSpec
    profile: Profile
    partition: Partition
    microbatches: list[Microbatch]

    def costs(self, capacity: int | None = None) -> ProfileCost:
        return ProfileCost(self.profile, capacity)


def module(name: str, num_layers: int = 4, *, role: str = "encoder", trainable: bool = True, inputs: list[str] | None = None) -> ModuleSpec:
    return ModuleSpec(
        name=name, kind="vit", role=role, num_layers=num_layers, hidden_size=8, ffn_hidden_size=16, num_attention_heads=2,  # type: ignore[arg-type]
        trainable=trainable, inputs=inputs,
    )


def grid(forward_ns: float, backward_input_ns: float, backward_weight_ns: float, activation_bytes: float = 0.0, boundary_bytes: float = 0.0,
         tokens: int = 1) -> ProfileGrid:
    """A grid of one point: one instance of ``tokens`` tokens; everything scales with the tokens."""
    return ProfileGrid(points=[ProfilePoint(
        instances=1, tokens=tokens, forward_ns=forward_ns, backward_input_ns=backward_input_ns, backward_weight_ns=backward_weight_ns,
        activation_bytes=activation_bytes, boundary_bytes=boundary_bytes,
    )])


def profile(modules: dict[str, ModuleProfile], latency_ns: float = 0.0, bytes_per_second: float = 1e9) -> Profile:
    return Profile(format="megatron-dip/profile/1", modules=modules, p2p=PointToPoint(latency_ns=latency_ns, bytes_per_second=bytes_per_second))


def vlm_case(num_microbatches: int = 6, num_ranks: int = 2, chunks: dict[str, int] | None = None) -> Case:
    """An encoder and a backbone; microbatch i has i mod 4 images of one size."""
    model = ModelSpec(modules=[module("vit", 4), module("lm", 4, role="backbone")])
    strategies = {"none": Strategy(), "full": Strategy(extra_forward=1.0, activation=0.1)}
    costs = profile({
        "vit": ModuleProfile(num_layers=4, layer=grid(1000, 1100, 900, 50, 10), strategies=strategies),
        "lm": ModuleProfile(num_layers=4, layer=grid(300, 310, 290, 40, 20, tokens=10), last=grid(200, 200, 200, tokens=10), strategies=strategies),
    }, latency_ns=5.0)
    microbatches: list[Microbatch] = [{"vit": [1] * (index % 4), "lm": [10]} for index in range(num_microbatches)]
    return Case(
        model=model, profile=costs, partition=even_partition(model, num_ranks, chunks or {}, {"vit": 2, "lm": 1}), microbatches=microbatches
    )


_times = st.integers(0, 50).map(float)


@st.composite
def arrangements(draw: st.DrawFn) -> Case:
    """Models as users arrange them, by roles alone: encoders, a backbone or none, decoders; any of them frozen.

    Encoders have instances only where something takes them; backbone and decoders are in every microbatch.
    """
    roles = ["encoder"] * draw(st.integers(0, 3)) + ["backbone"] * draw(st.integers(0, 1)) + ["decoder"] * draw(st.integers(0, 2))
    if "backbone" not in roles and "decoder" not in roles:
        roles.append("backbone")
    num_ranks = draw(st.integers(1, 4))
    modules, profiles, chunks, sizes = [], {}, {}, {}
    for index, role in enumerate(roles):
        name, num_layers = f"m{index}", draw(st.integers(1, 6))
        modules.append(module(name, num_layers, role=role, trainable=draw(st.booleans())))
        strategies = {"none": Strategy(), "full": Strategy(extra_forward=1.0, activation=draw(st.sampled_from([0.0, 0.1, 0.5])))}
        if draw(st.booleans()):
            strategies["selective"] = Strategy(extra_forward=0.2, activation=0.6)
        profiles[name] = ModuleProfile(
            num_layers=num_layers, layer=grid(draw(_times), draw(_times), draw(_times), draw(_times), draw(_times)),
            last=grid(draw(_times), draw(_times), draw(_times), draw(_times), draw(_times)) if draw(st.booleans()) else None, strategies=strategies,
        )
        chunks[name], sizes[name] = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    microbatches: list[Microbatch] = [
        {f"m{index}": draw(st.lists(st.integers(1, 9), min_size=0 if role == "encoder" else 1, max_size=4)) for index, role in enumerate(roles)}
        for _ in range(draw(st.integers(1, 5)))
    ]
    model = ModelSpec(modules=modules)
    return Case(
        model=model, profile=profile(profiles, latency_ns=draw(_times), bytes_per_second=1e9),
        partition=even_partition(model, num_ranks, chunks, sizes), microbatches=microbatches,
    )


@st.composite
def cases(draw: st.DrawFn, max_modules: int = 3, max_ranks: int = 3, max_microbatches: int = 4) -> Case:
    """Any acyclic arrangement of up to ``max_modules`` modules, frozen ones among them, with microbatches that may lack modules."""
    num_ranks = draw(st.integers(1, max_ranks))
    names = [f"m{index}" for index in range(draw(st.integers(1, max_modules)))]
    modules, profiles, chunks, sizes = [], {}, {}, {}
    for index, name in enumerate(names):
        inputs = [other for other in names[:index] if draw(st.booleans())]
        num_layers = draw(st.integers(1, 5))
        # Backbones, since any of them may lack in a microbatch: an encoder's instances need a consumer.
        modules.append(module(name, num_layers, role="backbone", trainable=draw(st.booleans()), inputs=inputs))
        strategies = {"none": Strategy()}
        if draw(st.booleans()):
            strategies["full"] = Strategy(extra_forward=1.0, activation=0.25)
        profiles[name] = ModuleProfile(
            num_layers=num_layers,
            layer=grid(draw(_times), draw(_times), draw(_times), draw(_times), draw(_times)),
            first=grid(draw(_times), draw(_times), draw(_times), draw(_times)) if draw(st.booleans()) else None,
            last=grid(draw(_times), draw(_times), draw(_times), draw(_times), draw(_times)) if draw(st.booleans()) else None,
            strategies=strategies,
        )
        chunks[name] = draw(st.integers(1, 3))
        sizes[name] = draw(st.integers(1, 3))
    microbatches: list[Microbatch] = []
    for _ in range(draw(st.integers(1, max_microbatches))):
        lengths = {name: draw(st.lists(st.integers(1, 9), max_size=4)) for name in names}
        if not any(lengths.values()):
            lengths[names[-1]] = [1]
        microbatches.append(lengths)
    model = ModelSpec(modules=modules)
    return Case(
        model=model, profile=profile(profiles, latency_ns=draw(_times), bytes_per_second=1e9),
        partition=even_partition(model, num_ranks, chunks, sizes), microbatches=microbatches,
    )
