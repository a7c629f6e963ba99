"""How a pipeline is split into stages, how long they idle, and how many micro batches they hold.

Imports neither torch nor DeepSpeed: a layout can be planned without them.
"""

import re
from functools import lru_cache
from itertools import accumulate, pairwise
from math import inf
from typing import NamedTuple

from models.config import GPTConfig, flops_by_layer, parameters_by_layer


class ChunkPass(NamedTuple):
    """A pass of one micro batch through one of a stage's model chunks."""

    backward: bool
    chunk: int
    micro_batch: int


def interleaved_passes(
    stages: int, stage: int, micro_batches: int, model_chunks: int
) -> list[ChunkPass]:
    """The order of a stage's passes in the interleaved schedule (arXiv:2104.04473, section 2.2).

    Micro batches go round in groups of `stages`, of which `micro_batches` is a multiple: a chunk takes
    the whole group, then the next chunk does. Backward passes take the chunks from last to first.

    Raises:
        ValueError: if `micro_batches` is no multiple of `stages`.
    """
    if micro_batches % stages:
        raise ValueError(f"{micro_batches} micro batches are no groups of {stages}")
    total = model_chunks * micro_batches

    def turn(number: int) -> tuple[int, int]:
        group, place = divmod(number, stages * model_chunks)
        return place // stages, group * stages + place % stages

    # A gradient comes back to this stage after (model_chunks - 1) rounds of a group, and the way to the
    # last stage and back. So many forward passes fill the time; then the two kinds take turns.
    ahead = min(2 * (stages - 1 - stage) + (model_chunks - 1) * stages, total)
    found = []
    for number in range(total + ahead):
        if number < total:
            found.append(ChunkPass(False, *turn(number)))
        if number >= ahead:
            chunk, micro_batch = turn(number - ahead)
            found.append(ChunkPass(True, model_chunks - 1 - chunk, micro_batch))
    return found


def ideal_bubble(schedule: str, stages: int, micro_batches: int, model_chunks: int = 1) -> float:
    """A stage's idle share of a step, if messages take no time and all passes equally long.

    A backward pass may take any multiple of a forward pass, but for zb-h1, where its two parts take
    as long as a forward pass each. With unequal ones and m >= p, a stage then idles for (p - 1) (F +
    B - W) of a step.

    Sources: arXiv:2104.04473, section 2.2, but as a share of the whole step, not of the ideal time;
    arXiv:2401.10241, section 2.3.

    Raises:
        KeyError: for an unknown schedule.
    """
    # With fewer micro batches than stages, there is too little W to fill the end.
    idle = max(stages - 1, 2 * stages - 1 - micro_batches) if stages > 1 else 0
    return {
        "zb-h1": idle / (3 * micro_batches + idle),
        "1f1b": (stages - 1) / (micro_batches + stages - 1),
        "interleaved": (stages - 1) / (model_chunks * micro_batches + stages - 1),
        "gpipe": (stages - 1) / (micro_batches + stages - 1),
        "naive": (stages - 1) / stages,
    }[schedule]


def stage_bounds(config: GPTConfig, stages: int, partition: str) -> list[int]:
    """The bounds of the stages: stage s runs layers bounds[s] to bounds[s + 1] - 1.

    Args:
        config: the model; its chain has `layers + 4` layers.
        stages: the pipeline parallel size.
        partition: "parameters" makes the largest stage as small as possible, "flops" the slowest as
            fast, "uniform" gives each stage equally many layers, and "type:REGEX" equally many layers
            whose name (`models.config`) matches.

    Raises:
        ValueError: if the partition is none of these, its REGEX matches fewer layers than there are
            stages, or a stage would have no parameters to train.
    """
    layers = parameters_by_layer(config)
    sizes = [size for _, size in layers]
    if partition == "parameters":
        bounds = list(_balanced(tuple(sizes), stages))
    elif partition == "flops":
        bounds = list(_balanced(tuple(flops_by_layer(config)), stages))
    elif partition == "uniform":
        bounds = uniform_bounds(len(layers), stages)
    elif partition.startswith("type:"):
        pattern = partition.removeprefix("type:")
        try:
            matches = [int(bool(re.search(pattern, name, re.IGNORECASE))) for name, _ in layers]
        except re.error as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
        if sum(matches) < stages:
            raise ValueError(
                f"{sum(matches)} layers match '{pattern}', fewer than the {stages} stages; they are "
                f"token, position, {config.layers} of block, norm and output"
            )
        bounds = balanced_bounds(matches, stages)
    else:
        raise ValueError(f"'{partition}' is not parameters, flops, uniform or type:REGEX")
    for stage in range(stages):
        if not sum(sizes[bounds[stage] : bounds[stage + 1]]):
            raise ValueError(f"stage {stage} of {stages} would have nothing to train")
    return bounds


