"""Compare the speed of a recipe's layout with a plain loop on the same machine, in one run.

The plain loop is `launch/parity/reference.py` on one device: torch's AdamW, no DeepSpeed, and fp32
master weights beside a bf16 model if the recipe trains in bf16. It trains on the same batches from
the same initial weights, with the same micro batch size and the same `train.compile`.

Optionally, a third configuration is timed: the plain loop with its layers spread over as many
devices, in one process (`models/layerwise.py`), the baseline for pipeline parallelism. It is not
compiled.

The configurations are timed in turns, in fresh processes, so that a temporary slowdown of the
machine affects all of them.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe
from launch.data.batch import Batch
from launch.errors import UserError

if TYPE_CHECKING:
    import torch

    from launch.training.train_step import StepResult

PLAIN, LAYERWISE, LAYOUT = "plain loop", "layer-wise", "layout"


@dataclass(frozen=True)
class Speed:
    """One configuration. Times are medians over the steps of all rounds.

    `memory_gib` is the peak of the rank that uses most: allocated on a GPU, resident on a CPU.
    `mfu` is None if the device's peak is unknown; see `models.config.flops_per_token`.
    """

    name: str
    ranks: int
    device: str
    seconds_per_step: float
    tokens_per_second: float
    tokens_per_second_per_rank: float
    memory_gib: float
    mfu: float | None
    last_loss: float


def bench(
    recipe: Recipe,
    ranks: int,
    warmup: int,
    rounds: int,
    layerwise: bool = False,
    say: Callable[[str], None] = print,
) -> list[Speed]:
    """Time the plain loop and the recipe on `ranks` ranks; the plain loop comes first.

    With `layerwise`, one process with its layers on `ranks` devices comes between them.

    The recipe's `train.steps` includes the `warmup` steps, which are excluded from each median.

    Raises:
        UserError: if the recipe does not fit the ranks, or a rank failed.
    """
    from launch.config.layout import plan_layout
    from launch.planner.model_size import model_size
    from launch.runtime.local_launcher import run_local_ranks

    plan_layout(recipe, ranks)
    if layerwise and (ranks == 1 or recipe.model.family == "hf"):
        raise UserError("--layerwise: it spreads the layers of a family gpt over 2 or more devices")
    if recipe.train.steps <= warmup:
        raise UserError(f"--steps: no step is left to time after {warmup} for warming up")
    names = [PLAIN, *([LAYERWISE] if layerwise else []), LAYOUT]
    found: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for turn in range(rounds):
            for name in names if turn % 2 == 0 else reversed(names):
                world = ranks if name == LAYOUT else 1
                say(f"round {turn + 1} of {rounds}: {name} on {world} rank{'s'[: world - 1]}")
                place = Path(folder) / f"{turn}-{name.split()[0]}"
                place.mkdir()
                if name == LAYOUT:
                    run_local_ranks(measure_layout, world, recipe.model_dump(), place)
                else:
                    devices = ranks if name == LAYERWISE else 1
                    run_local_ranks(measure_plain, 1, recipe.model_dump(), place, devices)
                found[name].append(
                    [json.loads(f.read_text()) for f in sorted(place.glob("*.json"))]
                )
    _, flops = model_size(recipe)
    return [_speed(name, recipe, warmup, flops, turns) for name, turns in found.items()]


def _speed(
    name: str, recipe: Recipe, warmup: int, flops: float, turns: list[list[dict[str, Any]]]
) -> Speed:
    first = turns[0][0]
    # Ranks wait for each other in every step, so rank 0's times hold for all.
    seconds = statistics.median(s for turn in turns for s in turn[0]["seconds"][warmup:])
    ranks = len(turns[0]) * int(first["devices"])
    speed = recipe.train.global_batch_size * recipe.data.sequence_length / seconds
    peak = first["peak_tflops"]
    return Speed(
        name=name,
        ranks=ranks,
        device=first["device"],
        seconds_per_step=seconds,
        tokens_per_second=speed,
        tokens_per_second_per_rank=speed / ranks,
        memory_gib=max(rank["memory_gib"] for turn in turns for rank in turn),
        mfu=speed / ranks * flops / (peak * 1e12) if peak else None,
        last_loss=first["losses"][-1],
    )


def as_json(recipe: Recipe, speeds: list[Speed]) -> dict[str, Any]:
    """The output of `--json`: every configuration, and the layout compared with the plain loop."""
    plain, layout = speeds[0], speeds[-1]
    return {
        "recipe": recipe.name,
        "config": recipe.deepspeed["config"],
        "compile": recipe.train.compile,
        "ratio_total": layout.tokens_per_second / plain.tokens_per_second,
        "ratio_per_rank": layout.tokens_per_second_per_rank / plain.tokens_per_second,
        "speeds": [asdict(speed) for speed in speeds],
    }


def measure_plain(values: dict[str, Any], folder: Path, devices: int = 1) -> None:
    """Time the plain loop on this process's device, or layer-wise on several; one rank calls it.

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
    cuda = torch.cuda.is_available()
    if cuda and torch.cuda.device_count() < devices:
        raise UserError(
            f"--layerwise: {devices} devices, and this machine has {torch.cuda.device_count()} GPUs; "
            "lower --ranks"
        )
    # Without GPUs, one CPU stands in for several devices: it runs, but the speed means nothing.
    places = [torch.device("cuda", i) if cuda else torch.device("cpu") for i in range(devices)]
    device = places[0]
    train = plan.recipe.train
    model = build_model(plan.recipe, training_dtype(plan.ds_config), device)
    if devices > 1:
        from models.gpt import GPT
        from models.layerwise import spread_over

        assert isinstance(model, GPT)
        try:
            model = spread_over(model, places)
        except ValueError as error:
            raise UserError(f"--layerwise: {error}; lower --ranks") from None
    reference = Reference(model, plan.ds_config, train)
    if train.compile and devices == 1:
        reference.compile()
    _measure(
        train.steps,
        places,
        plan.batch,
        reference.train_step,
        folder / "rank0000.json",
    )


def measure_layout(values: dict[str, Any], folder: Path) -> None:
    """Time the recipe's own layout; every rank calls it.

    Raises:
        UserError: as `launch/train.py`.
    """
    from launch.training.setup import local_engine

    with local_engine(values, folder) as local:
        from launch.training.train_step import train_step

        _measure(
            local.plan.recipe.train.steps,
            [local.ranks.device],
            local.batch,
            lambda batch: train_step(local.engine, batch),
            folder / f"rank{local.ranks.rank:04d}.json",
        )


def _measure(
    steps: int,
    devices: "list[torch.device]",
    batch: Callable[[int], Batch],
    step: "Callable[[Batch], StepResult]",
    file: Path,
) -> None:
    import torch

    from launch.runtime.hardware import device_peak_tflops, peak_memory_gib

    device = devices[0]
    seconds, losses = [], []
    for number in range(steps):
        rows = batch(number)
        started = time.perf_counter()
        losses.append(step(rows).loss)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    measured = {
        "seconds": seconds,
        "losses": losses,
        "memory_gib": max(peak_memory_gib(place) for place in devices),
        "devices": len(devices),
        "peak_tflops": device_peak_tflops(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    file.write_text(json.dumps(measured))
