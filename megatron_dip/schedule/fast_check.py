# mypy: no-check-untyped-defs
"""The checker's verdict alone, compiled: whether a plan holds, in some hundred ns a stage and without the interpreter's lock.

In: a plan's columns. Out: starts, makespan and peaks where the plan holds, None where it does not or where its numbers are too unusual
to tell (tags with large gaps, posts in groups). :mod:`megatron_dip.schedule.checker` says in plain Python what is wrong, and decides what
is left open here; what a plan must keep stands there too. Nothing is shared with what makes plans, nor with that module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from megatron_dip.spec.plan_columns import PlanColumns, numbers

_LARGEST_SUM = 2.0**62
_SPARE = 1_000_000
"""Entries that a table may have beyond eight times what it is made for."""
FW, BW, W = 0, 1, 2
ISEND, IRECV, WAIT_SEND, WAIT_RECV = 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class PlanHolds:
    """Of a plan that was found to hold. Times in ns, memory in bytes."""

    start: NDArray[np.int64]
    """[stages]"""
    makespan: int
    peak_memory: list[int]
    """[ranks]"""


class _Stages(NamedTuple):
    """Columns of the stages, as the kernels read them; see :class:`PlanColumns`."""

    rank: NDArray[np.int64]
    kind: NDArray[np.int8]
    duration: NDArray[np.int64]
    dep_offset: NDArray[np.int64]
    dep_stage: NDArray[np.int64]
    dep_lag: NDArray[np.int64]
    module: NDArray[np.int64]
    vp_stage: NDArray[np.int64]
    first_layer: NDArray[np.int64]
    num_layers: NDArray[np.int64]
    microbatch: NDArray[np.int64]
    tokens: NDArray[np.int64]
    instances: NDArray[np.int64]
    strategy: NDArray[np.int64]
    segment: NDArray[np.int64]
    """[T] number of the stage's (module, microbatch, sub-microbatch)"""


class _Actions(NamedTuple):
    """Actions and messages, numbered in the order of outputs."""

    offset: NDArray[np.int64]
    op: NDArray[np.int8]
    stage: NDArray[np.int64]
    peer: NDArray[np.int64]
    message: NDArray[np.int64]
    """[A] -1 = none"""
    producer: NDArray[np.int64]
    """[M]"""
    consumer: NDArray[np.int64]
    """[M]"""
    in_offset: NDArray[np.int64]
    """[T + 1] messages that a stage awaits are in_message[in_offset[t] : in_offset[t + 1]]"""
    in_message: NDArray[np.int64]


def plan_holds(columns: PlanColumns, microbatches: Sequence[Mapping[str, Sequence[int]]] | None = None) -> PlanHolds | None:
    """The verdict; None: it does not hold, or it cannot be told here."""
    head, num_stages, num_ranks = columns.head, len(columns.id), columns.head.ranks
    if not _form_holds(columns):
        return None
    segment = _segments(columns)
    if segment is None:
        return None
    stages = _Stages(**{name: getattr(columns, name) for name in _Stages._fields if name != "segment"}, segment=segment)
    order, offset = columns.order, columns.order_offset
    if not _order_holds(num_ranks, stages, order, offset) or not _chains_hold(columns, stages):
        return None
    if microbatches is not None and not _data_hold(columns, stages, microbatches):
        return None
    start = np.zeros(num_stages, np.int64)
    if _times(stages, order, offset, start) < num_stages:
        return None
    makespan = int((start + stages.duration).max(initial=0))
    work = int(stages.duration.sum())
    bubbles = 1.0 - work / (num_ranks * makespan) if makespan else 0.0
    if makespan != head.claimed_makespan or head.lower_bound > makespan or not abs(bubbles - head.bubble_fraction) <= 1e-6:
        return None
    initial = np.array(head.memory_initial, np.int64)
    held, peaks = np.empty(num_ranks, np.int64), np.empty(num_ranks, np.int64)
    _memory(order, offset, columns.mem_delta_start, columns.mem_delta_end, initial, held, peaks)
    capacity = peaks if head.memory_capacity is None else np.array(head.memory_capacity, np.int64)
    if (peaks > capacity).any() or peaks.tolist() != head.peak_memory or (held != initial).any():
        return None
    actions = _messages(columns, num_stages)
    if actions is None or not _edges_have_messages(stages, actions, columns.local_stage, columns.local_source):
        return None
    if not _rank_actions_hold(num_ranks, stages, actions, order, offset):
        return None
    if not all(_runs_through(num_ranks, stages.rank, actions, one_queue) for one_queue in (False, True)):
        return None
    return PlanHolds(start, makespan, peaks.tolist())


