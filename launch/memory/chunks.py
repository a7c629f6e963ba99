"""Which parts of the model a pipeline stage has, and how many passes of each are alive at a time."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from launch.config.layout import Layout
from launch.config.schema import Parallel, Recipe
from launch.memory.activations import Activations
from models.config import GPTConfig
from models.pipeline_stages import chunk_passes_alive, micro_batches_alive, stage_chunks


class Running(NamedTuple):
    """What a stage holds while a pass runs.

    Attributes:
        chunk: the model chunk that runs; 0 if the stage has one alone.
        alive: of each chunk, how many passes are alive, the one that runs among them.
    """

    chunk: int
    alive: tuple[int, ...]


def running_passes(recipe: Recipe, layout: Layout, stage: int) -> list[Running]:
    """What a stage holds at those passes at which it may hold the most."""
    parallel, stages, m = recipe.parallel, layout.grid["pipeline"], layout.accumulation
    if parallel.model_chunks == 1:
        return [Running(0, (micro_batches_alive(parallel.schedule, stages, stage, m),))]
    found = chunk_passes_alive(stages, stage, m, parallel.model_chunks)
    return [Running(*one) for one in sorted(found)]


def bytes_elsewhere(of_chunks: Sequence[Activations], running: Running) -> float:
    """What the passes of other chunks keep, and what the engine has received last: an input, a gradient."""
    if len(of_chunks) == 1:
        return 0.0
    here = of_chunks[running.chunk]
    others = sum(
        alive * (each.kept + each.received + each.sent + each.logits)
        for alive, each in zip(running.alive, of_chunks, strict=True)
        if each is not here
    )
    return others + 2 * max(each.received for each in of_chunks)


@lru_cache(maxsize=256)
def chunks_of_stages(
    config: GPTConfig, stages: int, parallel: Parallel
) -> list[list[tuple[int, int]]]:
    """The model chunks of each pipeline stage; of one stage, the whole chain.

    Raises:
        ValueError: as `models.pipeline_stages.stage_bounds`.
    """
    if stages == 1:
        return [[(0, config.layers + 4)]]
    return stage_chunks(config, stages, parallel.partition, parallel.model_chunks)
