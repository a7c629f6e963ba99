"""Train a recipe: read it, build the engine, run the training loop, and report the result.

    deepspeed launch/train.py --config recipes/gpt_tiny_zero2.yaml --set train.steps=30

Works the same under `deepspeed`, `torchrun` and `accelerate launch`, and without a launcher on one
device. `train` below shows the whole run, in order.
"""

import sys
import time

STARTED = time.perf_counter()

from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the checkout, not launch/

from launch.errors import explain_missing_packages

explain_missing_packages()

import argparse
import gc
import math
import os
from typing import TYPE_CHECKING

from launch.config.cli_args import add_recipe_arguments
from launch.config.load import load_recipe
from launch.config.schema import Recipe
from launch.deepspeed_patches.versions import check_version
from launch.errors import UserError
from launch.runtime.console import Stopwatch, say
from launch.runtime.failures import is_out_of_memory, one_line_errors
from launch.runtime.process_group import (
    from_main_rank,
    prepare_environment,
    shutdown,
)
from launch.runtime.rank_env import set_rank_env_from_launcher
from launch.runtime.signals import (
    install_signal_handlers,
    save_on_signal,
)

if TYPE_CHECKING:
    from launch.training.train_step import StepResult


def train(recipe: Recipe, resume: str | None, force: bool = False) -> int:
    """Run a recipe to the end on this rank; `force` skips the check that the GPUs have the memory.

    Returns:
        The exit code: 0, or `STOPPED_BY_SIGNAL` if a signal came, and the run has saved and stopped.

    Raises:
        UserError: for any error that the user can fix; see `launch/errors.py`.
    """
    clock = Stopwatch(STARTED)
    clock.lap("interpreter and recipe")
    prepare_environment()
    # What is imported makes some 400,000 objects that stay. To look through them for garbage again and
    # again took a sixth of the imports' time.
    collect_at = gc.get_threshold()
    gc.set_threshold(50_000)

    from launch.planner.fit_check import check_fits
    from launch.planner.model_size import model_size
    from launch.training.setup import join_ranks, plan_run

    if not force:
        check_fits(recipe)
    # A run that resumes needs no initial weights; one that `auto` starts is checked when it is built.
    first = recipe if resume is None else recipe.without_init_from()
    plan = plan_run(first, int(os.environ["WORLD_SIZE"]), say)
    layout, corpus = plan.layout, plan.corpus
    clock.lap("data")

    from launch.checkpoint.identity import check, identity
    from launch.checkpoint.load import load
    from launch.checkpoint.resume import choose_start
    from launch.checkpoint.save import Saver
    from launch.deepspeed_patches.nvme_folder import make_empty, remove, with_own_swap_folder
    from launch.runtime.rng import seed_generators, use_deterministic_kernels
    from launch.runtime.run_dir import lock_run_dir, write_settings
    from launch.training.engine import build_engine
    from launch.training.evaluate import evaluate
    from launch.training.finalize import finish
    from launch.training.metrics import Metrics, check_trackers
    from launch.training.preemption import clear_stop_request, stop_requested
    from launch.training.train_step import train_step

    check_trackers(recipe)
    if recipe.train.deterministic:
        use_deterministic_kernels()
    clock.lap("imports")
    ranks, topology = join_ranks(plan, say)
    data_rank = topology.get_data_parallel_rank()
    clock.lap("process group")

    start = from_main_rank(ranks, lambda: choose_start(recipe, resume))
    say(start.message)
    run, done, code = start.folder, 0, 0
    this_run = identity(recipe, plan.ds_config, layout, corpus.folder.name)
    if start.checkpoint:
        done, change = check(start.checkpoint, this_run, recipe.train.steps)
        if change:
            say(f"the checkpoint is of another layout, and is read into this one: {change}")
    ds_config, swap_folders = with_own_swap_folder(plan.ds_config, run.path)
    lock = lock_run_dir(run) if ranks.is_main else None
    if ranks.is_main:
        write_settings(run, recipe, ds_config, ranks.world_size)
    if ranks.local_rank == 0:
        make_empty(swap_folders)
    validation = plan.validation(data_rank)
    first = recipe.without_init_from() if start.checkpoint else recipe
    engine = build_engine(first, ds_config, ranks, topology)
    seed_generators(recipe.train.seed, topology.coordinates["pipeline"], data_rank)
    if start.checkpoint:
        load(engine, topology, ranks, start.checkpoint, this_run)
    saver = Saver(engine, topology, ranks, run, this_run, recipe.checkpoint)
    clock.lap("engine")
    gc.freeze()  # what is there now is never garbage
    gc.set_threshold(*collect_at)

    parameters, flops = model_size(recipe)
    say(f"{layout.describe()}; {parameters:,} parameters")
    say(f"start-up: {clock}")
    metrics = None
    if ranks.is_main:
        metrics = Metrics(run, recipe, done, ranks.world_size, flops, ranks.device)

    if recipe.checkpoint.every and recipe.checkpoint.on_signal:
        save_on_signal()
    steps, eval_every = recipe.train.steps, recipe.train.eval_every
    save_every, stopping = recipe.checkpoint.every, False
    for step in range(done + 1, steps + 1):
        result = train_step(engine, plan.batch(step - 1, data_rank))
        check_finite(step, result)
        if metrics:
            metrics.log(step, result)
        if (eval_every and step % eval_every == 0) or step == steps:
            validation_loss = evaluate(engine, validation)
            if metrics:
                metrics.log_validation(step, validation_loss)
        # Checked last, so that the step's records are complete when the run resumes.
        stopping = step < steps and stop_requested(run, ranks)
        if stopping or (save_every and (step % save_every == 0 or step == steps)):
            saver.save(step)
        if stopping:
            code = clear_stop_request(run, ranks)
            say(f"stopped on request after step {step} of {steps}; go on with --resume auto")
            break
        if metrics:
            metrics.restart_clock()
    if done >= steps:
        validation_loss = evaluate(engine, validation)
    saver.finish()
    if metrics:
        metrics.close()
    if not stopping:
        finish(recipe, ds_config, engine, run, corpus, ranks, validation_loss)
    say(f"loss curve: {run.path / 'loss.png'}")
    say(f"run folder: {run.path}")
    if ranks.local_rank == 0:
        remove(swap_folders)
    if lock:
        lock.release()
    return code


