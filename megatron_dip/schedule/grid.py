"""Schedules as text grids that read back: one line a rank, one cell a stage, in execution order.

A cell is ``<module>:<vp_stage><F|B|W><microbatch>.<sub_microbatch>``, for example ``vit:0F3.1``: the forward of microbatch 3's second
ViT sub-microbatch through the rank's first ViT chunk. A line is ``rank 0 | cell cell ...``; columns are padded to one width, the width
carries no meaning. A marked cell stands in ``>``...``<``. Times are not part of a grid.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megatron_dip.spec.errors import InputError
from megatron_dip.spec.plan import Plan, PlanStage, StageKind

_LETTERS: dict[StageKind, str] = {"fw": "F", "bw": "B", "w": "W"}
_KINDS: dict[str, StageKind] = {letter: kind for kind, letter in _LETTERS.items()}
_CELL = re.compile(r"(?P<module>[^\s:|<>]+):(?P<vp_stage>\d+)(?P<kind>[FBW])(?P<microbatch>\d+)\.(?P<sub_microbatch>\d+)")


@dataclass(frozen=True, slots=True)
class Cell:
    """One stage of a rank's line."""

    module: str
    vp_stage: int
    kind: StageKind
    microbatch: int
    sub_microbatch: int

    def __str__(self) -> str:
        return f"{self.module}:{self.vp_stage}{_LETTERS[self.kind]}{self.microbatch}.{self.sub_microbatch}"


def cell_of(stage: PlanStage) -> Cell:
    return Cell(stage.module, stage.vp_stage, stage.kind, stage.microbatch, stage.sub_microbatch)


def plan_cells(plan: Plan) -> list[list[Cell]]:
    """For each rank its cells in execution order."""
    return [[cell_of(plan.stages[stage]) for stage in stages] for stages in plan.order]


def format_grid(cells: Sequence[Sequence[Cell]], marked: Collection[tuple[int, int]] = ()) -> str:
    """The grid's text. ``marked``: (rank, position) of the cells to point at."""
    rows = [
        [f">{cell}<" if (rank, position) in marked else str(cell) for position, cell in enumerate(row)] for rank, row in enumerate(cells)
    ]
    width = max((len(cell) for row in rows for cell in row), default=0)
    label = len(str(len(rows) - 1))
    lines = [f"rank {rank:>{label}} | " + " ".join(cell.ljust(width) for cell in row) for rank, row in enumerate(rows)]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def parse_grid(text: str) -> list[list[Cell]]:
    """Reads a grid back, marks dropped. Raises InputError that names line and cell."""
    result: list[list[Cell]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        head, bar, body = line.partition("|")
        if not bar or head.split() != ["rank", str(len(result))]:
            raise InputError(f"line {number}", line, f"does not start with 'rank {len(result)} |'", "write one line for each rank, in order")
        row = []
        for word in body.split():
            match = _CELL.fullmatch(word.removeprefix(">").removesuffix("<"))
            if match is None:
                raise InputError(f"line {number}", word, "not a cell", "write <module>:<vp_stage><F|B|W><microbatch>.<sub_microbatch>")
            row.append(
                Cell(
                    match["module"], int(match["vp_stage"]), _KINDS[match["kind"]], int(match["microbatch"]), int(match["sub_microbatch"])
                )
            )
        result.append(row)
    return result
