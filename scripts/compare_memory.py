"""Measure the memory and speed of the usual ways to train a model, beside what is predicted.

    python scripts/compare_memory.py --config recipes/gpt_tiny_zero1.yaml --ranks 2
    python scripts/compare_memory.py --config recipes/gpt_1b3_zero1.yaml --set train.compile=false

Standard training, activation checkpointing, mixed precision, ZeRO-1 to 3, CPU offload, tensor 2,
pipeline 2, a naive layer split and a hybrid, as far as the ranks allow, each for a few steps on random
tokens in fresh processes. On GPUs the peak is the allocator's. On a CPU it is that of all tensors'
bytes, and kernels keep other tensors than the predicted ones of a GPU; the table says so.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from launch.config.cli_args import add_recipe_arguments
from launch.errors import UserError
from launch.perf.compare_methods import Compared, compare
from launch.perf.memory_measure import STEPS, WARMUP
from launch.planner.picture import draw
from launch.runtime.failures import one_line_errors
from launch.runtime.local_launcher import choose_ranks


def table(found: list[Compared], ranks: int) -> Table:
    """A readable table, in the order of the methods."""
    device = found[0].measured.device
    counted = (
        "all tensors' bytes on the CPU" if device == "cpu" else f"torch's allocator on {device}"
    )
    shown = Table(box=None, title=f"{ranks} ranks; peak of the fullest rank: {counted}")
    for name in ("", "peak GiB", "predicted", "error", "tokens/s"):
        shown.add_column(name, no_wrap=True)
    for each in found:
        shown.add_row(
            each.name,
            f"{each.measured_gib:.3f}",
            f"{each.predicted_gib:.3f}",
            f"{each.predicted_gib / each.measured_gib - 1:+.1%}",
            f"{each.tokens_per_second:,.0f}",
        )
    return shown


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe_arguments(parser)
    parser.add_argument("--ranks", type=int, metavar="N", help="default: one a GPU, else 2")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="K", help="of each method")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="methods with this in their name"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw it (png, svg)")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Measure, and print what was found.

    Raises:
        UserError: for bad input; see also `launch.perf.compare_methods.compare`.
    """
    if given.steps <= WARMUP:
        raise UserError(f"--steps: {given.steps} leaves none to time; use {WARMUP + 1} or more")
    ranks = choose_ranks(given.ranks)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    found = compare(given.config, given.set, ranks, given.steps, given.only, say)
    if not found:
        raise UserError(f"--only: no method for {ranks} ranks has '{given.only}' in its name")
    if given.json:
        values = [
            {
                "method": each.name,
                "device": each.measured.device,
                "measured_bytes": each.measured.peak,
                "predicted_gib": each.predicted_gib,
                "tokens_per_second": each.tokens_per_second,
            }
            for each in found
        ]
        print(json.dumps(values, indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(found, ranks))
    if given.picture:
        bars = [(each.name, each.predicted.parts, 0.0, each.measured_gib) for each in found]
        draw(
            bars,
            None,
            f"Peak memory, predicted parts and measured sum, {ranks} ranks",
            given.picture,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    given = parse_arguments(arguments)
    with one_line_errors():
        run(given)


if __name__ == "__main__":
    main()
