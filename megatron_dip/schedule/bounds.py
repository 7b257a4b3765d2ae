"""Lower bounds on the makespan.

In: a task graph. Out: a time in ns that no schedule of it can beat.
"""

from __future__ import annotations

import numpy as np

from megatron_dip.spec.tasks import TaskGraph


def lower_bound_ns(graph: TaskGraph) -> int:
    """The busiest rank's work."""
    work = np.zeros(graph.num_ranks, dtype=np.int64)
    np.add.at(work, graph.rank, graph.duration_ns)
    return int(work.max())
