"""Plan a training run: which layout of a model fits which GPUs, and which of them is fastest.

    python scripts/plan.py --model gpt_6b7 --gpus 8 --gpu-memory 80
    python scripts/plan.py --config recipes/gpt_1b3_zero1.yaml --gpus 2 --gpu h200
    python scripts/plan.py --model path/to/config.json --gpus 8 --nodes 4 --host-memory 1000
    python scripts/plan.py --layers 24 --hidden 2048 --heads 16 --vocab 50304 --gpus 2

One sentence says whether plain data parallelism is enough; the table has the layouts that fit, the
fastest first, with the parts of a rank's memory. `launch/memory/` has the arithmetic, and
recipes/MEMORY.md how far it was off when measured. Step times are estimates for an order.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not scripts/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from launch.errors import UserError
from launch.memory.estimate import GIB, StageMemory
from launch.planner.advice import advice, lesson_estimate
from launch.planner.cards import CARDS, card_of
from launch.planner.model_input import recipe_for
from launch.planner.model_size import model_size
from launch.planner.picture import draw
from launch.planner.search import Cluster, Plan, search
from launch.planner.write_plan import write_plan
from launch.runtime.failures import one_line_errors

SIZES = ("layers", "hidden", "heads", "vocab", "context", "kv-heads", "head-dim", "ffn")


def table(plans: list[Plan], rows: int) -> Table:
    """The fastest layouts that fit, with the memory of their fullest rank in GiB."""
    cluster = plans[0].cluster
    shown = Table(box=None, title=cluster.describe())
    for name in ("", "s/step", "tokens/s", "MFU", "GiB"):
        shown.add_column(name, no_wrap=True)
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "buckets", "gathered")
    for name in (*parts, "other", "host"):
        shown.add_column(name)
    for plan in [plan for plan in plans if plan.fits][:rows]:
        memory = plan.fullest.parts
        other = memory.overhead / GIB + plan.outside
        shown.add_row(
            plan.name(),
            f"{plan.time.total:.3g}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.mfu:.0%}",
            f"{plan.gib:.1f}",
            *(f"{getattr(memory, part) / GIB:.2f}" for part in parts),
            f"{other:.2f}",
            f"{plan.host_gib:.0f}" if plan.host_gib else "-",
        )
    return shown


def stage_lines(plan: Plan) -> list[str]:
    """The first and the last pipeline stage of a plan; the only one, without a pipeline."""
    stages = plan.stages if len(plan.stages) == 1 else [plan.stages[0], plan.stages[-1]]
    return [f"stage {memory.stage}: {memory.describe()}" for memory in stages]


def lesson_lines(plan: Plan) -> list[str]:
    """The rule of thumb (four times the model) beside the estimate, and why they differ."""
    stage = int(plan.config.removeprefix("zero")[0])
    lines = []
    for mixed in (False, True):
        whole, left = lesson_estimate(plan.recipe, plan.cluster.ranks, stage, mixed)
        kind = "2 bytes for everything" if mixed else "4 bytes for everything"
        lines.append(f"rule of thumb, {kind}: {whole:.1f} GiB, {left:.1f} with ZeRO-{stage}")
    memory = plan.fullest.parts
    states = (memory.weights + memory.gradients + memory.optimizer) / GIB
    lines.append(
        f"this planner: {states:.1f} GiB of weights, gradients and optimizer state, {plan.gib:.1f} in all. "
        "In 16 bits Adam keeps its moments and a copy of the weights in fp32, gradients are accumulated in "
        "fp32, and activations, logits and buffers come on top: the rule leaves all of that out"
    )
    return lines


def as_json(said: str, plans: list[Plan], rows: int) -> dict[str, object]:
    """The output of `--json`; sizes in bytes, times in seconds."""

    def stage(memory: StageMemory) -> dict[str, object]:
        return {**asdict(memory), "bytes": memory.parts.total}

    return {
        "advice": said,
        "plans": [
            {
                "name": plan.name(),
                "config": plan.recipe.deepspeed["config"],
                "parallel": plan.recipe.parallel.model_dump(),
                "micro_batch": plan.layout.micro_batch,
                "accumulation": plan.layout.accumulation,
                "checkpoint_activations": plan.recipe.model.checkpoint_activations,
                "compile": plan.recipe.train.compile,
                "fits": plan.fits,
                "gib": plan.gib,
                "host_gib": plan.host_gib,
                "seconds": asdict(plan.time),
                "tokens_per_second": plan.tokens_per_second,
                "mfu": plan.mfu,
                "stages": [stage(memory) for memory in plan.stages],
            }
            for plan in plans[:rows]
        ],
    }


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="NAME", help="a size, a config.json or its folder")
    parser.add_argument("--config", metavar="RECIPE", help="a recipe file, recipes/*.yaml")
    parser.add_argument("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[])
    for name in SIZES:
        parser.add_argument(f"--{name}", type=int, metavar="N", help="a size of the model")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens of a row")
    parser.add_argument("--global-batch", type=int, metavar="N", help="rows of a step")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of a host")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="hosts")
    parser.add_argument("--gpu", default="h100", help=f"{', '.join(CARDS)}; default: h100")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="instead of that GPU's")
    parser.add_argument("--host-memory", type=float, metavar="GIB", help="of each host")
    parser.add_argument(
        "--network", type=float, default=50.0, metavar="GBS", help="GB/s a GPU between hosts"
    )
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="layouts to show")
    parser.add_argument("--method", choices=("moments", "lesson"), default="moments")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--write", metavar="NAME", type=Path, help="write NAME.yaml and NAME.json")
    parser.add_argument("--picture", metavar="FILE", type=Path, help="draw the memory (png, svg)")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Search, and print what was found.

    Raises:
        UserError: for bad input, or if nothing fits.
    """
    for name in ("gpus", "nodes", "rows", "sequence", "global_batch", "network", "host_memory"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')}: {value:g} is too few; use 1 or more")
    sizes = {name.replace("-", "_"): getattr(given, name.replace("-", "_")) for name in SIZES}
    recipe = recipe_for(
        given.config,
        given.model,
        {name: value for name, value in sizes.items() if value is not None},
        given.set,
        given.sequence,
        given.global_batch,
    )
    card = card_of(given.gpu, given.gpu_memory)
    cluster = Cluster(card, given.gpus, given.nodes, given.host_memory, given.network)
    plans = search(recipe, cluster)
    said = advice(plans)
    if given.json:
        print(json.dumps(as_json(said, plans, given.rows), indent=2))
    else:
        print(said)
        parameters, _ = model_size(plans[0].recipe)
        print(f"{parameters:,} parameters; {plans[0].layout.describe()}\n")
        Console(width=None if sys.stdout.isatty() else 200).print(table(plans, given.rows))
        lines = lesson_lines(plans[0]) if given.method == "lesson" else stage_lines(plans[0])
        print("\n" + "\n".join(lines))
    if given.picture:
        fitting = [plan for plan in plans if plan.fits][: given.rows]
        bars = [(plan.name(), plan.fullest.parts, plan.outside, None) for plan in fitting]
        draw(bars, card.gib, f"Memory of the fullest rank, {cluster.describe()}", given.picture)
    if given.write:
        written, _ = write_plan(plans[0], given.write)
        start = f"deepspeed --num_gpus {given.gpus} launch/train.py --config {written}"
        print(f"written: {written}; start: {start}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command-line entry point."""
    given = parse_arguments(arguments)
    with one_line_errors():
        run(given)


if __name__ == "__main__":
    main()
