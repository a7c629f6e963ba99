"""Before training: do the GPUs have the memory? And after it ran out: what would fit?"""

import os
from typing import NoReturn

from launch.config.layout import plan_layout
from launch.config.resolve import resolve
from launch.config.schema import GPTModel, Recipe
from launch.errors import UserError
from launch.memory.estimate import GIB
from launch.planner.advice import nearest_fit
from launch.planner.cards import CARDS, Card
from launch.planner.search import Cluster, evaluate
from launch.runtime.hardware import peak_tflops


def check_fits(recipe: Recipe, cluster: Cluster | None = None) -> None:
    """Stop a recipe of family gpt that cannot fit the GPUs. Without GPUs, nothing is checked.

    Args:
        recipe: what is to be trained.
        cluster: the GPUs; default: those that this rank and the launcher's variables tell of.

    Raises:
        UserError: with the shortfall and the nearest layout that fits; and as `resolve`.
    """
    cluster = cluster or found_cluster()
    if cluster is None or not isinstance(recipe.model, GPTModel):
        return
    layout = plan_layout(recipe, cluster.ranks)
    plan = evaluate(recipe, layout, resolve(recipe, layout), cluster)
    lacking = plan.gib - cluster.card.gib
    if lacking > 0:
        raise UserError(
            f"memory: {recipe.name} needs {plan.gib:.1f} GiB on the GPUs of stage {plan.fullest.stage} "
            f"({plan.fullest.moment}), {lacking:.1f} more than the {cluster.card.gib:.1f} that a "
            f"{cluster.card.name} has; {nearest_fit(recipe, cluster)}; or go on with --force"
        )


def after_out_of_memory(recipe: Recipe, error: RuntimeError) -> NoReturn:
    """Raise what is shown when memory ran out in training: the error, and the nearest layout that fits.

    Raises:
        UserError: with that advice, if the error is a GPU's and the model of family gpt.
        RuntimeError: the error itself, otherwise.
    """
    cluster = found_cluster()
    if cluster is None or not isinstance(recipe.model, GPTModel):
        raise error
    first = str(error).strip().splitlines()[0][:200]
    raise UserError(f"out of memory: {first}; {nearest_fit(recipe, cluster)}") from error


def found_cluster() -> Cluster | None:
    """This host's GPUs, and as many on each of the run's hosts; None without GPUs."""
    import torch

    if not torch.cuda.is_available():
        return None
    here = torch.cuda.get_device_properties(0)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or ranks)
    return Cluster(card_named(here.name, here.total_memory / GIB), local, max(1, ranks // local))


def card_named(device: str, gib: float) -> Card:
    """A card as its driver names it; an unknown one gets an A100's bandwidths, to order layouts by."""
    words = device.lower().replace("-", " ").split()
    like = next((card for name, card in CARDS.items() if name in words), CARDS["a100"])
    tflops = peak_tflops(device) or like.tflops
    return Card(device, gib, tflops, like.memory_tbs, like.link_gbs, like.host_gbs)
