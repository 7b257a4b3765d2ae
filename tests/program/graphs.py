"""Task graphs and orders for the tests of lowering and of the executor, built the slow and obvious way.

A random model: one or two encoders that feed a backbone, each cut into P * K chunks, microbatches with any number of encoder
sub-microbatches (none too), backward whole or split, a frozen encoder now and then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.tasks import BACKWARD, FORWARD, WEIGHT, TaskGraph

Key = tuple[int, int, int, int, int, int]
"""kind, module, microbatch, sub_microbatch, vp_stage, rank"""


def build_graph(
    num_ranks: int,
    chunks: Sequence[int],
    sub_microbatches: Sequence[Sequence[int]],
    *,
    split_backward: bool = False,
    forward_only: bool = False,
    frozen: Sequence[int] = (),
    seed: int = 0,
) -> TaskGraph:
    """The last module is the backbone, fed by all others.

    Args:
        chunks: K of each module.
        sub_microbatches: for each microbatch the number of sub-microbatches of each module (the backbone's is 1).
        frozen: encoders without any backward.
    """
    rng = np.random.default_rng(seed)
    backbone = len(chunks) - 1
    tasks: list[Key] = []
    edges: dict[Key, list[tuple[Key, bool]]] = {}

    def path(kind: int, module: int, microbatch: int, sub: int) -> list[Key]:
        keys = [(kind, module, microbatch, sub, k, r) for k in range(chunks[module]) for r in range(num_ranks)]
        return keys if kind == FORWARD else keys[::-1]

    def add(key: Key, deps: list[tuple[Key, bool]]) -> None:
        tasks.append(key)
        edges[key] = deps

    for microbatch, counts in enumerate(sub_microbatches):
        encoders = [(m, s) for m in range(backbone) for s in range(counts[m])]
        for module, sub in [*encoders, (backbone, 0)]:
            previous: Key | None = None
            for key in path(FORWARD, module, microbatch, sub):
                deps = [(previous, True)] if previous else []
                if previous is None and module == backbone:
                    deps = [(path(FORWARD, m, microbatch, s)[-1], True) for m, s in encoders]
                add(key, deps)
                previous = key
        if forward_only:
            continue
        trained = [(m, s) for m, s in encoders if m not in frozen]
        for module, sub in [(backbone, 0), *trained]:
            previous = None
            for key in path(BACKWARD, module, microbatch, sub):
                deps = [((FORWARD, *key[1:]), False)]
                if previous:
                    deps.append((previous, True))
                elif module != backbone:
                    deps.append((path(BACKWARD, backbone, microbatch, 0)[-1], True))
                add(key, deps)
                if split_backward:
                    add((WEIGHT, *key[1:]), [(key, False)])
                previous = key
    number = {key: index for index, key in enumerate(tasks)}
    flat = [(number[dep], data, dep[5] != key[5]) for key in tasks for dep, data in edges[key]]
    count = len(tasks)
    return TaskGraph(
        num_ranks=num_ranks,
        module_names=(*tuple(f"encoder{m}" for m in range(backbone)), "backbone"),
        rank=np.array([key[5] for key in tasks], np.int32),
        kind=np.array([key[0] for key in tasks], np.int8),
        module=np.array([key[1] for key in tasks], np.int16),
        vp_stage=np.array([key[4] for key in tasks], np.int16),
        microbatch=np.array([key[2] for key in tasks], np.int32),
        sub_microbatch=np.array([key[3] for key in tasks], np.int32),
        duration_ns=rng.integers(0, 2_000_000, count),
        mem_start_bytes=np.zeros(count, np.int64),
        mem_end_bytes=np.zeros(count, np.int64),
        dep_offset=np.cumsum([0, *(len(edges[key]) for key in tasks)], dtype=np.int32),
        dep_task=np.array([edge[0] for edge in flat], np.int32),
        dep_lag_ns=np.array([rng.integers(0, 50_000) if edge[2] else 0 for edge in flat], np.int64),
        dep_is_data=np.array([edge[1] for edge in flat], np.bool_),
    )


def random_graph(seed: int, num_ranks: int, *, split_backward: bool | None = None, forward_only: bool = False) -> TaskGraph:
    rng = np.random.default_rng(seed)
    encoders = int(rng.integers(1, 3))
    chunks = [int(k) for k in rng.integers(1, 3, encoders + 1)]
    counts = [[*(int(n) for n in rng.integers(0, 4, encoders)), 1] for _ in range(int(rng.integers(1, 7)))]
    return build_graph(
        num_ranks,
        chunks,
        counts,
        split_backward=bool(rng.integers(2)) if split_backward is None else split_backward,
        forward_only=forward_only,
        frozen=[0] if rng.random() < 0.2 else [],
        seed=seed,
    )


def random_order(graph: TaskGraph, seed: int) -> list[NDArray[np.int32]]:
    """Orders that keep every dependency: the next task is any whose dependencies have run."""
    rng = np.random.default_rng(seed)
    waiting = np.diff(graph.dep_offset).astype(int)
    after: list[list[int]] = [[] for _ in range(graph.num_tasks)]
    for task in range(graph.num_tasks):
        for edge in range(graph.dep_offset[task], graph.dep_offset[task + 1]):
            after[graph.dep_task[edge]].append(task)
    ready = [task for task in range(graph.num_tasks) if waiting[task] == 0]
    rows: list[list[int]] = [[] for _ in range(graph.num_ranks)]
    while ready:
        task = ready.pop(int(rng.integers(len(ready))))
        rows[graph.rank[task]].append(task)
        for following in after[task]:
            waiting[following] -= 1
            if waiting[following] == 0:
                ready.append(following)
    return [np.array(row, np.int32) for row in rows]
