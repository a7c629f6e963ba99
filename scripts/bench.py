"""Time a recipe, with and without levers, beside a plain PyTorch loop, in one run on this machine.

    python scripts/bench.py --config recipes/gpt_tiny_zero2.yaml --ranks 2
    python scripts/bench.py --config recipes/gpt_tiny_zero2.yaml --levers --out rows.jsonl
    python scripts/bench.py --config recipes/gpt_tiny_zero2.yaml --row "halves: train.micro_batch_size=2"
    python scripts/bench.py --config recipes/gpt_1b3_zero1.yaml --peers --rounds 1
    python scripts/bench.py --table rows.jsonl

Rows: the plain loop on one device (launch/parity/reference.py); the recipe as it stands; the recipe with
each --lever (launch/perf/levers.py), to see what it brings by itself; the recipe with the keys of each
--row. Each is timed in fresh processes, the rows in turns: medians over the steps of all rounds after
warm-up, by device events on a GPU.

All train on the same batches from the same initial weights. A row whose losses differ from the plain loop's
by more than rounding explains (launch/parity/compare.py) is NOT EQUAL and has no speed in the table. What
does not apply is named on stderr, and a row that fails is a line of the table.

--peers trains the same GPT with what a user would take instead (launch/perf/peers/, a file each), from the
same weights on the same batches. Peers round elsewhere, in 16 bits by more than the bounds allow: their
losses' difference is shown, and not judged. They compile always, unless TORCHDYNAMO_DISABLE=1 is set.

--profile adds where a step's time goes on the device: kinds of work, communication that nothing computes
beside, gaps. Steps are profiled after the timed ones.

Compare ratios rather than tokens/s: they also hold on a busy machine. Without GPUs, the plain loop uses
all cores, and so do the ranks together; then the total ratio is the fair one. Peak memory is allocated on a
GPU, resident on a CPU. MFU counts attention in full, as models/config.py does; "causal" counts half of it.

Exit code 0: all rows that ran are equal; 1: one is not, or the recipe itself failed; 2: error in the recipe
or command line.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import os
from collections.abc import Sequence

from rich.console import Console

from launch.config.cli_args import add_recipe_arguments
from launch.config.load import load_recipe
from launch.errors import UserError
from launch.perf.bench.result import ResultFile, Timing, as_json, read_lines
from launch.perf.bench.rows import Sweep, plan_rows
from launch.perf.bench.run import bench, is_wrong
from launch.perf.bench.table import markdown, rich_table, split_table, splits_of
from launch.perf.levers import LEVERS, find_levers
from launch.perf.peers import PEERS
from launch.perf.peers.run import check_names
from launch.perf.step_profile.picture import save_picture
from launch.perf.step_profile.record import PROFILED_STEPS
from launch.runtime.failures import one_line_errors
from launch.runtime.local_launcher import choose_ranks

EXIT_DIFFERENT = 1


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    levers = "\n".join(f"  {lever.name:20}{lever.says}" for lever in LEVERS)
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"levers:\n{levers}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    add_recipe_arguments(parser, required=False)
    parser.add_argument(
        "--lever",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="time the recipe with each of these levers too, one at a time",
    )
    parser.add_argument("--levers", action="store_true", help="with every lever that applies to it")
    parser.add_argument(
        "--row",
        metavar="'NAME: KEY=VALUE ...'",
        action="append",
        default=[],
        help="time the recipe with these keys too; ranks=N among them: on fewer ranks; peer=PEER: by that "
        "peer; json.KEY=VALUE with peer=raw_deepspeed: a key of the JSON, unchecked; repeatable",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        metavar="PEER",
        help=f"time these peers too, or all: {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--layerwise",
        action="store_true",
        help="time one process with its layers on N devices too (Accelerate's dispatch)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="append a line of JSON a row, written as soon as the row has run",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="files of an earlier --out: a plain loop that is in them is compared with, and not run again",
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help=f"profile {PROFILED_STEPS} more steps of each row, and write a picture and traces there",
    )
    parser.add_argument(
        "--json", action="store_true", help="print lines of JSON instead of a table"
    )
    parser.add_argument(
        "--table",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="print files of an earlier --out as Markdown, and time nothing",
    )
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> int:
    """Time the rows and print the results; returns the exit code.

    Raises:
        UserError: for invalid numbers, levers or files; see also `launch.perf.bench.rows.plan_rows`.
    """
    if given.table:
        print(markdown(read_lines(given.table)))
        return 0
    if given.config is None:
        raise UserError("--config: name a recipe to time, recipes/*.yaml")
    for name, least in (("steps", 1), ("warmup", 0), ("rounds", 1)):
        value = getattr(given, name)
        if value < least:
            raise UserError(f"--{name}: {value} is too few; use {least} or more")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    levers = list(LEVERS) if given.levers else find_levers(given.lever)
    peers = [] if given.peers is None else list(given.peers or PEERS)
    check_names(peers)
    steps = given.warmup + given.steps + (PROFILED_STEPS if given.profile else 0)
    sets = (*given.set, f"train.steps={steps}")
    earlier = read_lines(given.reference)
    recipe = load_recipe(given.config, sets)
    ranks = choose_ranks(given.ranks, recipe.parallel.model_parallel_size)
    sweep = Sweep(
        given.config, sets, ranks, levers, given.levers, given.row, peers, given.layerwise
    )
    rows = plan_rows(sweep, lambda name, reason: say(f"left out: {name}: {reason}"))
    timing = Timing(given.warmup, given.steps, given.rounds)
    if given.profile:
        try:
            given.profile.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--profile: {given.profile} cannot be made a folder: {error.strerror}; name another"
            ) from None
    lines = bench(rows, timing, ResultFile(given.out), earlier, given.profile, say)
    if given.json:
        print("\n".join(as_json(line) for line in lines))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(rich_table(lines))
        if given.profile:
            console.print(split_table(lines))
    if given.profile and (splits := splits_of(lines)):
        picture = given.profile / "split.png"
        save_picture(splits, f"{recipe.name}: where a step's time goes", picture)
        say(f"picture: {picture}; traces for https://ui.perfetto.dev beside it")
    # A lever may need more memory than there is; the recipe itself may not.
    recipe_failed = any(
        line["error"] and not line["overrides"] and line["kind"] != "peer" for line in lines
    )
    return EXIT_DIFFERENT if recipe_failed or any(map(is_wrong, lines)) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Command-line entry point; returns the exit code."""
    given = parse_arguments(arguments)
    with one_line_errors():
        return run(given)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # no need to wait for torch's threads