def _form_holds(columns: PlanColumns) -> bool:
    head, num_ranks, num_stages = columns.head, columns.head.ranks, len(columns.id)
    if num_ranks < 1 or any(
        len(rows) != num_ranks for rows in (head.memory_initial, head.peak_memory, head.memory_capacity, columns.order_offset[1:], columns.action_offset[1:])
        if rows is not None
    ):
        return False
    sums = (columns.duration, columns.dep_lag, columns.mem_delta_start, columns.mem_delta_end)
    if sum(float(np.abs(column.astype(np.float64)).sum()) for column in sums) + sum(map(abs, head.memory_initial)) > _LARGEST_SUM:
        return False
    if any(value > _LARGEST_SUM for value in head.memory_capacity or ()):
        return False
    waiting = np.repeat(np.arange(num_stages), np.diff(columns.dep_offset))
    return bool(
        (columns.id == np.arange(num_stages)).all() and _within(columns.rank, num_ranks) and (columns.duration >= 0).all()
        and _within(columns.dep_stage, num_stages) and (columns.dep_stage != waiting).all() and (columns.dep_lag >= 0).all()
        and _within(columns.order, num_stages) and (columns.group < 0).all()
    )


def _within(values: NDArray[np.int64], size: int) -> bool:
    return bool(((values >= 0) & (values < size)).all())


def _segments(columns: PlanColumns) -> NDArray[np.int64] | None:
    """[T] the number of each stage's segment, by their first stages; None where numbers have large gaps."""
    sizes = [len(columns.module_names)] + [int(column.max(initial=0)) + 1 for column in (columns.microbatch, columns.sub_microbatch)]
    if min(int(column.min(initial=0)) for column in (columns.microbatch, columns.sub_microbatch, columns.vp_stage)) < 0:
        return None
    if float(sizes[0]) * sizes[1] * sizes[2] > 8 * len(columns.id) + _SPARE:
        return None
    return _number_segments(columns.module, columns.microbatch, columns.sub_microbatch, np.array(sizes))


@numba.njit(nogil=True, cache=True)
def _number_segments(module, microbatch, sub_microbatch, sizes):
    number = np.full(sizes[0] * sizes[1] * sizes[2], -1, np.int64)
    segment = np.empty(len(module), np.int64)
    count = 0
    for t in range(len(module)):
        place = (module[t] * sizes[1] + microbatch[t]) * sizes[2] + sub_microbatch[t]
        if number[place] < 0:
            number[place] = count
            count += 1
        segment[t] = number[place]
    return segment


@numba.njit(nogil=True, cache=True)
def _order_holds(num_ranks, stages, order, offset):
    """Every stage once, on its rank."""
    seen = np.zeros(len(stages.rank), np.bool_)
    for r in range(num_ranks):
        for i in range(offset[r], offset[r + 1]):
            if seen[order[i]] or stages.rank[order[i]] != r:
                return False
            seen[order[i]] = True
    return len(order) == len(seen)


