"""Costs from a profile, used exactly as they are given.

A grid's points stand at (instances n, length l = tokens / n). C(n, l) is their bilinear interpolation, continued linearly outside
(but never below 0). A grid with one length scales with the tokens, one with one count scales with the instances. A stage with n
instances of lengths l_1..l_n costs the mean of C(n, l_j) over j. Under a profile memory is the live stages' activation bytes alone:
weights, optimizer state and held encoder outputs count nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction

from megatron_dip.cost.interface import Part, PartCost
from megatron_dip.spec.errors import InputError
from megatron_dip.spec.profile import Profile, ProfileGrid, ProfilePoint, Strategy

_FIELDS = ("forward_ns", "backward_input_ns", "backward_weight_ns", "activation_bytes", "boundary_bytes")
_LARGEST = {"forward_ns": 1e13, "backward_input_ns": 1e13, "backward_weight_ns": 1e13, "activation_bytes": 1e14, "boundary_bytes": 1e14}
"""Of one part of one stage: hours, and more than a rank's memory many times over. Sums of such numbers stay within 64 bits."""
_CACHE_LIMIT = 1 << 16
"""Distinct stages remembered; a fresh start beyond it keeps a long training run's memory bounded."""


class ProfileCost:
    """Implements :class:`megatron_dip.cost.interface.CostModel` on a profile.

    Args:
        memory_capacity_bytes: activation bytes that a rank may hold; None = unlimited.
        field: how messages name the profile.

    Raises:
        InputError: points that form no grid, or numbers that cannot be (also from :meth:`part`, far outside the grid).
    """

    def __init__(self, profile: Profile, memory_capacity_bytes: int | None = None, field: str = "profile") -> None:
        profile.validate(field)
        self.p2p_latency_ns = float(profile.p2p.latency_ns)
        self.p2p_bytes_per_second = float(profile.p2p.bytes_per_second)
        self._capacity = memory_capacity_bytes
        self._field = field
        self._strategies = {name: dict(module.strategies) for name, module in profile.modules.items()}
        self._grids: dict[tuple[str, Part], _Grid | None] = {}
        for name, module in profile.modules.items():
            at = f"{field}.modules.{name}"
            self._grids[name, "layer"] = _Grid(module.layer, f"{at}.layer")
            self._grids[name, "first"] = None if module.first is None else _Grid(module.first, f"{at}.first")
            self._grids[name, "last"] = None if module.last is None else _Grid(module.last, f"{at}.last")
        self._cache: dict[tuple[str, Part, tuple[int, ...]], PartCost] = {}

    def part(self, module: str, part: Part, lengths: Sequence[int]) -> PartCost:
        key = (module, part, tuple(lengths))
        cost = self._cache.get(key)
        if cost is None:
            self._check_module(module)
            grid = self._grids[module, part]
            cost = PartCost() if grid is None or not lengths else grid.mean(lengths)
            for name, limit in _LARGEST.items():
                if getattr(cost, name) > limit:
                    raise InputError(
                        f"{self._field}.modules.{module}.{part}", getattr(cost, name),
                        f"{name} of a stage with {len(lengths)} instances of up to {max(lengths)} tokens is absurd (over {limit:g})",
                        "check the unit (nanoseconds, bytes), and whether the measured shapes reach that far",
                    )
            if len(self._cache) >= _CACHE_LIMIT:
                self._cache.clear()
            self._cache[key] = cost
        return cost

    def strategies(self, module: str, lengths: Sequence[int]) -> Mapping[str, Strategy]:
        self._check_module(module)
        return self._strategies[module]

    def static_bytes(self, module: str, num_layers: int, *, first: bool, last: bool) -> int:
        return 0

    def memory_capacity_bytes(self) -> int | None:
        return self._capacity

    def counts_all_memory(self) -> bool:
        return False

    def input_bytes(self, module: str, lengths: Sequence[int], *, at_first: bool) -> int:
        return 0

    def _check_module(self, module: str) -> None:
        if module not in self._strategies:
            raise InputError(
                f"{self._field}.modules", sorted(self._strategies), f"module {module!r} is missing", "add its costs to the profile"
            )


class _Grid:
    """The points of one part as a full grid over counts and lengths, five numbers each."""

    def __init__(self, grid: ProfileGrid, field: str) -> None:
        points: dict[tuple[int, Fraction], ProfilePoint] = {(p.instances, Fraction(p.tokens, p.instances)): p for p in grid.points}
        self.counts = sorted({count for count, _ in points})
        exact_lengths = sorted({length for _, length in points})
        self.lengths = [float(length) for length in exact_lengths]
        self.values: list[list[tuple[float, ...]]] = []
        for count in self.counts:
            row = []
            for length in exact_lengths:
                point = points.get((count, length))
                if point is None:
                    raise InputError(
                        f"{field}.points", [p.instances for p in grid.points],
                        f"form no grid: there is no point with {count} instances of {float(length):g} tokens each",
                        "measure every combination of the instance counts and the lengths (tokens / instances)",
                    )
                row.append(tuple(float(getattr(point, name)) for name in _FIELDS))
            self.values.append(row)

    def mean(self, lengths: Sequence[int]) -> PartCost:
        """Mean of C(n, l_j) over the instances."""
        count = len(lengths)
        sums = [0.0] * len(_FIELDS)
        for length, times in sorted(Counter(lengths).items()):
            for index, value in enumerate(self._at(count, length)):
                sums[index] += times * value
        return PartCost(**{name: max(0.0, total / count) for name, total in zip(_FIELDS, sums, strict=True)})

    def _at(self, count: int, length: int) -> list[float]:
        """C(count, length), one number for each of _FIELDS."""
        lower, upper, share = _line(self.counts, count)
        at_lower = self._at_length(lower, length)
        if lower == upper:
            return [value * share for value in at_lower]
        return [a * (1.0 - share) + b * share for a, b in zip(at_lower, self._at_length(upper, length), strict=True)]

    def _at_length(self, row: int, length: float) -> list[float]:
        lower, upper, share = _line(self.lengths, length)
        values = self.values[row]
        if lower == upper:
            return [value * share for value in values[lower]]
        return [a * (1.0 - share) + b * share for a, b in zip(values[lower], values[upper], strict=True)]


def _line(knots: Sequence[float], at: float) -> tuple[int, int, float]:
    """(lower, upper, share): the knots on whose line ``at`` lies. With a single knot lower == upper and share is the factor at / knot."""
    if len(knots) == 1:
        return 0, 0, at / knots[0]
    lower = min(max(bisect_right(knots, at) - 1, 0), len(knots) - 2)
    return lower, lower + 1, (at - knots[lower]) / (knots[lower + 1] - knots[lower])
