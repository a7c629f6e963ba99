"""Train a row's steps in its ranks; each rank returns what it measured."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.load import recipe_from_dict
from launch.data.batch import Batch
from launch.errors import UserError
from launch.perf.bench.watch import Watch

if TYPE_CHECKING:
    import torch

    from launch.training.train_step import StepResult


def measure_plain(values: dict[str, Any], trace: str | None, devices: int = 1) -> dict[str, Any]:
    """Time the plain loop on this process's device, or layer-wise on several; one rank calls it.

    With `trace`, how a file's name begins, the last steps are profiled.

    Raises:
        UserError: if there are fewer GPUs or fewer layers than `devices`.
    """
    from launch.runtime.process_group import prepare_environment

    prepare_environment()

    import torch

    from launch.ds_json.view import training_dtype
    from launch.parity.reference import Reference
    from launch.parity.run import plan_reference
    from launch.training.build_model import build_model

    plan = plan_reference(recipe_from_dict(values))
    use_threads()
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() < devices:
        raise UserError(
            f"--layerwise: {devices} devices, and this machine has {torch.cuda.device_count()} GPUs; "
            "lower --ranks"
        )
    # Without GPUs, one CPU stands in for several devices: it runs, but the speed means nothing.
    places = [torch.device("cuda", i) if cuda else torch.device("cpu") for i in range(devices)]
    train = plan.recipe.train
    model = build_model(plan.recipe, training_dtype(plan.ds_config), places[0])
    if devices > 1:
        from models.gpt import GPT
        from models.layerwise import spread_over

        assert isinstance(model, GPT)
        model = spread_over(model, places)
    reference = Reference(model, plan.ds_config, train)
    if train.compile and devices == 1:
        reference.compile()
    watch = Watch(places[0], train.steps, trace_file(trace, 0))
    losses = run_steps(watch, plan.batch, reference.train_step)
    return measured_by(watch, losses, places)


def measure_recipe(values: dict[str, Any], trace: str | None, scratch: Path) -> dict[str, Any]:
    """Time the recipe's own layout; every rank calls it.

    `values` and `trace` are those of `measure_plain`, `scratch` that of `local_engine`.

    Raises:
        UserError: as `launch/train.py`.
    """
    from launch.training.setup import local_engine

    use_threads()
    with local_engine(values, scratch) as local:
        from launch.training.train_step import train_step

        ranks = local.ranks
        steps = local.plan.recipe.train.steps
        watch = Watch(ranks.device, steps, trace_file(trace, ranks.rank))
        losses = run_steps(watch, local.batch, lambda batch: train_step(local.engine, batch))
        return measured_by(watch, losses, [ranks.device])


def use_threads() -> None:
    """Take the threads that `OMP_NUM_THREADS` allows: torch was imported before it was set."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def trace_file(beginning: str | None, rank: int) -> Path | None:
    """The file for a rank's trace."""
    return None if beginning is None else Path(f"{beginning}-rank{rank}.json.gz")


def run_steps(
    watch: Watch, batch: Callable[[int], Batch], step: "Callable[[Batch], StepResult]"
) -> list[float]:
    """Train the steps of a watch, and return their losses."""
    results = []
    watch.mark()
    for number in range(watch.steps):
        results.append(step(batch(number)))
        watch.mark()
    return [float(result.loss) for result in results]


def measured_by(watch: Watch, losses: list[float], devices: "list[torch.device]") -> dict[str, Any]:
    """What a rank measured, as plain values."""
    import torch

    from launch.runtime.hardware import device_peak_tflops, peak_memory_gib

    gpu = devices[0].type == "cuda"
    return {
        "seconds": watch.seconds(),
        "losses": losses,
        "memory_gib": max(peak_memory_gib(place) for place in devices),
        "peak_tflops": device_peak_tflops(devices[0]),
        "device": torch.cuda.get_device_name(devices[0]) if gpu else "cpu",
        "profile": watch.profile(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if gpu else None,
    }
