"""Slow, obvious twin of the deal: loads are added up anew for every question, and every swap is tried out on a copy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction
from math import ceil

TRIES = 4
Work = Sequence[Sequence[int]]
"""[N][K]"""


def loads(work: Work, replica_of: Sequence[int], num_replicas: int) -> list[int]:
    columns = range(len(work[0]))
    return [
        max(sum(row[k] for row, other in zip(work, replica_of, strict=True) if other == replica) for k in columns)
        for replica in range(num_replicas)
    ]


def bound(work: Work, num_replicas: int) -> int:
    size = len(work) // num_replicas
    bounds = []
    for k in range(len(work[0])):
        column = sorted(row[k] for row in work)
        bounds.append(ceil(Fraction(sum(column), num_replicas)))
        bounds.append(column[-1] + sum(column[: size - 1]))
    return max(bounds)


def swap(work: Work, num_replicas: int, target: int, replica_of: list[int]) -> int:
    """As the kernel: changes ``replica_of``, returns the largest load. Members keep the places in which swaps put them."""
    replicas = range(num_replicas)
    members = [[i for i, other in enumerate(replica_of) if other == replica] for replica in replicas]
    while True:
        now = loads(work, replica_of, num_replicas)
        heavy = now.index(max(now))
        if now[heavy] <= target:
            return now[heavy]
        enough = max([target, *(now[replica] for replica in replicas if replica != heavy)])
        best: tuple[int, int, int, int] | None = None
        tries = 0
        for light in sorted(replicas, key=lambda replica: (now[replica], replica)):
            if now[light] >= now[heavy]:
                continue
            for leaving, coming in itertools.product(members[heavy], members[light]):
                trial = list(replica_of)
                trial[leaving], trial[coming] = light, heavy
                then = loads(work, trial, num_replicas)
                value = max(then[heavy], then[light])
                if value < (now[heavy] if best is None else best[0]):
                    best = (value, light, leaving, coming)
            if best is not None:
                if best[0] <= enough or tries == TRIES:
                    break
                tries += 1
        if best is None:
            return now[heavy]
        _, light, leaving, coming = best
        replica_of[leaving], replica_of[coming] = light, heavy
        members[heavy][members[heavy].index(leaving)], members[light][members[light].index(coming)] = coming, leaving


def heaviest_first(work: Work, num_replicas: int) -> list[int]:
    size = len(work) // num_replicas
    replica_of = [-1] * len(work)
    for index in sorted(range(len(work)), key=lambda i: (-sum(work[i]), i)):
        dealt = [[work[i] for i, other in enumerate(replica_of) if other == replica] for replica in range(num_replicas)]
        with_room = [replica for replica in range(num_replicas) if len(dealt[replica]) < size]
        replica_of[index] = min(with_room, key=lambda replica: (max([sum(column) for column in zip(*dealt[replica], strict=True)], default=0), replica))
    return replica_of


def rename(num_replicas: int, replica_of: Sequence[int]) -> list[int]:
    pairs = list(itertools.product(range(num_replicas), repeat=2))
    overlap = {(share, replica): sum(1 for i, other in enumerate(replica_of) if other == share and i % num_replicas == replica) for share, replica in pairs}
    name: dict[int, int] = {}
    for share, replica in sorted(pairs, key=lambda pair: (-overlap[pair], pair)):
        if share not in name and replica not in name.values():
            name[share] = replica
    return [name[share] for share in replica_of]


def deal(work: Work, num_replicas: int) -> list[int]:
    least = bound(work, num_replicas)
    as_read = [index % num_replicas for index in range(len(work))]
    found = list(as_read)
    if swap(work, num_replicas, least + least // 200, found) <= least + least // 200:
        return found
    fresh, swapped = heaviest_first(work, num_replicas), list(as_read)
    best = swap(work, num_replicas, least + least // 10_000, fresh)
    reached = swap(work, num_replicas, least + least // 10_000, swapped)
    wanted = min(best, reached) + min(best, reached) // 200
    found = list(as_read)
    if swap(work, num_replicas, wanted, found) <= wanted:
        return found
    return swapped if reached <= wanted else rename(num_replicas, fresh)


def swap_pairs(
    work: Work, planned: Sequence[int], surplus: Sequence[int], fill: int, too_slow: int, near: int, tried: set[tuple[int, int]], replica_of: list[int]
) -> list[tuple[int, int, int, int]]:
    """As the kernel: changes ``replica_of``, returns (leaving, coming, foretold of the slow one, of the fast one) of each pair."""
    size, was = len(work) // len(planned), list(replica_of)

    def foretold(replica: int, leaving: int, coming: int) -> int:
        mine = [i for i, other in enumerate(was) if other == replica]
        then = [coming if i == leaving else i for i in mine]
        load, load_then = (max(sum(column) for column in zip(*[work[i] for i in share], strict=True)) for share in (mine, then))
        heaviest, heaviest_then = (max(sum(work[i]) for i in share) for share in (mine, then))
        return planned[replica] + surplus[replica] + load_then - load + fill * (heaviest_then - heaviest) // 1000

    free, swaps = set(range(len(planned))), []
    for slow in sorted(range(len(planned)), key=lambda replica: (-planned[replica], replica)):
        if planned[slow] <= too_slow or slow not in free:
            continue
        best: tuple[int, int, int, int] | None = None
        tries = 0
        for fast in sorted(free, key=lambda replica: (planned[replica], replica)):
            if planned[fast] >= planned[slow]:
                continue
            for leaving in range(len(was)):
                for coming in range(len(was)):
                    if was[leaving] == slow and was[coming] == fast and (leaving, coming) not in tried:
                        value = max(foretold(slow, leaving, coming), foretold(fast, coming, leaving))
                        if value < (planned[slow] if best is None else best[0]):
                            best = (value, fast, leaving, coming)
            if best is not None:
                if best[0] <= near or tries == TRIES:
                    break
                tries += 1
        if best is not None:
            _, fast, leaving, coming = best
            free -= {slow, fast}
            replica_of[leaving], replica_of[coming] = fast, slow
            swaps.append((leaving, coming, foretold(slow, leaving, coming), foretold(fast, coming, leaving)))
    assert all(replica_of.count(replica) == size for replica in range(len(planned)))
    return swaps
