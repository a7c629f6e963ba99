"""Benchmark a recipe against a plain PyTorch loop on one device of this machine.

    python scripts/bench.py --config recipes/gpt_tiny_zero2.yaml --ranks 2

Runs some steps of both, alternating and in fresh processes, and prints tokens/s, their ratio and
peak memory. Compare ratios rather than tokens/s: they also hold on a busy machine. Without GPUs,
the plain loop uses all cores, and so do the ranks together; then the total ratio is the fair one.
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
from launch.config.load import load_recipe
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.perf.benchmark import LAYOUT, Speed, as_json, bench
from launch.runtime.failures import one_line_errors
from launch.runtime.local_launcher import choose_ranks


def table(recipe: Recipe, speeds: list[Speed]) -> Table:
    """A readable table of the configurations and their ratios."""
    plain = speeds[0]
    found = Table(
        "", "ranks", "tokens/s", "per rank", "ratio, total", "ratio, a rank", "s/step", box=None
    )
    found.add_column("peak GiB per rank")
    found.add_column("MFU")
    found.title = f"{recipe.name} on {plain.device}"
    for speed in speeds:
        found.add_row(
            recipe.deepspeed["config"] if speed.name == LAYOUT else speed.name,
            str(speed.ranks),
            f"{speed.tokens_per_second:,.0f}",
            f"{speed.tokens_per_second_per_rank:,.0f}",
            f"{speed.tokens_per_second / plain.tokens_per_second:.2f}",
            f"{speed.tokens_per_second_per_rank / plain.tokens_per_second:.2f}",
            f"{speed.seconds_per_step:.3f}",
            f"{speed.memory_gib:.2f}",
            "-" if speed.mfu is None else f"{speed.mfu:.1%}",
        )
    return found


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="default: one a GPU, and 2 without GPUs; or else the fewest that the layout takes",
    )
    parser.add_argument(
        "--steps", type=int, default=10, metavar="K", help="steps to time a round; default: 10"
    )
    parser.add_argument(
        "--warmup", type=int, default=3, metavar="W", help="steps before those; default: 3"
    )
    parser.add_argument("--rounds", type=int, default=2, metavar="R", help="default: 2")
    add_recipe_arguments(parser)
    parser.add_argument(
        "--layerwise",
        action="store_true",
        help="time one process with its layers on N devices too (Accelerate's dispatch)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Time both and print the results.

    Raises:
        UserError: for invalid numbers; see also `launch.perf.benchmark.bench`.
    """
    for name, least in (("steps", 1), ("warmup", 0), ("rounds", 1)):
        value = getattr(given, name)
        if value < least:
            raise UserError(f"--{name}: {value} is too few; use {least} or more")
    steps = given.warmup + given.steps
    recipe = load_recipe(given.config, [*given.set, f"train.steps={steps}"])
    ranks = choose_ranks(given.ranks, recipe.parallel.model_parallel_size)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    speeds = bench(recipe, ranks, given.warmup, given.rounds, given.layerwise, say)
    if given.json:
        print(json.dumps(as_json(recipe, speeds), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(recipe, speeds))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    given = parse_arguments(arguments)
    with one_line_errors():
        run(given)


if __name__ == "__main__":
    main()
