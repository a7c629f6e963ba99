"""One training step on either of DeepSpeed's engines.

The dense engine runs forward, backward and step as it is told; the pipeline engine runs a schedule of
them over all stages, of which each rank has one. What comes out is the same on every rank.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports: means over the global batch, the norm before clipping."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool = False


def train_step(engine: DeepSpeedEngine, batch: Tensor) -> Step:
    """One optimizer step on this rank's part of a global batch.

    `batch` is `[accumulation, micro_batch, sequence + 1]`: each row's tokens predict the same row
    one place on. DeepSpeed divides each micro batch's loss by the accumulation steps, and averages
    the gradients over the data parallel ranks.
    """
    learning_rate = float(engine.get_lr()[0])
    if isinstance(engine, PipelineEngine):
        loss = float(engine.train_batch(micro_batch_pairs(batch)))
    else:
        loss_sum = torch.zeros((), device=engine.device)
        for sequences in batch.to(engine.device):
            micro_loss = engine(sequences[:, :-1], sequences[:, 1:])
            loss_sum += micro_loss.detach()
            engine.backward(micro_loss)
            engine.step()
        loss_sum /= len(batch)
        dist.all_reduce(loss_sum, group=engine.data_parallel_group)
        loss = loss_sum.item() / dist.get_world_size(engine.data_parallel_group)
    norm = engine.get_global_grad_norm()
    return Step(
        loss=loss,
        grad_norm=math.nan if norm is None else float(norm),
        learning_rate=learning_rate,
        skipped=not engine.was_step_applied(),
    )


def micro_batch_pairs(batch: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and labels of each micro batch, as the pipeline engine takes them."""
    return iter([(sequences[:, :-1], sequences[:, 1:]) for sequences in batch])
