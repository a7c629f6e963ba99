"""A probe: a composition of DeepSpeed's features on a tiny model. `compositions.py` lists them.

The reference knows from a probe what is mathematically asked for: precision, micro batches, clipping,
optimizer. How DeepSpeed is to do it (ZeRO stage, offload, buckets, ranks) must not change the result.
"""

from dataclasses import dataclass, field
from typing import Any

STEPS = 3
BLOCKS = 2


@dataclass(frozen=True)
class Shape:
    """What is particular about the model of a probe.

    Attributes:
        tied: the output layer's weight is the embedding's.
        used_twice: the first block is applied twice in a forward pass.
        recompute: activations of each block are recomputed in the backward pass: "" for not at all,
            or "reentrant" or "non-reentrant", as `torch.utils.checkpoint` has it.
        unused: a linear layer that takes no part in the forward pass, as some losses leave a head out.
        auxiliary: a second loss is added, for which the embedding and the first block are applied once
            more, outside of the engine's forward pass.
    """

    tied: bool = False
    used_twice: bool = False
    recompute: str = ""
    unused: bool = False
    auxiliary: bool = False


@dataclass(frozen=True)
class Probe:
    """One composition.

    Attributes:
        name: unique; the key of a result.
        feature: the row of the table that it belongs to.
        stage: ZeRO stage.
        dtype: "fp32", "bf16", "fp16", or "autocast" (torch's, to bf16, over fp32 weights).
        ranks: processes; each gets its own micro batches.
        accumulation: micro batches of a rank in a step.
        clip: largest gradient norm, 0 for no clipping.
        overflow: under fp16's moving loss scale, the step (from 1) that is first tried on a loss so large
            that its gradients overflow: it must be skipped, and the next try be as if it had not been.
            0 for a fixed scale.
        optimizer: "sgd" (its change of the weights shows the gradient's size, which Adam's hides),
            "adamw" or "muon".
        loop: "engine" calls forward, backward and step for each micro batch; "boundary" makes several
            backward calls a step through `set_gradient_accumulation_boundary`; "pipeline" uses
            PipelineModule with `stages` stages.
        stages: of the pipeline.
        shape: what is particular about the model.
        zero: further keys of `zero_optimization`.
        json: further keys of the JSON.
        needs: a module of DeepSpeed without which a version does not have the feature.
    """

    name: str
    feature: str = ""
    stage: int = 0
    dtype: str = "fp32"
    ranks: int = 2
    accumulation: int = 1
    clip: float = 0.0
    overflow: int = 0
    optimizer: str = "sgd"
    loop: str = "engine"
    stages: int = 1
    shape: Shape = Shape()
    zero: dict[str, Any] = field(default_factory=dict)
    json: dict[str, Any] = field(default_factory=dict)
    needs: str = "deepspeed"

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step, over all ranks that hold different data."""
        return self.ranks // self.stages * self.accumulation
