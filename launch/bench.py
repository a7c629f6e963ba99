"""How fast is a recipe's layout, and how fast is a plain loop on the same machine? Both in one run.

The plain loop is `launch/reference.py` on one device: torch's AdamW, no DeepSpeed, fp32 master
weights beside a bf16 model where the recipe trains in bf16. It computes the same batches from the
same weights with the same micro batch and the same `train.compile`.

Each is timed in fresh processes, in turns, so that what slows the machine for a while slows both.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import UserError
from launch.recipe import Recipe, recipe_from_dict

if TYPE_CHECKING:
    import torch

    from launch.step import Step

PLAIN, LAYOUT = "plain loop", "layout"


@dataclass(frozen=True)
class Speed:
    """One contender. Times are medians over the steps of all rounds.

    `memory_gib` is the peak of the rank that needs most: allocated on a GPU, resident on a CPU.
    `mfu` is None where the device's peak is not known; see `models.config.flops_per_token`.
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
    recipe: Recipe, ranks: int, warmup: int, rounds: int, say: Callable[[str], None] = print
) -> list[Speed]:
    """Time the plain loop and the recipe on `ranks` ranks; the plain loop comes first.

    The recipe's `train.steps` includes the `warmup` steps, which are left out of each median.

    Raises:
        UserError: where the recipe does not fit the ranks, or a rank failed.
    """
    from launch.describe import model_size
    from launch.layout import plan_layout
    from launch.local_ranks import run_local_ranks

    plan_layout(recipe, ranks)
    if recipe.train.steps <= warmup:
        raise UserError(f"--steps: no step is left to time after {warmup} for warming up")
    found: dict[str, list[list[dict[str, Any]]]] = {PLAIN: [], LAYOUT: []}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for turn in range(rounds):
            order = (PLAIN, LAYOUT) if turn % 2 == 0 else (LAYOUT, PLAIN)
            for name in order:
                world = 1 if name == PLAIN else ranks
                say(f"round {turn + 1} of {rounds}: {name} on {world} rank{'s'[: world - 1]}")
                place = Path(folder) / f"{turn}-{name.split()[0]}"
                place.mkdir()
                function = measure_plain if name == PLAIN else measure_layout
                run_local_ranks(function, world, recipe.model_dump(), place)
                found[name].append(
                    [json.loads(f.read_text()) for f in sorted(place.glob("*.json"))]
                )
    _, flops = model_size(recipe)
    return [_speed(name, recipe, warmup, flops, turns) for name, turns in found.items()]


def _speed(
    name: str, recipe: Recipe, warmup: int, flops: float, turns: list[list[dict[str, Any]]]
) -> Speed:
    first = turns[0][0]
    # Ranks wait for each other in every step: the first one's clock tells the time of all.
    seconds = statistics.median(s for turn in turns for s in turn[0]["seconds"][warmup:])
    ranks = len(turns[0])
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
    """What `--json` prints: both contenders, and how the layout compares with the plain loop."""
    plain, layout = speeds
    return {
        "recipe": recipe.name,
        "config": recipe.deepspeed["config"],
        "compile": recipe.train.compile,
        "ratio_total": layout.tokens_per_second / plain.tokens_per_second,
        "ratio_per_rank": layout.tokens_per_second_per_rank / plain.tokens_per_second,
        "speeds": [asdict(speed) for speed in speeds],
    }


def measure_plain(values: dict[str, Any], folder: Path) -> None:
    """Time the plain loop on this process's device; the only rank calls it."""
    from launch.distributed import prepare_environment

    prepare_environment()

    import torch

    from launch.build import build_model, training_dtype
    from launch.data import Batches, prepare, tokens_needed
    from launch.ds_config import resolve
    from launch.layout import plan_layout
    from launch.reference import Reference

    recipe = recipe_from_dict(values).on_one_device()
    layout = plan_layout(recipe, 1)
    ds_config = resolve(recipe, layout)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = prepare(recipe.data, tokens_needed=tokens_needed(recipe))
    train = recipe.train
    batches = Batches(
        corpus.train, recipe.data.sequence_length, train.global_batch_size, train.seed
    )
    model = build_model(recipe, training_dtype(ds_config), device)
    if train.compile:
        model.compile()
    reference = Reference(model, ds_config, train)
    _measure(
        train.steps,
        device,
        lambda step: batches.rank_batch(step, layout, 0),
        reference.train_step,
        folder / "rank0000.json",
    )


def measure_layout(values: dict[str, Any], folder: Path) -> None:
    """Time the recipe's own layout; every rank calls it.

    Raises:
        UserError: as `launch/train.py`.
    """
    from launch.local_engine import local_engine

    with local_engine(values, folder) as local:
        from launch.step import train_step

        _measure(
            local.recipe.train.steps,
            local.ranks.device,
            local.batch,
            lambda batch: train_step(local.engine, batch),
            folder / f"rank{local.ranks.rank:04d}.json",
        )


def _measure(
    steps: int,
    device: "torch.device",
    batch: "Callable[[int], torch.Tensor]",
    step: "Callable[[torch.Tensor], Step]",
    file: Path,
) -> None:
    import torch

    from launch.metrics import device_peak_tflops, peak_memory_gib

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
        "memory_gib": peak_memory_gib(device),
        "peak_tflops": device_peak_tflops(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    file.write_text(json.dumps(measured))