def _chains_hold(columns: PlanColumns, stages: _Stages) -> bool:
    """Every sub-microbatch passes every chunk of its module, forwards in order and backwards mirrored."""
    chunks, num_ranks = columns.head.chunks, columns.head.ranks
    if any(name not in chunks for name in columns.module_names):
        return False
    most = max((len(chunks[name]) for name in columns.module_names), default=0)
    size = np.full((len(columns.module_names), most, num_ranks), -1, np.int64)  # layers of a chunk, -1 = no such chunk
    for index, name in enumerate(columns.module_names):
        for vp_stage, row in enumerate(chunks[name]):
            size[index, vp_stage, : min(len(row), num_ranks)] = row[:num_ranks]
    total = np.array([sum(map(sum, chunks[name])) for name in columns.module_names], np.int64)
    labels = np.array([len(strategy) for strategy in columns.strategies], np.int64)
    if int(stages.segment.max(initial=-1) + 1) * most * num_ranks * 3 > 8 * len(columns.id) + _SPARE:
        return False
    at = np.full((int(stages.segment.max(initial=-1)) + 1, most * num_ranks, 3), -1, np.int64)
    if not _place_stages(stages, size, labels, at):
        return False
    return bool(_forwards_hold(stages, size, total, at) and _backwards_hold(stages, at) and _feeders_hold(stages, at))


@numba.njit(nogil=True, cache=True)
def _place_stages(stages, size, labels, at):
    """Fills ``at`` [segments, places, kinds] with stages; a place is vp_stage * P + rank."""
    num_ranks = size.shape[2]
    for t in range(len(stages.rank)):
        kind = stages.kind[t]
        if stages.vp_stage[t] >= size.shape[1] or size[stages.module[t], stages.vp_stage[t], stages.rank[t]] < 0:
            return False
        place = stages.vp_stage[t] * num_ranks + stages.rank[t]
        if at[stages.segment[t], place, kind] >= 0 or labels[stages.strategy[t]] != (0 if kind == W else stages.num_layers[t]):
            return False
        at[stages.segment[t], place, kind] = t
    return True


@numba.njit(nogil=True, cache=True)
def _waits_for(stages, t, other):
    for e in range(stages.dep_offset[t], stages.dep_offset[t + 1]):  # noqa: SIM110  (compiled)
        if stages.dep_stage[e] == other:
            return True
    return False


