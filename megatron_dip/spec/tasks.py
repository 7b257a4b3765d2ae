"""The task graph of one iteration as arrays: what the scheduler orders and what lowering turns into programs.

Letters: T tasks, E dependency edges, P pipeline ranks. Task ids are the stage ids of the plan. Arrays are C-contiguous and are not
written to after construction, so that worker threads share them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FORWARD = 0
BACKWARD = 1
"""Whole backward, or its input part where the backward is split."""
WEIGHT = 2

KIND_NAMES = ("fw", "bw", "w")
"""Kind code -> the plan's word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskGraph:
    num_ranks: int
    module_names: tuple[str, ...]
    """Module index -> name."""
    rank: NDArray[np.int32]
    """[T]"""
    kind: NDArray[np.int8]
    """[T] FORWARD, BACKWARD or WEIGHT"""
    module: NDArray[np.int16]
    """[T] index into module_names"""
    vp_stage: NDArray[np.int16]
    """[T]"""
    microbatch: NDArray[np.int32]
    """[T]"""
    sub_microbatch: NDArray[np.int32]
    """[T]"""
    duration_ns: NDArray[np.int64]
    """[T]"""
    mem_start_bytes: NDArray[np.int64]
    """[T] taken at the start"""
    mem_end_bytes: NDArray[np.int64]
    """[T] taken at the end; negative = given back"""
    dep_offset: NDArray[np.int32]
    """[T + 1] edges of task t are dep_offset[t] : dep_offset[t + 1]"""
    dep_task: NDArray[np.int32]
    """[E] the task waited for"""
    dep_lag_ns: NDArray[np.int64]
    """[E]"""
    dep_is_data: NDArray[np.bool_]
    """[E] a tensor travels along this edge (false: a backward on its own forward, a W on its B)"""

    @property
    def num_tasks(self) -> int:
        return len(self.rank)
