"""Time rows in turns, each turn in fresh processes, and compare what they trained with the plain loop.

The rows alternate, so that a temporary slowdown of the machine affects all of them. A row that crashes
or runs out of memory is a line among the results, and the others go on.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from launch.errors import UserError
from launch.perf.bench.equality import bounds_of, compare_losses
from launch.perf.bench.measure import measure_plain, measure_recipe
from launch.perf.bench.result import (
    Line,
    ResultFile,
    Timing,
    compared,
    described,
    measured,
    surroundings,
)
from launch.perf.bench.rows import Row
from launch.perf.peers.run import measure_peer
from launch.runtime.failures import OUT_OF_MEMORY

LONGEST_ERROR = 300  # characters


def bench(
    rows: Sequence[Row],
    timing: Timing,
    file: ResultFile,
    earlier: Iterable[Line] = (),
    traces: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[Line]:
    """Time the rows; returns a line for each, in their order.

    Args:
        rows: with a plain loop before those that are compared with it.
        timing: the steps to run; each recipe's `train.steps` are its warm-up, its timed steps, and with
            `traces` those that are profiled.
        file: gets every row's line as soon as it has run.
        earlier: lines of an earlier benchmark; a plain loop that is among them is not run again.
        traces: a folder for the traces of profiled steps; None: none are profiled.
        say: receives lines to report to the user.
    """
    using = surroundings()
    known = {
        line["trains"]: line for line in earlier if line["kind"] == "plain" and line.get("losses")
    }
    for row in rows:
        if row.kind == "plain" and row.trains in known:
            say(f"{row.name}: its losses are known from an earlier benchmark")
    rows = [row for row in rows if not (row.kind == "plain" and row.trains in known)]
    turns: dict[str, list[list[Line]]] = {row.name: [] for row in rows}
    failed: dict[str, str] = {}
    lines: dict[str, Line] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for turn in range(timing.rounds):
            for number, row in _in_turn(rows, turn):
                if row.name in failed:
                    continue
                say(f"round {turn + 1} of {timing.rounds}: {row.name} on {_ranks(row)}")
                place = Path(folder) / f"{turn}-{number}"
                place.mkdir()
                trace = None if traces is None else str(traces / re.sub(r"[^\w.-]+", "_", row.name))
                try:
                    turns[row.name].append(_take_turn(row, place, trace))
                except UserError as error:
                    failed[row.name] = explain(str(error))
                    say(f"{row.name}: {failed[row.name]}")
                line = {**described(row), "error": failed.get(row.name)}
                if row.name not in failed:
                    line |= measured(row, timing, turns[row.name])
                    if row.kind == "plain":
                        known[row.trains] = line
                    else:
                        line |= _compare(row, known.get(row.trains), turns[row.name])
                lines[row.name] = {**line, **using}
                file.write(lines[each.name] for each in rows if each.name in lines)
    return [lines[row.name] for row in rows]


def _in_turn(rows: Sequence[Row], turn: int) -> list[tuple[int, Row]]:
    numbered = list(enumerate(rows))
    return numbered if turn % 2 == 0 else numbered[::-1]


def _ranks(row: Row) -> str:
    return "1 rank" if row.processes == 1 else f"{row.processes} ranks"


def _take_turn(row: Row, place: Path, trace: str | None) -> list[Line]:
    from launch.runtime.local_launcher import run_local_ranks

    values = row.recipe.model_dump()
    if row.kind == "recipe":
        run_local_ranks(measure_recipe, row.ranks, values, place, trace)
    elif row.kind == "peer":
        run_local_ranks(measure_peer, row.ranks, values, place, trace, row.name)
    else:
        run_local_ranks(measure_plain, 1, values, place, trace, row.ranks)
    return [json.loads(file.read_text()) for file in sorted(place.glob("*.json"))]


def _compare(row: Row, plain: Line | None, turns: Sequence[Sequence[Line]]) -> Line:
    """The furthest that a turn's losses are from the plain loop's."""
    if row.incomparable:
        return compared(None, row.incomparable)
    if plain is None:
        return compared(None, "the plain loop did not run")
    bounds = bounds_of(row)
    found = [compare_losses(plain["losses"], turn[0]["losses"], bounds) for turn in turns]
    return compared(max(found, key=lambda equality: equality.share), None)


def explain(error: str) -> str:
    """Why a row failed, in one line."""
    if any(words in error for words in OUT_OF_MEMORY):
        return "out of memory"
    return error[:LONGEST_ERROR]


def is_wrong(line: Line) -> bool:
    """Whether a row ran and did not train the same as the plain loop."""
    return line.get("equal") is False and line["kind"] != "peer"
