"""Compiles the planner's kernels, or loads them from their cache, before any clock starts.

A first search of a process would otherwise spend tenths of a second of its budget, or tens of seconds where there is no cache yet, on
that. In: nothing. Out: nothing; the second call costs nothing.
"""

from __future__ import annotations

import functools

import numpy as np

from megatron_dip.cost.profile import ProfileCost
from megatron_dip.schedule.backward import search_forms
from megatron_dip.schedule.graph import StageProblem, build_problem
from megatron_dip.schedule.interleave import make_costs, make_kernel_graph
from megatron_dip.schedule.search import SearchOptions
from megatron_dip.spec.model import ModelSpec, ModuleSpec
from megatron_dip.spec.partition import Partition, SubMicrobatch
from megatron_dip.spec.profile import ModuleProfile, PointToPoint, Profile, ProfileGrid, ProfilePoint, Strategy

_EVALUATIONS = 120
"""Enough for a cycle of annealing and its refinement."""


@functools.cache
def load_kernels() -> None:
    """Searches a batch of four tiny microbatches on two ranks, under a limit on memory, in both forms of the backward."""
    module = ModuleSpec(name="lm", kind="lm", role="backbone", num_layers=2, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1)
    point = ProfilePoint(
        instances=1, tokens=1, forward_ns=100, backward_input_ns=100, backward_weight_ns=100, activation_bytes=100, boundary_bytes=1
    )
    profile = Profile(
        format="megatron-dip/profile/1", p2p=PointToPoint(latency_ns=1, bytes_per_second=1e9), modules={"lm": ModuleProfile(
            num_layers=2, layer=ProfileGrid(points=[point]),
            strategies={"none": Strategy(), "full": Strategy(extra_forward=1.0, activation=0.1)},
        )},
    )
    model, costs = ModelSpec(modules=[module]), ProfileCost(profile)
    partition = Partition(chunks={"lm": [[1, 1]]}, sub_microbatch_size={"lm": 1})
    subs = [SubMicrobatch(module="lm", microbatch=number, sub_microbatch=0, first_instance=0, lengths=(1 + number,)) for number in range(4)]

    def build(split_backward: bool) -> StageProblem:
        return build_problem(model, partition, subs, costs, split_backward=split_backward)

    problem = build(True)
    limit = np.ceil(make_costs(problem.fastest, make_kernel_graph(problem.fastest)).worst * 1.5).astype(np.int64)
    search_forms(build, limit, SearchOptions(evaluations=_EVALUATIONS), True)
