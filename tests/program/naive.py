"""Slow twins of lowering, of the checks and of the dry run: the same rules in plain Python over dictionaries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from megatron_dip.program.program import OP_NAMES, Program
from megatron_dip.spec.tasks import TaskGraph


def _deps(graph: TaskGraph, task: int) -> list[tuple[int, int, bool]]:
    first, last = graph.dep_offset[task], graph.dep_offset[task + 1]
    return [(int(graph.dep_task[e]), int(graph.dep_lag_ns[e]), bool(graph.dep_is_data[e])) for e in range(first, last)]


class _Launch(NamedTuple):
    """Sorted as the line is: by time, rank, kind (0 send, 1 receive, 2 task), number."""

    start: float
    rank: int
    kind: int
    item: int


def naive_messages(graph: TaskGraph) -> list[tuple[int, int, int]]:
    """(producer, consumer, lag) of each message, by consumer, then by its edges."""
    return [
        (dep, task, lag) for task in range(graph.num_tasks) for dep, lag, data in _deps(graph, task) if data and graph.rank[dep] != graph.rank[task]
    ]


def naive_launches(graph: TaskGraph, order: Sequence[Sequence[int]]) -> list[_Launch]:
    """The line: what starts next on a device with one queue, looked up among everything that could, again and again."""
    rank, messages = graph.rank.tolist(), naive_messages(graph)
    index = {int(task): i for row in order for i, task in enumerate(row)}
    channels: dict[tuple[int, int], list[int]] = {}
    for m in sorted(range(len(messages)), key=lambda m: (index[messages[m][0]], m)):
        channels.setdefault((rank[messages[m][0]], rank[messages[m][1]]), []).append(m)
    queue, free = [0.0] * graph.num_ranks, [0.0] * graph.num_ranks
    started: dict[int, float] = {}
    posted: dict[tuple[int, int], float] = {}
    line: list[_Launch] = []

    def over(m: int) -> float:
        return max(posted.get((0, m), math.inf), posted.get((1, m), math.inf)) + messages[m][2]

    def posts(end: int, rank_of_end: int) -> Iterator[tuple[int, float]]:
        """The next message of each channel, where it is made, and when the channel is free for it."""
        for channel, members in channels.items():
            left = [m for m in members if (end, m) not in posted]
            if channel[end] == rank_of_end and left and messages[left[0]][0] in started:
                before = members.index(left[0]) - 1
                yield left[0], over(members[before]) if before >= 0 else 0.0

    while True:
        candidates = []
        for r, row in enumerate(order):
            idle = max(queue[r], free[r])
            sends = [_Launch(max(idle, at), r, 0, m) for m, at in posts(0, r)]
            receives = [_Launch(max(queue[r], started[messages[m][0]], at), r, 1, m) for m, at in posts(1, r)]
            candidates += sends + receives
            left = [int(task) for task in row if int(task) not in started]
            if left and all(dep in started for dep, _, _ in _deps(graph, left[0])):
                needed = [over(m) for m, (_, consumer, _) in enumerate(messages) if consumer == left[0]]
                candidates.append(_Launch(max([idle, *needed, *(send.start for send in sends)]), r, 2, left[0]))
        if not candidates or min(candidates).start == math.inf:
            return line
        launch = min(candidates)
        line.append(launch)
        queue[launch.rank] = launch.start
        if launch.kind == 2:
            started[launch.item] = launch.start
            free[launch.rank] = launch.start + int(graph.duration_ns[launch.item])
        else:
            posted[launch.kind, launch.item] = launch.start


def naive_lower(graph: TaskGraph, order: Sequence[Sequence[int]], send_slack: int) -> list[list[tuple[str, int, int]]]:
    """Each rank's actions as (op, stage or message, peer or -1)."""
    rank, messages, line = graph.rank.tolist(), naive_messages(graph), naive_launches(graph, order)
    place = {(launch.kind, launch.item): at for at, launch in enumerate(line)}
    index = {int(task): i for row in order for i, task in enumerate(row)}
    sent = sorted(range(len(messages)), key=lambda m: (rank[messages[m][0]], rank[messages[m][1]], index[messages[m][0]], m))
    waits: dict[tuple[int, int], list[int]] = {}
    for m in sent:
        producer, _, lag = messages[m]
        row = [int(task) for task in order[rank[producer]]]
        posted = max(place[0, m], place[1, m])
        slot = index[producer] + 1
        while slot < len(row):
            between = sum(int(graph.duration_ns[task]) for task in row[index[producer] + 1 : slot])
            at = place[2, row[slot]]
            if at > posted and line[at].start >= line[posted].start + lag and between >= lag:
                break
            slot += 1
        waits.setdefault((rank[producer], min(slot + send_slack, len(row))), []).append(m)
    programs = []
    for r, row in enumerate(order):
        actions: list[tuple[str, int, int]] = []
        for launch in line:
            if launch.rank != r:
                continue
            if launch.kind == 2:
                actions += [("wait_send", m, rank[messages[m][1]]) for m in waits.get((r, index[launch.item]), [])]
                actions += [("wait_recv", m, rank[producer]) for m, (producer, consumer, _) in enumerate(messages) if consumer == launch.item]
                actions.append((("fw", "bw", "w")[graph.kind[launch.item]], launch.item, -1))
            else:
                peer = messages[launch.item][1 - launch.kind]
                actions.append((("isend", "irecv")[launch.kind], launch.item, rank[peer]))
        actions += [("wait_send", m, rank[messages[m][1]]) for m in waits.get((r, len(row)), [])]
        programs.append(actions)
    return programs


