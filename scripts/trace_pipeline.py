"""Trace a pipeline: time every instruction of real steps on every stage, and plot the timeline.

    python scripts/trace_pipeline.py --config recipes/gpt_tiny_pp2_zero1.yaml

Trains some steps of the recipe's own layout with each schedule (`--schedules`) and each number of
micro batches. Prints the bubble (the fraction of a step that a stage is idle) next to the
ideal one, and the number of micro batches whose activations each stage holds at once. Writes
timeline.png, trace.json (for https://ui.perfetto.dev or chrome://tracing) and bubble.csv. Exit code
0: success; 1: a stage held a different number of micro batches than its schedule specifies; 2:
error in the recipe or command line.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import os
from collections.abc import Sequence
from typing import get_args

from rich.console import Console

from launch.config.cli_args import add_recipe_arguments
from launch.config.load import load_recipe
from launch.config.parallel_rules import check_parallel
from launch.config.schema import Parallel, Recipe
from launch.errors import UserError
from launch.paths import ROOT
from launch.perf.pipeline_trace import check_pipeline, trace
from launch.runtime.failures import one_line_errors
from launch.runtime.local_launcher import choose_ranks

EXIT_DIFFERENT = 1


def show(
    recipe: Recipe,
    ranks: int,
    schedules: list[str],
    micro_batches: list[int],
    steps: int,
    out: Path,
) -> bool:
    """Trace, print the tables, write the files; return whether live micro batches are as expected.

    Raises:
        UserError: see `launch.perf.pipeline_trace.trace`.
    """
    from launch.perf.trace_plots import (
        bubble_table,
        live_table,
        save_picture,
        write_chrome,
        write_csv,
    )

    parallel = recipe.parallel
    print(
        f"{recipe.name}: {steps} timed steps each of {', '.join(schedules)} with {micro_batches} "
        f"micro batches, on {parallel.pipeline} stages",
        flush=True,
    )
    traced = trace(recipe, ranks, schedules, micro_batches, steps)
    cores = len(os.sched_getaffinity(0))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(bubble_table(traced.runs))
    console.print(live_table(traced.runs))
    print(f"device: {traced.device}; {ranks} ranks, {cores} usable cores")
    if traced.device != "cpu":
        print(
            "the passes' stream was synchronized around every instruction, which costs some overlap"
        )
    elif ranks > cores:
        print(
            f"{ranks} ranks share {cores} cores: passes, and so the measured bubble, include waiting for "
            "a core"
        )
    own = recipe.train.global_batch_size * parallel.tensor * parallel.pipeline
    own //= ranks * recipe.train.micro_batch_size
    drawn = min(micro_batches, key=lambda number: (abs(number - own), number))
    runs = [run for run in traced.runs if run.micro_batches == drawn]
    out.mkdir(parents=True, exist_ok=True)
    save_picture(runs, f"{recipe.name} on {traced.device}", out / "timeline.png")
    write_chrome(runs, out / "trace.json")
    write_csv(traced.runs, out / "bubble.csv")
    print(f"picture: {out / 'timeline.png'}; Chrome trace: {out / 'trace.json'}")
    return all(run.live() == run.expected() for run in traced.runs)


def numbers(text: str) -> list[int]:
    """Parse numbers of micro batches such as "2,4,8" into a sorted list without duplicates.

    Raises:
        UserError: for anything else.
    """
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise UserError(
            f"--micro-batches: '{text}' is no list of whole numbers above 0; write for example 2,4,8"
        )
    return found


def schedules_of(text: str | None, recipe: Recipe) -> list[str]:
    """Parse names of schedules such as "1f1b,zb-h1"; without any, those that the recipe composes with.

    Raises:
        UserError: for a name that is no schedule, or one that the recipe does not compose with.
    """
    known: list[str] = list(get_args(Parallel.model_fields["schedule"].annotation))
    if text is None:
        if recipe.parallel.model_chunks > 1:
            return [recipe.parallel.schedule]
        out = ("interleaved", "zb-h1") if recipe.train.compile else ("interleaved",)
        return [name for name in known if name not in out]
    for name in text.split(","):
        if name not in known:
            raise UserError(f"--schedules: no schedule '{name}'; they are {', '.join(known)}")
        parallel = recipe.parallel.model_copy(update={"schedule": name})
        check_parallel(recipe.model_copy(update={"parallel": parallel}))
    return list(dict.fromkeys(text.split(",")))


def check_groups(recipe: Recipe, micro_batches: list[int]) -> None:
    """Check numbers of micro batches against the interleaved schedule.

    Raises:
        UserError: for one that is no multiple of the stages.
    """
    stages = recipe.parallel.pipeline
    wrong = [number for number in micro_batches if number % stages]
    if recipe.parallel.model_chunks > 1 and wrong:
        raise UserError(
            f"--micro-batches: {wrong[0]} is no multiple of the {stages} stages, as interleaved needs; "
            f"write for example {stages},{2 * stages}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="default: one pipeline, tensor x pipeline ranks"
    )
    parser.add_argument(
        "--schedules",
        metavar="S,S",
        help="default: 1f1b,zb-h1,gpipe,naive; of a recipe with model chunks: interleaved",
    )
    parser.add_argument(
        "--micro-batches", default="2,4,8,16", metavar="M,M", help="default: 2,4,8,16"
    )
    parser.add_argument(
        "--steps", type=int, default=5, metavar="K", help="steps to time of each; default: 5"
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the files; default: runs/trace/<recipe>"
    )
    given = parser.parse_args(arguments)
    with one_line_errors():
        if given.steps < 1:
            raise UserError(f"--steps: {given.steps} is too few; use 1 or more")
        micro_batches = numbers(given.micro_batches)
        recipe = load_recipe(given.config, given.set)
        check_pipeline(recipe)
        one_pipeline = recipe.parallel.model_parallel_size
        ranks = choose_ranks(one_pipeline if given.ranks is None else given.ranks)
        out = given.out or ROOT / "runs" / "trace" / recipe.name
        schedules = schedules_of(given.schedules, recipe)
        check_groups(recipe, micro_batches)
        right = show(recipe, ranks, schedules, micro_batches, given.steps, out)
        return 0 if right else EXIT_DIFFERENT


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # no need to wait for torch's threads
