"""A recipe's engine on one of several local ranks, for the scripts that compare and time it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.recipe import Recipe, recipe_from_dict

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from launch.distributed import Ranks


class LocalEngine(NamedTuple):
    """What a rank holds. `batch` maps a step, from 0, to this rank's part of its global batch."""

    recipe: Recipe
    ranks: "Ranks"
    engine: "DeepSpeedEngine"
    batch: "Callable[[int], torch.Tensor]"


@contextmanager
def local_engine(values: dict[str, Any], scratch: Path) -> Iterator[LocalEngine]:
    """Join the ranks that `run_local_ranks` has started, and build the recipe's engine.

    Args:
        values: the recipe as plain values, which cross into another process.
        scratch: names the folder that a run with NVMe offload gets below its `nvme_path`.

    Raises:
        UserError: as `launch/train.py`.
    """
    from launch.distributed import connect, prepare_environment

    prepare_environment()

    from launch.data import Batches, prepare, tokens_needed
    from launch.ds_config import resolve
    from launch.engine import build_engine, make_topology
    from launch.jit import build_ops, ops_needed, use_private_cache
    from launch.layout import plan_layout
    from launch.swap import make_empty, remove, with_own_swap_folder

    use_private_cache()
    recipe = recipe_from_dict(values)
    layout = plan_layout(recipe, int(os.environ["WORLD_SIZE"]))
    corpus = prepare(recipe.data, tokens_needed=tokens_needed(recipe))
    batches = Batches(
        corpus.train,
        recipe.data.sequence_length,
        recipe.train.global_batch_size,
        recipe.train.seed,
    )
    ds_config, swap_folders = with_own_swap_folder(resolve(recipe, layout), scratch)
    build_ops(ops_needed(ds_config), print)
    if os.environ["LOCAL_RANK"] == "0":
        make_empty(swap_folders)
    ranks = connect()
    topology = make_topology(recipe, layout)
    engine = build_engine(recipe, ds_config, ranks, topology)
    yield LocalEngine(
        recipe, ranks, engine, lambda step: batches.rank_batch(step, layout, topology.data_rank)
    )
    if ranks.local_rank == 0:
        remove(swap_folders)
