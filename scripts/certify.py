"""Certify that features compose: train some hundred compositions of them, and compare with one device.

    python scripts/certify.py --core
    python scripts/certify.py --only "pipeline=2" --jobs 4
    python scripts/certify.py --table CERTIFICATE.md

In the compositions (--list) all pairs and triples of values meet that compose, of the axes in
launch/certify/axes.py. Each is a small model that is trained for four steps on 1 to 8 ranks, by gloo
on the CPU or by NCCL on this machine's GPUs, and compared with plain PyTorch without DeepSpeed. What
is done is a line of the results file, and is not done again with the same versions and commit. Exit
code 0: all hold; 1: some do not, or could not be run; 2: error in the command line.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launch.certify import array, results, table
from launch.certify.axes import Row, name, ranks, show
from launch.certify.run import Devices, Outcome, run_all
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.failures import one_line_errors
from launch.runtime.fork_server import run_ranks

EXIT_NOT_ALL_HOLD = 1


def chosen(given: argparse.Namespace) -> list[Row]:
    """The compositions that the command line names.

    Raises:
        UserError: if it names none.
    """
    found = array.load()
    rows = found.rows[: found.core] if given.core else found.rows
    words = set((given.only or "").split())
    rows = [row for row in rows if words <= _words(row)]
    if not rows:
        raise UserError(
            f"--only {given.only}: no composition has that; write values as --list does: stage=2 tensor=4"
        )
    return rows


def _words(row: Row) -> set[str]:
    return {f"ranks={ranks(row)}", *(f"{axis}={show(value)}" for axis, value in row.items())}


def certify(rows: list[Row], jobs: int | None, out: Path) -> int:
    """Run what is not in the file yet, and add it there; return the number that does not hold.

    Raises:
        UserError: for a file of something else, or fewer than one job.
    """
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs: {jobs} is too few; use 1 or more")
    devices = Devices.of_this_machine(jobs)
    jobs = jobs or len(devices) or max(1, len(os.sched_getaffinity(0)) // 2)
    using = results.versions(run_ranks(results.device_name, 1, show=None)[0])
    done = results.finished(results.read(out), using)
    todo = [row for row in rows if name(row) not in done]
    print(f"{len(todo)} compositions to run, {len(rows) - len(todo)} in {out} already", flush=True)
    console = Console(width=None if sys.stdout.isatty() else 200)
    columns = (TextColumn("certify"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="certify-", ignore_cleanup_errors=True) as folder,
        Progress(*columns, console=console) as bar,
    ):
        task = bar.add_task("", total=len(todo))

        def add(row: Row, outcome: Outcome) -> None:
            results.append(out, results.record(row, outcome, using))
            share = "" if outcome.share is None else f" {outcome.share:.0%} ({outcome.worst})"
            seconds = f"{outcome.seconds:.1f} s"
            bar.console.print(
                f"{outcome.status}{share}, {seconds}, {ranks(row)} ranks: {name(row)}",
                style=None if outcome.status == "holds" else "red",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
            if outcome.text:
                bar.console.print(
                    f"  {outcome.text}", markup=False, highlight=False, soft_wrap=True
                )
            bar.advance(task)

        run_all(todo, Path(folder), jobs, devices, add)
    kind = "CPU" if using["device"] == "CPU" else "GPU"
    latest = results.newest(each for each in results.read(out) if each["versions"] == using)
    statuses = Counter(latest[name(row), kind]["status"] for row in rows)
    print(", ".join(f"{count} {status}" for status, count in statuses.most_common()))
    return len(rows) - statuses["holds"]


def cover() -> None:
    """Find the compositions anew."""
    found = array.find()
    array.write(found)
    print(
        f"{len(found.rows)} compositions, {found.core} of them the core, and {len(found.refused)} refused "
        f"combinations: {array.FILE}"
    )


def print_list(rows: list[Row]) -> None:
    """Print the compositions, and what the project's checks refuse."""
    for row in rows:
        print(f"{ranks(row)} ranks: {name(row)}")
    print()
    for values, reason in array.load().refused:
        print(f"refused: {' '.join(f'{a}={show(v)}' for a, v in values)}: {reason}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--core", action="store_true", help="the few in which each value occurs")
    parser.add_argument(
        "--only", metavar="TEXT", help='those with these values: "stage=2 tensor=4", "ranks=2"'
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="how many to run side by side; default: half the cores, or one a GPU; more share the GPUs",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=ROOT / "runs" / "certify.jsonl",
        help="the results; default: runs/certify.jsonl",
    )
    parser.add_argument("--list", action="store_true", help="print the compositions and end")
    parser.add_argument(
        "--table", type=Path, metavar="PAGE", help="write the page from the results and end"
    )
    parser.add_argument(
        "--cover",
        action="store_true",
        help="find the compositions anew, after an axis or a rule has changed, and end (minutes)",
    )
    given = parser.parse_args(arguments)
    # Of the semaphores of ranks that were ended: a line at the end that helps nobody. The process that
    # prints it takes over our options.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    with one_line_errors():
        if given.cover:
            cover()
        elif given.list:
            print_list(chosen(given))
        elif given.table:
            given.table.write_text(table.page(array.load(), results.read(given.out)))
            print(given.table)
        else:
            return EXIT_NOT_ALL_HOLD if certify(chosen(given), given.jobs, given.out) else 0
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # no need to wait for torch's threads
