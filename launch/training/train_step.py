"""One training step on either of DeepSpeed's engines.

With the dense engine, we call forward, backward and step ourselves; the pipeline engine runs a
schedule of them, with one stage on each rank. The result is the same on every rank.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from launch.data.batch import Batch, MicroBatch


@dataclass(frozen=True)
class StepResult:
    """Metrics of one optimizer step: means over the global batch, and the norm before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool = False


def train_step(engine: DeepSpeedEngine, batch: Batch) -> StepResult:
    """One optimizer step on this rank's part of a global batch.

    The loss is the weighted sum over the global batch's labels, divided by their total weight.
    DeepSpeed divides each micro batch's loss by the accumulation steps and averages gradients over
    the data parallel ranks, so `denominator` is the total weight divided by both.
    """
    learning_rate = float(engine.get_lr()[0])
    data_size = dist.get_world_size(engine.data_parallel_group)
    denominator = batch.total_weight / (len(batch) * data_size)
    if isinstance(engine, PipelineEngine):
        micro_batches = (micro_batch.to(engine.device) for micro_batch in batch.micro_batches())
        loss = float(engine.train_batch(pipeline_inputs(micro_batches, denominator)))
    else:
        loss_sum = torch.zeros((), device=engine.device)
        for micro_batch in batch.micro_batches():
            micro_loss = engine(*micro_batch.to(engine.device)) / denominator
            loss_sum += micro_loss.detach()
            engine.backward(micro_loss)
            engine.step()
        loss_sum /= len(batch)
        dist.all_reduce(loss_sum, group=engine.data_parallel_group)
        loss = loss_sum.item() / data_size
    norm = engine.get_global_grad_norm()
    return StepResult(
        loss=loss,
        grad_norm=math.nan if norm is None else float(norm),
        learning_rate=learning_rate,
        skipped=not engine.was_step_applied(),
    )


def pipeline_inputs(
    micro_batches: Iterable[MicroBatch], denominator: float
) -> Iterator[tuple[Tensor | tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Micro batches in `GPTPipeline`'s format: the first stage's input and the loss target."""
    divisor = torch.tensor(denominator)
    for tokens, labels, loss_weights, positions in micro_batches:
        target = (labels, divisor) if loss_weights is None else (labels, divisor, loss_weights)
        yield (tokens if positions is None else (tokens, positions)), target
