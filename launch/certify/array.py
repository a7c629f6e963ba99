"""The certificate's compositions, in `array.json` beside this file, so that all know them at once.

Finding them takes minutes, and they are to stay the same ones until an axis or a rule changes. Then
`scripts/certify.py --cover` finds them anew; tests check the file against the project's own checks.
"""

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.certify.axes import AXES, TOGETHER, Row, ranks
from launch.certify.compositions import HF_FAMILIES, why_not
from launch.certify.covering import Combination, cover
from launch.errors import UserError

FILE = Path(__file__).with_name("array.json")
# A rank more, and a compiled model of ours and of transformers, as multiples of a composition on one rank.
COST_OF_A_RANK, COST_OF_COMPILE, COST_OF_COMPILE_HF = 0.5, 10.0, 20.0


@dataclass(frozen=True)
class Array:
    """The compositions, those of the core first, and what the project's checks refuse with a reason.

    In the core each value of each axis occurs, and tensor and pipeline parallelism, alone and together.
    """

    rows: list[Row]
    core: int
    refused: list[tuple[Combination, str]]


def cost(row: Row) -> float:
    """About how long a row takes, as a multiple of the shortest."""
    alone = 1.0
    if row["compile"]:
        alone = COST_OF_COMPILE_HF if row["family"] in HF_FAMILIES else COST_OF_COMPILE
    return alone * (1 + COST_OF_A_RANK * (ranks(row) - 1))


def find() -> Array:
    """Find the compositions by asking the project's checks. Takes minutes."""
    with tempfile.TemporaryDirectory(prefix="certify-") as folder:
        found = cover(AXES, TOGETHER, lambda row: why_not(row, Path(folder)), cost)
    refused = [(refusal.values, refusal.reason) for refusal in found.refusals]
    core = _core(found.rows)
    return Array([*core, *(r for r in found.rows if r not in core)], len(core), refused)


def _core(rows: list[Row]) -> list[Row]:
    """Few and cheap rows with all of `kinds`: next, the one with most of them for its cost."""
    missing = {kind for row in rows for kind in kinds(row)}
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(missing & kinds(row)) / cost(row))
        chosen.append(best)
        missing -= kinds(best)
    return chosen


def kinds(row: Row) -> set[tuple[str, Any]]:
    """What a row is of: each of its values, and whether the model is cut in two ways at once."""
    return {*row.items(), ("cut", (row["tensor"] > 1, row["pipeline"] > 1))}


def write(array: Array) -> None:
    """Write the file, a row a line."""

    def several(values: Iterable[object]) -> str:
        return "[\n" + ",\n".join(json.dumps(value) for value in values) + "\n]"

    rows = several(list(row.values()) for row in array.rows)
    refused = several([dict(values), reason] for values, reason in array.refused)
    FILE.write_text(
        f'{{"axes": {json.dumps(AXES)},\n"core": {array.core},\n'
        f'"rows": {rows},\n"refused": {refused}}}\n'
    )


def load() -> Array:
    """Read the file.

    Raises:
        UserError: if it was made for other axes.
    """
    found: dict[str, Any] = json.loads(FILE.read_text())
    if found["axes"] != {axis: list(values) for axis, values in AXES.items()}:
        raise UserError(
            f"{FILE.name}: the axes have changed; find the compositions anew: "
            "python scripts/certify.py --cover"
        )
    rows = [dict(zip(AXES, values, strict=True)) for values in found["rows"]]
    refused = [(tuple(values.items()), reason) for values, reason in found["refused"]]
    return Array(rows, found["core"], refused)
