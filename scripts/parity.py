"""Check that a layout is numerically equivalent to one device: run both and compare.

    python scripts/parity.py --config recipes/gpt_tiny_zero2.yaml --ranks 2

Runs K steps of the recipe in plain PyTorch on one device, without DeepSpeed, and K steps with the
recipe's own layout on N ranks, with the same initial weights and batches. Exit code 0: all losses,
gradient norms and final weights agree within rounding; 1: they do not; 2: error in the recipe or
command line.

With --bisect, a comparison that fails is followed by where it first does: both runs are repeated up to
that step, with every module's output and its gradient, and one line names the first module (or the
batch, the loss, a parameter's gradient, the norm, the optimizer's step), its step and its ranks.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import gc
import os
import tempfile
from collections.abc import Sequence

from rich.console import Console

from launch.config.cli_args import add_recipe_arguments
from launch.config.load import load_recipe
from launch.config.schema import Recipe
from launch.errors import UserError
from launch.paths import ROOT
from launch.runtime.failures import one_line_errors
from launch.runtime.local_launcher import choose_ranks, run_local_ranks

EXIT_DIFFERENT = 1
MOST_STEPS = 10  # rounding errors grow with each step; the tolerances are set for this many


def check(recipe: Recipe, ranks: int, out: Path, uneven: bool, find: bool = False) -> bool:
    """Run both, print the table, save the plot; return whether all is within tolerance.

    `uneven` gives labels different loss weights (`launch/parity/weights.py`). With `find`, say where a
    difference begins (`launch/parity/bisect.py`).

    Raises:
        UserError: for a recipe that does not fit the ranks or cannot be compared, or a failed rank.
    """
    import torch

    from launch.config.layout import plan_layout
    from launch.config.resolve import resolve
    from launch.ds_json.view import compute_dtype
    from launch.parity.compare import compare, key_biases, tolerances_of
    from launch.parity.report import first_step_past, save_picture, table, verdict
    from launch.parity.run import (
        check_comparable,
        plan_reference,
        read_record,
        run_reference,
        write_layout_record,
    )

    layout = plan_layout(recipe, ranks)
    check_comparable(recipe, resolve(recipe, layout))
    plan = plan_reference(recipe, layout.micro_batch, uneven)
    print(f"reference: {recipe.train.steps} steps in plain PyTorch on one device", flush=True)
    reference = run_reference(plan)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

    print(f"layout: {recipe.deepspeed['config']} on {layout.describe()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="parity-") as folder:
        file = Path(folder) / "layout.pt"
        run_local_ranks(write_layout_record, ranks, recipe.model_dump(), file, uneven)
        result = read_record(file)

    dtype = compute_dtype(plan.ds_config)
    limits = tolerances_of(recipe, plan.ds_config)
    differences = compare(reference, result, limits, key_biases(recipe))
    name = f"{recipe.name}, {ranks} ranks, {str(dtype).removeprefix('torch.')}"
    picture = out / "parity.png"
    save_picture(differences, name, picture)
    Console(width=None if sys.stdout.isatty() else 120).print(table(reference, differences))
    print(verdict(differences))
    print(f"picture: {picture}", flush=True)
    if find and differences[-1].past:
        from launch.parity.bisect import bisect, report

        steps = first_step_past(differences) or recipe.train.steps
        print(report(bisect(recipe, ranks, uneven, steps), recipe.train.compile))
    return not differences[-1].past


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry point; returns the exit code."""
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
        "--steps", type=int, default=5, metavar="K", help=f"1 to {MOST_STEPS}, default: 5"
    )
    parser.add_argument(
        "--uneven-loss-weights",
        action="store_true",
        help="count labels unequally, as fine-tuning does: in some micro batches 3 of them, or none",
    )
    parser.add_argument(
        "--bisect",
        action="store_true",
        help="where parity fails, run again and name the first module, rank and step that differ",
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for the picture; default: runs/parity/<recipe>"
    )
    given = parser.parse_args(arguments)
    with one_line_errors():
        if not 1 <= given.steps <= MOST_STEPS:
            raise UserError(
                f"--steps: {given.steps} is outside 1 to {MOST_STEPS}; rounding grows with the steps, and "
                "the tolerances hold for no more"
            )
        recipe = load_recipe(given.config, [*given.set, f"train.steps={given.steps}"])
        ranks = choose_ranks(given.ranks, recipe.parallel.model_parallel_size)
        out = given.out or ROOT / "runs" / "parity" / recipe.name
        holds = check(recipe, ranks, out, given.uneven_loss_weights, given.bisect)
        return 0 if holds else EXIT_DIFFERENT


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # no need to wait for torch's threads
