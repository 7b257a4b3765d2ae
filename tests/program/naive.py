"""Slow twins of lowering, of the checks and of the dry run: the same rules in plain Python over dictionaries."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dip.program.program import OP_NAMES, Program
from megatron_dip.spec.tasks import TaskGraph


def _deps(graph: TaskGraph, task: int) -> list[tuple[int, int, bool]]:
    first, last = graph.dep_offset[task], graph.dep_offset[task + 1]
    return [(int(graph.dep_task[e]), int(graph.dep_lag_ns[e]), bool(graph.dep_is_data[e])) for e in range(first, last)]


def naive_sequence(graph: TaskGraph, order: Sequence[Sequence[int]]) -> dict[int, int]:
    """Task -> place among all starts; ranks of equal start in rank order."""
    left = [list(map(int, row)) for row in order]
    free = [0] * graph.num_ranks
    end: dict[int, int] = {}
    place: dict[int, int] = {}
    while True:
        candidates = []
        for rank, row in enumerate(left):
            if row and all(dep in end for dep, _, _ in _deps(graph, row[0])):
                start = max([free[rank], *(end[dep] + lag for dep, lag, _ in _deps(graph, row[0]))])
                candidates.append((start, rank))
        if not candidates:
            return place
        start, rank = min(candidates)
        task = left[rank].pop(0)
        place[task] = len(place)
        end[task] = free[rank] = start + int(graph.duration_ns[task])


def naive_lower(graph: TaskGraph, order: Sequence[Sequence[int]], lookahead: int, send_slack: int) -> list[list[tuple[str, int, int]]]:
    """Each rank's actions as (op, stage or message, peer or -1)."""
    rank = graph.rank.tolist()
    place = naive_sequence(graph, order)
    messages = [(dep, task) for task in range(graph.num_tasks) for dep, _, data in _deps(graph, task) if data and rank[dep] != rank[task]]
    sent = sorted(range(len(messages)), key=lambda m: (place[messages[m][0]], m))
    index = [{int(task): i for i, task in enumerate(row)} for row in order]
    posts: dict[tuple[int, int], list[int]] = {}
    waits: dict[tuple[int, int], list[int]] = {}
    for i, m in enumerate(sent):
        sender, receiver = rank[messages[m][0]], rank[messages[m][1]]
        channel = [n for n in sent[i:] if (rank[messages[n][0]], rank[messages[n][1]]) == (sender, receiver)]
        slot = max(-1, min(index[receiver][messages[n][1]] for n in channel) - 1 - lookahead)
        posts.setdefault((receiver, slot), []).append(m)
        posted_at = place[int(order[receiver][slot])] if slot >= 0 else -1
        first = next(
            (
                j
                for j, task in enumerate(order[sender])
                if j > index[sender][messages[m][0]] and place[int(task)] > posted_at
            ),
            len(order[sender]),
        )
        waits.setdefault((sender, min(first + send_slack, len(order[sender]))), []).append(m)
    programs = []
    for r, row in enumerate(order):
        actions = [("irecv", m, rank[messages[m][0]]) for m in posts.get((r, -1), [])]
        for i, task in enumerate(map(int, row)):
            actions += [("wait_send", m, rank[messages[m][1]]) for m in waits.get((r, i), [])]
            actions += [("wait_recv", m, rank[producer]) for m, (producer, consumer) in enumerate(messages) if consumer == task]
            actions.append((("fw", "bw", "w")[graph.kind[task]], task, -1))
            actions += [("isend", m, rank[consumer]) for m, (producer, consumer) in enumerate(messages) if producer == task]
            actions += [("irecv", m, rank[messages[m][0]]) for m in posts.get((r, i), [])]
        actions += [("wait_send", m, rank[messages[m][1]]) for m in waits.get((r, len(row)), [])]
        programs.append(actions)
    return programs


def naive_dry_run(program: Program) -> bool:
    """Whether all ranks reach their end, under rendezvous sends and a first-in-first-out channel for each directed pair, moved one
    action at a time."""
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


def naive_stands(program: Program) -> list[int]:
    """How many actions each rank gets through when a wait ends once the message's other end is posted, one action at a time."""
    rows = program.actions()
    at = [0] * program.num_ranks
    posted: set[tuple[str, object]] = set()
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(rows):
            if at[rank] == len(row):
                continue
            action = row[at[rank]]
            needed = {"wait_send": "irecv", "wait_recv": "isend"}.get(action.op)
            if needed is not None and (needed, action.tag) not in posted:
                continue
            if action.op in ("isend", "irecv"):
                posted.add((action.op, action.tag))
            at[rank] += 1
            moved = True
    return at
