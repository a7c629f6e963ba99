"""Predict a rank's peak memory for a layout, and what it is made of, before anything is started.

A step is followed through the moments at which memory can peak (`moments.py`): the loss's forward and
backward pass, a block's backward pass, the reduction of gradients, and the update. Each moment is a sum
of tensors that exist then (`state.py`, `activations.py`, `gathered.py`), and the largest
counts. recipes/MEMORY.md compares the result with measurements.

Not counted: what is outside torch's allocator (CUDA's context and NCCL's buffers: `launch/planner/cards.py`
has their measured sizes), and the gaps that the allocator leaves between tensors.
"""

from dataclasses import dataclass, fields
from typing import Any

from launch.config.layout import Layout
from launch.config.schema import GPTModel, Recipe
from launch.memory.chunks import chunks_of_stages, running_passes
from launch.memory.moments import Step
from launch.memory.parts import Parts
from launch.memory.shapes import count

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
    stages = chunks_of_stages(recipe.model.shape, layout.grid["pipeline"], recipe.parallel)
    for stage, chunks in enumerate(stages):
        # A stage's only chunk is the one that always runs.
        steps = [
            Step.of(recipe, layout, ds_config, stage, chunks, running)
            for running in running_passes(recipe, layout, stage)
        ]
        peaks = [max(step.moments().items(), key=lambda item: item[1].total) for step in steps]
        step, (moment, parts) = max(
            zip(steps, peaks, strict=True), key=lambda pair: pair[1][1].total
        )
        host = dict(step.state.host)
        if checkpoints := max(step.on_host for step in steps):
            host["checkpoints"] = int(checkpoints)
        found.append(StageMemory(stage, count(step.shapes), moment, parts, host))
    return found
