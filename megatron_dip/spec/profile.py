"""Measured or given costs of a model's layers: the ``megatron-dip/profile/1`` format.

Times are nanoseconds, sizes bytes, per layer and for all instances of a stage together. The points of a grid stand at
(instances n, length l = tokens / n); :mod:`megatron_dip.cost` interpolates between them.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from megatron_dip.spec.errors import InputError

PROFILE_FORMAT = "megatron-dip/profile/1"


class ProfilePoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Cost of one layer (or of the first/last extra) at one batch shape."""

    instances: int
    tokens: int
    """Of all instances together."""
    forward_ns: float
    backward_input_ns: float
    backward_weight_ns: float
    activation_bytes: float
    """Held from the forward's start to the backward's end."""
    boundary_bytes: float
    """Size of the message to the next chunk."""

    @property
    def length(self) -> float:
        return self.tokens / self.instances


class ProfileGrid(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    points: list[ProfilePoint]


class Offload(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Activations moved to CPU memory between forward and backward."""

    bytes_per_second: float
    activation: float
    """Share of the activation bytes that stays on the device."""


class Strategy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A memory strategy of one layer, as shares of the layer's own costs."""

    extra_forward: float = 0.0
    """Share of the forward time that is run again, added to the input part of the backward."""
    activation: float = 1.0
    """Share of the activation bytes that is held."""
    offload: Offload | None = None


class ModuleProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    num_layers: int
    layer: ProfileGrid
    first: ProfileGrid | None = None
    """Embedding or stem; added to the first chunk."""
    last: ProfileGrid | None = None
    """Head and loss; added to the last chunk."""
    strategies: dict[str, Strategy] = msgspec.field(default_factory=lambda: {"none": Strategy()})


class PointToPoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    latency_ns: float
    bytes_per_second: float


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    format: Literal["megatron-dip/profile/1"]
    modules: dict[str, ModuleProfile]
    p2p: PointToPoint

    def validate(self, where: str = "profile") -> None:
        """Raises InputError for empty grids, and for numbers that are negative, not finite or absurd (over 10^15)."""
        for name, module in self.modules.items():
            at = f"{where}.modules.{name}"
            if module.num_layers < 1:
                raise InputError(f"{at}.num_layers", module.num_layers, "must be at least 1", "give the module's layer count")
            for part in ("layer", "first", "last"):
                grid: ProfileGrid | None = getattr(module, part)
                if grid is None:
                    continue
                if not grid.points:
                    raise InputError(f"{at}.{part}.points", [], "no points", "measure at least one batch shape")
                shapes: set[tuple[int, int]] = set()
                for index, point in enumerate(grid.points):
                    here = f"{at}.{part}.points[{index}]"
                    for field in ("instances", "tokens"):
                        if not 1 <= getattr(point, field) <= _MAX_COUNT:
                            raise InputError(f"{here}.{field}", getattr(point, field), f"outside 1 to {_MAX_COUNT}", "give a positive count of a real batch")
                    for field in ("forward_ns", "backward_input_ns", "backward_weight_ns", "activation_bytes", "boundary_bytes"):
                        _check_number(f"{here}.{field}", getattr(point, field), low=0.0)
                    if (point.instances, point.tokens) in shapes:
                        raise InputError(here, [point.instances, point.tokens], "the same shape twice", "keep one point a shape")
                    shapes.add((point.instances, point.tokens))
            if "none" not in module.strategies:
                raise InputError(f"{at}.strategies", sorted(module.strategies), "has no 'none'", 'add "none": {}')
            for label, strategy in module.strategies.items():
                here = f"{at}.strategies.{label}"
                _check_number(f"{here}.extra_forward", strategy.extra_forward, low=0.0, high=1e3)
                _check_number(f"{here}.activation", strategy.activation, low=0.0, high=1e3)
                if strategy.offload is not None:
                    _check_number(f"{here}.offload.bytes_per_second", strategy.offload.bytes_per_second, low=1.0)
                    _check_number(f"{here}.offload.activation", strategy.offload.activation, low=0.0, high=1.0)
        _check_number(f"{where}.p2p.latency_ns", self.p2p.latency_ns, low=0.0)
        _check_number(f"{where}.p2p.bytes_per_second", self.p2p.bytes_per_second, low=1.0)


_MAX_COUNT = 10**7
"""Of instances and tokens of a measured point, as of a workload's instances."""


def _check_number(field: str, value: float, *, low: float, high: float = 1e15) -> None:
    if not math.isfinite(value):
        raise InputError(field, value, "not a finite number", "measure again or give a number")
    if value < low or value > high:
        raise InputError(field, value, f"outside [{low:g}, {high:g}]", "check the unit (nanoseconds, bytes, bytes per second, shares)")