def naive_makespan(program: Program, duration_ns: Sequence[int], lag_ns: Sequence[int], one_queue: bool) -> int | None:
    """End of the last stage, one action at a time; None where ranks wait for each other."""
    rows, number = program.actions(), {int(tag): m for m, tag in enumerate(program.message_tag)}
    at = [0] * program.num_ranks
    queue, compute = [0] * program.num_ranks, [0] * program.num_ranks
    posted: dict[tuple[str, int], int] = {}
    last: dict[tuple[int, str, object], int] = {}
    ends = [0]

    def over(m: int) -> int | None:
        return max(posted["isend", m], posted["irecv", m]) + lag_ns[m] if ("isend", m) in posted and ("irecv", m) in posted else None

    while True:
        moved = False
        for r, row in enumerate(rows):
            if at[r] == len(row):
                continue
            action = row[at[r]]
            start = queue[r] if one_queue else 0
            if action.op in ("fw", "bw", "w"):
                start = max(start, compute[r])
                compute[r] = start + int(duration_ns[action.stage])
                ends.append(compute[r])
            elif action.op in ("wait_send", "wait_recv"):
                arrived = over(number[action.tag])
                if arrived is None:
                    continue
                start = compute[r] = max(compute[r], start, arrived)
            else:
                before = last.get((r, action.op, action.peer))
                free = over(before) if one_queue and before is not None else 0
                if free is None:
                    continue
                start = max(start, free, compute[r] if action.op == "isend" else 0)
                posted[action.op, number[action.tag]] = start
                last[r, action.op, action.peer] = number[action.tag]
            queue[r] = start
            at[r] += 1
            moved = True
        if not moved:
            return max(ends) if all(at[r] == len(row) for r, row in enumerate(rows)) else None


def naive_dry_run(program: Program, one_queue: bool = False) -> bool:
    """Whether all ranks reach their end, under rendezvous sends and a first-in-first-out channel for each directed pair, moved one
    action at a time. With one queue a post waits for the one before it at its end of its channel."""
    rows = program.actions()
    at = [0] * program.num_ranks
    sends: dict[tuple[object, object], list[object]] = {}
    receives: dict[tuple[object, object], list[object]] = {}

    def arrived(sender: object, receiver: object, tag: object) -> bool:
        channel = zip(sends.get((sender, receiver), []), receives.get((sender, receiver), []), strict=False)
        for sent, received in channel:
            if sent != received:
                return False
            if sent == tag:
                return True
        return False

    while True:
        moved = False
        for rank, row in enumerate(rows):
            if at[rank] == len(row):
                continue
            action = row[at[rank]]
            ends, channel = (sends, (rank, action.peer)) if action.op == "isend" else (receives, (action.peer, rank))
            if one_queue and action.op in ("isend", "irecv") and ends.get(channel) and not arrived(*channel, ends[channel][-1]):
                continue
            if action.op == "isend":
                sends.setdefault((rank, action.peer), []).append(action.tag)
            elif action.op == "irecv":
                receives.setdefault((action.peer, rank), []).append(action.tag)
            elif (action.op == "wait_send" and not arrived(rank, action.peer, action.tag)) or (
                action.op == "wait_recv" and not arrived(action.peer, rank, action.tag)
            ):
                continue
            at[rank] += 1
            moved = True
        if not moved:
            return all(at[rank] == len(row) for rank, row in enumerate(rows))