@numba.njit(nogil=True, cache=True)
def _forwards_hold(stages, size, total, at):
    num_ranks = size.shape[2]
    for s in range(at.shape[0]):
        next_layer, before = np.int64(0), np.int64(-1)
        module = np.int64(-1)
        for place in range(at.shape[1]):
            t = at[s, place, FW]
            if t < 0:
                continue
            module = stages.module[t]
            if size[module, place // num_ranks, place % num_ranks] != stages.num_layers[t] or stages.first_layer[t] != next_layer:
                return False
            if before >= 0 and not _waits_for(stages, t, before):
                return False
            next_layer += stages.num_layers[t]
            before = t
        if module < 0 or next_layer != total[module]:
            return False
    return True


@numba.njit(nogil=True, cache=True)
def _backwards_hold(stages, at):
    for s in range(at.shape[0]):
        behind, last_place = np.int64(-1), np.int64(-1)  # the backward of the place before, from the end; lowest place with one
        for place in range(at.shape[1] - 1, -1, -1):
            f, b, w = at[s, place, FW], at[s, place, BW], at[s, place, W]
            if w >= 0 and (b < 0 or f < 0 or not _waits_for(stages, w, b) or not _is_alike(stages, w, f)):
                return False
            if b < 0:
                continue
            if f < 0 or not _waits_for(stages, b, f) or not _is_alike(stages, b, f) or stages.strategy[b] != stages.strategy[f]:
                return False
            if behind >= 0 and not _waits_for(stages, b, behind):
                return False
            for e in range(stages.dep_offset[b], stages.dep_offset[b + 1]):
                if stages.kind[stages.dep_stage[e]] != BW and stages.dep_stage[e] != f:
                    return False
            behind, last_place = b, place
        if last_place >= 0:
            for place in range(last_place, at.shape[1]):
                if at[s, place, FW] >= 0 and at[s, place, BW] < 0:
                    return False
    return True


@numba.njit(nogil=True, cache=True)
def _is_alike(stages, t, forward):
    return (
        stages.first_layer[t] == stages.first_layer[forward] and stages.num_layers[t] == stages.num_layers[forward]
        and stages.tokens[t] == stages.tokens[forward] and stages.instances[t] == stages.instances[forward]
    )


@numba.njit(nogil=True, cache=True)
def _feeders_hold(stages, at):
    """What a module's first stage waits for is the last stage of a module that feeds it, and gradients come back."""
    last = np.full(at.shape[0], -1, np.int64)  # place of each segment's last forward
    for s in range(at.shape[0]):
        for place in range(at.shape[1]):
            if at[s, place, FW] >= 0:
                last[s] = place
    for s in range(at.shape[0]):
        place = 0
        while at[s, place, FW] < 0:
            place += 1
        t = at[s, place, FW]
        behind = at[s, place, BW]
        for e in range(stages.dep_offset[t], stages.dep_offset[t + 1]):
            source = stages.dep_stage[e]
            giver = stages.segment[source]
            if stages.kind[source] != FW or stages.microbatch[source] != stages.microbatch[t] or stages.module[source] == stages.module[t]:
                return False
            if at[giver, last[giver], FW] != source:
                return False
            ahead = at[giver, last[giver], BW]
            if ahead >= 0 and (behind < 0 or not _waits_for(stages, ahead, behind)):
                return False
    return True


def _data_hold(columns: PlanColumns, stages: _Stages, microbatches: Sequence[Mapping[str, Sequence[int]]]) -> bool:
    """Sub-microbatches, in order, hold each microbatch's instances exactly once."""
    first = np.full(int(stages.segment.max(initial=-1)) + 1, -1, np.int64)
    if not _first_forwards(stages, first):
        return False
    parts: dict[tuple[int, str], dict[int, tuple[int, int]]] = {}
    rows = (numbers(column[first]) for column in (columns.microbatch, columns.module, columns.sub_microbatch, columns.instances, columns.tokens))
    for microbatch, module, sub, instances, tokens in zip(*rows, strict=True):
        parts.setdefault((microbatch, columns.module_names[module]), {})[sub] = (instances, tokens)
    for index, microbatch_lengths in enumerate(microbatches):
        for module_name, lengths in microbatch_lengths.items():
            of_module, at = parts.pop((index, module_name), {}), 0
            for number in range(len(of_module)):
                instances, tokens = of_module.get(number, (0, 0))
                if instances < 1 or sum(lengths[at : at + instances]) != tokens:
                    return False
                at += instances
            if at != len(lengths):
                return False
    return not parts


@numba.njit(nogil=True, cache=True)
def _first_forwards(stages, first):
    """Fills ``first`` [segments] with a forward of each; whether all of a segment's have as many tokens and instances."""
    for t in range(len(stages.rank)):
        if stages.kind[t] == FW:
            s = stages.segment[t]
            if first[s] < 0:
                first[s] = t
            elif stages.tokens[first[s]] != stages.tokens[t] or stages.instances[first[s]] != stages.instances[t]:
                return False
    return True


@numba.njit(nogil=True, cache=True)
def _times(stages, order, offset, start):
    """Fills ``start`` with the earliest times under the order; returns how many stages could run."""
    count = len(start)
    waiting = np.zeros(count, np.int64)
    released = np.zeros(count + 1, np.int64)
    for t in range(count):
        for e in range(stages.dep_offset[t], stages.dep_offset[t + 1]):
            waiting[t] += 1
            released[stages.dep_stage[e] + 1] += 1
    for t in range(count):
        released[t + 1] += released[t]
    place = released[:count].copy()
    follower, lag = np.empty(released[count], np.int64), np.empty(released[count], np.int64)
    for t in range(count):
        for e in range(stages.dep_offset[t], stages.dep_offset[t + 1]):
            source = stages.dep_stage[e]
            follower[place[source]], lag[place[source]] = t, stages.dep_lag[e]
            place[source] += 1
    behind = np.full(count, -1, np.int64)
    for r in range(len(offset) - 1):
        for i in range(offset[r] + 1, offset[r + 1]):
            behind[order[i - 1]] = order[i]
            waiting[order[i]] += 1
    ready = np.empty(count, np.int64)
    size, done = 0, 0
    for t in range(count):
        if waiting[t] == 0:
            ready[size] = t
            size += 1
    while done < size:
        t = ready[done]
        done += 1
        end = start[t] + stages.duration[t]
        for i in range(released[t], released[t + 1] + 1):
            if i < released[t + 1]:
                other, arrives = follower[i], end + lag[i]
            elif behind[t] >= 0:
                other, arrives = behind[t], end
            else:
                break
            start[other] = max(start[other], arrives)
            waiting[other] -= 1
            if waiting[other] == 0:
                ready[size] = other
                size += 1
    return done


@numba.njit(nogil=True, cache=True)
def _memory(order, offset, delta_start, delta_end, initial, held, peaks):
    for r in range(len(initial)):
        held[r] = peaks[r] = initial[r]
        for i in range(offset[r], offset[r + 1]):
            held[r] += delta_start[order[i]]
            peaks[r] = max(peaks[r], held[r])
            held[r] += delta_end[order[i]]
            peaks[r] = max(peaks[r], held[r])


def _messages(columns: PlanColumns, num_stages: int) -> _Actions | None:
    """Messages by number; None where a tag is not made and awaited exactly once, or a stage or an action names what there is not."""
    num_messages = len(columns.output_tag)
    largest = int(columns.output_tag.max(initial=0))
    if int(columns.output_tag.min(initial=0)) < 0 or largest > 8 * num_messages + _SPARE or len(columns.input_tag) != num_messages:
        return None
    if not (_within(columns.input_stage, num_stages) and _within(columns.output_stage, num_stages) and _within(columns.input_tag, largest + 1)):
        return None
    number = np.full(largest + 1, -1, np.int64)
    number[columns.output_tag] = np.arange(num_messages)
    awaited = number[columns.input_tag]
    if (awaited < 0).any() or len(np.unique(awaited)) != num_messages:
        return None
    is_post = columns.op >= ISEND
    if not _within(columns.action_stage[~is_post], num_stages) or not _within(columns.tag[is_post], largest + 1):
        return None
    message = np.full(len(columns.op), -1, np.int64)
    message[is_post] = number[columns.tag[is_post]]
    if (message[is_post] < 0).any():
        return None
    consumer = np.empty(num_messages, np.int64)
    consumer[awaited] = columns.input_stage
    in_offset, in_message = _group(consumer, num_stages)
    return _Actions(
        columns.action_offset, columns.op, columns.action_stage, columns.peer, message, columns.output_stage, consumer, in_offset, in_message
    )


@numba.njit(nogil=True, cache=True)
def _group(key, size):
    """([size + 1], [len(key)]) indices by key, each key's in their order."""
    offset = np.zeros(size + 1, np.int64)
    for i in range(len(key)):
        offset[key[i] + 1] += 1
    for k in range(size):
        offset[k + 1] += offset[k]
    place, grouped = offset[:size].copy(), np.empty(len(key), np.int64)
    for i in range(len(key)):
        grouped[place[key[i]]] = i
        place[key[i]] += 1
    return offset, grouped


@numba.njit(nogil=True, cache=True)
def _edges_have_messages(stages, actions, local_stage, local_source):
    """Every dependency on another rank is one message, every other one but a stage pair's own a local input; and the other way round."""
    num_stages = len(stages.rank)
    for i in range(len(local_stage)):
        if local_stage[i] < 0 or local_stage[i] >= num_stages:
            return False
    local_offset, local = _group(local_stage, num_stages)
    carried, handed = np.zeros(len(actions.producer), np.bool_), np.zeros(len(local_stage), np.bool_)
    for t in range(num_stages):
        first, last = actions.in_offset[t], actions.in_offset[t + 1]
        for i in range(first, last):
            for j in range(first, i):
                if actions.producer[actions.in_message[i]] == actions.producer[actions.in_message[j]]:
                    return False
        for e in range(stages.dep_offset[t], stages.dep_offset[t + 1]):
            source = stages.dep_stage[e]
            found = False
            if stages.rank[source] != stages.rank[t]:
                for i in range(first, last):
                    m = actions.in_message[i]
                    if not carried[m] and actions.producer[m] == source:
                        carried[m] = found = True
                        break
            elif _is_own(stages, source, t):
                found = True
            else:
                for i in range(local_offset[t], local_offset[t + 1]):
                    if not handed[local[i]] and local_source[local[i]] == source:
                        handed[local[i]] = found = True
                        break
            if not found:
                return False
    return carried.all() and handed.all()


@numba.njit(nogil=True, cache=True)
def _is_own(stages, source, t):
    """Whether the edge is a stage pair's own (F to B, B to W): activations stay in place, nothing is handed over."""
    return (
        stages.segment[source] == stages.segment[t] and stages.vp_stage[source] == stages.vp_stage[t] and stages.kind[source] < stages.kind[t]
    )


@numba.njit(nogil=True, cache=True)
def _rank_actions_hold(num_ranks, stages, actions, order, order_offset):
    """Each rank's list by itself."""
    num_messages = len(actions.producer)
    done = np.zeros((num_messages, 4), np.bool_)  # isend, irecv, wait_send, wait_recv
    ran = np.zeros(len(stages.rank), np.bool_)
    for r in range(num_ranks):
        at = order_offset[r]
        for a in range(actions.offset[r], actions.offset[r + 1]):
            op = actions.op[a]
            if op < ISEND:
                t = actions.stage[a]
                if at == order_offset[r + 1] or order[at] != t or stages.kind[t] != op:
                    return False
                for i in range(actions.in_offset[t], actions.in_offset[t + 1]):
                    if not done[actions.in_message[i], WAIT_RECV - ISEND]:
                        return False
                ran[t] = True
                at += 1
                continue
            m = actions.message[a]
            producer, consumer = actions.producer[m], actions.consumer[m]
            sends = op in (ISEND, WAIT_SEND)
            if stages.rank[producer if sends else consumer] != r or stages.rank[consumer if sends else producer] != actions.peer[a]:
                return False
            if done[m, op - ISEND] or (op == ISEND and not ran[producer]) or (op >= WAIT_SEND and not done[m, op - WAIT_SEND]):
                return False
            done[m, op - ISEND] = True
        if at != order_offset[r + 1]:
            return False
    return done.all()


@numba.njit(nogil=True, cache=True)
def _runs_through(num_ranks, rank, actions, one_queue):
    """Runs all ranks: per directed pair the n-th send meets the n-th receive; a send is over once its receive is posted."""
    num_messages = len(actions.producer)
    channel = np.empty(num_messages, np.int64)
    for m in range(num_messages):
        channel[m] = rank[actions.producer[m]] * num_ranks + rank[actions.consumer[m]]
    first, _ = _group(channel, num_ranks * num_ranks)
    posts = np.full((2, num_messages), -1, np.int64)  # messages of each channel as they are sent, and as they are received
    count = np.zeros((2, num_ranks * num_ranks), np.int64)
    met = np.zeros(num_messages, np.bool_)
    position = actions.offset[:num_ranks].copy()
    moved = True
    while moved:
        moved = False
        for r in range(num_ranks):
            while position[r] < actions.offset[r + 1]:
                op, m = actions.op[position[r]], actions.message[position[r]]
                if op >= WAIT_SEND and not met[m]:
                    break
                if op in (ISEND, IRECV):
                    end, c = op - ISEND, channel[m]
                    number = count[end, c]
                    if one_queue and number > 0 and not met[posts[end, first[c] + number - 1]]:
                        break
                    posts[end, first[c] + number] = m
                    count[end, c] += 1
                    other = posts[1 - end, first[c] + number]
                    if other >= 0:
                        if other != m:
                            return False
                        met[m] = True
                position[r] += 1
                moved = True
    return (position == actions.offset[1:]).all()

