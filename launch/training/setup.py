"""A recipe's engine on one of several local ranks, for the scripts that compare and time it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.config.load import recipe_from_dict
from launch.config.schema import Recipe

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from launch.runtime.process_group import Ranks


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
    from launch.runtime.process_group import connect, prepare_environment

    prepare_environment()

    from launch.config.layout import plan_layout
    from launch.config.resolve import resolve
    from launch.data.batches import load_batches
    from launch.deepspeed_patches.nvme_folder import make_empty, remove, with_own_swap_folder
    from launch.runtime.op_builder import build_ops, ops_needed, use_private_cache
    from launch.training.engine import build_engine, make_topology

    use_private_cache()
    recipe = recipe_from_dict(values)
    layout = plan_layout(recipe, int(os.environ["WORLD_SIZE"]))
    _, batches = load_batches(recipe)
    ds_config, swap_folders = with_own_swap_folder(resolve(recipe, layout), scratch)
    build_ops(ops_needed(ds_config), print)
    if os.environ["LOCAL_RANK"] == "0":
        make_empty(swap_folders)
    ranks = connect()
    topology = make_topology(recipe, layout)
    engine = build_engine(recipe, ds_config, ranks, topology)
    yield LocalEngine(
        recipe,
        ranks,
        engine,
        lambda step: batches.rank_batch(step, layout, topology.get_data_parallel_rank()),
    )
    if ranks.local_rank == 0:
        remove(swap_folders)
