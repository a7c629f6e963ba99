"""Which DeepSpeed version computes right: train a tiny model under each released version, and compare.

    python scripts/versions.py --only 0.18.2,0.19.8

Each version is installed with pip into a folder of its own, below .cache/versions, beside the present
torch. Under each, raw DeepSpeed trains a tiny model in some seventy compositions of its features on
2 or 4 CPU processes; plain PyTorch trains the same on one device. A composition whose losses, gradient
norms or weights differ by more than rounding is wrong; one that raises, dies or hangs did not run.
A version takes one or two minutes. Results that the file has already are not measured again.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
from collections.abc import Sequence

from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.failures import one_line_errors


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--from", dest="first", default="0.17.5", metavar="VERSION",
        help="the oldest of the releases that pip finds; default: 0.17.5",
    )  # fmt: skip
    which.add_argument("--only", metavar="A,B,...", help="these versions instead; needs no index")
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="versions at once; default: 1"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "versions.jsonl", metavar="FILE",
        help="results, a JSON object a line; default: runs/versions.jsonl",
    )  # fmt: skip
    parser.add_argument("--table", type=Path, metavar="PAGE", help="write all results as Markdown")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Measure what is missing, and write the page.

    Raises:
        UserError: for a version that is none, an index that is not reached, a file of something else.
    """
    from launch.versions.environments import as_numbers, released
    from launch.versions.results import read
    from launch.versions.survey import survey
    from launch.versions.table import page

    if given.jobs < 1:
        raise UserError(f"--jobs: {given.jobs} is too few; use 1 or more")
    if given.only:
        versions = sorted({name.strip() for name in given.only.split(",")}, key=as_numbers)
    else:
        versions = released(given.first)
    survey(versions, given.out, given.jobs, lambda line: print(line, flush=True))
    if given.table:
        given.table.write_text(page(read(given.out)))
        print(f"table: {given.table}")
    print(f"results: {given.out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    given = parse_arguments(arguments)
    with one_line_errors():
        run(given)


if __name__ == "__main__":
    main()
