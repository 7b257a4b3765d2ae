"""Every iteration: cuts each microbatch's instances of a module into sub-microbatches of equal *cost*.

In: the microbatches' instance lengths, the run's partition and a cost model. Out: sub-microbatches, contiguous runs of instances in
the microbatch's order. Source: DIP (arXiv 2504.14145) section on sub-microbatches, M_i = ceil(N_i / B_i); the paper cuts by count,
which is the same where all instances of a module cost the same. Where they do not (video clips), a part with short instances may hold
more than B_i of them: the parts' costs are what must be equal.

Not modelled: moving instances between microbatches (packing is the data loader's), and the fixed cost of a kernel launch, which the
number of parts M_i accounts for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.cost.interface import CostModel
from megatron_dip.spec.model import ModelSpec
from megatron_dip.spec.partition import Partition, SubMicrobatch
from megatron_dip.spec.workload import Microbatch, check_consumers


def split(microbatches: Sequence[Microbatch], model: ModelSpec, partition: Partition, costs: CostModel) -> list[SubMicrobatch]:
    """All sub-microbatches of a global batch, by microbatch, then by module in the model's order, then by number.

    A module without instances in a microbatch has no sub-microbatch there. Deterministic. Raises InputError for encoder instances
    that nobody takes (:func:`megatron_dip.spec.workload.check_consumers`).
    """
    check_consumers(model, microbatches)
    unit_costs: dict[tuple[str, int], float] = {}
    result: list[SubMicrobatch] = []
    for index, microbatch in enumerate(microbatches):
        for module in model.modules:
            lengths = microbatch.get(module.name, [])
            if not lengths:
                continue
            size = partition.sub_microbatch_size[module.name]
            num_parts = -(-len(lengths) // size)
            if num_parts == 1:
                result.append(SubMicrobatch(module.name, index, 0, 0, tuple(lengths)))
                continue
            for length in lengths:
                if (module.name, length) not in unit_costs:
                    unit_costs[module.name, length] = instance_cost(module.name, length, size, costs)
            weights = np.array([unit_costs[module.name, length] for length in lengths])
            bounds = equal_parts(weights, num_parts)
            for part in range(num_parts):
                first, end = int(bounds[part]), int(bounds[part + 1])
                result.append(SubMicrobatch(module.name, index, part, first, tuple(lengths[first:end])))
    return result


def instance_cost(module: str, length: int, size: int, costs: CostModel) -> float:
    """Time in ns of one instance's share of a layer, forward and backward, within a stage of ``size`` instances of its length."""
    cost = costs.part(module, "layer", (length,) * size)
    return (cost.forward_ns + cost.backward_input_ns + cost.backward_weight_ns) / size


def equal_parts(weights: NDArray[np.float64], num_parts: int, power: float = 2.0) -> NDArray[np.int64]:
    """Bounds [num_parts + 1] of the contiguous, non-empty parts of ``weights`` [N] whose sums, raised to ``power``, add up to the least.

    Part p is ``weights[bounds[p] : bounds[p + 1]]``. The least sum of squares is the most even cut: with equal weights part sizes
    differ by at most one, larger parts first. A high power makes the largest part as small as can be.
    """
    count = len(weights)
    assert 1 <= num_parts <= count, (num_parts, count)
    if weights.min() == weights.max():
        base, extra = divmod(count, num_parts)
        sizes = np.full(num_parts, base, dtype=np.int64)
        sizes[:extra] += 1
        return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(sizes)))
    bounds = np.empty(num_parts + 1, dtype=np.int64)
    # Scaled so that high powers neither overflow nor vanish: an even part weighs 1.
    scaled = np.ascontiguousarray(weights, dtype=np.float64) * (num_parts / weights.sum())
    _least_power_cut(scaled, num_parts, power, bounds)
    return bounds


@numba.njit(nogil=True, cache=True)
def _least_power_cut(weights, num_parts, power, bounds):  # type: ignore[no-untyped-def]
    """Dynamic programme over (parts used, instances used). Writes ``bounds`` [num_parts + 1].

    The best start of a part moves on with its end and with the number of parts before it (the power of a sum fulfils the quadrangle
    inequality), so that only starts between the two neighbours' need a look: O(N * (N + num_parts)) in all (Knuth 1971, Yao 1980).
    """
    count = len(weights)
    prefix = np.zeros(count + 1)
    for index in range(count):
        prefix[index + 1] = prefix[index] + weights[index]
    best = np.full((num_parts + 1, count + 1), np.inf)
    came_from = np.zeros((num_parts + 1, count + 1), dtype=np.int32)
    best[0, 0] = 0.0
    for part in range(1, num_parts + 1):
        for end in range(count, part - 1, -1):
            low = max(part - 1, came_from[part - 1, end])
            high = end - 1
            if end < count:
                high = min(high, came_from[part, end + 1])
            for start in range(low, high + 1):
                total = prefix[end] - prefix[start]
                value = best[part - 1, start] + total**power
                # "<=" prefers the later start: larger parts come first, as in the cut by count.
                if value <= best[part, end]:
                    best[part, end] = value
                    came_from[part, end] = start
    end = count
    for part in range(num_parts, -1, -1):
        bounds[part] = end
        if part > 0:
            end = came_from[part, end]