def stage_chunks(
    config: GPTConfig, stages: int, partition: str, model_chunks: int = 1
) -> list[list[tuple[int, int]]]:
    """The model chunks of each stage: of each, its first layer and the one behind its last.

    The chain is split into `stages * model_chunks` parts, and part n is on stage n % stages
    (arXiv:2104.04473, section 2.2).

    Raises:
        ValueError: as `stage_bounds`; what it calls a stage is a part then.
    """
    parts = list(pairwise(stage_bounds(config, stages * model_chunks, partition)))
    return [parts[stage::stages] for stage in range(stages)]


@lru_cache(maxsize=64)
def _balanced(sizes: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """`balanced_bounds`, computed once: a planner asks for the same ones many times."""
    return tuple(balanced_bounds(list(sizes), stages))


def micro_batches_alive(schedule: str, stages: int, stage: int, micro_batches: int) -> int:
    """Peak number of micro batches alive on a stage (table: `models/pipeline_schedules.py`)."""
    if stages == 1 or schedule == "naive":
        return 1
    return micro_batches if schedule == "gpipe" else min(stages - stage, micro_batches)


def micro_batches_waiting(schedule: str, stages: int, stage: int, micro_batches: int) -> int:
    """How many wait for their weight gradients alone, while the most are alive."""
    if schedule != "zb-h1":
        return 0
    return min(stage, micro_batches - micro_batches_alive(schedule, stages, stage, micro_batches))


def chunk_passes_alive(
    stages: int, stage: int, micro_batches: int, model_chunks: int
) -> set[tuple[int, tuple[int, ...]]]:
    """What an interleaved stage holds while a pass runs: its chunk, and the passes alive of each chunk.

    The pass that runs is among them. Each of these occurs in a step.
    """
    alive, found = [0] * model_chunks, set()
    for backward, chunk, _ in interleaved_passes(stages, stage, micro_batches, model_chunks):
        alive[chunk] += not backward
        found.add((chunk, tuple(alive)))
        alive[chunk] -= backward
    return found


def uniform_bounds(layers: int, stages: int) -> list[int]:
    """Split `layers` layers into stages of equal length; the first stages take the remainder."""
    length, rest = divmod(layers, stages)
    return [stage * length + min(stage, rest) for stage in range(stages + 1)]


def balanced_bounds(sizes: list[int], stages: int) -> list[int]:
    """Split a chain of layers so that the largest and the smallest stage are close in size.

    Dynamic programming over (layers taken, stages filled), keeping the smallest spread between the
    largest and the smallest stage. The bounds equal those of DeepSpeed's `partition_balanced`, ties
    included; a test compares them.

    Args:
        sizes: parameters (or any cost) of each layer of the chain.
        stages: the pipeline parallel size.

    Returns:
        `stages + 1` bounds; stage s holds layers bounds[s] to bounds[s + 1] - 1.
    """
    count = len(sizes)
    if count <= stages:
        return uniform_bounds(count, stages)
    before = [0, *accumulate(sizes)]
    # best[taken]: (largest stage, smallest stage, bounds so far), for the stages filled so far.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0, inf, [0])}
    for _ in range(stages):
        longer: dict[int, tuple[float, float, list[int]]] = {}
        for taken in range(1, count + 1):
            spread = inf
            for start in range(taken):
                if start not in best:
                    continue
                largest, smallest, bounds = best[start]
                size = before[taken] - before[start]
                high, low = max(largest, size), min(smallest, size)
                if high - low <= spread:
                    spread = high - low
                    longer[taken] = (high, low, [*bounds, taken])
        best = longer
    return best[count][2]
