"""Predict a rank's peak memory for a layout, and what it is made of, before anything is started.

A step is followed through the moments at which memory can peak (`moments.py`): the loss's forward and
backward pass, a block's backward pass, the reduction of gradients, and the update. Each moment is a sum
of tensors that exist then (`state.py`, `activations.py`, `gathered.py`), and the largest
counts. recipes/MEMORY.md compares the result with measurements.

Not counted: what is outside torch's allocator (CUDA's context and NCCL's buffers: `launch/planner/cards.py`
has their measured sizes), and the gaps that the allocator leaves between tensors.
"""

from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import pairwise
from typing import Any

from launch.config.layout import Layout
from launch.config.schema import GPTModel, Recipe
from launch.memory.moments import Parts, Step
from launch.memory.shapes import count
from models.config import GPTConfig
from models.pipeline_stages import stage_bounds

GIB = 2**30


@dataclass(frozen=True)
class StageMemory:
    """A rank of one pipeline stage at its peak.

    Attributes:
        stage: the pipeline stage.
        parameters: the rank's weights before ZeRO partitions them.
        moment: when the peak is.
        parts: bytes on the device then.
        host: bytes in host memory (or on a disk), by kind.
    """

    stage: int
    parameters: int
    moment: str
    parts: Parts
    host: dict[str, int]

    @property
    def total(self) -> float:
        """GiB on the device."""
        return self.parts.total / GIB

    @property
    def host_total(self) -> float:
        """GiB in host memory, or on a disk."""
        return sum(self.host.values()) / GIB

    def describe(self) -> str:
        """One readable line: the sum and its parts."""
        parts = [
            f"{field.name} {getattr(self.parts, field.name) / GIB:.3g}"
            for field in fields(self.parts)
            if getattr(self.parts, field.name)
        ]
        line = (
            f"memory per rank (estimate): {self.total:.3g} GiB = {' + '.join(parts)}; fullest is "
            f"stage {self.stage} at {self.moment}, with {self.parameters:,} parameters"
        )
        return line + (f"; offloaded {self.host_total:.3g} GiB" if self.host else "")


def estimate(recipe: Recipe, layout: Layout, ds_config: dict[str, Any]) -> StageMemory:
    """The memory of the fullest rank, for a resolved DeepSpeed JSON and a model of family gpt.

    Raises:
        ValueError: if the layers cannot be split into stages as `parallel.partition` says.
    """
    return max(estimate_stages(recipe, layout, ds_config), key=lambda memory: memory.total)


def estimate_stages(recipe: Recipe, layout: Layout, ds_config: dict[str, Any]) -> list[StageMemory]:
    """The memory of a rank of each pipeline stage; as `estimate`."""
    assert isinstance(recipe.model, GPTModel)
    found = []
    bounds = bounds_of(recipe.model.shape, layout.grid["pipeline"], recipe.parallel.partition)
    for stage, (first, last) in enumerate(pairwise(bounds)):
        step = Step.of(recipe, layout, ds_config, stage, first, last)
        moments = step.moments()
        moment = max(moments, key=lambda name: moments[name].total)
        parameters = count(step.shapes)
        host = dict(step.state.host)
        if step.kept.on_host:
            host["checkpoints"] = int(step.alive * step.kept.on_host)
        found.append(StageMemory(stage, parameters, moment, moments[moment], host))
    return found


@lru_cache(maxsize=256)
def bounds_of(config: GPTConfig, stages: int, partition: str) -> tuple[int, ...]:
    """The bounds of the pipeline's stages; of one stage, the whole chain.

    Raises:
        ValueError: as `models.pipeline_stages.stage_bounds`.
    """
    if stages == 1:
        return 0, config.layers + 4
    return tuple(stage_bounds(config, stages, partition))
