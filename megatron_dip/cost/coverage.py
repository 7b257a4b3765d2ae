"""How far a workload lies outside what a profile measured: there its costs are continued lines, and less sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_dip.spec.profile import Profile, ProfileGrid
from megatron_dip.spec.workload import Microbatch


def outside_profile(profile: Profile, microbatches: Sequence[Microbatch], sub_microbatch_size: Mapping[str, int] | None = None) -> list[str]:
    """One sentence for each module and axis (instances, tokens an instance) on which the workload leaves the measured range.

    Args:
        sub_microbatch_size: module -> instances in a full stage; absent = whole microbatches run as one stage.
    """
    found = []
    for name, module in profile.modules.items():
        batches = [microbatch[name] for microbatch in microbatches if microbatch.get(name)]
        if not batches:
            continue
        size = None if sub_microbatch_size is None else sub_microbatch_size.get(name)
        parts = {count for lengths in batches for count in _stages(len(lengths), size)}
        lengths = [length for lengths in batches for length in lengths]
        counts = _range(module.layer, "instances")
        for count in sorted({min(parts), max(parts)}):
            if not counts[0] <= count <= counts[1]:
                found.append(_sentence(name, "instances in a stage", count, counts))
        measured = _range(module.layer, "length")
        for length in sorted({min(lengths), max(lengths)}):
            if not measured[0] <= length <= measured[1]:
                found.append(_sentence(name, "tokens in an instance", length, measured))
    return found


def _stages(instances: int, size: int | None) -> tuple[int, int]:
    """Instances of the smallest and the largest stage of a microbatch, cut into equal parts of at most ``size``."""
    num_parts = 1 if size is None else -(-instances // size)
    return instances // num_parts, -(-instances // num_parts)


def _range(grid: ProfileGrid, axis: str) -> tuple[float, float]:
    values = [float(getattr(point, axis)) for point in grid.points]
    return min(values), max(values)


def _sentence(module: str, what: str, value: float, measured: tuple[float, float]) -> str:
    low, high = measured
    factor = value / high if value > high else low / value
    side = "above" if value > high else "below"
    return (
        f"profile.modules.{module}.layer: {value:g} {what} lie {factor:.3g} times {side} the measured range {low:g} to {high:g}; "
        "costs there are continued lines"
    )