def check_finite(step: int, result: "StepResult") -> None:
    """Stop a run whose loss is not finite; every rank sees the same loss, so all of them stop.

    Raises:
        UserError: naming the step. Checkpoints and metrics already written are kept.
    """
    if not math.isfinite(result.loss) or (
        not result.skipped and not math.isfinite(result.grad_norm)
    ):
        raise UserError(
            f"step {step}: loss is {result.loss} and grad norm {result.grad_norm}; the weights are lost "
            "to it. Lower the learning rate (deepspeed.optimizer.params.lr) or lengthen "
            "train.schedule.warmup_steps, and start anew or --resume an earlier checkpoint"
        )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; DeepSpeed's launcher adds `--local_rank`."""
    parser = argparse.ArgumentParser(
        description="Train a recipe with DeepSpeed.",
        epilog="example:\n  deepspeed --num_gpus 2 launch/train.py "
        "--config recipes/gpt_tiny_zero2.yaml --set train.steps=30",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser, required=False)
    parser.add_argument(
        "--resume",
        metavar="PATH|auto",
        help="resume from a checkpoint or a run folder; auto: the newest complete checkpoint of this "
        "recipe's runs (or of run.dir), and step 0 where there is none",
    )
    parser.add_argument("--list", action="store_true", help="show the recipes, and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be run, without training, and stop"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="with --dry-run: as if on N ranks (default: those started, or the fewest that fit)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="train although the estimate says that the GPUs have too little memory",
    )
    parser.add_argument(
        "--allow-untested-deepspeed",
        action="store_true",
        help="train with a release of DeepSpeed that the workarounds were not tested with",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.list and not arguments.config:
        parser.error("give --config RECIPE, or --list to see the recipes")
    return arguments


def main() -> None:
    """Parse the command line and run the requested command."""
    arguments = parse_arguments()
    with one_line_errors():
        set_rank_env_from_launcher()
        install_signal_handlers()
        if arguments.list or arguments.dry_run:
            if os.environ.get("RANK", "0") != "0":
                return
            from launch.planner.dry_run import print_dry_run, print_list

            if arguments.list:
                print_list()
                return
            recipe = load_recipe(arguments.config, arguments.set)
            fewest = str(recipe.parallel.model_parallel_size)
            world_size = arguments.ranks or int(os.environ.get("WORLD_SIZE", fewest))
            print_dry_run(recipe, world_size)
            return
        check_version(arguments.allow_untested_deepspeed)
        recipe = load_recipe(arguments.config, arguments.set)
        try:
            code = train(recipe, arguments.resume, arguments.force)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            from launch.planner.fit_check import after_out_of_memory

            after_out_of_memory(recipe, error)
        shutdown(code)


if __name__ == "__main__":
    main()