def naive_check(program: Program) -> tuple[int, int, int, int] | None:
    """The first broken rule: (its number, rank, index among the rank's actions or -1, stage or message); None if all are kept."""
    owner, kind = program.stage_rank.tolist(), program.stage_kind.tolist()
    ends = list(zip(program.producer.tolist(), program.consumer.tolist(), strict=True))
    local = list(zip(program.local_before.tolist(), program.local_after.tolist(), strict=True))
    rows = [
        [
            (OP_NAMES[program.op[a]], int(program.stage[a]), int(program.peer[a]), int(program.message[a]))
            for a in range(program.action_offset[r], program.action_offset[r + 1])
        ]
        for r in range(program.num_ranks)
    ]
    sends: dict[tuple[int, int], list[int]] = {}
    place: dict[int, int] = {}
    for r, row in enumerate(rows):
        for op, _, peer, message in row:
            if op == "isend":
                channel = sends.setdefault((r, peer), [])
                place[message] = len(channel)
                channel.append(message)
    receives: dict[tuple[int, int], int] = {}
    ran: set[int] = set()
    done: set[tuple[str, int]] = set()
    for r, row in enumerate(rows):
        for index, (op, stage, peer, message) in enumerate(row):
            if op in ("fw", "bw", "w"):
                if owner[stage] != r or ("fw", "bw", "w")[kind[stage]] != op or stage in ran:
                    return 1, r, index, stage
                for m, (_, consumer) in enumerate(ends):
                    if consumer == stage and ("wait_recv", m) not in done:
                        return 5, r, index, m
                for before, after in local:
                    if after == stage and before not in ran:
                        return 6, r, index, before
                ran.add(stage)
                continue
            producer, consumer = ends[message]
            mine, other = (producer, consumer) if op in ("isend", "wait_send") else (consumer, producer)
            posted = ("isend" if mine == producer else "irecv", message) in done
            waited = ("wait_send" if mine == producer else "wait_recv", message) in done
            if (owner[mine], owner[other]) != (r, peer) or (op in ("isend", "irecv") and posted):
                return 2, r, index, message
            if op in ("wait_send", "wait_recv") and (waited or not posted):
                return 3, r, index, message
            if op == "isend" and producer not in ran:
                return 4, r, index, message
            if op == "irecv":
                if place.get(message) != receives.get((peer, r), 0):
                    return 7, r, index, message
                receives[peer, r] = receives.get((peer, r), 0) + 1
            done.add((op, message))
    for stage, rank in enumerate(owner):
        if stage not in ran:
            return 8, rank, -1, stage
    for m, (producer, consumer) in enumerate(ends):
        if not {("isend", m), ("wait_send", m)} <= done:
            return 9, owner[producer], -1, m
        if not {("irecv", m), ("wait_recv", m)} <= done:
            return 9, owner[consumer], -1, m
    return None


def naive_stands(programs: Sequence[Program], one_queue: bool, shared: Sequence[Mapping[int, int]] = ()) -> list[int]:
    """How many actions each rank of each program gets through, one action at a time.

    Args:
        one_queue: whether a post waits until both ends of the post before it in its direction and with its peer are posted.
        shared: for each program what stages it has in common with the others: stage -> number of the meeting.
    """
    rows = [list(program.actions()) for program in programs]
    meetings = shared or [{} for _ in programs]
    at = [[0] * program.num_ranks for program in programs]
    posted: set[tuple[int, str, object]] = set()
    last: dict[tuple[int, int, str, object], object] = {}

    def is_over(p: int, tag: object) -> bool:
        return {(p, "isend", tag), (p, "irecv", tag)} <= posted

    def standing_at(p: int, meeting: int) -> bool:
        """Whether the rank of program p that runs the shared stage stands before it or is past it."""
        return any(
            meetings[p].get(action.stage) == meeting and position <= at[p][r]
            for r, row in enumerate(rows[p]) for position, action in enumerate(row) if action.op in ("fw", "bw", "w")
        )

    moved = True
    while moved:
        moved = False
        for p, program in enumerate(programs):
            for r in range(program.num_ranks):
                if at[p][r] == len(rows[p][r]):
                    continue
                action = rows[p][r][at[p][r]]
                if action.op in ("wait_send", "wait_recv") and not is_over(p, action.tag):
                    continue
                if action.op in ("isend", "irecv"):
                    before = last.get((p, r, action.op, action.peer))
                    if one_queue and before is not None and not is_over(p, before):
                        continue
                    posted.add((p, action.op, action.tag))
                    last[p, r, action.op, action.peer] = action.tag
                meeting = meetings[p].get(action.stage) if action.op in ("fw", "bw", "w") else None
                if meeting is not None and not all(standing_at(other, meeting) for other in range(len(programs))):
                    continue
                at[p][r] += 1
                moved = True
    return [count for of_program in at for count in of_program]
