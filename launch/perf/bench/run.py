"""Time rows in turns, each turn in fresh processes, and compare what they trained with the plain loop.

The rows alternate, so that a temporary slowdown of the machine affects all of them. A row that crashes
or runs out of memory is a line among the results, and the others go on.
"""

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
from launch.runtime.fork_server import run_ranks
from launch.runtime.process_group import threads_per_rank

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
            for row in rows if turn % 2 == 0 else reversed(rows):
                if row.name in failed:
                    continue
                say(f"round {turn + 1} of {timing.rounds}: {row.name} on {_ranks(row)}")
                trace = None if traces is None else str(traces / re.sub(r"[^\w.-]+", "_", row.name))
                try:
                    turns[row.name].append(_take_turn(row, trace, Path(folder)))
                except Exception as error:  # of any type: it is a rank's
                    failed[row.name] = explain(error)
                    say("\n".join([f"{row.name}: {error}", *getattr(error, "__notes__", [])]))
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


def _ranks(row: Row) -> str:
    return "1 rank" if row.processes == 1 else f"{row.processes} ranks"


def _take_turn(row: Row, trace: str | None, scratch: Path) -> list[Line]:
    values, ranks = row.recipe.model_dump(), row.processes
    threads = str(threads_per_rank(ranks))
    env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    if row.kind == "recipe":
        return run_ranks(measure_recipe, ranks, values, trace, scratch, env=env, show=None)
    if row.kind == "peer":
        arguments = (values, trace, row.peer, row.json_keys)
        return run_ranks(measure_peer, ranks, *arguments, env=env, show=None)
    return run_ranks(measure_plain, ranks, values, trace, row.ranks, env=env, show=None)


def _compare(row: Row, plain: Line | None, turns: Sequence[Sequence[Line]]) -> Line:
    """The furthest that a turn's losses are from the plain loop's."""
    if row.incomparable:
        return compared(None, row.incomparable)
    if plain is None:
        return compared(None, "the plain loop did not run")
    bounds = bounds_of(row)
    found = [compare_losses(plain["losses"], turn[0]["losses"], bounds) for turn in turns]
    return compared(max(found, key=lambda equality: equality.share), None)


def explain(error: Exception) -> str:
    """Why a row failed, in one line."""
    text = str(error)
    if any(words in text for words in OUT_OF_MEMORY):
        return "out of memory"
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return f"{kind}{' '.join(text.split())}"[:LONGEST_ERROR]


def is_wrong(line: Line) -> bool:
    """Whether a row ran and did not train the same as the plain loop."""
    return line.get("equal") is False and line["kind"] != "peer"
